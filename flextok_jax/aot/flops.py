"""Model FLOPs of one training step: what the mathematics asks for, whatever is computed twice.

6 x parameters of each matrix x the positions it acts on (2 forwards, 4 backwards), and for
attention 12 x pairs x width per layer, where every position that may attend to one is a pair. Of a
VAE's step, where some networks are not trained and some run twice, the products are counted as they
stand in the program.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.extend.core

from flextok_jax.nn import ar, flextok
from flextok_jax.nn.config import ARConfig, FlexTokConfig
from flextok_jax.nn.layout import path_string


def tokenizer(cfg: FlexTokConfig) -> int:
    """Of one image, encoder and decoder with all registers. The VAE is not part of it."""
    n, r = cfg.num_patches, cfg.num_tokens
    positions = (
        (r"(encoder|decoder)/blocks/(attn|mlp)/.*", n + r),
        (r"(encoder|decoder)/patch_emb/.*|decoder/head/.*", n),
        (r"decoder/register_proj/.*|encoder/head/.*", r),
        (r"decoder/(blocks/adaln|head_adaln|time_mlp_.)/.*", 1),
    )
    params = jax.eval_shape(lambda: flextok.init(cfg, jax.random.key(0)))
    params = {name: params[name] for name in ("encoder", "decoder")}
    # Patches see patches; register i sees patches and registers up to itself.
    encoder = n * n + r * n + r * (r + 1) // 2
    attention = cfg.enc_depth * encoder * cfg.enc_width
    attention += cfg.dec_depth * (n + r) ** 2 * cfg.dec_width
    return 6 * _weights(params, positions) + 12 * attention


def ar_model(cfg: ARConfig, text_length: int = 0) -> int:
    """Of one sequence of all tokens; `text_length` positions of text in a text model."""
    length = cfg.num_tokens
    positions = (
        (r"ar/blocks/cross/w[kv]/.*|ar/text_fc\d/.*", text_length),
        (r"ar/(blocks|head)/.*", length),
    )
    params = jax.eval_shape(lambda: ar.init(cfg, jax.random.key(0)))
    pairs = length * (length + 1) // 2 + length * text_length
    return 6 * _weights(params, positions) + 12 * cfg.depth * pairs * cfg.width


def products(function: Callable, *args) -> int:
    """Of all matrix products and convolutions of `function(*args)`; args may be shapes.

    A convolution over spread out pixels (the gradient of one with strides) counts without the zeros
    between them; of branches the dearest one counts.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            total += _of_product(name, params, *(x.aval.shape for x in equation.invars[:2]),
                                 equation.outvars[0].aval.shape)  # fmt: skip
        elif name == "cond":
            total += max(_of_jaxpr(branch.jaxpr) for branch in params["branches"])
        elif name == "while":
            raise ValueError("a loop whose rounds depend on data has no number of FLOPs")
        else:
            inside = [getattr(x, "jaxpr", x) for x in params.values()]
            inside = sum(_of_jaxpr(x) for x in inside if isinstance(x, jax.extend.core.Jaxpr))
            total += params.get("length", 1) * inside
    return total


def _of_product(name, params, left, right, out) -> int:
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    _, (_, channels, *sides), _ = params["dimension_numbers"]
    zeros = math.prod(params["lhs_dilation"])
    return 2 * math.prod(out) * math.prod(right[axis] for axis in (channels, *sides)) // zeros


def _weights(params, positions) -> int:
    """Sum over matrices of parameters times positions."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path_string(path)
        if name.endswith("kernel"):
            times = next(count for pattern, count in positions if re.fullmatch(pattern, name))
            total += math.prod(leaf.shape) * times
    return total
