"""The AR stage: every shipped config trains, resumes bitwise, learns; what cannot be is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import TINY, changed, new_params, random_params, tiny_tokenizer
from PIL import Image

from configs import ar as CONFIGS
from examples.digits import arrays
from flextok_jax import cli
from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.data.records import Record, stored_tokens
from flextok_jax.data.shards import write_split
from flextok_jax.io.checkpoint import WorkdirError
from flextok_jax.io.storage import fingerprint
from flextok_jax.nn import ar, layout
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import from_dict
from flextok_jax.parallel import sharding
from flextok_jax.parallel.mesh import AXES, make_mesh
from flextok_jax.training.ar_stage import PAPER, ARStage
from flextok_jax.training.loop import train
from flextok_jax.training.state import build

VOCAB, LENGTH, TEXT = TINY.vocab_size, TINY.num_tokens, 6
TOKENIZER = {"source": "x", "origin": "X", "fingerprint": "0"}
CUT = ",width=64,depth=1,batch=8"


def write(folder, split, tokenizer=TOKENIZER, text=False, count=24, classes=()):
    """Tokens whose first half repeats the label, and whose second half is random."""
    rng = np.random.RandomState(len(split))

    def make(_):
        found = []
        for i in range(count):
            ids = rng.randint(0, VOCAB, (2, LENGTH))
            ids[:, : LENGTH // 2] = i % 10
            embedding = rng.standard_normal((1 + i % 3, TEXT)) if text and i else None
            arrays = {"tokens": stored_tokens(ids, VOCAB)}
            found.append(Record(f"{i}", arrays, i % 10, embedding=embedding))
        return found

    info = dict(tokenizer=tokenizer, vocab_size=VOCAB, num_tokens=LENGTH, num_shards=1)
    info |= {"arrays": {"tokens": [LENGTH]}, "num_images": count, "classes": list(classes)}
    null = np.zeros((2, TEXT)) if text else None
    write_split(folder / split, info | ({"text_dim": TEXT} if text else {}), make, null)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """{"c2i", "t2i"}: folders of tokens."""
    folders = {}
    for kind in ("c2i", "t2i"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        for split in ("train", "test"):
            write(folders[kind], split, text=kind == "t2i")
    return folders


def config(path, variant="digits", **changes):
    cut = CUT + (f",text={TEXT}" if variant.startswith("t2i") else "")
    c = CONFIGS.get_config(variant + cut)
    c.update(total_steps=4, log_every=2, eval_every=0)
    c.checkpoint.every = 2
    c.mesh.data = 1
    c.tokenizer.source = ""
    c.data.update(source="tokens", path=str(path), rotate=0.0, zoom=0.0)
    c.loss.chunk = 5
    c.optim.warmup_steps = 1
    c.evaluation.update(num_images=20, batch_size=8)
    for key, value in changes.items():
        owner, _, name = key.rpartition("__")
        (c[owner] if owner else c)[name] = value
    return c


def batch_of(stage, count=8):
    rng = np.random.RandomState(0)
    cfg = stage.model
    out = {
        "tokens": rng.randint(0, cfg.vocab_size, (count, cfg.num_tokens)),
        "label": rng.randint(0, 10, count),
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), out)


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    workdir = tmp_path_factory.mktemp("run")
    c = config(data["c2i"])
    return workdir, train(ARStage(c), c, workdir)


def test_a_run_logs_what_the_field_looks_at(trained):
    *_, last = lines(trained[0])
    bins = ("1", "2", "3-4", "5-8", "9-16")
    names = [f"loss_by_position/{b}" for b in bins]
    for name in ["loss", "accuracy", "perplexity", "loss_null", "log_z", *names]:
        assert name in last, name
    for name in ["loss", "accuracy", "perplexity", *names]:
        assert np.isfinite(last[f"eval/validation/{name}"]), name
    assert last["perplexity"] == pytest.approx(np.exp(last["loss"]), rel=1e-5)
    info = json.loads((trained[0] / "config.json").read_text())["model"]
    assert info["kind"] == "ar" and info["tokenizer"] == TOKENIZER
    assert from_dict(ARConfig, info["config"]) == ARStage(config(trained_path(trained))).model


def trained_path(trained):
    return json.loads((trained[0] / "config.json").read_text())["config"]["data"]["path"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["c2i_d12", "t2i_d12"])
def test_a_config_takes_a_real_step_on_tokens_when_cut_down(variant, data):
    """The optimizer step of the very config, in its type and with its condition; sizes are cut."""
    kind = "t2i" if variant.startswith("t2i") else "c2i"
    c = config(data[kind], variant)
    stage, mesh = ARStage(c), make_mesh(devices=jax.devices()[:1])
    assert stage.compute.dtype == "bfloat16"
    batch = make_pipeline(c.data, seed=0, batch_size=8, train=True)[0]
    frozen = layout.unbox(stage.load_frozen())
    assert set(frozen) == ({"null_text"} if kind == "t2i" else set())
    with jax.set_mesh(mesh):
        program = build(stage, c, mesh)
        state = program.init()
        before = jax.device_get(state.params)
        state, metrics = program.step(state, frozen, jax.tree.map(jnp.asarray, batch))
    assert int(state.skipped) == 0 and int(state.step) == 1
    assert abs(float(metrics["loss"].compute()) - np.log(VOCAB)) < 1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.params))
    assert all(x > 0 for x in jax.tree.leaves(moved)), moved


COUNTS = {  # Millions of weights in the blocks [paper] and released; 12 d w^2.
    "c2i_d10": 49, "c2i_d12": 85, "c2i_d16": 201, "c2i_d20": 393, "c2i_d24": 679, "c2i_d30": 1327,
}  # fmt: skip


@pytest.mark.parametrize("variant", ["digits", *COUNTS, "t2i_d12", "t2i_d36"])
def test_full_size_configs_describe_the_models_of_the_paper(variant):
    c = CONFIGS.get_config(variant)
    small = PAPER._replace(vocab_size=1000, num_tokens=16, num_classes=10)
    cfg = ARStage(c, small if variant == "digits" else PAPER).model
    boxed = ar.shapes(cfg)
    shapes = layout.unbox(boxed)
    blocks = shapes["ar"]["blocks"]
    own = {k: v for k, v in blocks.items() if k != "cross"}
    count = sum(x.size for x in jax.tree.leaves(own))
    exact = 12 * cfg.depth * cfg.width**2
    assert exact <= count < (1.1 if variant == "digits" else 1.05) * exact  # Rounded up.
    if variant in COUNTS:
        assert round(exact / 1e6) == COUNTS[variant]
    if variant != "digits":
        assert (cfg.width, cfg.num_heads) == (64 * cfg.depth, cfg.depth)
        assert (cfg.vocab_size, cfg.num_tokens, c.batch_size) == (64_000, 256, 1024)
        assert (c.total_steps, c.optim.warmup_steps) == (375_342, 37_534)
    else:
        assert sum(x.size for x in jax.tree.leaves(shapes)) * 4 < 5e6
    assert ("cross" in blocks) == (cfg.text_dim > 0) == variant.startswith("t2i")
    mesh = jax.sharding.AbstractMesh((1, 4, 2), AXES)
    placed = jax.tree.leaves(sharding.param_shardings(mesh, boxed))
    for shape, place in zip(jax.tree.leaves(shapes), placed, strict=True):
        assert shape.size < 1e6 or np.prod(place.shard_shape(shape.shape)) < shape.size


def test_the_loss_is_the_mean_of_its_bins_and_the_chunk_changes_nothing(data):
    stage, whole = (ARStage(config(data["c2i"], loss__chunk=c)) for c in (5, 99))
    params = new_params(stage.init)
    batch = batch_of(stage)
    args = params, {}, batch, jax.random.key(1), jnp.int32(0)
    loss, metrics = jax.jit(stage.loss)(*args)
    sizes = {"1": 1, "2": 1, "3-4": 2, "5-8": 4, "9-16": 8}
    bins = [n * metrics[f"loss_by_position/{b}"].compute() for b, n in sizes.items()]
    np.testing.assert_allclose(sum(bins) / LENGTH, loss, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(whole.loss)(*args)[0], loss, rtol=1e-5)


def test_positions_from_an_images_length_on_do_not_count(data):
    """In the loss, its gradient by the logits, and evaluation."""
    stage = ARStage(config(data["c2i"], loss__z_loss=0.1, condition__null_prob=0.0))
    params, batch = new_params(stage.init), batch_of(stage)
    short = batch | {"length": jnp.array([1, 3, 16, 20, 8, 2, 7, 5])}
    counted = np.arange(LENGTH) < np.asarray(short["length"])[:, None]
    condition = stage._condition(params, {}, batch, jnp.zeros(8, bool))
    predict, key = jax.jit(stage._predict), jax.random.key(0)
    head, _ = predict(params, batch["tokens"], batch, condition, key)
    by_hand = np.asarray(head.loss)[counted].mean() + 0.1 * (head.log_z[counted] ** 2).mean()

    def loss(batch, moved=0.0):
        stage._predict = lambda *args: (jax.tree.map(lambda x: x + moved, head), predict(*args)[1])
        value, logged = stage.loss(params, {}, batch, jax.random.key(1), jnp.int32(0))
        del stage._predict
        return value, logged

    value, logged = loss(short)
    assert value == pytest.approx(float(by_hand), rel=1e-5)
    bin_of = np.asarray(head.loss)[:, 4:8][counted[:, 4:8]].mean()
    assert logged["loss_by_position/5-8"].compute() == pytest.approx(float(bin_of), rel=1e-5)
    gradient = np.asarray(jax.grad(lambda x: loss(short, x)[0])(jnp.zeros((8, LENGTH))))
    assert (gradient[counted] > 0).all() and (gradient[~counted] == 0).all()
    full = batch | {"length": jnp.full(8, LENGTH)}
    assert loss(full)[0] == loss(batch)[0] == pytest.approx(float(head.loss.mean()
        + 0.1 * (head.log_z**2).mean()), rel=1e-5)  # fmt: skip
    mask = np.arange(8) < 3
    found = stage._evaluate(params, {}, short | {"mask": jnp.asarray(mask)})
    wanted = np.asarray(head.loss)[counted & mask[:, None]].mean()
    assert found["loss"].compute() == pytest.approx(float(wanted), rel=1e-4)


def test_dropped_conditions_are_the_null_condition(data):
    always, never = (ARStage(config(data["c2i"], condition__null_prob=p)) for p in (1.0, 0.0))
    params, batch = new_params(always.init), batch_of(always)
    unknown = batch | {"label": -jnp.ones_like(batch["label"])}
    args = jax.random.key(1), jnp.int32(0)
    loss_of = jax.jit(never.loss)
    dropped = jax.jit(always.loss)(params, {}, batch, *args)[0]
    assert dropped == pytest.approx(float(loss_of(params, {}, unknown, *args)[0]), rel=1e-5)
    assert abs(dropped - loss_of(params, {}, batch, *args)[0]) > 1e-4


def test_an_image_without_a_caption_gets_the_null_text(data):
    stage = ARStage(config(data["t2i"], "t2i_d12", compute__dtype="float32"))
    frozen = stage.load_frozen()
    assert frozen["null_text"]["text_mask"].tolist() == [True, True, False]
    text = np.random.RandomState(1).standard_normal((8, 3, TEXT)).astype(np.float32)
    mask = np.ones((8, 3), bool)
    batch = batch_of(stage) | {"text": jnp.asarray(text), "text_mask": jnp.asarray(mask)}
    absent = batch | {"text": batch["text"] * 0, "text_mask": jnp.asarray(mask & False)}

    kept = np.zeros(8, bool)
    for given, null in ((absent, kept), (batch, ~kept)):
        condition = stage._condition({}, frozen, given, null)
        np.testing.assert_array_equal(condition.text, np.zeros((8, 3, TEXT)))
        assert condition.text_mask.tolist() == [[True, True, False]] * 8
    condition = stage._condition({}, frozen, batch, kept)
    np.testing.assert_array_equal(condition.text, text)
    assert condition.text_mask.all()


def test_z_loss_is_added_to_the_mean(data):
    plain, with_z = (ARStage(config(data["c2i"], loss__z_loss=z)) for z in (0.0, 0.5))
    params = new_params(plain.init)
    args = params, {}, batch_of(plain), jax.random.key(1), jnp.int32(0)
    (a, metrics), (b, _) = jax.jit(plain.loss)(*args), jax.jit(with_z.loss)(*args)
    log_z = metrics["log_z"].compute()
    assert b - a == pytest.approx(0.5 * float(log_z) ** 2, rel=0.01)  # It hardly varies yet.


def test_training_learns_what_can_be_learnt_and_nothing_else(data, tmp_path):
    c = config(data["c2i"], total_steps=60, log_every=20, checkpoint__every=0)
    c.optim.lr = 3e-3
    train(ARStage(c), c, tmp_path)
    *_, last = lines(tmp_path)
    assert last["loss_by_position/5-8"] < 0.5  # The label, again and again,
    assert last["eval/validation/loss_by_position/5-8"] < 1
    assert last["eval/validation/loss_by_position/9-16"] > 4  # and noise.


# Images instead of tokens.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def online(tokenizer, images, **changes):
    return config(
        images, tokenizer__source=str(tokenizer), data__source="folder", data__split="all",
        data__eval_split="all", data__image_size=8, data__crop="center", data__shift=0, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    digits, _ = arrays("train")
    for i in range(10):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(digits[i]).save(path)
    return folder


def test_images_tokenised_in_the_step_are_the_tokens_made_before(tokenizer, images, tmp_path):
    args = ["--model", tokenizer, "--data", images, "--split", "all", "--out", tmp_path]
    assert cli.main(["tokenize", *map(str, args), "--num-tokens", "8"]) == 0
    c = online(tokenizer, images, model__num_tokens=8)
    before = config(tmp_path, data__split="all", data__eval_split="all", model__num_tokens=8)
    stages = ARStage(c), ARStage(before)
    frozen = layout.unbox(stages[0].load_frozen())
    assert set(frozen["tokenizer"]) == {"encoder", "vae"}
    batches = [make_pipeline(x.data, seed=3, batch_size=8, train=True)[1] for x in (c, before)]
    params, rest = new_params(stages[0].init), (jax.random.key(1), jnp.int32(0))
    found = [jax.jit(s._tokens)(f, b) for s, f, b in zip(stages, (frozen, {}), batches)]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (8, 8) and len(np.unique(found[0])) > 8
    losses = [
        jax.jit(s.loss)(params, f, b, *rest)[0] for s, f, b in zip(stages, (frozen, {}), batches)
    ]
    assert losses[0] == losses[1]
    infos = [s.export_config()["tokenizer"]["fingerprint"] for s in stages]
    assert infos[0] == infos[1] == fingerprint(random_params(TINY))


def test_fine_tuning_starts_from_the_averaged_weights_of_a_workdir(trained, tmp_path):
    c = config(trained_path(trained), init_from=str(trained[0]))
    found = ARStage(c).init_from(c.init_from)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(trained[1].state.ema), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_on_images_trains_and_leaves_the_tokenizer_out_of_its_state(
    tokenizer, images, tmp_path
):
    c = online(tokenizer, images, total_steps=2)
    outcome = train(ARStage(c), c, tmp_path)
    assert set(outcome.state.params) == {"ar"} and int(outcome.state.skipped) == 0
    *_, last = lines(tmp_path)
    assert np.isfinite(last["eval/validation/loss"])
    shutil.copytree(tokenizer, tmp_path / "moved")
    c.total_steps, c.tokenizer.source = 3, str(tmp_path / "moved")
    assert int(train(ARStage(c), c, tmp_path).state.step) == 3
    c.total_steps, stage = 4, ARStage(c)
    stage.export_config()["tokenizer"]["fingerprint"] = "other"
    with pytest.raises(WorkdirError, match="tokenizer.fingerprint: "):
        train(stage, c, tmp_path)


# What is refused.


def test_examples_without_text_are_counted_and_most_of_them_a_warning(data, tmp_path, caplog):
    with caplog.at_level("INFO", logger="flextok_jax"):
        ARStage(config(data["t2i"], "t2i_d12"))
    assert "'train': 1 of 24 examples have no embedding" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    for split in ("train", "test"):
        write(tmp_path, split, text=True, count=1)
    ARStage(config(tmp_path, "t2i_d12"))
    assert ["1 of 1" in r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_sizes_and_classes_are_those_of_the_data(tokenizer, images, data, tmp_path, caplog):
    stage = ARStage(online(tokenizer, images))
    cfg = stage.model
    assert (cfg.vocab_size, cfg.num_tokens, cfg.num_classes) == (VOCAB, LENGTH, 2)
    assert stage.export_config()["classes"] == ["class0", "class1"]
    assert ARStage(config(data["c2i"])).model.num_classes == 10  # The largest label and one.
    for split in ("train", "test"):
        write(tmp_path, split, classes=(names := list("abcdefghij")))
    assert ARStage(config(tmp_path)).export_config()["classes"] == names
    assert ARStage(config(tmp_path, model__num_classes=0)).export_config()["classes"] == []
    # Images without labels: an unconditional model, and it is said.
    caplog.clear()
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in images.glob("*/*.png"):
        shutil.copy(path, bare)
    assert ARStage(online(tokenizer, bare)).model.num_classes == 0
    assert "10 of 10" in caplog.text
    with pytest.raises(ValueError, match="num_classes=2"):
        ARStage(online(tokenizer, bare, model__num_classes=2))


def test_what_does_not_fit_is_refused_with_both_sides(data, tokenizer, images, tmp_path):
    def refused(c, match):
        with pytest.raises(ValueError, match=match):
            ARStage(c)

    path = data["c2i"]
    refused(config(path, model__vocab_size=64), f"vocab_size=64.*{VOCAB}")
    refused(config(path, model__num_tokens=17), "num_tokens=17.*16")
    refused(config(path, model__num_classes=9), "num_classes=9.*10")
    refused(config(path, tokenizer__source=str(tokenizer)), "tokenizer.source=")
    refused(config(path, data__source="folder"), "tokenizer.source=")
    refused(online(tokenizer, images, model__vocab_size=64), f"vocab_size=64.*{VOCAB}")
    refused(online(tokenizer, images, model__num_classes=3), "num_classes=3.*2")
    refused(config(path, "t2i_d12"), "text_dim=6.*0")
    write(tmp_path, "train", classes=list("abcdefghij"))
    write(tmp_path, "test", classes=list("abcdefghik"))
    refused(config(tmp_path), "'j', 'k'")
    full = tiny_tokenizer(changed(TINY, tokens=dict(count=16, order="full", keep="fixed")))
    full.save_pretrained(tmp_path / "full")
    refused(online(tmp_path / "full", images, model__num_tokens=8), r"num_tokens=8.*\(16,\)")
    c = online(tokenizer, images)
    c.data.image_size = 16
    refused(c, "image_size=16.*8")


def test_splits_of_two_tokenizers_are_refused(tmp_path):
    write(tmp_path / "a", "train")
    write(tmp_path / "b", "test", TOKENIZER | {"origin": "Y", "fingerprint": "1"})
    (tmp_path / "b" / "test").rename(tmp_path / "a" / "test")
    with pytest.raises(ValueError, match="(?s)tokenizer.fingerprint.*'0'.*'1'"):
        ARStage(config(tmp_path / "a"))
