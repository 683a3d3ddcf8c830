"""Numbers that compare reconstructions with originals. NumPy in float64, images in [-1, 1]."""

import numpy as np

SMALLEST_ERROR = 1e-10  # Mean squared; caps the PSNR of equal images at 106 dB.
WINDOW, SIGMA = 11, 1.5  # Of SSIM, in pixels.


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio per image, 10 log10(2^2 / MSE): [B, H, W, C] twice -> dB [B]."""
    error = np.mean(np.square(_difference(images, originals)), axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, SMALLEST_ERROR))


def mae(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Mean absolute error per image, of a range of 2: [B, H, W, C] twice -> [B]."""
    return np.mean(np.abs(_difference(images, originals)), axis=(1, 2, 3))


def compare(images: np.ndarray, originals: np.ndarray) -> dict[str, np.ndarray]:
    """ "psnr", "mae", and "ssim" where its window fits: [B, H, W, C] twice -> [B] each."""
    found = {"psnr": psnr(images, originals), "mae": mae(images, originals)}
    fits = min(images.shape[1:3]) >= WINDOW
    return found | ({"ssim": ssim(images, originals)} if fits else {})


def ssim(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Structural similarity per image (Wang et al. 2004): [B, H, W, C] twice -> [B], 1 for equal.

    On colours in 0..1, a Gaussian window of 11 pixels and sigma 1.5, constants 0.01^2 and 0.03^2,
    variances over n; the mean over channels and over the places where the window fits inside.

    Raises:
        ValueError: a side is shorter than the window.
    """
    x, y = ((np.asarray(a, np.float64) + 1) / 2 for a in (images, originals))
    if min(x.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs {WINDOW} pixels per side at least, not {x.shape[1:3]}")
    rows, columns = _windows(x.shape[1]), _windows(x.shape[2]).T

    def local(values):  # The window's mean, separably.
        return rows @ np.moveaxis(values, 3, 1) @ columns

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return np.mean(light * structure, axis=(1, 2, 3))


def _windows(size: int) -> np.ndarray:
    """[size - 10, size]: the window at each place where it fits."""
    weights = np.exp(-0.5 * np.square((np.arange(WINDOW) - WINDOW // 2) / SIGMA))
    places = np.arange(size - WINDOW + 1)[:, None]
    out = np.zeros((len(places), size))
    out[places, places + np.arange(WINDOW)] = weights / weights.sum()
    return out


def frequency_bands(height: int, width: int) -> list[int]:
    """Lower ends of the bands of `error_by_frequency`: 0, 1, 2, 4, 8, ... cycles per image."""
    highest = np.hypot(0.5, 0.5) * min(height, width)
    return [0, *(2**i for i in range(int(np.log2(highest)) + 1))]


def error_by_frequency(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """The mean squared error by spatial frequency: [B, H, W, C] twice -> [B, bands].

    The power of the error's two-dimensional Fourier transform in rings of an octave each (see
    `frequency_bands`; a cycle is the shorter side long). By Parseval's theorem the bands of an
    image sum to its mean squared error.
    """
    error = _difference(images, originals)
    _, height, width, channels = error.shape
    power = np.abs(np.fft.fft2(error, axes=(1, 2), norm="ortho")) ** 2
    power = power.sum(3).reshape(len(error), height * width) / (height * width * channels)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    starts = frequency_bands(height, width)
    # Whole numbers of cycles come out of fftfreq with a rounding error.
    band = np.searchsorted(starts, (frequency * min(height, width)).ravel() + 1e-9, "right") - 1
    return power @ np.eye(len(starts))[band]


def code_usage(tokens: np.ndarray) -> dict[str, list]:
    """How many ids each position uses over a set of images.

    Args:
        tokens: int [n, k].

    Returns:
        "distinct": the number of different ids per position, at most min(n, V);
        "perplexity": exp of the entropy of the ids per position.
    """
    distinct, perplexity = [], []
    for column in tokens.T:
        counts = np.unique(column, return_counts=True)[1]
        share = counts / counts.sum()
        distinct.append(len(counts))
        perplexity.append(float(np.exp(-np.sum(share * np.log(share)))))
    return {"distinct": distinct, "perplexity": perplexity}


def _difference(images, originals):
    return np.asarray(images, np.float64) - np.asarray(originals, np.float64)
