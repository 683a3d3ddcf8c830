"""The Haar transform of patches, and tokens that are its scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import CONFIGS, random_params, relative

from examples.digits import arrays
from flextok_jax import FlexTok
from flextok_jax.nn import flextok, haar, layers, layout
from flextok_jax.nn.config import Compute
from flextok_jax.training.tokenizer_stage import TokenizerStage


@pytest.mark.parametrize("side, levels", ((2, 1), (4, 2), (8, 2), (8, 3)))
def test_scales_are_means_of_blocks_and_what_is_left(side, levels):
    matrix = haar.matrix(side, levels)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(side**2), atol=1e-12)
    image = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    scales = haar.split(layers.patchify(image, side), side, levels)
    assert tuple(x.shape[-1] for x in scales) == haar.sizes(side, levels, 3)

    def written(kept):
        parts = [x if i < kept else jnp.zeros_like(x) for i, x in enumerate(scales)]
        return np.asarray(layers.unpatchify(haar.join(parts, side, levels), side, 16, 24))

    assert relative(written(len(scales)), image) < 1e-5
    for kept in range(1, len(scales)):
        block = 2 ** (levels - kept + 1)
        means = image.reshape(2, 16 // block, block, 24 // block, block, 3).mean(axis=(2, 4))
        assert relative(written(kept), means.repeat(block, axis=1).repeat(block, axis=2)) < 1e-5
        if kept == 1:
            cells = layers.patchify(means, side // block)
            assert relative(scales[0], block * cells) < 1e-5


@pytest.fixture(scope="module")
def tok():
    c = CONFIGS["lab"].get_config("spectral")
    c.model.encoder.depth = c.model.decoder.depth = 1
    cfg = TokenizerStage(c).model
    return FlexTok(cfg, random_params(cfg))


def parts(images):
    return haar.split(layers.patchify(images, 4), 4, 2)


def test_no_scale_depends_on_finer_ones(tok):
    images = arrays("train")[0][:3]
    tokens, other = np.asarray(tok.tokenize(images)), images.copy()
    assert tok.prefixes == (16, 32, 48)
    other[:, ::2] = 255 - other[:, ::2]  # Of pixels; then the coarsest scale alone as it was.
    first = np.asarray(flextok.encode(tok.params, tok.config, Compute(), to_x(images)))
    mixed = [parts(to_x(x)) for x in (images, other)]
    mixed = haar.join([mixed[0][0], *mixed[1][1:]], 4, 2)
    mixed = layers.unpatchify(mixed, 4, 16, 16)
    again = np.asarray(flextok.encode(tok.params, tok.config, Compute(), mixed))
    assert relative(again[:, :16], first[:, :16]) < 1e-5
    assert (np.abs(again - first)[:, 16:].max(axis=-1) > 1e-3).all()
    whole = parts(tok.detokenize(tokens))
    both = parts(tok.detokenize(tokens, [16, 32, 48]))
    for kept, row in ((1, 0), (2, 1), (3, 2)):
        made = parts(tok.detokenize(tokens[:, : 16 * kept]))
        for i in range(3):
            if i < kept:
                assert relative(made[i], whole[i]) < 1e-5
            else:
                assert np.abs(made[i]).max() < 1e-5
            assert relative(both[i][row] + 1, made[i][row] + 1) < 1e-5
    with pytest.raises(ValueError, match="come in scales"):
        tok.tokenize(images, 20)
    found = tok.choose_length(images, "mae", target=0.0)
    assert found.counts == (16, 32, 48)
    with pytest.raises(ValueError, match="counts="):
        tok.choose_length(images, "mae", target=0.0, counts=(16, 20))


def to_x(images):
    return images / np.float32(127.5) - 1


def test_a_scale_costs_its_tokens(tok):
    shapes = layout.unbox(flextok.shapes(tok.config))
    images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)
    run = jax.jit(flextok.encode, static_argnums=(1, 2, 4))
    flops = {}
    for k in tok.prefixes:
        given = shapes, tok.config, Compute(scan=False), images, k
        flops[k] = run.lower(*given).cost_analysis()["flops"]
    assert flops[16] < 0.4 * flops[48] and flops[32] < 0.75 * flops[48]


def test_configurations_without_scales_are_refused(tok):
    cfg = tok.config
    for changes in ({"patch_size": 6}, {"positions": "none"}, {"levels": 3}):
        with pytest.raises(ValueError, match="levels="):
            dataclasses.replace(cfg.sites, **changes)
    for changes in ({"keep": "uniform"}, {"registers": True}):
        with pytest.raises(ValueError, match="order='scales'"):
            dataclasses.replace(cfg.tokens, **changes)
    tokens = dataclasses.replace(cfg.tokens, order="full")
    with pytest.raises(ValueError, match="sites.levels=2"):
        dataclasses.replace(cfg, tokens=tokens)
