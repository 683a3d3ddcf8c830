"""Stage 0: the autoencoder between pixels and latents.

The loss is that of `pixel_losses` for a reconstruction from a sample of the posterior, with the
kernel of the decoder's last convolution as W, plus kl_weight KL / (H W 3). `optim.groups` gives the
discriminator an optimizer of its own.

The latent scaling factor, 1 / (standard deviation of sampled latents of training images, with the
averaged weights), is measured whenever a checkpoint is saved, and lies in it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.evaluation import metrics
from flextok_jax.io import models
from flextok_jax.nn import vae
from flextok_jax.nn.images import to_float
from flextok_jax.nn.layout import path_string
from flextok_jax.nn.vae_config import VAEConfig
from flextok_jax.parallel.rng import named
from flextok_jax.training.batches import Validation, on_mesh
from flextok_jax.training.pixel_losses import PixelLosses
from flextok_jax.training.stage import Stage

FIRST_LOGVAR = -6.0


class VAEStage(Stage):
    """Reconstruction, KL, LPIPS and an adversarial loss that starts late."""

    def __init__(self, config):
        """Reads `model`, `discriminator`, `loss`, `lpips`, `compute`, `evaluation` and `data`."""
        model = config.model.to_dict() | {"block_out": tuple(config.model.block_out)}
        self.model, self._kl_weight = VAEConfig(**model), config.loss.kl_weight
        self.dtype = jnp.dtype(config.compute.dtype)
        self.pixels = PixelLosses(config.loss, config.discriminator, config.lpips, self.dtype)
        self._data, self._evaluation = config.data, config.evaluation
        multiple = math.lcm(self.model.downsample, self.pixels.multiple)
        if (size := config.data.image_size) % multiple:
            raise ValueError(
                f"data.image_size={size}: VAE and discriminator need a multiple of {multiple}"
            )

    def init(self, key):
        """{"vae"}, and with a `gan_weight` {"discriminator"}; float32."""
        params = {"vae": _first_params(self.model, named(key, "vae"))}
        return params | self.pixels.init(named(key, "discriminator"))

    def init_from(self, source: str):
        """The VAE of a folder, a hub id or a workdir of ours; the discriminator starts anew."""
        found, params = models.load_vae(source, scaling_factor=1.0)
        if dataclasses.replace(found, sample_posterior=True) != self.model:
            raise ValueError(f"the VAE at {source} is {found}; the configuration is {self.model}")
        return jax.jit(self.init)(jax.random.key(0)) | {"vae": params}

    def load_frozen(self):
        """{"lpips"}, if `lpips` names its files."""
        return self.pixels.load_frozen()

    def loss(self, params, frozen, batch, key, step):
        """See above.

        Args:
            batch: "image": uint8 [B, H, W, 3].
        """
        images = to_float(batch["image"])
        mean, logvar = vae.encode_moments(params["vae"], self.model, images, self.dtype)
        noise = jax.random.normal(named(key, "posterior"), mean.shape)
        latents = vae.sample_posterior(mean, logvar, noise)

        def decode(last_kernel):
            decoder = params["vae"]["decoder"]
            decoder = decoder | {"conv_out": decoder["conv_out"] | {"kernel": last_kernel}}
            tree = params["vae"] | {"decoder": decoder}
            return vae.decode_latents(tree, self.model, latents, self.dtype)

        made, to_last = jax.vjp(decode, params["vae"]["decoder"]["conv_out"]["kernel"])
        loss, logged = self.pixels.loss(params, frozen, images, made, to_last, step)
        kl = vae.kl(mean, logvar)
        loss += self._kl_weight * jnp.mean(kl) / math.prod(images.shape[1:])
        return loss, logged | {"kl": Average.from_model_output(kl)}

    def measure(self, params, frozen, mesh):
        """{"scaling_factor", "latent_std"} of the first `evaluation.num_latents` images."""
        size = self._evaluation.batch_size
        count = -(-self._evaluation.num_latents // size)
        sums = 0.0
        for i, batch in enumerate(on_mesh((self._training[i] for i in range(count)), mesh)):
            key = jax.random.fold_in(jax.random.key(0), i)
            found = self._moments(params["vae"], batch["image"], key)
            sums = sums + np.asarray(jax.device_get(found), np.float64)
        mean, square = sums[:2] / sums[2]
        std = math.sqrt(max(square - mean**2, 1e-12))
        return {"scaling_factor": 1 / std, "latent_std": std}

    @functools.cached_property
    def _training(self):
        size = self._evaluation.batch_size
        return make_pipeline(self._data, seed=0, batch_size=size, train=True)

    @functools.partial(jax.jit, static_argnums=0)
    def _moments(self, params, images, key):
        """[sum, sum of squares, number] of sampled latents."""
        mean, logvar = vae.encode_moments(params, self.model, to_float(images), self.dtype)
        x = vae.sample_posterior(mean, logvar, jax.random.normal(key, mean.shape))
        return jnp.stack([jnp.sum(x), jnp.sum(x**2), jnp.float32(x.size)])

    def evaluators(self):
        """ "reconstruction": psnr (dB), mae, ssim of validation images, by the posterior's mean."""
        if not self._evaluation.num_images:
            return {}
        images = Validation(self._data, self._evaluation)

        def stream(params, mesh):
            for batch in images.batches(mesh):
                found = self._decoded(params["vae"], batch["image"])
                yield "", found, batch["image"], batch["mask"]

        return {"reconstruction": lambda params, frozen, mesh: metrics.means(stream(params, mesh))}

    @functools.partial(jax.jit, static_argnums=0)
    def _decoded(self, params, images):
        mean, _ = vae.encode_moments(params, self.model, to_float(images), self.dtype)
        return vae.decode_latents(params, self.model, mean, self.dtype)

    def export_config(self):
        """What `models.load_vae` needs beside the weights and the measured scaling factor."""
        return {"kind": "vae", "config": dataclasses.asdict(self.model)}


def _first_params(cfg: VAEConfig, key):
    """The VAE's parameters at the start, from one array of random numbers (quick to compile).

    Kernels: normal, variance 1 / fan-in. Log variance: -6. With the means' own standard deviation
    the decoder would see mostly noise for thousands of steps.
    """
    shapes = jax.eval_shape(lambda key: vae.init_vae(cfg, key), key)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    noises = jnp.split(jax.random.normal(key, (int(ends[-1]),)), ends[:-1])

    def first(path, shape, noise):
        module, leaf = path_string(path).split("/")[-2:]
        if leaf == "kernel":
            return noise.reshape(shape) / math.sqrt(math.prod(shape[:-1]))
        if leaf == "scale":
            return jnp.ones(shape)
        start = jnp.zeros(shape)
        return start.at[shape[0] // 2 :].set(FIRST_LOGVAR) if module == "quant_conv" else start

    parts = [first(path, leaf.shape, x) for (path, leaf), x in zip(leaves, noises)]
    return jax.tree.unflatten(tree, parts)
