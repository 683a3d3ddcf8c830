"""Attention without logits, and what is computed with padding, equal the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.nn import attention, block, layout, order
from flextok_jax.nn.config import Blocks

B, T, H, D = 2, 256, 2, 64
SCALE = 8.0 / D


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return tuple(jax.random.normal(key, (B, T, H, D)) for key in keys)


def plain(mask):
    """softmax(scale q k^T) v by its definition."""

    def core(q, k, v):
        logits = SCALE * jnp.einsum("bthd,bshd->bhts", q, k)
        weights = jax.nn.softmax(jnp.where(mask[None, None], logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    return core


def registers_last(n):
    """Patches see patches; register i sees patches and registers up to itself."""
    mask = np.zeros((T, T), bool)
    mask[:, :n] = True
    mask[n:, n:] = np.tri(T - n, dtype=bool)
    return mask


STEPS = order.Sequence(("a", "b"), (100, T - 100), ranks=(3,) * 100 + (1,) * 100 + (4,) * (T - 200))
steps = np.ones((T, T), bool)  # b's first 100 positions have the lowest rank.
steps[:200, 200:] = steps[100:200, :100] = False
CASES = {
    "full": (order.full(x=T), "pallas", np.ones((T, T), bool)),
    "causal": (order.causal(x=T), "pallas", np.tri(T, dtype=bool)),
    "causal by xla": (order.causal(x=T), "xla", np.tri(T, dtype=bool)),
    "encoder": (order.causal_last(x=128, y=T - 128), "pallas", registers_last(128)),
    "encoder by xla": (order.causal_last(x=128, y=T - 128), "xla", registers_last(128)),
    "any ranks": (STEPS, "xla", steps),
}


def attend(sequence, how):
    """`attention.attend` of [B, T, H, D]."""

    def core(*qkv):
        flat = (x.reshape(*x.shape[:2], -1) for x in qkv)
        return attention.attend(*flat, D, sequence, how, SCALE).reshape(qkv[0].shape)

    return core


@pytest.mark.parametrize("case", CASES)
def test_every_implementation_is_the_definition_with_its_gradient(case, interpreted):
    sequence, how, mask = CASES[case]
    core = attend(sequence, how)
    *qkv, weight = inputs()

    def value(core):
        def loss(q, k, v):
            out = core(q, k, v)
            return jnp.sum(out * weight), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)

    (_, found), found_grads = value(core)
    (_, expected), expected_grads = value(plain(mask))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for a, b in zip(found_grads, expected_grads):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_tpu_kernel_is_called_only_where_it_can_compute():
    q, k, v, _ = inputs()
    folded = order.Sequence(("x",), (T,), folded=3)
    called = {
        name: "pallas_call" in str(jax.make_jaxpr(f)(q, k, v))
        for name, f in {
            "alone": attend(order.full(x=T), "pallas"),
            "bias": attend(folded, "pallas"),
            "short": lambda q, k, v: attend(order.full(x=100), "pallas")(
                q[:, :100], k[:, :100], v[:, :100]
            ),
        }.items()
    }
    assert called == {"alone": True, "bias": True, "short": False}


def test_padding_among_the_keys_changes_nothing_of_norms_and_folds():
    q, k, v = (np.asarray(x[:, :9]).reshape(B, 9, H * D) for x in inputs()[:3])
    here = np.array([0, 1, 4, 5, 8])  # The last one stands for three.

    def run(rows, length, mask=None):
        sequence = order.Sequence(("x",), (length,), folded=3)
        given = (x[:, rows] for x in (q, k, v))
        return attention.attend(*given, D, sequence, "xla", SCALE, True, mask=mask)

    mask = np.broadcast_to(np.isin(np.arange(9), here), (B, 9))
    found = run(np.arange(9), 9, jnp.asarray(mask))
    np.testing.assert_allclose(found[:, here], run(here, len(here)), atol=1e-5)


def test_a_padded_hidden_width_changes_nothing():
    width, hidden, computed = 96, 250, 256
    cfg = Blocks(width=width, head_dim=32, mlp_hidden=hidden)
    mlp = block.MLP(cfg, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 3, width))
    params = layout.unbox(mlp.init(jax.random.key(1), x))
    fc = {name: leaf["kernel"] for name, leaf in params["params"].items()}
    assert fc["fc1"].shape == fc["fc3"].shape == (width, hidden) == fc["fc2"].shape[::-1]

    def plain(params, x):
        fc1, fc2, fc3 = (params["params"][f"fc{i}"]["kernel"] for i in (1, 2, 3))
        return (jax.nn.silu(x @ fc1) * (x @ fc3)) @ fc2

    for f in (lambda f: f(params, x), lambda f: jax.grad(lambda p: jnp.sum(f(p, x) ** 2))(params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                     f(mlp.apply), f(plain))  # fmt: skip
    assert f"{computed}]" in str(jax.make_jaxpr(mlp.apply)(params, x))
    small = block.MLP(Blocks(width=64), jnp.float32)  # 170 would cost half more
    params = layout.unbox(small.init(jax.random.key(1), x[..., :64]))
    assert "256]" not in str(jax.make_jaxpr(small.apply)(params, x[..., :64]))


def test_modulation_of_equal_halves_is_that_of_any_segments():
    modulation = jax.random.normal(jax.random.key(0), (2, 2, 8))
    equal, more = (block.spread(modulation, (4, count)) for count in (4, 5))
    np.testing.assert_array_equal(equal, more[:, :8])
    np.testing.assert_array_equal(equal[:, 3], modulation[:, 0])
    np.testing.assert_array_equal(equal[:, 4], modulation[:, 1])


@pytest.mark.parametrize("queries, masked", [(7, True), (8, True), (7, False)])
def test_filled_up_to_even_lengths_attention_is_the_same(queries, masked):
    _, k, v, _ = (x[:, :7] for x in inputs())
    q, bias = inputs()[0][:, :queries], jnp.arange(queries * 7.0).reshape(1, 1, queries, 7)
    mask = jnp.asarray(np.tri(queries, 7, 0, bool))[None, None] if masked else None
    wide = attention.even(q, k, v, mask, bias)
    assert wide[0].shape[1] == wide[1].shape[1] == wide[2].shape[1] == 8

    def softmax(q, k, v, mask, bias):
        return jax.nn.dot_product_attention(q, k, v, bias, mask)

    expected = softmax(q, k, v, mask, bias)
    np.testing.assert_allclose(softmax(*wide)[:, :queries], expected, atol=1e-6)
    assert np.isfinite(softmax(*wide)).all()
