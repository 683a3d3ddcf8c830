"""An image file's bytes to upright RGB: the one decoder."""

import io
import re
import warnings

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

try:
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pass

# Large images are fine; Pillow refuses those that are twice as large. For all threads at once,
# because `warnings.catch_warnings` is not thread-safe.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# The size of a PNG file's metadata must not cost the picture.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26

# Pillow warns of broken EXIF without the name of a file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTATION = 0x0112  # The EXIF tag of the camera's rotation.
_T = Image.Transpose
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE,
    6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90,
}  # fmt: skip


def opened(data: bytes) -> Image.Image:
    """An image of which only the header is read. Raises what Pillow raises, of any type."""
    if not data:
        raise ValueError("the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        if data.startswith(_PNG):
            return Image.open(io.BytesIO(_bare_png(data)))
        if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1"):
            raise ValueError("HEIC images need: pip install pillow-heif") from None
        raise


def _bare_png(data: bytes) -> bytes:
    """A PNG file without metadata and profiles, of which a broken one would cost the picture."""
    kept, place = [_PNG], len(_PNG)
    while place < len(data):
        stop = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[place:stop])
        place = stop
    return b"".join(kept)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _UPRIGHT.get(int(image.getexif().get(_ORIENTATION, 1)))
    except Exception:  # EXIF breaks in any way there is, and never costs the picture.
        return None


def upright(image: bytes | np.ndarray, least: int | None = None) -> Image.Image:
    """Decodes an image to upright RGB.

    The camera's rotation (EXIF) is applied, transparency is laid over white, 16-bit greyscale is
    scaled to 8 bits, and of an animation the first frame is taken.

    Args:
        image: the bytes of a file, or uint8 [H, W, 3].
        least: pixels that each side must keep: a large JPEG is decoded 2, 4 or 8 times smaller,
            which costs less (libjpeg's reduced inverse DCT). None: the whole picture.

    Raises:
        Exception: as `opened`, for a file that is not whole.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    image = opened(image)
    if least:
        image.draft(None, (least, least))  # Of a JPEG; nothing happens to others.
    image.load()
    if turn := _turn(image):
        image = image.transpose(turn)
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
