"""The loss of each stage in bfloat16: a stored number, and that of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import stage_params

from configs import ar, tokenizer, vae
from examples import digits
from flextok_jax.training.ar_stage import ARStage, Tokens
from flextok_jax.training.tokenizer_stage import TokenizerStage
from flextok_jax.training.vae_stage import VAEStage

# Made by this file with float32. Another x86 machine differs by rounding only, far below 2 %.
GOLDEN = {"vae": 3.2324, "tokenizer": 3.3785, "ar": 7.0858}


def stage_of(name: str, dtype: str):
    if name == "vae":
        c = vae.get_config("digits,width=8")
        c.loss.update(gan_weight=0.5, gan_start=0)
        c.discriminator.update(width=8, layers=2)
        make = VAEStage
    elif name == "tokenizer":
        c = tokenizer.get_config("digits,width=32,enc_depth=1,dec_depth=2")
        c.evaluation.num_images = 0
        make = TokenizerStage
    else:
        c = ar.get_config("digits,width=32,depth=2")
        c.tokenizer.source = ""  # The batch has tokens.

        def make(config):
            return ARStage(config, Tokens({}, vocab_size=1000, num_tokens=16, num_classes=10))

    c.compute.dtype = dtype
    return make(c)


def loss_of(name: str, dtype: str) -> float:
    stage = stage_of(name, dtype)
    batch = {"image": jnp.asarray(digits.arrays("train")[0][:8])}
    batch["label"] = jnp.asarray(digits.arrays("train")[1][:8], jnp.int32)
    batch["tokens"] = jnp.asarray(np.random.RandomState(0).randint(0, 1000, (8, 16)), jnp.int32)
    loss, _ = jax.jit(stage.loss)(stage_params(stage), {}, batch, jax.random.key(1), jnp.int32(1))
    return float(loss)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_loss_in_bfloat16_is_the_stored_one_and_nearly_that_of_float32(name):
    whole, half = loss_of(name, "float32"), loss_of(name, "bfloat16")
    assert whole == pytest.approx(GOLDEN[name], rel=2e-2)
    assert half == pytest.approx(GOLDEN[name], rel=2e-2)
    assert half == pytest.approx(whole, rel=3e-2) and half != whole
