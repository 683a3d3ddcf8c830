"""Every variant of the laboratory: gradients, files, prefixes, and what its decoder can do."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import CONFIGS, changed, random_params, relative, stage_params
from PIL import Image

from examples import canvas, digits, paper
from examples.digits import arrays
from examples.lab import measuring
from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.commands.common import read_lengths
from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.io.formats import flexar
from flextok_jax.nn import ar, bottleneck, flextok, layout, repa
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Compute
from flextok_jax.nn.images import mae, to_float
from flextok_jax.nn.tokenizer_config import Bottleneck, Text
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.training.ar_stage import ARStage, Tokens
from flextok_jax.training.tokenizer_stage import TokenizerStage

LAB = CONFIGS["lab"]
SLOW = pytest.mark.slow


def config(variant):
    c = LAB.get_config(variant)
    if c.model.encoder.depth:
        c.model.encoder.depth = c.model.decoder.depth = 1
    return c


@pytest.fixture(scope="module", params=[*LAB.TOKENIZERS, "textok", "alit"])
def model(request):
    """(configuration, stage, parameters without the zeros of a new model, a tokenizer of them)."""
    c = config(request.param)
    stage = TokenizerStage(c)
    params = stage_params(stage)
    own = {name: x for name, x in params.items() if name != "repa"}
    return c, stage, params, FlexTok(stage.model, own | {"vae": {}})


def images(count=6):
    return arrays("train")[0][:count]


def examples_of(tok, count=6):
    """(images, what `tokenize` reads beside them, what `detokenize` does)."""
    if tok.config.image_size == (16, 16):
        return images(count), {}, {}
    made = [canvas.canvas("train", i) for i in range(count)]
    text = {"text": np.stack([one.embedding for one in made])} if tok.config.text.dim else {}
    pixels = np.stack([one.image for one in made])
    return pixels, text if tok.config.text.encoder else {}, text


def gradients_of(stage, params, tok):
    pixels, _, text = examples_of(tok, 32)
    if stage.embedding and not text:  # Features of images.
        text = {"text": np.random.default_rng(0).standard_normal((32, *stage.embedding))}
    batch = jax.tree.map(jnp.asarray, {"image": pixels} | text)

    def loss(params):
        return stage.loss(params, {}, batch, jax.random.key(2), jnp.int32(0))[0]

    return jax.jit(jax.grad(loss))(params)


def test_a_gradient_reaches_every_parameter(model):
    _, stage, params, tok = model
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients_of(stage, params, tok)):
        path = layout.path_string(path)
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0 or not stage.trainable(path), path


@SLOW
@pytest.mark.parametrize("variant", [*LAB.TOKENIZERS, "textok", "alit"])
def test_a_new_model_has_a_gradient(variant):
    stage = TokenizerStage(config(variant))
    params = layout.unbox(jax.jit(stage.init)(jax.random.key(0)))
    found = gradients_of(stage, params, FlexTok(stage.model, params | {"vae": {}}))
    assert max(np.abs(gradient).max() for gradient in jax.tree.leaves(found)) > 1e-4


def test_a_saved_model_is_the_same_model(model, tmp_path):
    _, stage, params, tok = model
    tok.save_pretrained(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    assert again.config == tok.config and again.fingerprint == tok.fingerprint
    pixels, given, _ = examples_of(tok)
    np.testing.assert_array_equal(again.tokenize(pixels, **given), tok.tokenize(pixels, **given))
    c = LAB.get_config("one_pass")
    c.init_model, c.init_from, c.data.image_size = True, str(tmp_path), tok.config.image_size[0]
    assert TokenizerStage(c).model == stage.model
    found = stage.init_from(c.init_from)
    assert found.keys() == params.keys()
    for name in ("encoder", "decoder", "bottleneck"):
        jax.tree.map(np.testing.assert_array_equal, found.get(name), params.get(name))


def test_tokens_are_what_the_model_says_of_itself(model):
    c, _, _, tok = model
    pixels, text, read = examples_of(tok)
    tokens, count = np.asarray(tok.tokenize(pixels, **text)), c.model.tokens.count
    if tok.discrete:
        assert tokens.dtype == np.int32 and tokens.shape == (6, count)
        assert 0 <= tokens.min() and tokens.max() < tok.config.vocab_size
    else:
        assert tokens.dtype == np.float32 and tokens.shape == (6, count, c.model.bottleneck.dim)
    for k in sorted({1, 5, 16, count}):
        if k in tok.prefixes:
            found = np.asarray(tok.tokenize(pixels, k, **text))
            if tok.config.tokens.revised and k < count:  # The encoder knows k.
                assert (found != tokens[:, :k]).any()
            else:
                assert relative(found, tokens[:, :k]) < 1e-5
            assert np.isfinite(tok.detokenize(tokens, k, **read)).all()
        elif k <= count:
            with pytest.raises(ValueError, match=f"num_tokens={k}"):
                tok.tokenize(pixels, k)
            with pytest.raises(ValueError, match=f"num_tokens={k}"):
                tok.detokenize(tokens, k)


def test_a_decoder_of_one_pass_takes_no_arguments_of_a_flow(model):
    _, _, _, tok = model
    pixels, text, _ = examples_of(tok)
    tokens = tok.tokenize(pixels, **text)
    if tok.config.is_flow:
        seen = []
        found = tok.detokenize(tokens, steps=3, on_step=lambda i, x: seen.append((i, x.shape)))
        assert seen == [(i, (6, 16, 16, 3)) for i in (1, 2, 3)]
        assert relative(tok.detokenize(tokens, steps=3), found) < 1e-5
    else:
        for name, value in (("steps", 3), ("guidance_scale", 2.0), ("key", 1)):
            with pytest.raises(ValueError, match=name):
                tok.detokenize(tokens, **{name: value})


def test_losses_of_pixels_are_refused_where_there_are_none():
    c = config("continuous")
    c.loss.gan_weight = 0.1
    with pytest.raises(ValueError, match="gan_weight"):
        TokenizerStage(c)


def test_a_discriminator_trains_beside_a_decoder_of_pixels():
    c = config("one_pass")
    c.loss.update(gan_weight=0.1, gan_start=0)
    c.discriminator.update(width=4, layers=1)
    stage = TokenizerStage(c)
    params = layout.unbox(stage.init(jax.random.key(0)))
    assert set(params) == {"encoder", "decoder", "bottleneck", "discriminator"}
    batch = {"image": jnp.asarray(images())}
    _, metrics = jax.jit(stage.loss)(params, {}, batch, jax.random.key(1), jnp.int32(5))
    assert np.isfinite(metrics["g_loss"].compute()) and metrics["d_loss"].compute() > 0


@pytest.fixture(scope="module", params=["elastictok", "one_d_piece"])
def ordered(request):
    """A tokenizer without causal order whose tokens have prefixes, and images."""
    c = config(request.param)
    c.model.encoder.width = c.model.decoder.width = 32
    cfg = TokenizerStage(c).model
    return FlexTok(cfg, random_params(cfg)), images(2)


def test_dropped_tokens_say_nothing(ordered):
    tok, pixels = ordered
    tokens = np.asarray(tok.tokenize(pixels, 5))
    both = np.asarray(tok.detokenize(np.pad(tokens, ((0, 0), (0, 3))), [5, 8]))
    cfg, codes = tok.config, flextok.codes_of(tok.params, tok.config, tokens)
    alone = flextok.values(tok.params, cfg, tok.compute, codes, np.array([5, 5]))
    assert relative(both[0], alone[0]) < 1e-5 and relative(both[1], alone[1]) > 1e-3
    assert relative(tok.detokenize(tokens), alone) < 1e-5


def test_lengths_and_sweeps_encode_for_each_number_where_the_encoder_is_told(ordered):
    tok, pixels = ordered
    found = tok.choose_length(pixels, "mae", target=0.0, counts=(2, 5))
    tokens = np.asarray(tok.tokenize(pixels))
    for k, values in zip((2, 5), found.values.T):
        given = rec.tokens_for(tok, tokens, pixels, k, 2)
        np.testing.assert_array_equal(given[:, :k], tok.tokenize(pixels, k))
        decoded = np.asarray(tok.detokenize(np.asarray(given)[:, :k])).clip(-1, 1)
        np.testing.assert_allclose(values, mae(decoded, to_float(pixels)), rtol=1e-5)
    if tok.config.tokens.told:
        with pytest.raises(ValueError, match="told"):
            read_lengths("lengths.json", tok, [])
        with pytest.raises(ValueError, match="must be 16x16"):
            tok.tokenize(pixels[:, :8])
    k = int(found.num_tokens[0])
    np.testing.assert_array_equal(found.tokens[0, :k], tok.tokenize(pixels, k)[0])


def test_two_books_are_two_quantisers_of_every_second_token():
    cfg = Bottleneck("vq", (), dim=4, size=8, books=2)
    books = jax.random.normal(jax.random.key(0), (16, 4))
    z = jax.random.normal(jax.random.key(1), (3, 6, 4))
    found = bottleneck.quantize({"codebook": books}, cfg, z)
    single, losses = dataclasses.replace(cfg, books=1), []
    for i in range(2):
        own = {"codebook": books[8 * i : 8 * i + 8]}
        one = bottleneck.quantize(own, single, z[:, i::2])
        np.testing.assert_array_equal(found.ids[:, i::2], one.ids)
        np.testing.assert_array_equal(found.codes[:, i::2], one.codes)
        losses.append(one.loss)
    np.testing.assert_allclose(found.loss, np.mean(losses, axis=0), rtol=1e-6)
    again = bottleneck.codes_of({"codebook": books}, cfg, found.ids)
    np.testing.assert_allclose(again, found.codes, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 3 books"):
        changed(TokenizerStage(config("imagefolder")).model, bottleneck__books=3)


def test_contrast_of_equal_pairs_has_its_closed_form():
    count, logit = 5, 2.0
    pairs = logit**0.5 * jnp.eye(count)
    params = {"kernel": jnp.eye(count), "bias": jnp.zeros(count)}
    # Their means are the pairs; of the tokens, and of the targets.
    codes = pairs[:, None] + jnp.array([1.0, -1.0, 0.0])[None, :, None]
    found = repa.contrast(params, codes, jnp.stack([2 * pairs, 0 * pairs], axis=1))
    np.testing.assert_allclose(found, np.log(1 + (count - 1) * np.exp(-logit)), rtol=1e-6)
    mixed = repa.contrast(params, codes, jnp.roll(pairs, 1, axis=0)[:, None])
    np.testing.assert_allclose(mixed - found, logit, rtol=1e-6)


def test_the_last_book_follows_the_features_of_the_images():
    stage = TokenizerStage(config("imagefolder"))
    params, cfg = layout.unbox(stage.init(jax.random.key(0))), stage.model
    features = jax.random.normal(jax.random.key(1), (8, *stage.embedding))
    batch = {"image": jnp.asarray(images(8)), "text": features}
    loss, logged = jax.jit(stage.loss)(params, {}, batch, jax.random.key(2), jnp.int32(0))
    registers = flextok.encode(params, cfg, stage.compute, to_float(batch["image"]))
    codes = flextok.quantize(params, cfg, registers).codes
    expected = float(np.mean(repa.contrast(params["repa"], codes[:, 1::2], features)))
    parts = {name: float(metric.compute()) for name, metric in logged.items() if name[:4] != "code"}
    assert parts["loss_repa"] == pytest.approx(expected, rel=1e-4)
    total = parts["rec"] + parts["loss_bottleneck"] + 0.1 * parts["loss_repa"]
    assert float(loss) == pytest.approx(total, rel=1e-5)
    c = config("one_pass")
    c.repa.update(weight=0.1, width=64, book=True)
    with pytest.raises(ValueError, match="books=1"):
        TokenizerStage(c)


@pytest.fixture(scope="module")
def rounds():
    """A tokenizer of 32 tokens in four rounds, and images."""
    c = config("alit")
    c.model.encoder.width = c.model.decoder.width = 32
    cfg = TokenizerStage(c).model
    return FlexTok(cfg, random_params(cfg)), examples_of(FlexTok(cfg, {}), 4)[0]


def test_a_round_does_not_depend_on_later_ones(rounds):
    tok, pixels = rounds
    latents = jnp.asarray(to_float(pixels))
    keep = np.array([8, 16, 24, 32])

    @functools.partial(jax.jit, static_argnums=1)
    def encode(keep, count):
        return flextok.encode(tok.params, tok.config, tok.compute, latents, count, keep)

    mixed = np.asarray(encode(keep, 32))
    for row, k in enumerate(keep.tolist()):
        alone = encode(np.full(4, k), k)
        assert alone.shape == (4, k, 8)
        assert relative(mixed[row, :k], alone[row]) < 1e-5
        assert relative(tok.registers(pixels, k), alone) < 1e-5
    # A round revises the tokens of those before it.
    assert relative(mixed[3, :8], encode(keep, 8)[3]) > 1e-2


def test_the_cost_grows_by_rounds(rounds):
    tok, pixels = rounds
    flops = {}
    for k in tok.prefixes:
        run = jax.jit(lambda p, x, k=k: flextok.encode(p, tok.config, Compute(scan=False), x, k))
        flops[k] = run.lower(tok.params, to_float(pixels)).cost_analysis()["flops"]
    # Per position a block of width D costs 24 D^2 + 4 T D, T the positions: 64 patches and tokens.
    cost = [(24 * 32 + 4 * t) * t for t in (72, 80, 88, 96)]
    grown = [(flops[k] - flops[8]) / (flops[32] - flops[8]) for k in tok.prefixes]
    np.testing.assert_allclose(grown, np.cumsum([0, *cost[1:]]) / sum(cost[1:]), atol=0.01)


def test_every_round_is_sampled_equally_often(rounds):
    stage = TokenizerStage(config("alit"))
    keep = stage.draw(jax.random.key(0), jnp.arange(8))["keep"]
    assert sorted(keep.tolist()) == [8, 8, 16, 16, 24, 24, 32, 32]
    assert set(stage.lengths(2)) == {32}


def test_rounds_are_chosen_by_the_error(rounds):
    tok, pixels = rounds
    found = tok.choose_length(pixels, "mae", target=0.0)
    assert found.counts == (8, 16, 32) and (found.num_tokens == 32).all()
    tokens = tok.tokenize(pixels, 8)
    made = np.asarray(tok.detokenize(tokens)).clip(-1, 1)
    np.testing.assert_allclose(found.values[:, 0], mae(made, to_float(pixels)), rtol=1e-5)
    with pytest.raises(ValueError, match="rounds.*8, 16, 24"):
        tok.tokenize(pixels, 12)
    with pytest.raises(ValueError, match="num_tokens=12: .*8, 16, 24"):
        tok.detokenize(tok.tokenize(pixels, 16), [8, 12, 16, 16])
    with pytest.raises(ValueError, match=r"num_tokens=12: allowed are \[8, 16, 24, 32\]"):
        rec.check_counts(tok, [12])
    sizes = dict(width=32, depth=1, head_dim=16, mlp_hidden=64)
    with pytest.raises(ValueError, match="12 positions.*prefixes"):
        ImageGenerator(ARConfig(512, 12, **sizes), {}, tok)


def test_rounds_that_are_none_are_refused(rounds):
    for name, value in (("count", 30), ("dropped", "zero"), ("order", "causal")):
        with pytest.raises(ValueError, match="rounds=4"):
            changed(rounds[0].config, **{f"tokens__{name}": value})


@pytest.fixture(scope="module", params=["textok", "tatitok"])
def reader(request):
    """A tokenizer that reads captions, and images with those."""
    cfg = TokenizerStage(config(request.param)).model
    tok = FlexTok(cfg, random_params(cfg))
    return tok, *examples_of(tok, 2)


def test_a_part_that_reads_a_caption_depends_on_it(reader):
    tok, pixels, given, text = reader
    tokens = np.asarray(tok.tokenize(pixels, **given))
    others = text["text"][::-1]
    if tok.config.text.encoder:
        assert (np.abs(tok.tokenize(pixels, text=others) - tokens) > 1e-3).any((1, 2)).all()
    else:
        with pytest.raises(ValueError, match="must be None"):
            tok.tokenize(pixels, text=others)
    made = np.asarray(tok.detokenize(tokens, **text))
    assert (np.abs(tok.detokenize(tokens, text=others) - made) > 1e-3).any((1, 2, 3)).all()
    with pytest.raises(ValueError, match=r"\(2, 3, 14\).*\[2, 4, 14\]"):
        tok.detokenize(tokens, text=others[:, :3])


def test_no_caption_is_a_caption_of_padding_and_the_model_without_captions(reader):
    tok, pixels, *_ = reader
    nothing = np.zeros((2, 4, canvas.CHANNELS))
    empty = {"text": nothing} if tok.config.text.encoder else {}
    tokens = np.asarray(tok.tokenize(pixels))
    made = np.asarray(tok.detokenize(tokens))
    np.testing.assert_array_equal(tok.tokenize(pixels, **empty), tokens)
    np.testing.assert_array_equal(tok.detokenize(tokens, text=nothing), made)
    rest = {
        part: {name: x for name, x in params.items() if not name.startswith("text_")}
        for part, params in tok.params.items()
    }
    plain = FlexTok(changed(tok.config, text=dataclasses.asdict(Text())), rest)
    assert relative(tokens, plain.tokenize(pixels)) < 1e-5
    assert relative(made, plain.detokenize(tokens)) < 1e-5


def test_the_order_of_a_caption_lies_in_its_positions_and_padding_says_nothing(reader):
    tok, pixels, given, text = reader
    order = np.array([2, 0, 3, 1])
    moved = {
        part: {name: x[order] if name == "text_pos" else x for name, x in params.items()}
        for part, params in tok.params.items()
    }
    # Padding that is attended to is seen.
    words, all_read = text["text"], FlexTok(changed(tok.config, text__padded=False), tok.params)
    assert (words == 0).all(-1).any()
    tokens = np.asarray(tok.tokenize(pixels, **given))
    made, other = tok.detokenize(tokens, **text), FlexTok(tok.config, moved)
    again = {name: x[:, order] for name, x in given.items()}
    assert relative(other.tokenize(pixels, **again), tokens) < 1e-5
    assert relative(other.detokenize(tokens, text=words[:, order]), made) < 1e-5
    assert relative(all_read.detokenize(tokens, **text), made) > 1e-3


def test_captions_are_read_from_files_beside_the_images(tmp_path):
    for split in ("train", "test"):
        for i in range(4):
            made = canvas.canvas(split, i)
            (tmp_path / split).mkdir(exist_ok=True)
            Image.fromarray(made.image).save(tmp_path / split / f"{i}.png")
            np.save(tmp_path / split / f"{i}.npy", made.embedding)
    c = config("textok")
    c.data.path = str(tmp_path)
    c.evaluation.update(num_images=4, batch_size=4)
    stage = TokenizerStage(c)
    given = dict(seed=0, batch_size=4, train=False, embedding=stage.embedding)
    (batch,) = make_pipeline(c.data, **given).eval_batches(4)
    expected = [canvas.canvas("test", i).embedding for i in range(4)]
    np.testing.assert_array_equal(batch["text"], np.stack(expected))
    params = layout.unbox(stage.init(jax.random.key(0)))
    found = dict(stage.evaluators()["reconstruction"](params, {}, make_mesh(data=1)))
    assert np.isfinite(found["psnr/4"])
    with pytest.raises(ValueError, match="14 channels, not 5"):
        make_pipeline(c.data, **given | {"embedding": (4, 5)})[0]
    for path in tmp_path.rglob("*.npy"):
        path.unlink()
    with pytest.raises(ValueError, match="flextok embed"):
        make_pipeline(c.data, **given)


# A text encoder is trained with it; test_token_flow.py has its flow.
FAST = [name for name in LAB.GENERATORS if name != "flowtok"]


@pytest.fixture(scope="module", params=[*FAST, pytest.param("flowtok", marks=SLOW)])
def generator(request):
    """(stage, parameters without the zeros of a new model, a generator of them)."""
    c = LAB.get_config(request.param)
    c.model.update(width=32, depth=1, head_dim=16, mlp_hidden=64)
    c.loss.kl_weight = 0.5
    stage = of_tokens(c)
    params = stage_params(stage)
    return stage, params, ImageGenerator(stage.model, {"ar": params["ar"]})


def text_batch(stage):
    """Captions of 64 images as the stage reads them."""
    rows = [stage.captions(f"the digit {digits.WORDS[i % 10]}") for i in range(64)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def of_tokens(c):
    """The stage of a variant for 16 tokens of 1 000 ids, or of four numbers."""
    c.tokenizer.source = ""
    vocab_size = 0 if c.model.channels else 1000
    return ARStage(c, Tokens({}, vocab_size, num_tokens=16, num_classes=10))


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("coarse", {"loss": {"z_loss": 1e-4}}, "z_loss=0.0001.*set it to 0"),
        ("token_flow", {"loss": {"z_loss": 1e-4}}, "z_loss=0.0001.*set it to 0"),
        ("single", {"time_shift": 2.0}, "time_shift=2.0.*set it to 1"),
    ],
)
def test_a_value_that_would_do_nothing_is_refused(variant, changes, message):
    c = LAB.get_config(variant)
    c.update(changes)
    with pytest.raises(ValueError, match=message):
        of_tokens(c)


def test_a_gradient_reaches_every_parameter_of_a_generator(generator):
    stage, params, gen = generator
    rng, cfg = np.random.default_rng(0), stage.model
    tokens = rng.integers(1000, size=(64, 16)).astype(np.int32)
    if cfg.channels:
        tokens = rng.normal(size=(64, 16, cfg.channels)).astype(np.float32)
    batch = {"tokens": tokens, "label": np.arange(64, dtype=np.int32) % 10}
    if cfg.text_dim:
        batch |= text_batch(stage)
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(params):
        return stage.loss(params, {}, batch, jax.random.key(2), jnp.int32(0))

    (value, logged), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, layout.path_string(path)
    if cfg.channels:
        flow, source = (float(logged[f"loss_{name}"].compute()) for name in ("flow", "source"))
        assert (source > 0) == (cfg.text_dim > 0)
        assert float(value) == pytest.approx(flow + 0.5 * source, rel=1e-5)


def test_a_saved_generator_is_the_same_generator(generator, tmp_path):
    _, _, gen = generator
    gen.save_pretrained(tmp_path)
    again = ImageGenerator.from_pretrained(tmp_path)
    assert again.config == gen.config and again.fingerprint == gen.fingerprint
    assert flexar.about(tmp_path)["text"] == (gen.config.text_dim > 0)
    how = dict(key=3, guidance_scale=2.0, labels=[1, 2])
    if gen.config.text_dim:
        how |= dict(labels=None, text_embeddings=np.ones((2, 5, gen.config.text_dim)))
    found = np.asarray(gen.generate_tokens(**how))
    np.testing.assert_array_equal(again.generate_tokens(**how), found)
    assert found.shape[:2] == (2, 16)
    assert gen.config.channels or (0 <= found.min() and found.max() < 1000)


def test_a_generator_takes_fewer_steps_than_tokens():
    steps = {}
    for variant in LAB.GENERATORS:
        steps[variant] = measuring.passes(of_tokens(LAB.get_config(variant)).model)
    assert steps == {
        "single": 16, "pairs": 8, "folded": 8, "doubling": 5, "masked": 8, "coarse": 17,
        "token_flow": 20, "flowtok": 20,
    }  # fmt: skip


def test_folded_groups_cost_half_the_positions():
    flops = {}
    for variant in ("pairs", "folded"):
        cfg = of_tokens(LAB.get_config(variant)).model
        tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
        run = jax.jit(ar.hidden, static_argnums=(1, 2))
        given = layout.unbox(ar.shapes(cfg)), cfg, Compute(scan=False), tokens, ar.ARCondition()
        flops[variant] = run.lower(*given).cost_analysis()["flops"]
    # Of 4 blocks half, and the folds' MLPs, 2/3 of half a block each: (2 + 2/3) / 4.
    assert 0.6 < flops["folded"] / flops["pairs"] < 0.72


@pytest.mark.parametrize("variant", ["binformer", pytest.param("cleaner", marks=SLOW)])
def test_an_image_to_image_model_writes_what_lies_beside(variant, tmp_path):
    stage = TokenizerStage(config(variant))
    pairs = [paper.pair("train", i) for i in range(16)]
    batch = {
        "image": np.stack([p.worn for p in pairs]),
        "target": np.stack([p.clean for p in pairs]),
    }
    params = layout.unbox(stage.init(jax.random.key(0)))

    @jax.jit
    def run(params):
        return stage.loss(params, {}, batch, jax.random.key(2), jnp.int32(0))[0]

    # The head of a new model writes zeros.
    np.testing.assert_allclose(run(params), np.mean(to_float(batch["target"]) ** 2), rtol=1e-5)
    params = stage_params(stage)
    tok = FlexTok(stage.model, params | {"vae": {}})
    tok.save_pretrained(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    assert again.config == tok.config
    np.testing.assert_array_equal(*(t.tokenize(batch["image"][:2]) for t in (tok, again)))
    gradients = jax.jit(jax.grad(run))(params)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        path = layout.path_string(path)
        assert np.abs(gradient).max() > 0 or not stage.trainable(path), path
