"""One rule for every array of every shipped AR model and VAE; test_sharding.py: the tokenizers."""

import re

import numpy as np
import pytest
from test_ar_stage import CONFIGS as AR
from test_ar_stage import TOKENIZER
from test_sharding import BIG, MESH, leaves, local_size, rules_of
from test_vae_stage import CONFIGS as VAE

from flextok_jax import main
from flextok_jax.data.records import Record
from flextok_jax.data.shards import write_split
from flextok_jax.training.optimizer import trainable_paths
from flextok_jax.training.state import build


def config_of(kind, variant, folder):
    """The shipped configuration, with the smallest data that it accepts."""
    if kind == "vae":
        return VAE.get_config(variant)
    config = AR.get_config(variant)
    if config.data.source == "tokens":
        model = config.model
        about = dict(
            tokenizer=TOKENIZER, vocab_size=model.vocab_size, num_tokens=model.num_tokens,
            arrays={"tokens": [model.num_tokens]}, num_images=1, num_shards=1,
            **({"text_dim": model.text_dim} if model.text_dim else {}),
        )  # fmt: skip
        embedding = np.zeros((1, model.text_dim)) if model.text_dim else None
        for split in ("train", "test"):
            arrays = {"tokens": np.zeros((1, model.num_tokens), np.uint16)}
            record = Record("0", arrays, 0, embedding=embedding)
            write_split(folder / split, about, lambda _: [record], embedding)
        config.data.path = str(folder)
    return config


@pytest.mark.parametrize(
    "kind, variant",
    [("ar", variant) for variant in AR.VARIANTS] + [("vae", variant) for variant in VAE.VARIANTS],
)
def test_every_parameter_average_and_optimizer_slot_has_one_rule(kind, variant, tmp_path):
    config = config_of(kind, variant, tmp_path)
    stage = main.make_stage(config)
    state = build(stage, config, MESH).shapes
    params, averages = leaves(state.params), leaves(state.ema)
    assert params.keys() == averages.keys()
    for path, leaf in params.items():
        assert len(rules_of(path)) == 1, (path, rules_of(path))
        assert averages[path].sharding == leaf.sharding, path
    slots = {path: leaf for path, leaf in leaves(state.opt_state).items() if leaf.shape}
    found = set()
    for path, leaf in slots.items():  # ".../mu/ar/head/kernel": the parameter's path follows.
        if path.endswith("/ns_coeffs"):  # three numbers of Muon
            assert leaf.sharding.is_fully_replicated
            continue
        parameter = re.sub(r"^.*?(mu|nu)/", "", path)
        assert leaf.sharding == params[parameter].sharding, path
        found.add(parameter)
    assert found == trainable_paths(state.params, stage.trainable, config.freeze)
    if kind == "ar":
        for path, leaf in leaves(state).items():
            assert leaf.size <= BIG or local_size(leaf) < leaf.size, path
