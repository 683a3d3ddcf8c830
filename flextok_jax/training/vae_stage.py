"""Stage 0: the autoencoder between pixels and latents, and its discriminator.

Two networks, one loss, one gradient. With x the image, y its reconstruction from a sample of the
posterior, D the discriminator and `sg` what is held constant, the loss is

    F(y) + kl_weight KL / (H W 3) + w G(y; sg D) + L(D; sg y),      F = |x - y| + lpips_weight LPIPS
    G = -mean D(y)        L = (mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2

so each network gets the gradient of its own terms only, and `optim.groups` gives each its own
optimizer. Hinge loss: Lim and Ye, arXiv 1705.02894. The weight w and its clipping: Esser et al.,
arXiv 2012.09841; with W the kernel of the decoder's last convolution,

    w = gan_weight clip(|dF/dW| / (|dG/dW| + 1e-4), 0, 1e4).

The latent scaling factor, 1 / (standard deviation of sampled latents of training images, with the
averaged weights), is measured by an evaluator, so at the end of every run and with every other
evaluation. It is thereby in DIR/metrics.jsonl beside the step it was measured at, survives an
interruption as every evaluation does, and asks nothing of the loop; whoever reads the workdir as a
VAE (`models.load_vae`) takes it from there.
"""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.evaluation import metrics as evaluation
from flextok_jax.io import models
from flextok_jax.io.formats import networks
from flextok_jax.nn import vae
from flextok_jax.nn.config import VAEConfig
from flextok_jax.nn.images import to_float
from flextok_jax.nn.layout import path_string
from flextok_jax.nn.lpips import lpips
from flextok_jax.nn.patchgan import PatchGAN
from flextok_jax.parallel.rng import named
from flextok_jax.training.batches import held_out, on_mesh

MAX_ADAPTIVE_WEIGHT = 1e4
FIRST_LOGVAR = -6.0
MODEL_FIELDS = ("latent_channels", "block_out", "layers_per_block", "norm_groups", "mid_attention")

log = logging.getLogger(__name__)


class VAEStage:
    """Reconstruction, KL, LPIPS and an adversarial loss that begins late."""

    def __init__(self, config):
        """Reads `model`, `discriminator`, `loss`, `lpips`, `compute`, `evaluation` and `data`."""
        unknown = sorted(set(config.model) - set(MODEL_FIELDS))
        if unknown:
            raise ValueError(f"config.model has unknown keys {unknown}; allowed: {MODEL_FIELDS}")
        model = {k: tuple(v) if k == "block_out" else v for k, v in config.model.items()}
        self.model, self.weights = VAEConfig(**model), config.loss
        self.dtype = jnp.dtype(config.compute.dtype)
        self.discriminator = PatchGAN(**config.discriminator, dtype=self.dtype)
        self._data, self._evaluation, self._lpips = config.data, config.evaluation, config.lpips
        if self.weights.reconstruction not in ("l1", "l2"):
            raise ValueError(f"loss.reconstruction={self.weights.reconstruction!r}: l1 or l2")
        if bool(config.lpips.vgg) != bool(config.lpips.heads):
            raise ValueError("lpips.vgg and lpips.heads: name both files, or neither")
        multiples = {self.model.downsample: "the VAE's reduction"}
        if self.weights.gan_weight:
            multiples[self._smallest] = "what the discriminator's last layer needs"
        for multiple, why in multiples.items():
            if config.data.image_size % multiple:
                raise ValueError(
                    f"data.image_size={config.data.image_size}: must be a multiple of {multiple}, "
                    f"{why}"
                )

    @property
    def _smallest(self) -> int:
        return 2 ** (self.discriminator.layers + 2)

    def init(self, key):
        """{"vae"}, and with a `gan_weight` {"discriminator"}; float32."""
        params = {"vae": _begin(self.model, named(key, "vae"))}
        if self.weights.gan_weight:
            images = jnp.zeros((1, self._smallest, self._smallest, self.model.in_channels))
            key = named(key, "discriminator")
            params["discriminator"] = self.discriminator.init(key, images)["params"]
        return params

    def init_from(self, source: str):
        """The VAE of a folder, a hub id or a workdir of ours; the discriminator starts anew."""
        found, params = models.load_vae(source, scaling_factor=1.0)
        if dataclasses.replace(found, sample_posterior=True) != self.model:
            raise ValueError(f"the VAE at {source} is {found}; the configuration is {self.model}")
        return jax.jit(self.init)(jax.random.key(0)) | {"vae": params}

    def load_frozen(self):
        """{"lpips"}: VGG16 and the linear heads, if `lpips` names their files."""
        if not self.weights.lpips_weight:
            return {}
        if not self._lpips.vgg:
            log.warning("no LPIPS term: lpips.vgg and lpips.heads name no files")
            return {}
        return {"lpips": networks.load_lpips(self._lpips.vgg, self._lpips.heads)}

    def trainable(self, path: str) -> bool:
        return True

    def loss(self, params, frozen, batch, key, step):
        """See above. Each gradient with respect to the reconstruction is computed once.

        Args:
            batch: "image": uint8 [B, H, W, 3].
        """
        cfg, weights = self.model, self.weights
        images = to_float(batch["image"])
        mean, logvar = vae.encode_moments(params["vae"], cfg, images, self.dtype)
        noise = jax.random.normal(named(key, "posterior"), mean.shape)
        latents = vae.sample_posterior(mean, logvar, noise)

        def decode(last_kernel):
            decoder = params["vae"]["decoder"]
            decoder = decoder | {"conv_out": decoder["conv_out"] | {"kernel": last_kernel}}
            tree = params["vae"] | {"decoder": decoder}
            return vae.decode_latents(tree, cfg, latents, self.dtype)

        made, to_last = jax.vjp(decode, params["vae"]["decoder"]["conv_out"]["kernel"])
        fixed = jax.lax.stop_gradient(made)
        fidelity = functools.partial(self._fidelity, frozen, images)
        (value, logged), gradient = jax.value_and_grad(fidelity, has_aux=True)(fixed)

        per_image_kl = vae.kl(mean, logvar)
        logged["kl"] = _average(per_image_kl)
        total = weights.kl_weight * jnp.mean(per_image_kl) / math.prod(images.shape[1:])
        if weights.gan_weight:
            begun = step >= weights.gan_start
            g, g_gradient, d, real, fake = jax.lax.cond(
                begun, self._adversarial, _nothing, params["discriminator"], images, fixed
            )
            norms = [jnp.linalg.norm(to_last(x)[0]) for x in (gradient, g_gradient)]
            weight = weights.gan_weight * adaptive_weight(*norms) * begun
            value, gradient = value + weight * g, gradient + weight * g_gradient
            total += d
            scalars = {"g_loss": g, "d_loss": d, "adaptive_weight": weight}
            scalars |= {"logits/real": real, "logits/fake": fake}
            logged |= {name: _average(x) for name, x in scalars.items()}
        return total + _with_gradient(value, made, gradient), logged

    def _fidelity(self, frozen, images, made):
        """(F, metrics): how far the reconstruction is from the image."""
        difference = made - images
        l1 = self.weights.reconstruction == "l1"
        error = jnp.abs(difference) if l1 else jnp.square(difference)
        per_image = jnp.mean(error, axis=(1, 2, 3))
        total, logged = jnp.mean(per_image), {"rec": _average(per_image)}
        if "lpips" in frozen:
            distance = lpips(frozen["lpips"], made, images, self.dtype)
            total += self.weights.lpips_weight * jnp.mean(distance)
            logged["lpips"] = _average(distance)
        return total, logged

    def _adversarial(self, params, images, made):
        """(G, dG/dy, L, mean logit of real images, of made ones); only L has a gradient."""

        def judge(params, x):
            return self.discriminator.apply({"params": params}, x)

        def persuade(x):
            return -jnp.mean(judge(jax.lax.stop_gradient(params), x))

        g, gradient = jax.value_and_grad(persuade)(made)
        real, fake = judge(params, images), judge(params, made)
        d = (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2
        return g, gradient, d, jnp.mean(real), jnp.mean(fake)

    def evaluators(self):
        """ "latents": see above. "reconstruction": PSNR of held-out images."""
        found = {"latents": self._measure_latents}
        if self._evaluation.num_images:
            found["reconstruction"] = self._reconstruction
        return found

    def _measure_latents(self, params, frozen, mesh):
        """Yields ("std", ...) and ("scaling_factor", ...) of the first training batches."""
        size, count = self._evaluation.batch_size, self._evaluation.num_latents
        pipeline = make_pipeline(self._data, seed=0, batch_size=size, train=True)
        batches = on_mesh((pipeline[i] for i in range(-(-count // size))), mesh)
        sums = _sum_over(batches, lambda b, key: self._moments(params["vae"], b, key))
        mean, square = sums[:2] / sums[2]
        std = math.sqrt(max(square - mean**2, 1e-12))
        yield "std", std
        yield "scaling_factor", 1 / std

    @functools.partial(jax.jit, static_argnums=0)
    def _moments(self, params, batch, key):
        """[sum, sum of squares, number] of sampled latents."""
        mean, logvar = vae.encode_moments(params, self.model, to_float(batch["image"]), self.dtype)
        x = vae.sample_posterior(mean, logvar, jax.random.normal(key, mean.shape))
        return jnp.stack([jnp.sum(x), jnp.sum(x**2), jnp.float32(x.size)])

    def _reconstruction(self, params, frozen, mesh):
        """Yields psnr (dB), mae, ssim from the posterior's mean, and of `downsampled` images.

        The latter, NAME_downsampled, are the same images stored as small images of as many values.
        Means over the first validation images, as `evaluation.metrics` defines them.
        """

        def stream():
            for batch in held_out(self._data, self._evaluation, mesh):
                made, small = self._reconstructed(params["vae"], batch["image"])
                yield "", made, batch["image"], batch["mask"]
                yield "_downsampled", small, batch["image"], batch["mask"]

        return evaluation.means(stream())

    @functools.partial(jax.jit, static_argnums=0)
    def _reconstructed(self, params, images):
        """uint8 images → their reconstructions, and `downsampled` ones of as many values."""
        images = to_float(images)
        mean, _ = vae.encode_moments(params, self.model, images, self.dtype)
        small = downsampled(images, math.prod(mean.shape[1:]))
        return vae.decode_latents(params, self.model, mean, self.dtype), small

    def export_config(self):
        """What `models.load_vae` needs beside the weights and the measured scaling factor."""
        return {"kind": "vae", "config": dataclasses.asdict(self.model)}


def _begin(cfg: VAEConfig, key):
    """The VAE's parameters at the start, from one draw of random numbers (quick to compile).

    Kernels: normal, variance 1 / fan-in. The log variance: -6, because with a standard deviation
    as large as the means' the decoder would see mostly noise, and the bias that takes it away moves
    by no more than the learning rate per step.
    """
    shapes = jax.eval_shape(lambda key: vae.init_vae(cfg, key), key)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    drawn = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])

    def begin(path, shape, noise):
        module, leaf = path_string(path).split("/")[-2:]
        if leaf == "kernel":
            return noise.reshape(shape) / math.sqrt(math.prod(shape[:-1]))
        if leaf == "scale":
            return jnp.ones(shape)
        start = jnp.zeros(shape)
        return start.at[shape[0] // 2 :].set(FIRST_LOGVAR) if module == "quant_conv" else start

    parts = [begin(path, leaf.shape, x) for (path, leaf), x in zip(leaves, drawn)]
    return jax.tree.unflatten(tree, parts)


def adaptive_weight(fidelity_norm, adversarial_norm):
    """How much stronger the gradient of F is than that of G, within 0 .. 1e4."""
    return jnp.clip(fidelity_norm / (adversarial_norm + 1e-4), 0.0, MAX_ADAPTIVE_WEIGHT)


def downsampled(images, values: int):
    """What is left of images that are stored as small images: the simplest thing to compare with.

    Averaged over areas to the smallest grid with at least `values` numbers (the channels counted),
    then enlarged bicubically.

    Args:
        images: float32 [B, H, W, C].
        values: how many numbers an image may take.

    Returns:
        The same shape and type.
    """
    _, H, W, C = images.shape
    scale = math.sqrt(values / (H * W * C))
    down = [jnp.asarray(_area_weights(n, math.ceil(n * scale - 1e-6))) for n in (H, W)]
    small = jnp.einsum("bhwc,ih,jw->bijc", images, *down, precision="highest")
    return jax.image.resize(small, images.shape, "cubic", precision="highest")


def _area_weights(size: int, small: int) -> np.ndarray:
    """[small, size]: how much of each pixel lies in each of `small` equal parts, rows sum to 1."""
    edges = np.linspace(0, size, small + 1)
    pixel = np.arange(size)
    low = np.maximum(edges[:-1, None], pixel)
    high = np.minimum(edges[1:, None], pixel + 1)
    return (np.maximum(high - low, 0) * small / size).astype(np.float32)


def _sum_over(batches, score) -> np.ndarray:
    """The float64 sum over batches of score(batch, key)."""
    total = 0.0
    for index, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(0), index)
        total = total + np.asarray(jax.device_get(score(batch, key)), np.float64)
    return total


def _with_gradient(value, x, gradient):
    """The scalar `value`, taken as a constant, with `gradient` as its derivative by x."""
    value, gradient = jax.lax.stop_gradient((value, gradient))
    return value + jnp.sum(gradient * (x - jax.lax.stop_gradient(x)))


def _nothing(params, images, made):
    """The adversarial terms before they begin."""
    zero = jnp.float32(0)
    return zero, jnp.zeros_like(made), zero, zero, zero


def _average(values):
    return metrics.Average.from_model_output(values)
