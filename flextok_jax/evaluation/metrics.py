"""Metrics that compare images with their originals, jitted, and the evaluator that averages them.

Images are float32 [B, H, W, C] in [-1, 1]. The same evaluator serves training and the commands.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from scipy.stats import entropy

from flextok_jax.nn.images import mae, psnr, to_float, to_uint8

WINDOW, SIGMA = 11, 1.5  # Of SSIM, in pixels.


def ssim(images, originals):
    """Structural similarity per image (Wang et al. 2004): [B], 1 for equal.

    On colours in 0..1, a Gaussian window of 11 pixels and sigma 1.5, constants 0.01^2 and 0.03^2,
    variances over n; the mean over channels and over the positions where the window fits inside.
    No side may be shorter than the window.
    """
    x, y = (images + 1) / 2, (originals + 1) / 2
    rows, columns = (jnp.asarray(_windows(side), jnp.float32) for side in x.shape[1:3])

    def local(values):  # The window's mean, separably.
        return jnp.einsum("bhwc,ih,jw->bijc", values, rows, columns, precision="highest")

    mean_x, mean_y = local(x), local(y)
    dx, dy = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (dx + dy + c2), axis=(1, 2, 3))


def _windows(size: int) -> np.ndarray:
    """[size - 10, size]: the window at each position where it fits."""
    weights = np.exp(-0.5 * np.square((np.arange(WINDOW) - WINDOW // 2) / SIGMA))
    starts = np.arange(size - WINDOW + 1)[:, None]
    out = np.zeros((len(starts), size))
    out[starts, starts + np.arange(WINDOW)] = weights / weights.sum()
    return out


@jax.jit
def compare(images, originals) -> dict[str, jax.Array]:
    """ "psnr", "mae", and "ssim" where its window fits: float32 [B] each."""
    found = {"psnr": psnr(images, originals), "mae": mae(images, originals)}
    if min(images.shape[1:3]) >= WINDOW:
        found["ssim"] = ssim(images, originals)
    return found


def frequency_bands(height: int, width: int) -> list[int]:
    """Lower ends of the bands of `error_by_frequency`: 0, 1, 2, 4, 8, ... cycles per image."""
    highest = np.hypot(0.5, 0.5) * min(height, width)
    return [0, *(2**i for i in range(int(np.log2(highest)) + 1))]


@jax.jit
def error_by_frequency(images, originals):
    """The mean squared error by spatial frequency: [B, bands].

    The power of the error's two-dimensional Fourier transform in rings of an octave each (see
    `frequency_bands`; a cycle is the shorter side long). By Parseval's theorem the bands of an
    image sum to its mean squared error.
    """
    _, height, width, channels = images.shape
    power = jnp.abs(jnp.fft.fft2(images - originals, axes=(1, 2), norm="ortho")) ** 2
    power = power.sum(3).reshape(-1, height * width) / (height * width * channels)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    starts = frequency_bands(height, width)
    # Whole numbers of cycles come out of fftfreq with a rounding error.
    band = np.searchsorted(starts, (frequency * min(height, width)).ravel() + 1e-9, "right") - 1
    rings = jnp.asarray(np.eye(len(starts))[band], jnp.float32)
    return jnp.matmul(power, rings, precision="highest")


Function = Callable[[jax.Array, jax.Array], dict[str, jax.Array]]


def per_image(stream: Iterable[tuple], functions: Sequence[Function] = (compare,)) -> dict:
    """The values of jitted functions of (images, originals) for every image of a stream.

    Args:
        stream: (suffix, images, originals, mask) for one batch after the other: images uint8, or
            float in [-1, 1], which are clipped and rounded to 8 bits as files of them would be;
            mask bool [B] of the images that count. Arrays may lie over several processes' devices.
        functions: each returns {metric: [B, ...]}.

    Returns:
        {metric + suffix: float64 [n, ...]}, in order. ValueError where images are not finite.
    """
    found: dict[str, list] = {}
    for suffix, images, originals, mask in stream:
        a, finite = _as_files(images)
        b, _ = _as_files(originals)
        values = {f"{k}{suffix}": v for part in functions for k, v in part(a, b).items()}
        values, finite, mask = gather((values, finite, mask))
        wrong = int(np.sum(mask & ~finite))
        if wrong:
            raise ValueError(
                f"{wrong} of {int(mask.sum())} reconstructions {suffix} are not finite. Check the "
                "model's parameters, or try dtype float32"
            )
        for name, value in values.items():
            found.setdefault(name, []).append(value[mask].astype(np.float64))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def means(stream: Iterable[tuple]) -> Iterator[tuple[str, float]]:
    """An evaluator: (metric + suffix, mean over images) of a stream; see `per_image`."""
    for name, values in per_image(stream).items():
        yield name, float(values.mean())


@jax.jit
def _as_files(images):
    """(float32 in [-1, 1], rounded to 8 bits; bool [B], whether all values are finite)."""
    if images.dtype == jnp.uint8:
        return to_float(images), jnp.ones(len(images), bool)
    return to_float(to_uint8(images)), jnp.all(jnp.isfinite(images), axis=(1, 2, 3))


def gather(tree):
    """Arrays [B, ...] over the devices of all processes → whole NumPy arrays, in each process."""

    def whole(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)


def codes(tokens: np.ndarray, vocab_size: int, counts: Sequence[int]) -> dict:
    """How ids are used over a set of images.

    Args:
        tokens: int [n, k].
        vocab_size: V, 0 where tokens have no ids: then nothing is returned.
        counts: numbers of tokens.

    Returns:
        "codebook_usage": {k: the share of all ids that occur among the first k tokens}; "codes":
        {"distinct": different ids, "perplexity": exp of the entropy of the ids, by position}.
    """
    if not vocab_size:
        return {}
    used = [np.unique(column, return_counts=True)[1] for column in tokens.T]
    return {
        "codebook_usage": {k: len(np.unique(tokens[:, :k])) / vocab_size for k in counts},
        "codes": {
            "distinct": list(map(len, used)),
            "perplexity": [float(np.exp(entropy(count))) for count in used],
        },
    }
