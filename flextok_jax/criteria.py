"""What an image from its first k tokens is measured by, for `FlexTok.choose_length`.

"flow", "latent", "psnr" and "mae" need no file. `lpips`, `dino` and `clip` are networks of the
user's files.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.formats import clip as clip_files
from flextok_jax.io.formats import networks
from flextok_jax.nn import clip as clip_network
from flextok_jax.nn import dinov2 as dinov2_network
from flextok_jax.nn import lpips as lpips_network
from flextok_jax.nn.config import Compute
from flextok_jax.nn.images import mae, psnr

TINY = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Criterion:
    """A number for each image.

    Attributes:
        name: for messages and files.
        function: (params, decoded, originals) -> [B]; None for "velocity".
        larger_is_better: else smaller is better.
        of: what is compared: "images", float32 [B, H, W, 3] in [-1, 1]; "latents", float32
            [B, h, w, C], scaled, at no cost of the VAE's decoder; or "velocity", the flow's own
            loss (see lengths.py).
        params: of a network.
        metadata: which network it is, in JSON terms.
    """

    name: str
    function: Callable | None = None
    larger_is_better: bool = True
    of: str = "images"
    params: dict = dataclasses.field(default_factory=dict, repr=False)
    metadata: dict = dataclasses.field(default_factory=dict)


def _latent_error(params, decoded, originals):
    error = jnp.sum(jnp.square(decoded - originals), axis=(1, 2, 3))
    return error / jnp.maximum(jnp.sum(jnp.square(originals), axis=(1, 2, 3)), TINY)


NAMED = {
    "flow": Criterion("flow", of="velocity"),
    "latent": Criterion("latent", jax.jit(_latent_error), False, "latents"),
    "psnr": Criterion("psnr", jax.jit(lambda params, *both: psnr(*both))),
    "mae": Criterion("mae", jax.jit(lambda params, *both: mae(*both)), False),
}
OF_FILES = {"lpips": "lpips(vgg, heads)", "dino": "dino(source)", "clip": "clip(source)"}


def find(criterion) -> Criterion:
    """A criterion by its name; a `Criterion` as it is; or one of a function of the user's.

    Raises:
        ValueError: an unknown name, or neither of these.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        name = getattr(criterion, "__name__", type(criterion).__name__)
        return Criterion(name, lambda params, *both: criterion(*map(np.asarray, both)))
    if str(criterion) in NAMED:
        return NAMED[criterion]
    if str(criterion) in OF_FILES:
        raise ValueError(
            f"criterion {criterion!r} is a network of files: pass criteria.{OF_FILES[criterion]}"
        )
    raise ValueError(
        f"criterion={criterion!r}: allowed are {', '.join([*NAMED, *OF_FILES])}, or a function "
        "(images, originals) -> [B], larger is better"
    )


def lpips(vgg, heads) -> Criterion:
    """The distance LPIPS, smaller is better; see `networks.load_lpips` for the files."""
    params = networks.load_lpips(vgg, heads)
    return Criterion(
        "lpips", jax.jit(lpips_network.lpips), False, "images", jax.device_put(params),
        {"sha256": storage.fingerprint(params)},
    )  # fmt: skip


def dino(source, size: int = 224) -> Criterion:
    """The cosine of DINOv2's features of the class token: the same things, wherever they are.

    Args:
        source: a folder, or a hub id, see `networks.load_dinov2`.
        size: images are resized to so many pixels a side, rounded to whole patches.
    """
    features, params, metadata = dino_features(source, size)
    return _cosine("dino", features, params, metadata)


def dino_features(source, size: int) -> tuple[Callable, dict, dict]:
    """((params, images in [-1, 1]) -> the class token's features, params, metadata): see `dino`."""
    cfg, params = networks.load_dinov2(source)
    side = max(1, round(size / cfg.patch_size)) * cfg.patch_size

    def features(params, images):
        images = jax.image.resize(images, (len(images), side, side, 3), "cubic")
        return dinov2_network.features(params, cfg, Compute(), images)[:, 0]

    metadata = {"sha256": storage.fingerprint(params), "size": side}
    return features, jax.device_put(params), metadata


def clip(source) -> Criterion:
    """The cosine of CLIP's vectors of images, see `formats.clip.load` for the source."""
    found = clip_files.load(source)

    def features(params, images):
        return clip_network.image_features(params, found.config, Compute(), images)

    params = {"vision": found.params["vision"]}
    return _cosine(
        "clip", features, jax.device_put(params), {"sha256": storage.fingerprint(params)}
    )


def _cosine(name: str, features: Callable, params: dict, metadata: dict) -> Criterion:
    def cosine(params, *both):
        a, b = (features(params, images) for images in both)
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, TINY)

    return Criterion(name, jax.jit(cosine), True, "images", params, metadata)
