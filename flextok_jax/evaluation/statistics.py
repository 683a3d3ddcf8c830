"""Metrics of a set of images from the features of a network. NumPy in float64.

n images, D features, V classes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.paths import local_copy

NEIGHBOURS = 3  # Of precision and recall.
SPLITS = 10  # Of the Inception score.
SHUFFLE_SEED = 2020  # Of the Inception score's parts; that of torch-fidelity.
CHUNK = 2000  # Rows that are computed at a time.


class Gaussian(NamedTuple):
    """The first two moments of features: mean float64 [D], unbiased covariance float64 [D, D]."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSet:
    """What a network says of a set of images; what is derived from it is computed once.

    Attributes:
        features: float [n, D].
        logits: float [n, V].
        labels: int [n], -1 unknown.
    """

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.features)

    @functools.cached_property
    def gaussian(self) -> Gaussian:
        """Raises ValueError for fewer than two images."""
        return gaussian(self.features)

    @functools.cached_property
    def radii(self) -> np.ndarray:
        """The squared distance of each image to its nearest neighbour number NEIGHBOURS: [n].

        Raises ValueError where there are not so many.
        """
        if len(self) <= NEIGHBOURS:
            raise ValueError(f"{len(self)} images: more than k={NEIGHBOURS} are needed")
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
    if reference is None and len(real) > 1:
        reference = real.gaussian
    if reference is not None and len(made) > 1:
        yield "fid", fid(made.gaussian, reference)
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


def gaussian(features: np.ndarray) -> Gaussian:
    """Mean and unbiased covariance, summed around the mean: no large numbers are subtracted.

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} images have no covariance: at least 2 are needed")
    mean = features.mean(0, dtype=np.float64)
    scatter = np.zeros((len(mean), len(mean)))
    for start in range(0, len(features), CHUNK):
        centred = features[start : start + CHUNK] - mean
        scatter += centred.T @ centred
    return Gaussian(mean, scatter / (len(features) - 1))


def fid(a: Gaussian, b: Gaussian) -> float:
    """The Fréchet distance |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (arXiv 1706.08500).

    With A = F F^T and B = G G^T, the trace of (A B)^(1/2) is the sum of the singular values of
    F^T G: real and stable also for covariances without full rank, of fewer images than features.

    Raises:
        ValueError: the numbers of features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features: both must come from the "
            "same network"
        )
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
        splits: how many random parts, always the same ones, because images are often ordered by
            class.

    Returns:
        (mean, standard deviation) over the parts.

    Raises:
        ValueError: fewer images than parts.
    """
    count = len(logits)
    if count < splits:
        raise ValueError(f"{count} images in {splits} parts: at least one image per part is needed")
    order = np.random.RandomState(SHUFFLE_SEED).permutation(count)
    scores = []
    for i in range(splits):
        part = order[i * count // splits : (i + 1) * count // splits]
        x = np.asarray(logits[part], np.float64)
        x = x - x.max(1, keepdims=True)
        log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
        p = np.exp(log_p)
        log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))  # 0 by underflow
        scores.append(np.exp(np.mean(np.sum(p * (log_p - log_mean), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(real: FeatureSet, made: FeatureSet) -> tuple[float, float]:
    """How many made images lie among the real ones, and the reverse (arXiv 1904.06991).

    A set's manifold is the union of the balls around its features that reach to their nearest
    neighbour number NEIGHBOURS in the set.

    Returns:
        (precision, recall): the share of `made` in the manifold of `real`, the share of `real` in
        that of `made`.

    Raises:
        ValueError: a set has too few images.
    """
    return _inside(made.features, real), _inside(real.features, made)


def _inside(points, manifold: FeatureSet) -> float:
    """The share of `points` in a manifold."""
    squares = _squares(points, manifold.features)
    return float(np.mean(np.concatenate([(d <= manifold.radii).any(1) for d in squares])))


def _squares(a, b):
    """Squared distances [rows, len(b)], for CHUNK rows of `a` after each other."""
    centre = b.mean(0, dtype=np.float64).astype(b.dtype)  # Near the origin squares cancel less.
    b = b - centre
    norms = np.sum(np.square(b), axis=1)
    for start in range(0, len(a), CHUNK):
        part = a[start : start + CHUNK] - centre
        squares = part @ b.T
        squares *= -2
        squares += np.sum(np.square(part), axis=1)[:, None]
        squares += norms[None]
        yield np.maximum(squares, 0, out=squares)


def write_gaussian(path, found: Gaussian) -> None:
    """Writes the arrays `mu` and `sigma` as the ADM evaluator (arXiv 2105.05233) keeps them."""
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=found.mean, sigma=found.covariance)


def read_gaussian(path) -> tuple[Gaussian, str]:
    """Statistics in that format, and the sha256 over the two arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no npz file, or holds no such arrays.
    """
    try:
        with local_copy(path) as local, np.load(local, allow_pickle=False) as found:
            mean, covariance = found["mu"], found["sigma"]
    except FileNotFoundError:
        raise
    except Exception as error:  # A damaged archive shows itself as several exceptions.
        raise ValueError(
            f"{path} holds no reference statistics, the arrays `mu` and `sigma` of an npz file "
            f"({type(error).__name__}: {error})"
        ) from error
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}, expected (D,), (D, D)"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: mu or sigma has values that are not finite")
    digest = storage.fingerprint({"mu": mean, "sigma": covariance})
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64)), digest
