"""FlexTok: what a user holds. Images to tokens, any prefix of the tokens to images."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flextok_jax import lengths
from flextok_jax.flow import sampler as flow_sampler
from flextok_jax.io import hub, models, storage
from flextok_jax.nn import flextok, vae
from flextok_jax.nn.config import Compute
from flextok_jax.nn.images import to_float
from flextok_jax.nn.tokenizer_config import TokenizerConfig
from flextok_jax.parallel.mesh import mesh_context, platform
from flextok_jax.parallel.sharding import place, spread_batch

Key = jax.Array | int | None
MOST = 2.0  # What a float image may reach, as decoded ones do; it is clipped to [-1, 1].


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "count"))
def _encode(params, images, noise, keep, text, cfg: TokenizerConfig, compute: Compute, count: int):
    """uint8 or float images -> (registers, tokens [B, count, …], bool [B]: all are finite)."""
    if images.dtype == jnp.uint8:
        images = to_float(images)
    found = flextok.tokens_of(params, cfg, compute, images, count, noise, keep, text)
    registers, tokens = found
    return registers, tokens, jnp.isfinite(registers).all(axis=(1, 2))


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "method"))
def _flow(params, tokens, keep, state, schedule, first, stop, cfg, compute, method):
    """Steps first .. stop - 1 of the flow from the first keep [B] of the tokens [B, K, …]."""
    codes = flextok.codes_of(params, cfg, tokens)
    return flextok.flow_steps(
        params, cfg, compute, codes, keep, state, schedule, first, stop, method
    )


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "grid"))
def _values(params, tokens, keep, text, cfg, compute, grid):
    """Tokens [B, K, …], of which the first keep [B] count -> latents [B, h, w, C], in one pass."""
    codes = flextok.codes_of(params, cfg, tokens)
    return flextok.values(params, cfg, compute, codes, keep, grid, text)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def _to_images(params, latents, cfg, compute):
    """Scaled latents [B, h, w, C] -> (images [B, H, W, 3], bool [B]: all of it is finite)."""
    dtype = jnp.dtype(compute.dtype)
    images = vae.latents_to_images(params["vae"], cfg.vae, latents, dtype)
    return images, jnp.isfinite(images).all(axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True, eq=False)
class FlexTok:
    """A tokenizer with its parameters. Make one with `FlexTok.from_pretrained`.

    The cost follows the number of tokens: encoding k tokens runs N + K positions and decoding them
    N + K + 1 (N + 1 for the null pass of guidance), where K is k rounded up to a power of two, at
    most R. At most log2(R) + 1 programs are compiled per batch shape, whatever k are asked for.

    Attributes:
        config: the model.
        params: nested dictionaries {"vae", "encoder", "decoder"} of float32 arrays, and
            {"bottleneck"} where that has parameters.
        compute: how it is run (dtype, attention).
        mesh: the devices it is spread over, None for the default device.
        origin: where it came from, in words.
        null_text: float32 [T, E], what a decoder that reads a text gets where none is given.
    """

    config: TokenizerConfig
    params: dict
    compute: Compute = Compute()
    mesh: Mesh | None = None
    origin: str = "memory"
    null_text: np.ndarray | None = None
    _file: models.Loaded | None = dataclasses.field(default=None, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        source,
        revision: str | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        attention: str = "xla",
    ) -> "FlexTok":
        """Loads a tokenizer.

        Args:
            source: a hub id (owner/name, owner/name@REVISION), a folder or `model.safetensors` in
                the released format, a workdir of our own training (its averaged weights), or the
                name of a shipped demo model ("demo-digits").
            revision: branch, tag or commit of a hub id that names none.
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
        file = models.load(source, revision)
        params = place(mesh, file.params, flextok.shapes(file.config))
        file = dataclasses.replace(file, params={})  # the arrays on the devices are the ones
        return cls(file.config, params, compute, mesh, file.origin, file.null_text, file)

    @property
    def num_tokens(self) -> int:
        """R, the most tokens an image can have."""
        return self.config.num_tokens

    @property
    def discrete(self) -> bool:
        """Whether tokens are ids, int32 [B, k]; else they are codes, float32 [B, k, F]."""
        return self.config.discrete

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The numbers of tokens that stand for an image: 1..R, whole scales or rounds, or R."""
        return self.config.prefixes

    def __repr__(self) -> str:
        cfg, (height, width) = self.config, self.config.image_size
        kind = f"{cfg.vocab_size} ids" if cfg.discrete else f"{cfg.code_dim} channels"
        return (
            f"FlexTok({self.origin!r}: {height}x{width} pixels, {self.num_tokens} tokens of {kind})"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 over all parameters."""
        return storage.fingerprint(self.params)

    def decodes(self, fingerprint: str) -> bool:
        """Whether tokens of the model with this sha256 are its own: that is it, or its teacher."""
        return fingerprint in (self.fingerprint, self._file and self._file.teacher)

    def tokenize(
        self, images, num_tokens: int | None = None, key: Key = None, text=None
    ) -> jax.Array:
        """Images to tokens, coarse to fine.

        Args:
            images: [B, H, W, 3], uint8, or float in [-1, 1]. H and W are the training size or
                smaller multiples of the patch size in pixels.
            num_tokens: k, how many tokens; all R by default. The result is the prefix of the full
                one, at the cost of k tokens.
            key: None uses the mean of the VAE's posterior; a key or an int seed samples it.
            text: float [B, T, E], features of texts, for a model whose encoder reads them; see
                `detokenize`.

        Returns:
            int32 [B, k]; of a continuous bottleneck float32 [B, k, F].

        Raises:
            ValueError: a wrong shape, type, range, or number of tokens; or the encoder's output is
                not finite.
        """
        return self._run_encoder(images, num_tokens, key, text)[1]

    def registers(self, images, num_tokens: int | None = None, text=None) -> jax.Array:
        """The registers before quantisation, for probing: float32 [B, k, F] (2 F of "kl")."""
        return self._run_encoder(images, num_tokens, None, text)[0]

    def detokenize(
        self,
        tokens,
        num_tokens=None,
        image_size: int | tuple[int, int] | None = None,
        steps: int | None = None,
        guidance_scale: float | Callable[[float], float] | None = None,
        norm_guidance: bool | None = None,
        solver: str | None = None,
        key: Key = None,
        noise=None,
        on_step: Callable[[int, jax.Array], None] | None = None,
        time_shift: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        text=None,
    ) -> jax.Array:
        """Tokens to images.

        Args:
            tokens: int [B, k], 1 <= k <= R; of a continuous bottleneck float [B, k, F].
            num_tokens: keep only the first of them: an int, or int [B], one number per image.
            image_size: side or (H, W) in pixels; the training size by default.
            steps: number of steps of the flow; None, here and below: the model's own default.
            guidance_scale: a float, or a callable of t (1 is noise, 0 is data). 1 turns guidance
                off and halves the cost.
            norm_guidance: adaptive projected guidance (APG) in place of plain guidance.
            solver: "euler", "midpoint" or "multistep".
            key: a key or an int seed for the noise; None means seed 0.
            noise: [B, h, w, C] latents of noise, in place of `key`.
            on_step: called after each step with its number, from 1, and the images (as returned)
                that the flow then points to.
            time_shift: above 1 there are more steps near noise, below 1 near data.
            guidance_interval: (low, high), the times at which there is guidance; elsewhere a step
                costs one pass. See `flow.sampler.Sampler`.
            text: float [B, T, E], features of texts, for a model whose decoder reads them; by
                default the model's `null_text` for every image, or none where vectors of zeros are
                padding.

        Returns:
            float32 [B, H, W, 3], nominally in [-1, 1], not clipped.

        Raises:
            ValueError: ids out of range, a wrong shape, a number of tokens outside 1..k or not of
                `prefixes`, or arguments of a flow for a model that decodes in one pass; or images
                are not finite.
        """
        cfg = self.config
        tokens = self._check_tokens(tokens)
        batch, given = tokens.shape[:2]
        keep = _check_keep(num_tokens, batch, given)
        for k in np.unique(keep).tolist():
            self._check_count(k)
        count = flextok.bucket(int(keep.max()), cfg.num_tokens)
        tokens = tokens[:, :count]
        fill = [(0, 0), (0, max(0, count - given))] + [(0, 0)] * (tokens.ndim - 2)
        tokens = np.pad(tokens, fill)
        how = dict(
            steps=steps, guidance_scale=guidance_scale, norm_guidance=norm_guidance, solver=solver,
            time_shift=time_shift, guidance_interval=guidance_interval,
        )  # fmt: skip
        how = {name: value for name, value in how.items() if value is not None}
        text = self._text(text, batch, cfg.text.dim, "decoder")
        if not cfg.is_flow:
            others = dict(key=key, noise=noise, on_step=on_step)
            if useless := [*how, *(name for name, x in others.items() if x is not None)]:
                raise ValueError(
                    f"{', '.join(useless)}: this model decodes in one pass, without noise or steps"
                )
            size = self._size(image_size)
            grid = tuple(side // cfg.patch_pixels for side in size)
            arrays = tokens, keep, text
            with self.on_mesh():
                arrays = spread_batch(self.mesh, arrays)
                return self._images(_values(self.params, *arrays, cfg, self.compute, grid), batch)
        sampler = cfg.sampler_with(**how)
        schedule, noise = sampler.schedule(), self._noise(noise, key, batch, image_size)
        # One program for any number of steps: a window of them, or one at a time to look at.
        each = 1 if on_step else flow_sampler.LENGTH
        with self.on_mesh():
            tokens, keep, noise = spread_batch(self.mesh, (tokens, keep, noise))
            state = flow_sampler.start(noise)
            for first in range(0, sampler.steps, each):
                part, place = schedule.window(first)
                stop = place + min(each, sampler.steps - first)
                state = _flow(
                    self.params, tokens, keep, state, part, np.int32(place), np.int32(stop),
                    cfg=cfg, compute=self.compute, method=sampler.method,
                )  # fmt: skip
                if on_step:
                    on_step(first + 1, self._images(state.clean, batch))
            return self._images(state.x, batch)

    def choose_length(
        self,
        images,
        criterion="flow",
        target: float | None = None,
        within: float | None = None,
        counts: Sequence[int] | None = None,
        rule: str = "first",
        samples: int | None = None,
        steps: int | None = None,
        guidance_scale: float | Callable[[float], float] | None = None,
        norm_guidance: bool | None = None,
        key: Key = None,
        batch_size: int = 32,
    ) -> "lengths.Lengths":
        """The smallest number of tokens of each image that meets a target.

        Args:
            images: as for `tokenize`.
            criterion: "flow": what the tokens explain of the flow's loss, 0 for none and 1 for all
                R of them, without sampling; "latent": relative squared error of decoded latents;
                "psnr" (dB) or "mae" of decoded images; a network, see `criteria`; or a function
                (images float32 [n, H, W, 3] in [-1, 1], originals) -> [n], larger is better.
            target: the value to be reached, in the criterion's unit; or else
            within: how much worse than with the largest of `counts` the value may be.
            counts: ascending numbers of tokens to choose from; 1, 2, 4, ... up to R by default.
            rule: "first": the smallest number that meets, though a larger one may fail; "stable":
                the smallest for which it and all larger numbers meet.
            samples: noises that the criterion is averaged over: 16 by default for "flow", else 1.
                An image's noises follow from the key and its index; all numbers share them.
            steps, guidance_scale, norm_guidance: of decoding, as for `detokenize`.
            key: a key or an int seed for the noise; None means seed 0.
            batch_size: images at a time; it does not change the result.

        Returns:
            `num_tokens` int32 [B], `met` bool [B], `values`, `counts`, `tokens`; see
            `lengths.Lengths`. `detokenize(found.tokens, found.num_tokens)` makes the images.

        Raises:
            ValueError: arguments that do not fit the model or each other, or a criterion whose
                values are not finite or have a wrong shape.
        """
        how = dict(steps=steps, guidance_scale=guidance_scale, norm_guidance=norm_guidance)
        how = {name: value for name, value in how.items() if value is not None}
        return lengths.choose(
            self, self._check_images(images), criterion, target, within, counts, rule, samples,
            how, _key(0 if key is None else key), batch_size,
        )  # fmt: skip

    def _images(self, latents, batch: int) -> jax.Array:
        images, finite = _to_images(self.params, latents, self.config, self.compute)
        self._check_finite(finite, batch, "the decoder")
        return images if len(images) == batch else images[:batch]

    def _check_finite(self, finite, batch: int, part: str):
        if wrong := int(np.sum(~np.asarray(finite)[:batch])):
            raise ValueError(
                f"{self.origin}: {part} made numbers that are not finite, for {wrong} of {batch} "
                "images. Check the model's parameters, or try float32"
            )

    def save_pretrained(self, folder) -> None:
        """Writes `model.safetensors` into `folder`, in the released format where that can hold it.

        A model that was loaded from such a file keeps its metadata. Another VAE than the released
        ones, another bottleneck, order or target is written with a `_target_` of this project.
        """
        file = self._file or models.Loaded(self.config, {})
        params = jax.tree.map(np.asarray, self.params)
        models.save(folder, dataclasses.replace(file, params=params))

    def push_to_hub(
        self,
        repo: str,
        license: str,
        picture=None,
        numbers: hub.Table | None = None,
        private: bool = False,
    ) -> str:
        """Publishes the model on the Hugging Face hub, with a model card made from its run.

        The card says what the model is and how to load it; of a model from a workdir also the
        command, the configuration, the data (without the folders on this machine) and the last
        evaluation.

        Args:
            repo: "owner/name"; made where it is not there.
            license: of the weights, as the hub names it, such as "apache-2.0".
            picture: a PNG file for the card, such as the grid of `flextok reconstruct`.
            numbers: a table for the card: the titles, then the rows, as text.
            private: whether a new repository is.

        Returns:
            The source of what was published, "owner/name@COMMIT".

        Raises:
            ValueError, OSError: see `io.hub.push`.
        """
        cfg, (height, width) = self.config, self.config.image_size
        kind = f"{cfg.vocab_size:,} ids" if cfg.discrete else f"{cfg.code_dim} numbers"
        about = {
            "images": f"{height} x {width} pixels",
            "tokens": f"{self.num_tokens} of {kind}, {cfg.tokens.order}",
            **hub.parameters(self.params, self.fingerprint),
        }
        use = f'from flextok_jax import FlexTok\n\ntok = FlexTok.from_pretrained("{repo}")'
        card = hub.model_card(
            repo, license, about, use, ["image-tokenizer"], self._file and self._file.workdir,
            picture is not None, numbers,
        )  # fmt: skip
        return hub.push(repo, self.save_pretrained, card, picture, private)

    def _run_encoder(self, images, num_tokens, key, text):
        cfg = self.config
        images = self._check_images(images)
        k = cfg.num_tokens if num_tokens is None else num_tokens
        if not is_int(k) or not 1 <= k <= cfg.num_tokens:
            raise ValueError(f"num_tokens={k!r}: must be an int in 1..{cfg.num_tokens}")
        self._check_count(int(k))
        batch, height, width, _ = images.shape
        text = self._text(text, batch, cfg.text.encoder, "encoder")
        noise = None
        if key is not None and cfg.vae.kind != "identity":
            down = cfg.vae.downsample
            shape = (batch, height // down, width // down, cfg.vae.latent_channels)
            noise = jax.random.normal(_key(key), shape)
        exact, keep = cfg.tokens.order != "full", np.full(batch, k, np.int32)
        count = flextok.bucket(int(k), cfg.num_tokens) if exact else cfg.num_tokens
        count = int(k) if cfg.tokens.rounds > 1 else count  # One round after the other.
        with self.on_mesh():
            arrays = spread_batch(self.mesh, (images, noise, keep, text))
            *found, finite = _encode(self.params, *arrays, cfg, self.compute, count)
        self._check_finite(finite, batch, "the encoder")

        def cut(x):
            # On the host: a device would compile a program for every k.
            return x if x.shape[:2] == (batch, k) else jax.device_put(np.asarray(x)[:batch, :k])

        return tuple(map(cut, found))

    def _check_count(self, k: int):
        if k not in self.prefixes:
            *some, most = self.prefixes
            raise ValueError(
                f"num_tokens={k}: tokens of {self.origin} come in scales or rounds, allowed are "
                f"{some} and {most}"
                if some
                else f"num_tokens={k}: the tokens of {self.origin} are not ordered, only all "
                f"{most} of them stand for an image"
            )

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
        if not -MOST <= low <= high <= MOST:
            raise ValueError(
                f"float images range from {low:g} to {high:g}: must be finite and in [-1, 1] "
                "(x / 127.5 - 1 for values in 0..255; or pass uint8)"
            )
        if low >= 0 and 0 < high <= 1:
            warnings.warn(
                f"float images range from {low:g} to {high:g}, as if their range were 0..1: it is "
                "-1..1 here (2 x - 1)",
                stacklevel=4,
            )
        return images.astype(np.float32).clip(-1, 1)

    def _check_size(self, height: int, width: int):
        most, step = self.config.image_size, self.config.patch_pixels
        sides = zip((height, width), most)
        if not all(is_int(s) and 0 < s <= m and s % step == 0 for s, m in sides):
            raise ValueError(
                f"image size {height}x{width}: each side must be a multiple of {step} pixels, at "
                f"most {most[0]}x{most[1]}"
            )
        if not self.config.tokens.registers and (height, width) != most:
            raise ValueError(
                f"image size {height}x{width}: must be {most[0]}x{most[1]}, because each of the "
                f"{self.num_tokens} tokens has its place in the image"
            )

    def _check_tokens(self, tokens) -> np.ndarray:
        tokens, cfg = np.asarray(tokens), self.config
        kind, shape = (
            ("integers", "[B, k]") if cfg.discrete else ("floats", f"[B, k, {cfg.code_dim}]")
        )
        fits = tokens.ndim == 2 if cfg.discrete else tokens.shape[2:] == (cfg.code_dim,)
        fits = fits and tokens.shape[0] and 1 <= tokens.shape[1] <= cfg.num_tokens
        if not fits or not np.issubdtype(tokens.dtype, np.integer if cfg.discrete else np.floating):
            raise ValueError(
                f"tokens are {tokens.dtype} of shape {tokens.shape}: must be {kind} {shape} with "
                f"B >= 1 and k in 1..{cfg.num_tokens}"
            )
        if not cfg.discrete:
            if not np.isfinite(tokens).all():
                raise ValueError("tokens are not finite")
            return tokens.astype(np.float32)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= cfg.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong}: must be in 0..{cfg.vocab_size - 1}")
        return tokens.astype(np.int32)

    def _size(self, image_size) -> tuple[int, int]:
        """(H, W) in pixels."""
        if image_size is None:
            return self.config.image_size
        size = (image_size,) * 2 if np.ndim(image_size) == 0 else tuple(image_size)
        if len(size) != 2:
            raise ValueError(f"image_size={image_size!r}: must be a side or (H, W) in pixels")
        self._check_size(*size)
        return size

    def _text(self, text, batch: int, reads, part: str):
        """The features of texts float32 [B, T, E]; None for a part that reads none."""
        dim, length = self.config.text.dim, self.config.text.length
        if reads and text is None and self.null_text is not None:
            text = np.broadcast_to(self.null_text[None], (batch, *self.null_text.shape))
        if text is None and self.config.text.padded:
            return None
        found = None if text is None else np.shape(text)
        if found != ((batch, length, dim) if reads else None):
            wanted = f"float {[batch, length, dim]}: its {part} reads them" if reads else "None"
            raise ValueError(
                f"text has shape {found}: must be {wanted}"
                + f" (or put those of the empty text as {models.NULL_TEXT}, [{length}, {dim}], "
                "beside the model's file)" * bool(reads)
            )
        return None if text is None else np.asarray(text, np.float32)

    def _noise(self, noise, key, batch: int, image_size):
        cfg = self.config
        down, channels = cfg.vae.downsample, cfg.vae.latent_channels
        noise = None if noise is None else jnp.asarray(noise, jnp.float32)
        if image_size is None and noise is not None and noise.ndim == 4:
            image_size = tuple(s * down for s in noise.shape[1:3])
        size = self._size(image_size)
        shape = (batch, size[0] // down, size[1] // down, channels)
        if noise is None:
            return jax.random.normal(_key(0 if key is None else key), shape)
        if noise.shape != shape:
            raise ValueError(f"noise has shape {noise.shape}: must be {shape}")
        return noise

    def on_mesh(self):
        """The context in which computations run on the devices of `mesh`."""
        return mesh_context(self.mesh)


Tokenizer = FlexTok  # Of other projects too: docs/peers.md.


def is_int(value) -> bool:
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
