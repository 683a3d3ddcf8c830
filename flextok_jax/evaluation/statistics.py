"""What is said about a set of images from the features of a network. NumPy in float64.

Features are computed on devices and summed here, on the host and in the order of the images, so
that sums depend neither on the number of devices nor of processes.

n images, D features, V classes.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from flextok_jax.io import storage

SHUFFLE_SEED = 2020  # Of the Inception score's parts; that of torch-fidelity.


def gather(tree):
    """Arrays [B, ...] that lie over the devices of all processes -> whole NumPy arrays, in each.

    What a network says of a batch, and the mask of its images. All processes call it together.
    """

    def whole(x):
        if not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


class Gaussian(NamedTuple):
    """The first two moments of features.

    Attributes:
        mean: float64 [D].
        covariance: float64 [D, D].
    """

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Moments:
    """The sums behind a `Gaussian`, which grow by batches and merge.

    Attributes:
        count: n.
        mean: float64 [D].
        scatter: float64 [D, D], the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def empty(cls, size: int) -> "Moments":
        """Of no features at all; `size`: D."""
        return cls(0, np.zeros(size), np.zeros((size, size)))

    def add(self, features: np.ndarray, mask: np.ndarray | None = None) -> "Moments":
        """With those of a batch [B, D]; `mask`: bool [B], which of them count (all by default)."""
        features = np.asarray(features, np.float64)
        features = features if mask is None else features[np.asarray(mask, bool)]
        if not len(features):
            return self
        mean = features.mean(0)
        centred = features - mean
        return self.merge(Moments(len(features), mean, centred.T @ centred))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub, LeVeque 1979): no large numbers are subtracted."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        scatter = np.outer(apart, apart) * (self.count * other.count / count)
        scatter += self.scatter
        scatter += other.scatter
        return Moments(count, self.mean + apart * (other.count / count), scatter)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance.

        Raises:
            ValueError: fewer than two features.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance: 2 are needed at least")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


def fid(a: Gaussian, b: Gaussian) -> float:
    """The Fréchet distance |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (arXiv 1706.08500).

    With A = F F^T and B = G G^T, the trace of (A B)^(1/2) is the sum of the singular values of
    F^T G: real and stable also for covariances without full rank, of fewer images than features.

    Raises:
        ValueError: they are of different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"statistics of {len(a.mean)} and of {len(b.mean)} features: were they made by the "
            "same network?"
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


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) of parts of the images (arXiv 1606.03498).

    Args:
        logits: [n, V] of the classifier, before the softmax; see `nn.inception` which ones.
        splits: how many parts. They are drawn at random, always the same, because images are often
            ordered by class.

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
        log_p = _log_softmax(np.asarray(logits[part], np.float64))
        p = np.exp(log_p)
        log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))  # 0 by underflow
        scores.append(np.exp(np.mean(np.sum(p * (log_p - log_mean), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def _log_softmax(x):
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def precision_recall(
    real: np.ndarray, made: np.ndarray, k: int = 3, chunk: int = 2000
) -> tuple[float, float]:
    """How much of what was made lies among the real, and the reverse (arXiv 1904.06991).

    A set's manifold is the union of the balls around its features that reach to their k-th nearest
    neighbour in the set.

    Args:
        real, made: [n, D] and [m, D].
        k: of the neighbours.
        chunk: rows that are compared at a time with a whole set.

    Returns:
        (precision, recall): the share of `made` in the manifold of `real`, the share of `real` in
        that of `made`.

    Raises:
        ValueError: a set has no k-th neighbours.
    """
    if min(len(real), len(made)) <= k:
        raise ValueError(
            f"{len(real)} real and {len(made)} made images: more than k={k} of each are needed"
        )
    centre = np.mean(real, axis=0, dtype=np.float64)  # Near the origin squares cancel less.
    real, made = real - centre, made - centre
    return _inside(made, real, k, chunk), _inside(real, made, k, chunk)


def _inside(points, among, k, chunk) -> float:
    """The share of `points` in the manifold of `among`."""
    radii = np.concatenate([np.partition(d, k, 1)[:, k] for d in _squares(among, among, chunk)])
    inside = [(d <= radii).any(1) for d in _squares(points, among, chunk)]
    return float(np.mean(np.concatenate(inside)))


def _squares(a, b, chunk):
    """Squared distances [rows, len(b)], for `chunk` rows of `a` after each other."""
    norms = np.sum(np.square(b), axis=1)
    for start in range(0, len(a), chunk):
        part = a[start : start + chunk]
        squares = part @ b.T
        squares *= -2
        squares += np.sum(np.square(part), axis=1)[:, None]
        squares += norms[None]
        yield np.maximum(squares, 0, out=squares)


def write_gaussian(path, gaussian: Gaussian) -> None:
    """Writes the arrays `mu` and `sigma` as the ADM evaluator (arXiv 2105.05233) keeps them."""
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=gaussian.mean, sigma=gaussian.covariance)


def read_gaussian(path) -> tuple[Gaussian, str]:
    """Statistics in that format, and the sha256 over the two arrays, whatever lies beside them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no npz file, or holds no such arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
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
    digest = storage.fingerprint({"mu": mean, "sigma": covariance})
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64)), digest
