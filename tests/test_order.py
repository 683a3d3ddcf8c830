"""Order is a rank: what has a higher rank has no effect, in every model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import TINY, changed

from flextok_jax.nn import ar, block, decoder, dinov2, encoder, flextok, order
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.block import Block
from flextok_jax.nn.config import Compute

FULL = changed(TINY, tokens=dict(count=16, order="full", keep="fixed"))
AR = ARConfig(vocab_size=9, num_tokens=6, width=32, depth=1, head_dim=16, mlp_hidden=32)
DINO = dinov2.DINOv2Config(width=32, depth=1, num_heads=2, mlp_hidden=32, patch_size=4, grid=2)
COMPUTE = Compute()


def run_tokenizer(cfg):
    x = jnp.zeros((1, *cfg.latent_shape))
    keep = jnp.array([3])

    def run(params):
        codes = flextok.quantize(params, cfg, flextok.encode(params, cfg, COMPUTE, x)).codes
        return flextok.decode(params, cfg, COMPUTE, codes[:, :8], keep, x)

    return run, flextok.shapes(cfg)


def run_ar():
    tokens = jnp.zeros((1, 6), jnp.int32)
    return lambda p: ar.logits(p, AR, COMPUTE, tokens, ARCondition()), ar.shapes(AR)


def run_dinov2():
    images = jnp.zeros((1, 8, 8, 3))
    return lambda p: dinov2.patch_features(p, DINO, COMPUTE, images), dinov2.shapes(DINO)


MODELS = {
    "flextok": lambda: run_tokenizer(TINY),
    "full order": lambda: run_tokenizer(FULL),
    "ar": run_ar,
    "dinov2": run_dinov2,
}


@pytest.mark.parametrize("name", MODELS)
def test_perturbing_a_position_changes_nothing_of_lower_rank(name, monkeypatch):
    """For every sequence that the model runs, in a block of its kind with random weights."""
    seen, original = [], block.stack

    def spy(cfg, compute, carry, shared, sequences, **options):
        seen.extend((cfg, sequence) for sequence in sequences)
        return original(cfg, compute, carry, shared, sequences=sequences, **options)

    for module in (encoder, decoder, ar, dinov2):
        monkeypatch.setattr(module, "stack", spy)
    run, shapes = MODELS[name]()
    jax.eval_shape(run, jax.tree.map(lambda x: x, block.layout.unbox(shapes)))
    assert seen
    for cfg, sequence in dict.fromkeys(seen):
        one = Block(dataclasses.replace(cfg, depth=1), COMPUTE, (sequence,))
        length = sequence.length
        x = jax.random.normal(jax.random.key(0), (1, length, cfg.width))
        start = (x,), None, jnp.int32(0)
        nothing = (None,) * 3
        params = block.layout.unbox(jax.jit(one.init)(jax.random.key(1), start, nothing))
        # As it is, and perturbed at each position: one batch.
        other = jax.random.normal(jax.random.key(2), x.shape)
        moved = x + jnp.eye(length)[:, :, None] * other
        batch = jnp.concatenate([x, moved])
        ((out,), *_), _ = jax.jit(one.apply)(params, ((batch,), None, jnp.int32(0)), nothing)
        effect = np.abs(np.asarray(out[1:] - out[:1])).max(-1).T  # [output, input]
        ranks = np.array(sequence.ranks or (0,) * length)
        allowed = ranks[None, :] <= ranks[:, None]
        assert (effect[~allowed] == 0).all(), name
        assert (effect[allowed] > 0).all(), name


def test_the_ranks_of_the_models_are_those_of_their_descriptions():
    encoder_ranks = order.causal_last(patches=3, registers=2)
    assert encoder_ranks.ranks == (0, 0, 0, 1, 2) and encoder_ranks.head == 3
    assert order.causal(tokens=3).ranks == (0, 1, 2) and order.causal(tokens=3).is_causal
    assert order.full(a=2, b=3).mask() is None and order.full(a=2).head == 0
    np.testing.assert_array_equal(order.causal(x=4).mask(), np.tri(4, dtype=bool))
    x = jnp.arange(5.0).reshape(1, 5, 1)
    np.testing.assert_array_equal(encoder_ranks.part(x, "registers")[0, :, 0], [3, 4])
    np.testing.assert_array_equal(
        encoder_ranks.join(*(encoder_ranks.part(x, n) for n in ("patches", "registers"))), x
    )
    with pytest.raises(ValueError, match="expected"):
        encoder_ranks.join(x, x)


def test_a_prefix_is_exact_where_the_rank_rises():
    assert TINY.prefixes == tuple(range(1, 17)) and FULL.prefixes == (16,)
