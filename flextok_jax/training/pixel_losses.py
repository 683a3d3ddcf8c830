"""Losses of reconstructed pixels: L1 or L2, LPIPS, and a discriminator that starts late.

With x the image, y its reconstruction, D the discriminator and `sg` what is held constant,

    F(y) + w G(y; sg D) + L(D; sg y),      F = |x - y| (or its square) + lpips_weight LPIPS(x, y)
    G = -mean D(y)        L = (mean max(0, 1 - D(x)) + mean max(0, 1 + D(y))) / 2

so the generator (whatever made y) and the discriminator each get the gradient of their own terms
only. Hinge loss: Lim and Ye, arXiv 1705.02894. The adaptive weight and its clipping: Esser et al.,
arXiv 2012.09841; with W the kernel of the generator's last layer,

    w = gan_weight clip(|dF/dW| / (|dG/dW| + 1e-4), 0, 1e4).
"""

import functools
import logging

import jax
import jax.numpy as jnp
from clu.metrics import Average

from flextok_jax.io.formats import networks
from flextok_jax.nn.lpips import lpips
from flextok_jax.nn.patchgan import PatchGAN

MAX_ADAPTIVE_WEIGHT = 1e4

log = logging.getLogger(__name__)


class PixelLosses:
    """The losses above, as pure functions of parameters. Images are multiples of `multiple`."""

    def __init__(self, weights, discriminator, lpips_paths, dtype):
        """Reads the parts `loss`, `discriminator` and `lpips` of a config.

        Raises:
            ValueError: a value is not allowed.
        """
        self._weights, self._lpips, self._dtype = weights, lpips_paths, jnp.dtype(dtype)
        self.discriminator = PatchGAN(**discriminator, dtype=self._dtype)
        self.multiple = 2 ** (self.discriminator.layers + 2) if weights.gan_weight else 1
        if weights.reconstruction not in ("l1", "l2"):
            raise ValueError(f"loss.reconstruction={weights.reconstruction!r}: l1 or l2")
        if bool(lpips_paths.vgg) != bool(lpips_paths.heads):
            raise ValueError("lpips.vgg and lpips.heads: name both files, or neither")

    def init(self, key):
        """{"discriminator"}, float32; {} without a `gan_weight`."""
        if not self._weights.gan_weight:
            return {}
        images = jnp.zeros((1, self.multiple, self.multiple, 3))
        return {"discriminator": self.discriminator.init(key, images)["params"]}

    def load_frozen(self):
        """{"lpips"}: VGG16 and the linear heads; {} where no files are named."""
        if not self._weights.lpips_weight:
            return {}
        if not self._lpips.vgg:
            log.warning("no LPIPS term: lpips.vgg and lpips.heads name no files")
            return {}
        return {"lpips": networks.load_lpips(self._lpips.vgg, self._lpips.heads)}

    def loss(self, params, frozen, images, made, to_last, step):
        """Each gradient with respect to the reconstruction is computed once.

        Args:
            images: float32 [B, H, W, 3] in [-1, 1].
            made: their reconstructions, of the same shape.
            to_last: from a gradient by `made` to (that by W,), as `jax.vjp` returns it.
            step: int32, batches so far.

        Returns:
            (float32 scalar with the gradients above, metrics)
        """
        weights, fixed = self._weights, jax.lax.stop_gradient(made)
        reconstruction = functools.partial(self.reconstruction, frozen, images)
        (value, logged), gradient = jax.value_and_grad(reconstruction, has_aux=True)(fixed)
        if not weights.gan_weight:
            return _with_gradient(value, made, gradient), logged
        started = step >= weights.gan_start
        g, g_gradient, d, real, fake = jax.lax.cond(
            started, self._adversarial, _nothing, params["discriminator"], images, fixed
        )
        norms = [jnp.linalg.norm(to_last(x)[0]) for x in (gradient, g_gradient)]
        weight = weights.gan_weight * adaptive_weight(*norms) * started
        value, gradient = value + weight * g, gradient + weight * g_gradient
        scalars = {"g_loss": g, "d_loss": d, "adaptive_weight": weight}
        scalars |= {"logits/real": real, "logits/fake": fake}
        logged |= {name: Average.from_model_output(x) for name, x in scalars.items()}
        return d + _with_gradient(value, made, gradient), logged

    def reconstruction(self, frozen, images, made):
        """(F, metrics)."""
        difference = made - images
        l1 = self._weights.reconstruction == "l1"
        error = jnp.abs(difference) if l1 else jnp.square(difference)
        per_image = jnp.mean(error, axis=(1, 2, 3))
        total, logged = jnp.mean(per_image), {"rec": Average.from_model_output(per_image)}
        if "lpips" in frozen:
            distance = lpips(frozen["lpips"], made, images, self._dtype)
            total += self._weights.lpips_weight * jnp.mean(distance)
            logged["lpips"] = Average.from_model_output(distance)
        return total, logged

    def _adversarial(self, params, images, made):
        """(G, dG/dy, L, mean logit of real images, of made ones); only L has a gradient."""

        def logits(params, x):
            return self.discriminator.apply({"params": params}, x)

        def generator_loss(x):
            return -jnp.mean(logits(jax.lax.stop_gradient(params), x))

        g, gradient = jax.value_and_grad(generator_loss)(made)
        real, fake = logits(params, images), logits(params, made)
        d = (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2
        return g, gradient, d, jnp.mean(real), jnp.mean(fake)


def adaptive_weight(reconstruction_norm, adversarial_norm):
    """How much stronger the gradient of F is than that of G, within 0 .. 1e4."""
    return jnp.clip(reconstruction_norm / (adversarial_norm + 1e-4), 0.0, MAX_ADAPTIVE_WEIGHT)


def _nothing(params, images, made):
    """The adversarial terms before they start."""
    zero = jnp.float32(0)
    return zero, jnp.zeros_like(made), zero, zero, zero


def _with_gradient(value, x, gradient):
    """The scalar `value`, taken as a constant, with `gradient` as its derivative by x."""
    value, gradient = jax.lax.stop_gradient((value, gradient))
    return value + jnp.sum(gradient * (x - jax.lax.stop_gradient(x)))
