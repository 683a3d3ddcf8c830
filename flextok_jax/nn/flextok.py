"""The whole tokenizer as pure functions of (params, configs, arrays)."""

import contextlib

import jax
import jax.numpy as jnp

from flextok_jax.flow import path, sampler
from flextok_jax.nn import bottleneck, layout, vae
from flextok_jax.nn.config import Compute
from flextok_jax.nn.decoder import Condition, Decoder, unconditional
from flextok_jax.nn.encoder import Encoder
from flextok_jax.nn.tokenizer_config import TokenizerConfig


def init(cfg: TokenizerConfig, key: jax.Array) -> dict:
    """Random parameters, float32, in boxes with their axes (see nn/layout.py).

    {"vae", "encoder", "decoder"}, and {"bottleneck"} where that has any.
    """
    key_vae, key_enc, key_dec, key_book = jax.random.split(key, 4)
    latents = jnp.zeros((1, *cfg.latent_shape))
    condition = Condition(
        jnp.zeros((1, cfg.num_tokens, cfg.code_dim)),
        jnp.full((1,), cfg.num_tokens),
        jnp.zeros((1,), bool),
    )
    given = dict(x_t=latents, t=jnp.zeros((1,))) if cfg.is_flow else {}
    text = jnp.zeros((1, cfg.text.length, cfg.text.dim)) if cfg.text.dim else None
    params = {
        "vae": vae.init_vae(cfg.vae, key_vae),
        "encoder": Encoder(cfg).init(key_enc, latents, text=text)["params"],
        "decoder": Decoder(cfg).init(key_dec, (condition,), text=text, **given)["params"],
    }
    for part in ("encoder", "decoder"):  # Their layers are the VAE's, which say no axes.
        if "convs" in params[part]:
            params[part] |= {"convs": layout.whole(params[part]["convs"])}
    book = bottleneck.init(cfg.bottleneck, key_book)
    return params | ({"bottleneck": book} if book else {})


def shapes(cfg: TokenizerConfig) -> dict:
    """The shapes of `init`'s parameters, without making them, in their boxes."""
    return jax.eval_shape(lambda key: init(cfg, key), jax.random.key(0))


def lengths(num_tokens: int, base: int = 2) -> tuple[int, ...]:
    """1, 2, 4, ... (powers of `base`) below R, and R: what programs are compiled for."""
    found = [1]
    while found[-1] * base < num_tokens:
        found.append(found[-1] * base)
    return (*found, num_tokens) if num_tokens > 1 else (1,)


def doublings(prefixes) -> tuple[int, ...]:
    """Of ascending numbers of tokens the first from 1, 2, 4, ... on, and the last."""
    wanted = lengths(prefixes[-1])
    return tuple(sorted({next(k for k in prefixes if k >= least) for least in wanted}))


def bucket(k: int, num_tokens: int, base: int = 2) -> int:
    """The smallest of `lengths` that is at least k."""
    return next(length for length in lengths(num_tokens, base) if length >= k)


def encode(
    params,
    cfg: TokenizerConfig,
    compute: Compute,
    latents,
    num_registers=None,
    keep=None,
    text=None,
) -> jax.Array:
    """Latents [B, h, w, C] -> registers float32 [B, K, channels]; see `Encoder.__call__`."""
    args = (latents, num_registers, keep, text)
    return Encoder(cfg, compute).apply({"params": params["encoder"]}, *args)


def quantize(params, cfg: TokenizerConfig, registers, noise=None) -> bottleneck.Quantized:
    """Registers [B, K, channels] -> codes, ids and loss; see `bottleneck.quantize`."""
    return bottleneck.quantize(params.get("bottleneck", {}), cfg.bottleneck, registers, noise)


def codes_of(params, cfg: TokenizerConfig, tokens) -> jax.Array:
    """Tokens (ids, or float codes) -> float32 [B, K, F]."""
    return bottleneck.codes_of(params.get("bottleneck", {}), cfg.bottleneck, tokens)


def tokens_of(
    params,
    cfg: TokenizerConfig,
    compute: Compute,
    images,
    count=None,
    noise=None,
    keep=None,
    text=None,
):
    """Images to tokens: the way of `FlexTok.tokenize` and of training on tokens alike.

    Where ids are decided, float32 means products of the highest precision: TF32 and bfloat16
    products would turn some ids into their neighbours.

    Args:
        images: float32 [B, H, W, 3] in [-1, 1].
        count: K, how many tokens; all by default.
        noise: [B, h, w, C], for a sample of the VAE's posterior; None: its mean.
        keep: int32 [B], text: float [B, T, E]; see `Encoder.__call__`.

    Returns:
        (registers float32 [B, K, channels], tokens: ids int32 [B, K] or codes float32 [B, K, F]).
    """
    dtype, exact = jnp.dtype(compute.dtype), compute.dtype == "float32"
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        latents = vae.images_to_latents(params["vae"], cfg.vae, images, dtype, noise)
        registers = encode(params, cfg, compute, latents, count, keep, text)
        found = quantize(params, cfg, registers)
    return registers, found.codes if found.ids is None else found.ids


def velocities(
    params, cfg: TokenizerConfig, compute: Compute, x_t, t, conditions, capture=None, length=None
):
    """The velocities of a flow, one per condition; see `Decoder.__call__`."""
    decoder = Decoder(cfg, compute)
    made = decoder.apply({"params": params["decoder"]}, conditions, x_t, t, capture, length=length)
    if cfg.target.flow.predicts == "velocity":
        return made
    images, features = (made, None) if capture is None else made
    found = tuple(path.velocity_to(image, x_t, t) for image in images)
    return found if capture is None else (found, features)


def values(
    params, cfg: TokenizerConfig, compute: Compute, codes, keep, grid=None, text=None
) -> jax.Array:
    """Codes [B, K, F] to scaled latents float32 [B, h, w, C] in one pass; see `Decoder`."""
    condition = Condition(codes, keep, jnp.zeros(keep.shape, bool))
    decoder = Decoder(cfg, compute)
    (made,) = decoder.apply({"params": params["decoder"]}, (condition,), grid=grid, text=text)
    return made


def last_kernel(cfg: TokenizerConfig) -> tuple[str, ...]:
    """The path below "decoder" of the weights that write the values."""
    if cfg.has_convs:
        return "convs", "conv_out", "kernel"
    if cfg.sites.levels:  # The finest of several.
        return f"head_{cfg.sites.levels}", "kernel"
    return "head_conv" if cfg.target.output == "conv" else "head", "kernel"


def flow_steps(
    params,
    cfg: TokenizerConfig,
    compute: Compute,
    codes,
    keep,
    state,
    schedule,
    first,
    stop,
    method,
) -> sampler.State:
    """Steps of the flow from codes to scaled latents.

    Args:
        codes: float32 [B, K, F], K <= R: positions beyond K are folded into one.
        keep: int32 [B], tokens kept of each image, at most K.
        state, schedule, first, stop, method: see `sampler.integrate`.
    """
    batch = codes.shape[0]
    given = (Condition(codes, keep, jnp.zeros((batch,), bool)),)
    both = (*given, unconditional(batch, cfg.code_dim))

    def step(x, t, length, guided):
        conditions = both if guided else given
        return velocities(params, cfg, compute, x, t, conditions, length=length)

    return sampler.integrate(step, state, schedule, first, stop, method)


def decode(params, cfg: TokenizerConfig, compute: Compute, codes, keep, noise, how=None, text=None):
    """Codes to scaled latents, float32 [B, h, w, C], by either target.

    Args:
        codes, keep: see `flow_steps`.
        noise: [B, h, w, C]; of the target "values" its shape alone counts.
        how: a `Sampler`, None for the model's own; not for the target "values".
        text: float [B, T, E], see `Decoder.__call__`.
    """
    if not cfg.is_flow:
        grid = tuple(side // cfg.sites.patch_size for side in noise.shape[1:3])
        return values(params, cfg, compute, codes, keep, grid, text)
    how = cfg.sampler if how is None else how
    state, steps = sampler.start(noise), how.schedule()
    return flow_steps(
        params, cfg, compute, codes, keep, state, steps, 0, how.steps, how.method
    ).x  # fmt: skip
