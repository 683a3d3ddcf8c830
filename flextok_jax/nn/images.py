"""Pixels between uint8 and float32 in [-1, 1]: the one place that knows the range.

Both functions use array methods only, so they take NumPy and JAX arrays alike and return the same
kind.
"""


def to_float(images):
    """uint8 [...] in 0..255 → float32 [...] in [-1, 1]: x / 127.5 - 1."""
    return images.astype("float32") / 127.5 - 1.0


def to_uint8(images):
    """float [...] → uint8 [...]: clipped to [-1, 1], then rounded to the nearest of 0..255."""
    return ((images.clip(-1, 1) + 1) * 127.5).round().astype("uint8")
