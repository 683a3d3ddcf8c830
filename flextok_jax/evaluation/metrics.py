"""Numbers that compare reconstructions with originals. NumPy in float64, images in [-1, 1]."""

import numpy as np

SMALLEST_ERROR = 1e-10  # Mean squared; caps the PSNR of equal images at 106 dB.


def psnr(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio per image, 10 log10(2^2 / MSE): [B, H, W, C] twice -> dB [B]."""
    error = np.mean(np.square(_difference(images, originals)), axis=(1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, SMALLEST_ERROR))


def mae(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Mean absolute error per image, of a range of 2: [B, H, W, C] twice -> [B]."""
    return np.mean(np.abs(_difference(images, originals)), axis=(1, 2, 3))


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
