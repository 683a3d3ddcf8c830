"""Bytes of an image file to upright RGB, by Pillow.

Pillow and not a faster binding, by measurement (`python -m benchmarks.data`; numbers in
docs/data.md): what simplejpeg saves in decoding is nearly lost in the antialiased crop that
follows, and Pillow would still be needed for every other format, for the camera's rotation and for
damaged files. Scaled decoding of large photographs it has too ("draft" mode: libjpeg's reduced
inverse DCT).
"""

import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

# A large image is fine; the one that is refused is twice as large. Once and for all, because what a
# thread filters for a while all threads do.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
ORIENTATION = 0x0112  # The EXIF tag of the camera's rotation; from 5 on it swaps the sides.


def decode_image(data: bytes) -> Image.Image:
    """The bytes of an image file as an upright RGB image; see `opened` and `upright_rgb`."""
    return upright_rgb(opened(data))


def opened(data: bytes) -> Image.Image:
    """An image of which only the header is read yet.

    Raises:
        Exception: whatever Pillow raises for bytes that are no image; it has no single type. Among
            them DecompressionBombError for more than 2 * Image.MAX_IMAGE_PIXELS pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    return Image.open(io.BytesIO(data))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the camera's rotation."""
    turned = image.getexif().get(ORIENTATION, 1) >= 5
    return image.size[::-1] if turned else image.size


def upright_rgb(image: Image.Image, factor: int = 1) -> Image.Image:
    """Decodes an opened image.

    The camera's rotation (EXIF) is applied, transparency is laid over white, 16-bit greyscale is
    scaled to 8 bits, and of an animation the first frame is taken.

    Args:
        factor: 1, 2 or 4: a JPEG is decoded so many times smaller, sides rounded up, which costs
            less; other formats never are.

    Raises:
        Exception: as `opened`, for a file that is not whole.
    """
    if factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; store 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def reason(error: Exception) -> str:
    """Why a file cannot be read, in one line without addresses in memory."""
    lines = f"{type(error).__name__}: {error}".splitlines()
    return re.sub(r" <\S+ object at \w+>", "", lines[0])
