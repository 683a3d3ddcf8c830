"""Metrics of a set of images from the features of a network. NumPy in float64.

n images, D features, V classes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp

from flextok_jax.io import storage
from flextok_jax.io.paths import as_path, local_copy

NEIGHBOURS = 3  # Of precision and recall.
SPLITS = 10  # Of the Inception score.
SHUFFLE_SEED = 2020  # Of the Inception score's parts; that of torch-fidelity.
CHUNK = 2000  # Rows of distances that are computed at a time.


class Gaussian(NamedTuple):
    """Moments of features, float64."""

    mean: np.ndarray  # [D]
    covariance: np.ndarray  # [D, D], unbiased


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSet:
    """What a network says of a set of images."""

    features: np.ndarray  # float [n, D]
    logits: np.ndarray  # float [n, V]
    labels: np.ndarray  # int [n], -1 unknown

    def __len__(self) -> int:
        return len(self.features)

    @functools.cached_property
    def gaussian(self) -> Gaussian:
        """The moments of two images or more."""
        x = self.features.astype(np.float64)
        return Gaussian(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))

    @functools.cached_property
    def radii(self) -> np.ndarray:
        """The squared distance of each image to its nearest neighbour number NEIGHBOURS: [n]."""
        rows = _squares(self.features, self.features)
        return np.concatenate([np.partition(part, NEIGHBOURS, 1)[:, NEIGHBOURS] for part in rows])

    @property
    def accuracy(self) -> float:
        """The share of images whose largest logit is that of their label."""
        return float(np.mean(self.logits.argmax(1) == self.labels))


def feature_metrics(
    made: FeatureSet, real: FeatureSet, classes: bool, reference: Gaussian | None = None
) -> Iterator[tuple[str, float]]:
    """An evaluator: (metric, value), as far as there are enough images for it.

    Args:
        classes: whether the logits are of the classes of the labels.
        reference: what FID compares with instead of `real`.
    """
    yield "real_count", len(real)
    if len(made) > 1 and (reference or len(real) > 1):
        yield "fid", fid(made.gaussian, reference or real.gaussian)
    if len(made) >= SPLITS:
        score, deviation = inception_score(made.logits)
        yield "inception_score", score
        yield "inception_score_deviation", deviation
    if min(len(made), len(real)) > NEIGHBOURS:
        precision, recall = precision_recall(real, made)
        yield "precision", precision
        yield "recall", recall
    for name, images in {"accuracy": made, "real_accuracy": real}.items():
        if classes and (images.labels >= 0).all():
            yield name, images.accuracy


def fid(a: Gaussian, b: Gaussian) -> float:
    """The Fréchet distance |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (arXiv 1706.08500).

    With A = F F^T and B = G G^T, the trace of (A B)^(1/2) is the sum of the singular values of
    F^T G: real and stable also for covariances without full rank, of fewer images than features.
    """
    product = _root(a.covariance).T @ _root(b.covariance)
    overlap = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    apart = a.mean - b.mean
    return float(apart @ apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap)


def _root(covariance: np.ndarray) -> np.ndarray:
    """F [D, rank] with F F^T = covariance, but for eigenvalues within rounding of 0."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: np.ndarray, splits: int = SPLITS) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) of parts of the images (arXiv 1606.03498).

    Args:
        logits: [n, V] of the classifier, before the softmax; see `nn.inception` which ones.
        splits: how many parts, n at most; random ones: images are often ordered by class.

    Returns:
        (mean, standard deviation) over the parts.
    """
    order, scores = np.random.RandomState(SHUFFLE_SEED).permutation(len(logits)), []
    for i in range(splits):
        part = order[i * len(logits) // splits : (i + 1) * len(logits) // splits]
        log_p = log_softmax(logits[part].astype(np.float64), axis=1)
        log_mean = logsumexp(log_p, axis=0) - np.log(len(part))
        scores.append(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_mean), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: FeatureSet, made: FeatureSet) -> tuple[float, float]:
    """How many made images lie among the real ones, and the reverse (arXiv 1904.06991).

    A set's manifold is the union of the balls around its features that reach to their nearest
    neighbour number NEIGHBOURS in the set, which has more images than that.

    Returns:
        (precision, recall): the share of `made` in the manifold of `real`, and the reverse.
    """

    def inside(points: FeatureSet, manifold: FeatureSet) -> float:
        squares = _squares(points.features, manifold.features)
        return float(np.mean(np.concatenate([(d <= manifold.radii).any(1) for d in squares])))

    return inside(made, real), inside(real, made)


def _squares(a, b):
    """Squared distances [rows, len(b)], for CHUNK rows of `a` after each other."""
    centre = b.mean(0, dtype=np.float64).astype(b.dtype)  # Near the origin squares cancel less.
    b = b - centre
    norms = np.sum(np.square(b), axis=1)
    for start in range(0, len(a), CHUNK):
        part = a[start : start + CHUNK] - centre
        squares = part @ b.T
        squares *= -2
        squares += np.sum(np.square(part), axis=1)[:, None] + norms
        yield np.maximum(squares, 0, out=squares)


def write_gaussian(path, found: Gaussian) -> None:
    """Writes the arrays `mu` and `sigma` as the ADM evaluator (arXiv 2105.05233) keeps them."""
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=found.mean, sigma=found.covariance)


def read_gaussian(path) -> tuple[Gaussian, str]:
    """Statistics in that format, and the sha256 over the two arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such arrays, or values that are not finite.
    """
    path = as_path(path)
    try:
        with local_copy(path) as local, np.load(local, allow_pickle=False) as found:
            mean, covariance = (found[name].astype(np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(f"they have shapes {mean.shape} and {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("they have values that are not finite")
    except FileNotFoundError:
        raise
    except Exception as error:  # A damaged archive shows itself as several exceptions.
        raise ValueError(
            f"{path} must be an npz file with finite arrays mu [D] and sigma [D, D]: {error}"
        ) from error
    digest = storage.fingerprint({"mu": mean, "sigma": covariance})
    return Gaussian(mean, covariance), digest
