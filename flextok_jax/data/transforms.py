"""uint8 image transforms: pure functions of an image and of uniform draws in [0, 1).

The draws are made for the whole global batch at once, and each process applies its own rows.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

BICUBIC = Image.Resampling.BICUBIC
CROPS = ("random", "window", "center", "none")
CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)
FLIP, ANGLE, ZOOM, SHIFT_X, SHIFT_Y, CROP = range(6)  # Columns of the draws; CROP to the end.
NUM_DRAWS = CROP + CROP_TRIES * 4
COLOR = NUM_DRAWS - 4  # Also those of the last try of a crop, which hardly ever comes.


@dataclasses.dataclass(frozen=True)
class Transform:
    """What happens to an image between decoding and the batch.

    Attributes:
        image_size: side S of the result, in pixels.
        crop: "random" (`random_resized_crop`), "window" (`random_window`), "center"
            (`center_crop`), "none": already S x S.
        crop_scale: smallest and largest share of the area that a random crop keeps.
        flip: mirror half of the images.
        quarter_turns: turn by 0, 90, 180 or 270 degrees.
        shift: translate by up to so many whole pixels.
        rotate: turn by up to so many degrees either way.
        zoom: enlarge or shrink by up to this fraction.
        color: brighten or darken by up to this share of the range, and each of red, green and blue
            by up to as much again.
    """

    image_size: int
    crop: str = "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = False
    quarter_turns: bool = False
    shift: int = 0
    rotate: float = 0.0
    zoom: float = 0.0
    color: float = 0.0

    def __post_init__(self):
        low, high = self.crop_scale if len(self.crop_scale) == 2 else (0, 0)
        for ok, name, allowed in (
            (self.crop in CROPS, "crop", ", ".join(CROPS)),
            (0 < low <= high <= 1, "crop_scale", "0 < low <= high <= 1"),
            (0 <= self.shift < self.image_size, "shift", "less than image_size"),
        ):
            if not ok:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}; allowed: {allowed}.")

    def without_randomness(self) -> "Transform":
        """The transform of evaluation: a random crop becomes the centre crop, the rest is off."""
        return Transform(self.image_size, "none" if self.crop == "none" else "center")

    @property
    def least(self) -> int | None:
        """Pixels of an image's sides that `fit` needs; None: all.

        With so many the smallest random crop still has `image_size` pixels along each side.
        Evaluation sees every pixel.
        """
        if self.crop == "random":
            return math.ceil(self.image_size / math.sqrt(self.crop_scale[0] * CROP_RATIO[0]))
        return None

    def fit(self, image: Image.Image, draws: np.ndarray) -> np.ndarray:
        """One RGB image of any size -> uint8 [S, S, 3], half of them mirrored if `flip`.

        Args:
            draws: float [NUM_DRAWS] in [0, 1).

        Raises:
            ValueError: the image has another size and crop is "none".
        """
        size, place = self.image_size, draws[CROP:]
        if self.crop == "random":
            cut = random_resized_crop(image, size, place, self.crop_scale)
        elif self.crop == "window":
            cut = random_window(image, size, place)
        elif self.crop == "center":
            cut = center_crop(image, size)
        elif image.size == (size, size):
            cut = np.asarray(image)
        else:
            raise ValueError(
                f"the image is {image.width} x {image.height} pixels, data.image_size {size}: set "
                "data.crop to 'center' or 'random'"
            )
        if self.flip and draws[FLIP] < 0.5:
            # By Pillow: NumPy copies a mirrored picture several times slower.
            cut = np.asarray(ImageOps.mirror(Image.fromarray(cut)))
        return cut

    def augment(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Turns, rotation, zoom, shift and colour of uint8 [B, S, S, 3]; draws: [B, NUM_DRAWS]."""
        if self.quarter_turns:
            turns = (4 * draws[:, ANGLE]).astype(int)
            images = np.stack([np.rot90(image, turn) for image, turn in zip(images, turns)])
        if self.shift or self.rotate or self.zoom:
            signed = 2 * draws - 1
            images = affine(
                images,
                degrees=self.rotate * signed[:, ANGLE],
                zoom=1 + self.zoom * signed[:, ZOOM],
                shift=np.floor((2 * self.shift + 1) * draws[:, SHIFT_X : SHIFT_Y + 1]) - self.shift,
            )
        if self.color:
            by = 255 * self.color * (2 * draws[:, COLOR:] - 1)
            by = np.rint(by[:, :1] + by[:, 1:]).astype(np.int16)
            images = np.clip(images + by[:, None, None], 0, 255).astype(np.uint8)
        return images


def random_window(image: Image.Image, size: int, draws: np.ndarray) -> np.ndarray:
    """A square of `size` pixels, as they are, uniform over the image; draws: float [2 or more]."""
    width, height = image.size
    if min(image.size) < size:
        raise ValueError(
            f"the image is {width} x {height} pixels, smaller than data.image_size {size}: set "
            "data.crop='random', which enlarges"
        )
    y, x = (int(draw * (side - size + 1)) for draw, side in zip(draws, (height, width)))
    return np.asarray(image.crop((x, y, x + size, y + size)))


def random_resized_crop(image: Image.Image, size: int, draws: np.ndarray, scale=(0.08, 1.0)):
    """A random rectangle (`crop_box`) as uint8 [size, size, 3], bicubic and antialiased."""
    box = crop_box(image.size, draws, scale)
    return np.asarray(image.resize((size, size), BICUBIC, box))


def crop_box(size: Sequence[int], draws: np.ndarray, scale) -> tuple[int, int, int, int]:
    """A random rectangle (left, upper, right, lower) of an image of size (width, height).

    Area uniform in `scale` times the image's, ratio of the sides log-uniform in 3/4..4/3, place
    uniform; the first of ten tries that fits. If none does: the largest centred rectangle of an
    allowed ratio (Szegedy et al., arXiv 1409.4842, as torchvision's RandomResizedCrop has it).
    `draws`: float [4 * CROP_TRIES] in [0, 1).
    """
    width, height = size
    low, high = (math.log(ratio) for ratio in CROP_RATIO)
    for area_draw, ratio_draw, x_draw, y_draw in draws.reshape(CROP_TRIES, 4).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            x, y = int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1))
            return x, y, x + w, y + h
    w = min(width, max(1, round(height * CROP_RATIO[1])))
    h = min(height, max(1, round(width / CROP_RATIO[0])))
    return _middle(size, (w, h))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre crop that evaluations of ImageNet models use (ADM style): uint8 [size, size, 3].

    The image is halved by 2 x 2 averages while its short side is at least twice `size`, then
    resized by a bicubic filter until the short side is `size`, and the middle is cut out.
    """
    most = 16 * min(image.size)  # Longer ends cannot be seen, and would cost memory without end.
    if max(image.size) > most:
        image = image.crop(_middle(image.size, [min(side, most) for side in image.size]))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], BICUBIC)
    return np.asarray(image.crop(_middle(image.size, (size, size))))


def _middle(size: Sequence[int], inner: Sequence[int]) -> tuple[int, int, int, int]:
    x, y = ((a - b) // 2 for a, b in zip(size, inner))
    return x, y, x + inner[0], y + inner[1]


def affine(images: np.ndarray, degrees, zoom, shift) -> np.ndarray:
    """Rotates and zooms about the centre, then translates; bilinear, black beyond the border.

    Args:
        images: uint8 [B, H, W, 3].
        degrees: float [B], counter-clockwise.
        zoom: float [B], above 1 enlarges.
        shift: float [B, 2], pixels to the right and down.
    """
    height, width = images.shape[1:3]
    out = np.empty_like(images)
    for i, image in enumerate(images):
        # Pillow wants the way back: source = centre + R^-1 (target - centre - shift) / zoom.
        angle = math.radians(degrees[i])
        cos, sin = math.cos(angle) / zoom[i], math.sin(angle) / zoom[i]
        x, y = width / 2 + shift[i, 0], height / 2 + shift[i, 1]
        back = (cos, -sin, width / 2 - cos * x + sin * y, sin, cos, height / 2 - sin * x - cos * y)
        out[i] = Image.fromarray(image).transform(
            (width, height), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
        )
    return out
