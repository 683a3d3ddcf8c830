"""Eight devices compute what one computes, on every mesh: training, and generation."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from common import ROOT
from test_ar_stage import config as ar_config
from test_ar_stage import write
from test_tokenizer_stage import config as tokenizer_config

from flextok_jax import main
from flextok_jax.io.formats.names import flatten
from flextok_jax.nn import layout
from flextok_jax.parallel.sharding import param_shardings
from flextok_jax.training import optimizer
from flextok_jax.training.loop import train

pytestmark = pytest.mark.slow  # a process of eight devices

RUNS = [("tokenizer", sizes) for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2))]  # data, fsdp, tensor
RUNS += [("ar", (2, 2, 2))]  # the vocabulary over `tensor`
STEPS = 20


def configs(tokens):
    """Kind -> configuration of a small run in float32, with `tokens` a folder of AR data."""
    tok = tokenizer_config("digits,width=64,enc_depth=1,dec_depth=1,batch=16")
    ar = ar_config(tokens, batch_size=16, evaluation__num_images=0)
    for c in (tok, ar):
        c.update(total_steps=STEPS, log_every=1)
        c.checkpoint.every = 0
        c.optim.update(lr=1e-3, warmup_steps=5)
        c.compute.scan = True
    return {"tokenizer": tok, "ar": ar}


def run(config, mesh, workdir):
    """Trains; returns how many steps were compiled."""
    compiled = []

    def listen(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration" and "train_step" in fun_name:
            compiled.append(fun_name)

    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    train(main.make_stage(config), config, workdir)
    jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


def updates(config, mesh):
    """{path: the first update by Muon or Adam}, for given gradients on the shardings of a run."""
    config.optim.rule = "muon"
    stage, tx = main.make_stage(config), optimizer.make_optimizer(config)
    boxed = jax.eval_shape(stage.init, jax.random.key(0))
    random, shapes = np.random.RandomState(0), layout.unbox(boxed)
    params, grads = (
        jax.tree.map(lambda x: random.normal(size=x.shape).astype(x.dtype), shapes) for _ in "12"
    )
    placed = jax.device_put((params, grads), (param_shardings(mesh, boxed),) * 2)
    found = jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params)[0])(*placed)
    return flatten(jax.device_get(found))


ON_EIGHT = """
import json, pathlib, sys
import conftest
import jax
import numpy as np
from common import GOLDEN, TINY, random_params, tiny_generator, tiny_tokenizer
from test_sweep import CFG, SETTINGS, sweep_of
from test_meshes import RUNS, configs, run, updates
from flextok_jax import FlexTok, ImageGenerator, TextEncoder, conditions, search, token_search
from flextok_jax import verifiers
from flextok_jax.io.checkpoint import Checkpoints
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.nn import ar, flextok
from flextok_jax.parallel.sharding import place

Checkpoints.save = lambda *_: None  # test_processes.py saves on several devices, and it takes time.
assert jax.device_count() == 8
folder, labels = pathlib.Path(sys.argv[1]), np.arange(5)
compiled = [
    run(configs(folder / "tokens")[kind], sizes, folder / f"{kind} {sizes}") for kind, sizes in RUNS
]
mesh = make_mesh(2, 2, 2)
config = configs(folder / "tokens")["tokenizer"]
one, eight = (updates(config, m) for m in (make_mesh(devices=jax.devices()[:1]), mesh))
moved = {p: [float(np.abs(x - one[p]).max()), float(np.abs(x).max())] for p, x in eight.items()}
plain = tiny_generator(TINY)
params = place(mesh, plain.params, ar.shapes(plain.config))
tok = FlexTok(TINY, place(mesh, plain.tokenizer.params, flextok.shapes(TINY)), mesh=mesh)
gen = ImageGenerator(plain.config, params, tok, mesh=mesh)
wanted, images = plain.generate_tokens(labels, key=0), plain.generate(labels, key=0, steps=2)
again, embed = gen.generate(labels, key=0, steps=2), gen.params["ar"]["embed"]
generated = dict(
    same_tokens=bool((gen.generate_tokens(labels, key=0) == wanted).all()),
    error=float(np.abs(again - images).max() / np.abs(images).max()),
    rows=embed.addressable_shards[0].data.shape[0] / embed.shape[0],
)

bright = verifiers.function(lambda images, prompts: images.mean((1, 2, 3)))
how = dict(labels=[1, 2], beams=2, candidates=3, schedule=(1, 4), search_steps=1, steps=2, key=0)
one, several = (search(model, bright, **how) for model in (plain, gen))
generated["same_search"] = bool((one.tokens == several.tokens).all())
generated["search_error"] = float(np.abs(one.scores - several.scores).max())
settings = token_search.Settings(beams=2, candidates=3)
task = token_search.prepare(gen, bright, conditions.of_labels([1]), settings)
cache = task.proposals.open(0, np.zeros((6, 0), np.int32), 1).caches[0].k
generated["search_rows"] = cache.addressable_shards[0].data.shape[0] / cache.shape[0]

encoders = [TextEncoder.from_pretrained(GOLDEN / "text" / "t5_a", mesh=m) for m in (None, mesh)]
(wanted, mask), (found, _) = (encoder.encode(["a red cube", "", "cat"]) for encoder in encoders)
generated["text_error"] = float(np.abs(found - wanted)[mask].max() / np.abs(wanted[mask]).max())

swept = []
for count in (1, 2, 8):
    several = make_mesh(count, 1, 1, jax.devices()[:count]) if count > 1 else None
    tok = tiny_tokenizer(CFG) if several is None else FlexTok(CFG, random_params(CFG), mesh=several)
    out = folder / f"sweep {count}"
    out.mkdir()
    (result,) = sweep_of(tok, out).run(SETTINGS[:1])
    swept.append(result["metrics"])
print(json.dumps(dict(compiled=compiled, moved=moved, generated=generated, swept=swept)))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the folder of all runs, what the process with eight devices found)."""
    folder = tmp_path_factory.mktemp("meshes")
    write(folder / "tokens", "train")
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "JAX_NUM_CPU_DEVICES": "8",
    }
    command = [sys.executable, "-c", ON_EIGHT, str(folder)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        for kind, config in configs(folder / "tokens").items():  # meanwhile, one device
            assert run(config, (1, 1, 1), folder / f"{kind} one") == 1
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return folder, json.loads(output.splitlines()[-1])


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind, sizes", RUNS, ids=str)
def test_the_losses_are_those_of_one_device(kind, sizes, runs):
    one, eight = records(runs[0] / f"{kind} one"), records(runs[0] / f"{kind} {sizes}")
    assert [r["step"] for r in eight] == [r["step"] for r in one] == [*range(1, STEPS + 1)]
    assert one[-1]["loss"] < one[0]["loss"]
    for key in ("loss", "grad_norm"):  # The same parameters.
        assert eight[0][key] == pytest.approx(one[0][key], rel=1e-3), key
    # Later, rounding may have given another id at the border of two levels.
    assert [r["loss"] for r in eight] == pytest.approx([r["loss"] for r in one], rel=2e-2)


def test_every_run_compiles_its_step_once(runs):
    assert runs[1]["compiled"] == [1] * len(RUNS)


def test_muon_moves_every_parameter_as_on_one_device(runs):
    moved = runs[1]["moved"]
    assert {path.split("/")[0] for path in moved} == {"encoder", "decoder"}
    for path, (error, largest) in moved.items():
        assert error < 1e-4 * largest, path


def test_generation_gives_the_same_tokens_and_images(runs):
    """`tokenize` and `detokenize` alone: test_tokenizer.py."""
    found = runs[1]["generated"]
    assert found["same_tokens"] and found["error"] < 1e-5
    assert found["rows"] == 1 / 2  # the vocabulary over `tensor`
    assert found["text_error"] < 1e-5


def test_a_search_finds_the_same_with_its_rows_over_the_devices(runs):
    """Six candidates, filled up to a multiple of the four parts of the batch."""
    found = runs[1]["generated"]
    assert found["same_search"] and found["search_error"] < 1
    assert found["search_rows"] == 1 / 4


def test_an_evaluation_gives_the_same_numbers_on_one_two_and_eight_devices(runs):
    one, *others = runs[1]["swept"]
    for other in others:
        for name in ("psnr", "mae", "ssim", "fid", "inception_score", "precision", "recall"):
            assert other[name] == pytest.approx(one[name], rel=2e-3), name
        assert other["codes"] == one["codes"] and other["count"] == one["count"]
