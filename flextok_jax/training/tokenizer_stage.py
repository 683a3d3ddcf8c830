"""The tokenizer stage: encoder, bottleneck and decoder, trained end to end on VAE latents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average
from flax import traverse_util

from flextok_jax.data import shards
from flextok_jax.data import sources as image_sources
from flextok_jax.evaluation import metrics
from flextok_jax.flow import path as flow
from flextok_jax.io import models, sources, storage
from flextok_jax.io.formats import networks
from flextok_jax.io.paths import as_path, resolved
from flextok_jax.nn import dinov2, flextok, layout, repa, vae
from flextok_jax.nn.config import Compute, from_dict
from flextok_jax.nn.decoder import Condition
from flextok_jax.nn.images import to_float
from flextok_jax.nn.layers import is_fixed
from flextok_jax.nn.tokenizer_config import TokenizerConfig
from flextok_jax.nn.vae_config import VAEConfig, identity_vae
from flextok_jax.parallel.rng import named
from flextok_jax.training import groups
from flextok_jax.training.batches import Validation, bins
from flextok_jax.training.code_usage import CodeUsage
from flextok_jax.training.pixel_losses import PixelLosses
from flextok_jax.training.stage import Stage

TIME_BINS = 4


class TokenizerStage(Stage):
    """Latents from a random prefix of the image's tokens: by rectified flow, or in one pass.

    With `repa.weight` also REPA (see `nn.repa`), towards features of DINOv2; with `repa.book` of
    the last codebook's tokens, and without a `repa.source` towards embeddings beside the images.
    """

    def __init__(self, config, vae_config: VAEConfig | None = None, grouped: bool = True):
        """Reads the configuration, and of the VAE its own.

        Args:
            config: a ConfigDict.
            vae_config: replaces that of the VAE which `vae.source` names, and nothing is read.
            grouped: whether images are computed with about as many tokens as they keep, where that
                is exact; False: with all. The loss is the same.

        Raises:
            ValueError: sizes, losses, REPA or encoded data do not fit the model.
        """
        source = config.vae.source
        if vae_config is None:
            vae_config = models.vae_config(source, config.vae.scaling_factor)
        if source != models.IDENTITY and as_path(source).exists():
            source = str(resolved(as_path(source)))
        model = config.model.to_dict()
        if config.init_model:
            model = dataclasses.asdict(models.load(config.init_from).config)
        patch_pixels = model["sites"]["patch_size"] * vae_config.downsample
        side, rest = divmod(config.data.image_size, patch_pixels)
        if rest:
            raise ValueError(
                f"data.image_size={config.data.image_size}: must be a multiple of {patch_pixels}, "
                f"the patch size times the VAE's reduction {vae_config.downsample}"
            )
        model |= {"vae": dataclasses.asdict(vae_config)}
        model["sites"] = model["sites"] | {"grid": (side, side)}
        self.model = cfg = from_dict(TokenizerConfig, model)
        self._bottleneck_weight = config.loss.bottleneck_weight
        self._pixels = PixelLosses(
            config.loss, config.discriminator, config.lpips, config.compute.dtype
        )
        of_pixels = config.loss.lpips_weight or config.loss.gan_weight
        if of_pixels and (cfg.is_flow or cfg.vae.kind != models.IDENTITY):
            raise ValueError(
                "loss.lpips_weight and loss.gan_weight are for model.target.kind='values' with "
                "vae.source='identity': set them to 0"
            )
        if cfg.text.dim and not cfg.text.padded:
            raise ValueError("model.text.padded=False: captions differ in length, set it to True")
        self.embedding = (cfg.text.length, cfg.text.dim) if cfg.text.dim else None
        self.compute = Compute(**config.compute)
        self._vae_source, self._data, self._evaluation = source, config.data, config.evaluation
        self._time_shift, self._repa = config.time_shift, config.repa
        self._dinov2 = self._check_repa() if config.repa.weight else None
        self._decoder_repa = config.repa.weight and not config.repa.book
        if config.data.source == "encoded":
            self._check_encoded()
        # These losses read tokens that an image does not keep, or are no mean over images.
        whole = cfg.bottleneck.has_loss or config.loss.gan_weight
        self._grouped = grouped and cfg.tokens.order == "causal" and not whole

    def _check_encoded(self):
        """Refuses latents and features that are not what this configuration would make."""
        data, cfg = self._data, self.model.vae
        if data.paired:
            raise ValueError("data.paired=True: encoded data holds no pairs; set it to False")
        manifest = shards.read_manifest(data.path, data.split)
        params = models.vae_params(self._vae_source, cfg)
        ours = {"image_size": data.image_size, "vae": models.vae_identity(cfg, params)}
        theirs = {name: manifest.get(name, {}) for name in ours}
        if self._repa.weight and not self._repa.source:
            ours["repa.width"] = self._repa.width
            theirs["repa.width"] = manifest["arrays"].get("repa", [0])[-1]
        shards.check_same(theirs, ours, f"{data.path}/{data.split}")
        if self._evaluation.num_images and not self._evaluation.data:
            raise ValueError(
                f"{data.path} holds no images to evaluate on: name some by evaluation.data=FOLDER, "
                "or set evaluation.num_images=0"
            )

    def _check_repa(self) -> dinov2.DINOv2Config | None:
        """What features are computed by; None: they come with the data."""
        options, depth = self._repa, self.model.decoder.depth
        if options.book:
            if self.model.bottleneck.books == 1 or self.model.text.dim:
                raise ValueError(
                    f"repa.book=True with model.bottleneck.books={self.model.bottleneck.books}, "
                    f"model.text.dim={self.model.text.dim}: needs more than one book, and no text"
                )
            if not options.source and self._data.source != "encoded":
                self.embedding = (1, options.width)
                return None
        elif not self.model.is_flow or depth <= repa.BLOCK:
            raise ValueError(
                f"repa.weight={options.weight} needs model.target.kind='flow' and "
                f"{repa.BLOCK + 1} blocks of the decoder at least, model.decoder.depth={depth}"
            )
        if bool(options.source) == (self._data.source == "encoded"):
            raise ValueError(
                f"repa.source={options.source!r}: needed for data with images, not for encoded "
                "features"
            )
        if not options.source:
            return None
        cfg = networks.dinov2_config(options.source)
        if cfg.width != options.width or options.image_size % cfg.patch_size:
            raise ValueError(
                f"{options.source} has features of {cfg.width} channels and patches of "
                f"{cfg.patch_size} pixels: repa.width={options.width} and "
                f"repa.image_size={options.image_size} do not fit"
            )
        return cfg

    def init(self, key):
        """{"encoder", "decoder"}, float32, in boxes; where they exist "bottleneck", "repa"."""
        channels = self.model.vae.latent_channels
        without_vae = dataclasses.replace(self.model, vae=identity_vae(channels))
        own = models.trained(flextok.init(without_vae, key)) | self._projection(key)
        return own | self._pixels.init(named(key, "discriminator"))

    def init_from(self, source: str):
        """The parts of a released FlexTok or a workdir; projection and discriminator are new."""
        new = layout.unbox(self._projection(jax.random.key(0)))
        new |= self._pixels.init(jax.random.key(0))
        return models.trained(models.load(source).params) | new

    def _projection(self, key):
        if not self._repa.weight:
            return {}
        width, key = self._repa.width, named(key, "repa")
        if self._repa.book:
            return {"repa": repa.init_contrast(width, self.model.code_dim, key)}
        return {"repa": repa.init(self.model.decoder.width, width, key)}

    def load_frozen(self):
        """{"vae"}, not for the identity; {"dinov2"}, where it computes the features for REPA."""
        frozen = {"vae": models.vae_params(self._vae_source, self.model.vae)}
        if self._dinov2:
            params = networks.load_dinov2(self._repa.source)[1]
            frozen["dinov2"] = layout.box(params, dinov2.shapes(self._dinov2))
        frozen |= self._pixels.load_frozen()
        return {name: params for name, params in frozen.items() if params}

    def trainable(self, path: str) -> bool:
        return not is_fixed(path)

    def draw(self, key, rank):
        """What is sampled for each image, [B, ...]; the arguments: see training/stage.py.

        "keep", int32, and "null", bool: the tokens it keeps (0 under the null condition), and
        whether it has the null condition. Both by the quantile (rank + u) / B, with one u for the
        batch: systematic sampling. "posterior": noise for the VAE's, and "code" for the
        bottleneck's, where they have one. For a flow "time" and "noise".
        """
        cfg, size = self.model, len(rank)
        q = (rank + jax.random.uniform(named(key, "keep"))) / size
        null, p = q < self._null_prob, self._null_prob
        units = cfg.tokens.units
        keep = flow.kept((q - p) / (1 - p), units, cfg.tokens.keep) * (cfg.num_tokens // units)
        drawn = {"keep": jnp.where(null, 0, keep), "null": null}

        def normal(name, shape):
            drawn[name] = jax.random.normal(named(key, name), (size, *shape))

        if self._samples_posterior:
            normal("posterior", cfg.latent_shape)
        if cfg.bottleneck.kind == "kl":
            normal("code", (cfg.num_tokens, cfg.code_dim))
        if cfg.is_flow:
            normal("noise", cfg.latent_shape)
            drawn["time"] = self._times(named(key, "time"), size)
        return drawn

    def _times(self, key, size):
        """Times of a flow, [size] (docs/reference.md, Objective)."""
        how = self.model.target.flow
        if how.log_normal_time:
            t = flow.logit_normal_time(key, size)
        else:
            t = flow.mode_time(jax.random.uniform(key, (size,)), how.mode_scale)
        return flow.shift_time(t, self._time_shift)

    @property
    def _null_prob(self):
        return self.model.target.flow.null_prob if self.model.is_flow else 0.0

    def lengths(self, count):
        """Tokens that are computed of the images in each of `count` groups, cut by rank.

        The most that one of them can keep, rounded up to a sixteenth of R, and then to a few: the
        step is compiled for each, which takes longer where blocks are unrolled.
        """
        cfg, p = self.model, self._null_prob
        most, unit = cfg.num_tokens, -(-cfg.num_tokens // 16)
        if not self._grouped:
            return (most,) * count
        # A little below the highest quantile, which no image has.
        q = np.maximum(0, (np.arange(1, count + 1) / count - 1e-6 - p) / (1 - p))
        kept = np.asarray(flow.kept(jnp.asarray(q, jnp.float32), most, cfg.tokens.keep))
        bounds = [min(most, -(-int(k) // unit) * unit) for k in kept]
        return groups.few(bounds, 4 if self.compute.scan else 2)

    def loss(self, params, frozen, batch, key, step, length=None):
        """The target's loss, plus `loss.bottleneck_weight` times the bottleneck's.

        Args:
            batch: "image": uint8 [B, H, W, 3], and "target", the same, where the decoder is to
                write another image than the encoder reads; or "moments": [B, h, w, 2C], mean and
                log variance of the VAE's posterior, made before. For a model that reads texts
                "text": [B, T, E]. For REPA without a `repa.source`
                also "repa": [B, P, E], features of DINOv2, made before. And what `draw` made, which
                is made here where it is missing.
            length: K, how many tokens are computed; no image may keep more. All by default.
        """
        cfg = self.model
        length = cfg.num_tokens if length is None else length
        if "keep" not in batch:
            size = len(jax.tree.leaves(batch)[0])
            batch = self.draw(key, groups.ranks(named(key, "rank"), size)) | batch
        x0 = wanted = self._latents(frozen, batch)
        if "target" in batch:
            wanted = self._latents(frozen, batch | {"image": batch["target"]})
        # By rounding, the highest quantile of a group may be the lowest of the next one.
        keep = jnp.minimum(batch["keep"], length)
        text = batch.get("text")
        registers = flextok.encode(params, cfg, self.compute, x0, length, keep, text)
        found = flextok.quantize(params, cfg, registers, batch.get("code"))
        target = self._flow if cfg.is_flow else self._values
        loss, per_image, logged = target(params, frozen, batch, wanted, found.codes, keep, step)
        logged |= self._by_tokens(per_image, keep, batch["null"])
        if cfg.discrete:
            logged["codebook"] = CodeUsage.from_ids(found.ids, keep, cfg.num_tokens, cfg.vocab_size)
        if cfg.bottleneck.has_loss:
            loss += self._bottleneck_weight * jnp.mean(found.loss)
            logged["loss_bottleneck"] = Average.from_model_output(found.loss)
        if self._repa.weight and self._repa.book:
            books = cfg.bottleneck.books
            targets, codes = self._targets(frozen, batch), found.codes[:, books - 1 :: books]
            apart = repa.contrast(params["repa"], codes, targets)
            loss += self._repa.weight * jnp.mean(apart)
            logged["loss_repa"] = Average.from_model_output(apart)
        return loss, logged

    def _flow(self, params, frozen, batch, x0, codes, keep, step):
        """(loss, the flow's loss [B], metrics) (docs/reference.md, Objective)."""
        t, noise, cfg = batch["time"], batch["noise"], self.model
        x_t, condition = flow.interpolate(x0, noise, t), Condition(codes, keep, batch["null"])
        capture = repa.BLOCK if self._decoder_repa else None
        made = flextok.velocities(params, cfg, self.compute, x_t, t, (condition,), capture)
        (velocity,), features = made if self._decoder_repa else (made, None)
        wanted = flow.target(x0, noise)
        if cfg.target.flow.predicts == "image":
            # The same, but near t = 0 limited as the prediction is.
            wanted = flow.velocity_to(x0, x_t, t)
        per_image = flow.flow_loss(velocity, wanted)
        loss, logged = jnp.mean(per_image), self._by_time(per_image, t)
        if self._decoder_repa:
            targets, dtype = self._targets(frozen, batch), jnp.dtype(self.compute.dtype)
            apart = -repa.similarity(params["repa"], features, targets, dtype)
            for name, values in (("loss_flow", per_image), ("loss_repa", apart)):
                logged[name] = Average.from_model_output(values)
            loss += self._repa.weight * jnp.mean(apart)
        return loss, per_image, logged

    def _values(self, params, frozen, batch, x0, codes, keep, step):
        """The losses of the latents that the decoder writes in one pass. Returns as `_flow`."""
        cfg, decoder = self.model, traverse_util.flatten_dict(params["decoder"])
        last = flextok.last_kernel(cfg)
        grid = tuple(side // cfg.sites.patch_size for side in x0.shape[1:3])

        def decode(last_kernel):
            changed = traverse_util.unflatten_dict(decoder | {last: last_kernel})
            tree = params | {"decoder": changed}
            return flextok.values(tree, cfg, self.compute, codes, keep, grid, batch.get("text"))

        made, to_last = jax.vjp(decode, decoder[last])
        loss, logged = self._pixels.loss(params, frozen, x0, made, to_last, step)
        per_image = jnp.mean(jnp.square(made - x0), axis=(1, 2, 3))
        return loss, per_image, logged

    def _targets(self, frozen, batch):
        """DINOv2's features [B, P, E] of a batch, or what lies beside its images."""
        if not self._dinov2:
            return batch["text" if self.embedding else "repa"]
        size, params = self._repa.image_size, frozen["dinov2"]
        images = batch.get("target", batch["image"])
        return repa.targets(params, self._dinov2, self.compute, images, size)

    @property
    def _samples_posterior(self):
        return self.model.vae.kind != models.IDENTITY and self.model.vae.sample_posterior

    def _latents(self, frozen, batch):
        """Scaled latents float32 [B, h, w, C], a sample of the posterior where the VAE has one."""
        cfg = self.model.vae
        if "moments" in batch:
            mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        else:
            images = to_float(batch["image"])
            params, dtype = frozen.get("vae", {}), jnp.dtype(self.compute.dtype)
            mean, logvar = vae.encode_moments(params, cfg, images, dtype)
        if self._samples_posterior:
            mean = vae.sample_posterior(mean, logvar, batch["posterior"])
        return jax.lax.stop_gradient(mean * cfg.scaling_factor)

    def _by_time(self, per_image, t):
        """The loss of images whose time lies in each of TIME_BINS."""
        quarter, out = jnp.minimum(t * TIME_BINS, TIME_BINS - 1).astype(int), {}
        for i in range(TIME_BINS):
            name = f"loss_by_time/{i / TIME_BINS:.2f}-{(i + 1) / TIME_BINS:.2f}"
            out[name] = Average.from_model_output(per_image, mask=quarter == i)
        return out

    def _by_tokens(self, per_image, keep, null):
        """The loss of images that kept 1, 2, 3-4, 5-8, ... tokens, and of the null condition."""
        out, ordered = {}, len(self.model.prefixes) > 1
        for name, tokens in bins(self.model.num_tokens).items() if ordered else ():
            mask = (keep > tokens.start) & (keep <= tokens.stop) & ~null
            out[f"loss_by_tokens/{name}"] = Average.from_model_output(per_image, mask=mask)
        if self.model.is_flow:
            out["loss_null"] = Average.from_model_output(per_image, mask=null)
        return out

    def evaluators(self):
        """ "reconstruction": psnr/K (dB), mae/K, ssim/K for K = 1, 2, 4, ..., R tokens.

        With the posterior's mean, the model's default sampler and noise of seed 0.
        """
        if not self._evaluation.num_images:
            return {}
        images = Validation(self._images(), self._evaluation, embedding=self.embedding)
        lengths = flextok.doublings(self.model.prefixes)

        def stream(params, frozen, mesh):
            for i, batch in enumerate(images.batches(mesh, f", {len(lengths)} lengths")):
                key = jax.random.fold_in(jax.random.key(0), i)
                for k in lengths:
                    count = flextok.bucket(k, lengths[-1], 4) if len(lengths) > 1 else k
                    given = batch["image"], batch.get("text"), key, jnp.int32(k), count
                    found = self._decoded(params, frozen, *given)
                    yield f"/{k}", found, batch.get("target", batch["image"]), batch["mask"]

        return {"reconstruction": lambda *args: metrics.means(stream(*args))}

    def _images(self):
        """The part `data` of the config with what `evaluation.data` names in its place."""
        data = self._data
        if self._evaluation.data:
            data = data.copy_and_resolve_references()
            found = image_sources.parse(self._evaluation.data)
            image_sources.check_images(found)
            data.update(source=found.source, path=found.path, name=found.name)
        return data

    @functools.partial(jax.jit, static_argnums=(0, 7))
    def _decoded(self, params, frozen, images, text, key, k, count):
        """uint8 [B, H, W, 3] → float32 [B, H, W, 3], from the first k of `count` tokens."""
        cfg, compute, of_vae = self.model, self.compute, frozen.get("vae", {})
        dtype = jnp.dtype(compute.dtype)
        x0 = vae.images_to_latents(of_vae, cfg.vae, to_float(images), dtype)
        keep = jnp.full(x0.shape[:1], k)
        registers = flextok.encode(params, cfg, compute, x0, count, keep, text)
        codes = flextok.quantize(params, cfg, registers).codes
        noise = jax.random.normal(key, x0.shape)
        x = flextok.decode(params, cfg, compute, codes, keep, noise, text=text)
        return vae.latents_to_images(of_vae, cfg.vae, x, dtype)

    def export_config(self):
        """What `FlexTok.from_pretrained` needs; "vae_fingerprint": sha256 over the parameters."""
        source, frozen = self._vae_source, models.vae_params(self._vae_source, self.model.vae)
        return {
            "kind": "flextok",
            "config": dataclasses.asdict(self.model),
            "vae_source": source if source == models.IDENTITY else sources.pinned(source),
            "vae_fingerprint": storage.fingerprint(frozen),
        }
