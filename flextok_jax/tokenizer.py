"""FlexTok: what a user holds. Images to tokens, any prefix of the tokens to images."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flextok_jax.flow import sampler
from flextok_jax.io import models, storage
from flextok_jax.nn import flextok, fsq, vae
from flextok_jax.nn.config import Compute, FlexTokConfig
from flextok_jax.nn.images import to_float
from flextok_jax.parallel.mesh import platform
from flextok_jax.parallel.sharding import param_shardings, spread_batch

Key = jax.Array | int | None


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "count"))
def _encode(params, images, noise, cfg: FlexTokConfig, compute: Compute, count: int):
    """uint8 or float images -> (registers [B, count, F], ids [B, count]); N + count positions."""
    if images.dtype == jnp.uint8:
        images = to_float(images)
    dtype = jnp.dtype(compute.dtype)
    latents = vae.images_to_latents(params["vae"], cfg.vae, images, dtype, noise)
    registers = flextok.encode(params, cfg, compute, latents, count)
    return registers, flextok.quantize(registers, cfg)[1]


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "guided", "normalized"))
def _decode(params, tokens, keep, noise, scales, cfg, compute, guided, normalized):
    """ids [B, K], of which the first keep [B] count -> images [B, H, W, 3]."""
    codes = fsq.indices_to_codes(tokens, cfg.levels)
    latents = flextok.decode(params, cfg, compute, codes, keep, noise, scales, guided, normalized)
    return vae.latents_to_images(params["vae"], cfg.vae, latents, jnp.dtype(compute.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class FlexTok:
    """A FlexTok tokenizer with its parameters. Make one with `FlexTok.from_pretrained`.

    The cost follows the number of tokens: encoding k tokens runs N + K positions and decoding them
    N + K + 1 (N + 1 for the null pass of guidance), where K is k rounded up to a power of two, at
    most R. At most log2(R) + 1 programs are compiled per batch shape, whatever k are asked for.

    Attributes:
        config: the model.
        params: nested dictionaries {"vae", "encoder", "decoder"} of float32 arrays.
        compute: how it is run (dtype, attention).
        mesh: the devices it is spread over, None for the default device.
        origin: where it came from, in words.
    """

    config: FlexTokConfig
    params: dict
    compute: Compute = Compute()
    mesh: Mesh | None = None
    origin: str = "memory"
    _file: models.Loaded | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def from_pretrained(
        cls, source, dtype: str = "float32", mesh: Mesh | None = None, attention: str = "xla"
    ) -> "FlexTok":
        """Loads a tokenizer.

        Args:
            source: a hub id, a folder or `model.safetensors` in the released format, a workdir of
                our own training (its averaged weights), or the name of a shipped demo model
                ("demo-digits").
            dtype: "float32" or "bfloat16", of the computation; parameters stay float32.
            mesh: spread batches and parameters over these devices (see `parallel.mesh.make_mesh`).
            attention: "xla", or "cudnn" on CUDA GPUs with bfloat16, or "pallas" on TPUs.

        Raises:
            FileNotFoundError: the source is not there; the message says how to get it.
            ValueError: the file is not understood (one error lists every reason), or these devices
                do not have that attention.
        """
        compute = Compute(dtype=dtype, attention=attention)
        compute.check_platform(platform(mesh))
        file = models.load(source)
        if mesh is None:
            params = jax.tree.map(jnp.asarray, file.params)
        else:
            params = jax.device_put(file.params, param_shardings(mesh, file.params))
        file = dataclasses.replace(file, params={})  # the arrays on the devices are the ones
        return cls(file.config, params, compute, mesh, file.origin, file)

    @property
    def num_tokens(self) -> int:
        """R, the most tokens an image can have."""
        return self.config.num_tokens

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 over all parameters."""
        return storage.fingerprint(self.params)

    def tokenize(self, images, num_tokens: int | None = None, key: Key = None) -> jax.Array:
        """Images to tokens, coarse to fine.

        Args:
            images: [B, H, W, 3], uint8, or float in [-1, 1]. H and W are the training size or
                smaller multiples of the patch size in pixels.
            num_tokens: k, how many tokens; all R by default. The result is the prefix of the full
                one, at the cost of k tokens.
            key: None uses the mean of the VAE's posterior; a key or an int seed samples it.

        Returns:
            int32 [B, k].

        Raises:
            ValueError: a wrong shape, type, range, or number of tokens.
        """
        return self._run_encoder(images, num_tokens, key)[1]

    def registers(self, images, num_tokens: int | None = None) -> jax.Array:
        """The registers before quantisation, for probing: float32 [B, k, F]."""
        return self._run_encoder(images, num_tokens, None)[0]

    def detokenize(
        self,
        tokens,
        num_tokens=None,
        image_size: int | tuple[int, int] | None = None,
        steps: int = 20,
        guidance_scale: float | Callable[[float], float] | None = None,
        norm_guidance: bool = True,
        key: Key = None,
        noise=None,
    ) -> jax.Array:
        """Tokens to images, by `steps` Euler steps of the flow.

        Args:
            tokens: int [B, k], 1 <= k <= R.
            num_tokens: keep only the first of them: an int, or int [B], one number per image.
            image_size: side or (H, W) in pixels; the training size by default.
            steps: number of Euler steps.
            guidance_scale: a float, a callable of t (1 is noise, 0 is data), or None for the
                model's own default. 1 turns guidance off and halves the cost.
            norm_guidance: adaptive projected guidance (APG) instead of plain guidance.
            key: a key or an int seed for the noise; None means seed 0.
            noise: [B, h, w, C] latents of noise, in place of `key`.

        Returns:
            float32 [B, H, W, 3], nominally in [-1, 1], not clipped.

        Raises:
            ValueError: ids out of range, a wrong shape, or a number of tokens outside 1..k.
        """
        cfg = self.config
        tokens = self._check_tokens(tokens)
        batch, given = tokens.shape
        keep = _check_keep(num_tokens, batch, given)
        count = flextok.bucket(int(keep.max()), cfg.num_tokens)
        padding = max(0, count - given)
        tokens = np.pad(tokens[:, :count], ((0, 0), (0, padding)))
        noise = self._noise(noise, key, batch, image_size)
        if not _is_int(steps) or steps < 1:
            raise ValueError(f"steps={steps!r}: must be an int, at least 1")
        scale = cfg.guidance_scale if guidance_scale is None else guidance_scale
        if not callable(scale) and (np.ndim(scale) or np.asarray(scale).dtype.kind not in "iuf"):
            raise ValueError(f"guidance_scale={scale!r}: must be a number or a callable of t")
        scales = sampler.guidance_schedule(scale, int(steps))
        if not np.isfinite(scales).all():
            raise ValueError(f"guidance_scale={scale!r} gives {scales}: must be finite")
        guided = callable(scale) or scale != 1
        with self._on_mesh():
            images = _decode(
                self.params,
                *spread_batch(self.mesh, (tokens.astype(np.int32), keep, noise)),
                jnp.asarray(scales),
                cfg=cfg,
                compute=self.compute,
                guided=guided,
                normalized=bool(norm_guidance) and guided,
            )
        return images[:batch]

    def save_pretrained(self, folder) -> None:
        """Writes `model.safetensors` in the released format into `folder`.

        A model that was loaded from such a file keeps its tensor names and its metadata. A model
        with another VAE than the released ones is written with a `_target_` of this project.
        """
        file = self._file or models.Loaded(self.config, {})
        params = jax.tree.map(np.asarray, self.params)
        models.save(folder, dataclasses.replace(file, params=params))

    def _run_encoder(self, images, num_tokens, key):
        cfg = self.config
        images = self._check_images(images)
        k = cfg.num_tokens if num_tokens is None else num_tokens
        if not _is_int(k) or not 1 <= k <= cfg.num_tokens:
            raise ValueError(f"num_tokens={k!r}: must be an int in 1..{cfg.num_tokens}")
        batch, height, width, _ = images.shape
        noise = None
        if key is not None and cfg.vae.kind != "identity":
            down = cfg.vae.downsample
            shape = (batch, height // down, width // down, cfg.vae.latent_channels)
            noise = jax.random.normal(_key(key), shape)
        with self._on_mesh():
            registers, ids = _encode(
                self.params,
                *spread_batch(self.mesh, (images, noise)),
                cfg=cfg,
                compute=self.compute,
                count=flextok.bucket(int(k), cfg.num_tokens),
            )
        return registers[:batch, :k], ids[:batch, :k]

    def _check_images(self, images):
        images = images if isinstance(images, jax.Array) else np.asarray(images)
        if images.ndim != 4 or images.shape[-1] != self.config.vae.in_channels:
            raise ValueError(
                f"images have shape {images.shape}: must be [B, H, W, "
                f"{self.config.vae.in_channels}]"
            )
        if images.shape[0] == 0:
            raise ValueError("images are an empty batch: give at least one image")
        self._check_size(*images.shape[1:3])
        if images.dtype == np.uint8:
            return images
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are {images.dtype}: must be uint8, or float in [-1, 1]")
        low, high = float(images.min()), float(images.max())
        if not (-1 - 1e-5 <= low and high <= 1 + 1e-5):
            raise ValueError(
                f"float images range from {low:g} to {high:g}: must be finite and in [-1, 1] "
                "(x / 127.5 - 1 for values in 0..255; or pass uint8)"
            )
        return images.astype(np.float32)

    def _check_size(self, height: int, width: int):
        most, step = self.config.image_size, self.config.patch_pixels
        sides = zip((height, width), most)
        if not all(_is_int(s) and 0 < s <= m and s % step == 0 for s, m in sides):
            raise ValueError(
                f"image size {height}x{width}: each side must be a multiple of {step} pixels, at "
                f"most {most[0]}x{most[1]}"
            )

    def _check_tokens(self, tokens) -> np.ndarray:
        tokens, cfg = np.asarray(tokens), self.config
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"tokens are {tokens.dtype} of shape {tokens.shape}: must be integers [B, k]"
            )
        if not (1 <= tokens.shape[1] <= cfg.num_tokens and tokens.shape[0]):
            raise ValueError(
                f"tokens have shape {tokens.shape}: must be [B, k] with B >= 1 and k in "
                f"1..{cfg.num_tokens}"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= cfg.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong}: must be in 0..{cfg.vocab_size - 1}")
        return tokens

    def _noise(self, noise, key, batch: int, image_size):
        cfg = self.config
        down, channels = cfg.vae.downsample, cfg.vae.latent_channels
        noise = None if noise is None else jnp.asarray(noise, jnp.float32)
        if image_size is not None:
            size = (image_size,) * 2 if np.ndim(image_size) == 0 else tuple(image_size)
            if len(size) != 2:
                raise ValueError(f"image_size={image_size!r}: must be a side or (H, W) in pixels")
        elif noise is not None and noise.ndim == 4:
            size = tuple(s * down for s in noise.shape[1:3])
        else:
            size = cfg.image_size
        self._check_size(*size)
        shape = (batch, size[0] // down, size[1] // down, channels)
        if noise is None:
            return jax.random.normal(_key(0 if key is None else key), shape)
        if noise.shape != shape:
            raise ValueError(f"noise has shape {noise.shape}: must be {shape}")
        return noise

    def _on_mesh(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def _is_int(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _key(key: jax.Array | int) -> jax.Array:
    return jax.random.key(key) if isinstance(key, (int, np.integer)) else key


def _check_keep(num_tokens, batch: int, given: int) -> np.ndarray:
    """How many tokens each image keeps, int32 [batch]."""
    keep = np.asarray(given if num_tokens is None else num_tokens)
    if not np.issubdtype(keep.dtype, np.integer) or keep.shape not in ((), (batch,)):
        raise ValueError(
            f"num_tokens={num_tokens!r}: must be an int, or {batch} ints, one per image, each in "
            f"1..{given}"
        )
    if keep.min() < 1 or keep.max() > given:
        wrong = keep.min() if keep.min() < 1 else keep.max()
        raise ValueError(f"num_tokens={wrong}: must be in 1..{given}, the tokens that were given")
    return np.broadcast_to(keep, (batch,)).astype(np.int32)
