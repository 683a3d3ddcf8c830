"""Groups of images that keep about as many tokens: the same loss and gradients, at less cost."""

import jax
import numpy as np
import optax
import pytest
from common import GOLDEN
from test_tokenizer_stage import config as tokenizer_config
from test_tokenizer_stage import digits

from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training.state import build
from flextok_jax.training.tokenizer_stage import TokenizerStage

REPA = dict(
    repa__weight=0.5, repa__source=str(GOLDEN / "dinov2"), repa__image_size=42, repa__width=24,
    model__decoder__depth=3,
)  # fmt: skip


def config(**changes):
    c = tokenizer_config("digits,width=32,enc_depth=1,dec_depth=1,batch=16", **changes)
    c.optim.update(b1=0.0, grad_clip=None)  # So that the first moment is the gradient.
    c.compute.scan = True
    return c


def first_step(config, grouped, devices=1):
    """(loss and other metrics, gradients) of a step from parameters without zeros."""
    stage = TokenizerStage(config, grouped=grouped)
    mesh = make_mesh(data=devices, devices=jax.devices()[:devices])
    program = build(stage, config, mesh)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), program.shapes.params
    )
    frozen = jax.tree.map(
        lambda x: getattr(x, "value", x), stage.load_frozen(), is_leaf=lambda x: hasattr(x, "value")
    )
    batch = digits(config.batch_size)
    state, metrics = program.step(program.init_from(params), frozen, batch)
    found = {name: jax.device_get(metric.compute()) for name, metric in metrics.items()}
    return found, jax.device_get(optax.tree.get(state.opt_state, "mu"))


def agree(found, wanted):
    """Metrics, and gradients relative to the largest."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[0], wanted[0])
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted[1]))
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "changes",
    [{}, {"optim__accumulate": 4}, {**REPA, "optim__accumulate": 8}],
    ids=["slices", "accumulated", "repa"],
)
def test_a_step_in_groups_is_the_step_at_full_length(changes):
    c = config(**changes)
    agree(first_step(c, True), first_step(c, False))
