"""The TPU kernels, run by XLA on a CPU, equal the plain path: values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import TINY, random_params

from flextok_jax.nn import flextok, kernels, order
from flextok_jax.nn.attention import layer_norm
from flextok_jax.nn.config import Blocks, Compute
from flextok_jax.nn.decoder import Condition
from flextok_jax.nn.tokenizer_config import Sites, Tokens
from flextok_jax.parallel.mesh import AXES, make_mesh

B, H, D = 2, 2, 64
W = H * D


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [(i + 1) * jax.random.normal(k, s) for i, (k, s) in enumerate(zip(keys, shapes))]


def agree(f, plain, *args):
    """Results, and gradients of a sum of them with random weights."""

    def both(f):
        def loss(*args):
            out = jax.tree.leaves(f(*args))
            weights = arrays(*(leaf.shape for leaf in out))
            return sum(jnp.sum(a * b) for a, b in zip(out, weights)), out

        return jax.jit(jax.value_and_grad(loss, tuple(range(len(args))), has_aux=True))(*args)

    (_, found), found_grads = both(f)
    (_, expected), expected_grads = both(plain)
    for a, b in zip((*found, *found_grads), (*expected, *expected_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0)


LONG = 384  # Queries in three spans, with 128, 256 and 384 keys where the mask allows no more.
BIAS = np.append(np.zeros(149, np.float32), np.log(7))  # The last key stands for seven.
ATTENTIONS = {  # (positions, mask, bias of keys)
    "all": (LONG, None, None),
    "causal": (LONG, np.tri(LONG, dtype=bool), None),
    "encoder": (LONG, order.causal_last(x=128, y=LONG - 128).mask(), None),
    "part of a block": (150, order.causal_last(x=128, y=22).mask(), None),
    "folded": (150, None, BIAS),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_with_its_norms_is_the_definition_with_its_gradient(name, interpreted):
    length, mask, bias = ATTENTIONS[name]

    def plain(q, k, v):
        q, k, v = (x.reshape(B, length, H, D) for x in (q, k, v))
        logits = jnp.einsum("bthd,bshd->bhts", layer_norm(q), layer_norm(k)) * 8 / D
        if bias is not None:
            logits += bias[None, None, None]
        if mask is not None:
            logits = jnp.where(mask[None, None], logits, -jnp.inf)
        out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits, axis=-1), v)
        return out.reshape(B, length, W)

    def ours(q, k, v):
        return kernels.attend(q, k, v, D, 8 / D, mask, bias, norm=True)

    agree(ours, plain, *arrays(*[(B, length, W)] * 3))


@pytest.mark.parametrize("lengths", [(256,), (128, 128), (128, 22)], ids=str)
def test_norm_and_gate_are_their_formulas_with_their_gradients(lengths, interpreted):
    total, segments = sum(lengths), len(lengths)
    x, y, a = arrays((B, total, W), (B, total, W), (B, segments, W))

    def spread(vectors):
        return jnp.repeat(vectors, np.array(lengths), axis=1, total_repeat_length=total)

    def modulated(x, shift, scale):
        return x, layer_norm(x) * (1 + spread(scale)) + spread(shift)

    def normalize(x, shift, scale):
        return kernels.normalize(x, shift, scale, lengths)

    def add_gated(x, y, gate):
        return kernels.add_gated(x, y, gate, lengths)

    agree(normalize, modulated, x + 5, a, a / 3)
    agree(kernels.normalize, lambda x: (x, layer_norm(x)), x + 5)
    agree(add_gated, lambda x, y, gate: x + spread(gate) * y, x, y, a)


BLOCKS = Blocks(width=W, depth=1, head_dim=D)
CFG = dataclasses.replace(
    TINY, sites=Sites((16, 8), 1), tokens=Tokens(128), encoder=BLOCKS, decoder=BLOCKS
)


@pytest.mark.parametrize("count", [21, pytest.param(CFG.num_tokens, marks=pytest.mark.slow)])
def test_both_networks_train_the_same_with_the_kernels(count, interpreted):
    params = random_params(CFG)
    x, codes = arrays((B, 16, 8, CFG.vae.latent_channels), (B, count, CFG.code_dim))
    t, keep, null = jnp.array([0.3, 0.8]), jnp.array([5, count]), jnp.array([False, False])

    def loss(params, compute):
        (v,) = flextok.velocities(params, CFG, compute, x, t, (Condition(codes, keep, null),))
        return jnp.mean(v**2) + jnp.mean(flextok.encode(params, CFG, compute, x, count) ** 2)

    def value(attention, remat):
        compute = Compute(attention=attention, remat=remat)
        f = jax.jit(jax.value_and_grad(lambda p: loss(p, compute)))
        text = str(jax.make_jaxpr(f)(params))
        # In an encoder's and a decoder's block: attention, two norms, two gates, backwards too.
        names = ("attention_64", "attention_gradient_64", "normalize", "add_gated_gradient")
        assert all((f"name={name}" in text) == (attention == "pallas") for name in names)
        return f(params)

    expected = value("xla", "none")
    with jax.set_mesh(make_mesh()):  # One device, but by the same road as many.
        found = value("pallas", "dots")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1])
    ):
        scale = max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a, b, atol=1e-4 * scale, rtol=0, err_msg=str(path))


def test_other_sizes_are_computed_without_them():
    few = CFG.num_tokens // 2
    params = jax.eval_shape(lambda: random_params(CFG))
    compute = Compute(attention="pallas")

    def kernels_of(rows, count, t):
        x = jnp.zeros((B, rows, 8, CFG.vae.latent_channels))
        codes = jnp.zeros((B, count, CFG.code_dim))
        condition = Condition(codes, jnp.zeros((B,), int), jnp.zeros((B,), bool))
        f = functools.partial(flextok.velocities, cfg=CFG, compute=compute)
        text = str(jax.make_jaxpr(lambda p: f(p, x_t=x, t=t, conditions=(condition,)))(params))
        return text.count("pallas_call")

    one_time = jnp.zeros((1,))  # for all images
    assert kernels_of(16, few, jnp.zeros((B,))) == kernels_of(16, CFG.num_tokens, one_time) == 5
    assert kernels_of(8, few, one_time) == 1  # Registers begin within a block: attention alone.
    assert kernels_of(4, few, one_time) == 0
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1, 1, 2), AXES)):
        assert kernels.can_attend("pallas", 256, 2 * W, D)
        assert not kernels.can_attend(
            "pallas", 256, W, D
        )  # Both heads lie in the lanes of one device.
