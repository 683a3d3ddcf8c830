"""Flow over token vectors, from noise or from a text (He et al., arXiv 2503.10772).

A model with `ARConfig.channels` generates the tokens of a continuous bottleneck, all at once, by a
rectified flow from t = 1 to t = 0. By class, or without condition, the source at t = 1 is noise. Of
a text model the source is a sample of a Gaussian that the text decides, of the shape of the tokens:
the flow begins at the text, and nothing else tells it what the text is. That Gaussian is made by a
Transformer of K learned queries which attend to the text, under "source".

Guidance of a text model: for some images of training the label is negative, and the tokens are
those of another one of them. So this branch learns the flow from any text to any image.

B batch, K tokens, F channels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flextok_jax.flow import path, sampler
from flextok_jax.nn import ar, vae
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Compute
from flextok_jax.nn.generation import Sampling
from flextok_jax.nn.velocity import Velocity


class Losses(NamedTuple):
    """Of each image, float32 [B].

    Attributes:
        flow: the mean squared error of the velocity.
        source: see `source_loss`; 0 without text.
    """

    flow: jax.Array
    source: jax.Array


def velocity(params, cfg: ARConfig, compute: Compute, x, t, labels) -> jax.Array:
    """See `Velocity.__call__`."""
    own = {name: p for name, p in params["ar"].items() if name != "source"}
    return Velocity(cfg, compute).apply({"params": own}, x, t, labels)


def source(params, cfg: ARConfig, compute: Compute, condition: ARCondition):
    """Mean and log variance, float32 [B, K, F] each, of where the flow of a text begins."""
    own, dtype = {"ar": params["ar"]["source"]}, jnp.dtype(compute.dtype)
    shape = (len(condition.text), cfg.num_tokens, cfg.width)
    queries = jnp.broadcast_to(own["ar"]["pos"].astype(dtype)[None], shape)
    x = ar.through(own, cfg.source, compute, queries, condition)
    return vae.split_moments(ar.head(ar.head_weights(own, x.dtype), x))


def source_loss(mean: jax.Array, logvar: jax.Array, samples: jax.Array) -> jax.Array:
    """What keeps the Gaussians of texts wide, and apart from each other: float32 [B], in nats.

    The sum of two terms. 0.5 sum((0.3 mean)^6 + variance - 1 - log variance), as in FlowTok's code,
    is the KL divergence to the standard normal distribution, but for the mean, which is nearly free
    up to 3: where the variance falls, a point of the path gives the image away, and the text is
    not learned. And -log of the probability that a sample comes from its own text rather than from
    another one of the batch, InfoNCE (arXiv 1807.03748) with the densities themselves as critic.

    Args:
        mean, logvar, samples: float32 [B, K, F], of each text.
    """
    width = 0.5 * jnp.sum((0.3 * mean) ** 6 + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2))
    mean, logvar, samples = (x.reshape(len(x), -1) for x in (mean, logvar, samples))
    product = functools.partial(jnp.matmul, precision="highest")
    precision = jnp.exp(-logvar)
    distance = product(samples**2, precision.T) - 2 * product(samples, (mean * precision).T)
    density = -0.5 * (distance + jnp.sum(mean**2 * precision + logvar, axis=1)[None])
    return width - jnp.diagonal(jax.nn.log_softmax(density))


def rolled(null: jax.Array) -> jax.Array:
    """A permutation int [B] that moves each row of `null` (bool [B]) to the next of them."""
    order = jnp.argsort(~null, stable=True)  # Rows of `null` first.
    place = jnp.cumsum(null) - 1
    following = order[(place + 1) % jnp.maximum(1, jnp.sum(null))]
    return jnp.where(null, following, jnp.arange(len(null)))


def losses(
    params,
    cfg: ARConfig,
    compute: Compute,
    tokens,
    condition: ARCondition,
    null,
    key,
    time_shift: float = 1.0,
) -> Losses:
    """The losses of training.

    Args:
        tokens: float32 [B, K, F].
        condition: by class, with negative labels where `null`; by text, the texts of all images.
        null: bool [B], the images with the null condition.
        key: of times (logit-normal) and noise.
        time_shift: above 1 more times are near the source; see `path.shift_time`.
    """
    batch, x0 = len(tokens), tokens / cfg.scale
    times, noises = jax.random.split(key)
    noise, apart = jax.random.normal(noises, x0.shape), jnp.zeros(batch)
    labels = condition.labels
    if cfg.text_dim:
        labels, x0 = jnp.where(null, -1, 0), x0[rolled(null)]
        moments = source(params, cfg, compute, condition)
        noise = vae.sample_posterior(*moments, noise)
        apart = source_loss(*moments, noise)
    t = path.shift_time(path.logit_normal_time(times, batch), time_shift)
    found = velocity(params, cfg, compute, path.interpolate(x0, noise, t), t, labels)
    return Losses(path.flow_loss(found, path.target(x0, noise)), apart)


def generate(
    params,
    cfg: ARConfig,
    compute: Compute,
    condition: ARCondition,
    null: ARCondition | None,
    sampling: Sampling,
    keys: jax.Array,
    schedule: sampler.Schedule,
    stop: jax.Array,
) -> jax.Array:
    """All tokens, float32 [B, K, F], by Euler steps.

    Args:
        condition: of the B samples.
        null: anything but None: with guidance, of each position.
        sampling: its temperature multiplies the noise.
        keys: [B]. A sample depends on its own key, not on the rest of the batch.
        schedule, stop: see `sampler.integrate`.
    """
    shape, labels = (cfg.num_tokens, cfg.channels), condition.labels
    x = sampling.temperature * jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    if cfg.text_dim:
        labels = jnp.zeros(len(x), jnp.int32)
        x = vae.sample_posterior(*source(params, cfg, compute, condition), x)

    def step(x, t, length, guided):
        made = velocity(params, cfg, compute, x, t, labels)
        if null is not None:
            other = velocity(params, cfg, compute, x, t, jnp.full_like(labels, -1))
            made = other + sampling.guidance[None, :, None] * (made - other)
        return (made,)

    state = sampler.integrate(step, sampler.start(x), schedule, 0, stop, sampler.Method())
    return state.x * cfg.scale
