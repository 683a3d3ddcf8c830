"""Programs compiled by the TPU compiler, here, without a TPU."""

import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import ROOT
from jax.sharding import NamedSharding

from flextok_jax.aot import chips, flops, hlo, verdict
from flextok_jax.compile import report
from flextok_jax.nn import ar, kernels, layers, layout
from flextok_jax.nn.config import ARConfig, FlexTokConfig, identity_vae
from flextok_jax.parallel.mesh import compiler_options, make_mesh

pytest.importorskip("libtpu", reason="the TPU compiler is for Linux on x86_64")

VGG16 = (64, 64, 128, 128, *3 * (256,), *6 * (512,))  # channels of its convolutions
SMALL = "ar.py:c2i_d24,depth=2,width=256,batch=64,vocab=1024,num_tokens=128"  # hidden width 768


def run(*args, config=SMALL, topology="v5e:2x2"):
    command = [
        sys.executable, "-m", "flextok_jax.compile", f"--config={ROOT}/configs/{config}",
        f"--topology={topology}", *args,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(what is printed, the JSON, the program's text) of a small AR model's training step."""
    folder = tmp_path_factory.mktemp("compile")
    done = run(
        "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.compute.attention=pallas",
        "--config.compute.remat=dots", f"--out={folder}/out.json", f"--text={folder}/out.txt",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "out.json").read_text())
    return done.stdout, found, (folder / "out.txt").read_text()


def test_a_training_step_compiles_for_four_chips_within_a_memory_ceiling(small):
    _, found, _ = small
    memory = found["memory"]
    assert found["chips"] == 4 and found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    kinds = sum(size for kind, size in memory.items() if kind not in ("total", "chip"))
    assert memory["total"] == kinds < 1.0 * 2**30
    # Parameters, averages and two moments, a quarter of each on every chip.
    state = memory["parameters"] + memory["averages"] + memory["optimizer"]
    cfg = ARConfig(
        vocab_size=1024, num_tokens=128, width=256, depth=2, mlp_hidden=768, num_classes=1000
    )
    params = jax.eval_shape(lambda: ar.init(cfg, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert state == pytest.approx(4 * 4 * count / 4, rel=0.05)


def test_no_weight_of_a_block_travels_whole_in_float32(small):
    _, _, text = small
    gathered = [
        shape
        for instruction in hlo.instructions(text)
        if " all-gather" in instruction.text
        for shape in hlo.shapes(instruction.text)
    ]
    assert any(kind == "bf16" for kind, _ in gathered)  # They do travel.
    matrices = {(256, 256), (256, 768), (768, 256), (256, 1024)}
    whole = {shape[-2:] for kind, shape in gathered if kind == "f32" and len(shape) >= 2}
    assert not whole & matrices


def test_the_report_says_what_it_is_and_holds_the_numbers(small):
    text, found, _ = small
    assert "by the compiler's estimate; nothing ran" in text
    assert f"MFU {found['mfu']:.1%}" in text and "all-gather" in text
    assert 0 < found["mfu"] < found["mfu_without_kernels"] < 1
    assert found["kernels"] == 2 + 2 and found["open_loops"] == 0  # forwards and backwards
    assert found["seconds"] > found["seconds_without_kernels"] > 0
    assert found["collectives"]["all-gather"]["bytes"] > 0


@pytest.mark.slow
def test_the_step_of_a_vae_compiles_with_all_its_terms(tmp_path):
    done = run(
        "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.discriminator.width=8",
        f"--out={tmp_path}/out.json", config="vae.py:c4,width=32,layers=1,batch=4,image=64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    # The arguments that are not state: VGG16, whole on every chip, and the images.
    weights = sum(9 * a * b for a, b in zip((3, *VGG16), VGG16)) + sum(VGG16)
    heads = sum((64, 128, 256, 512, 512))
    assert found["memory"]["other arguments"] >= 4 * (weights + heads)
    assert found["model_flops"] > 0 and 0 < found["mfu"] < 1


def compiled(f, mesh, args, out=None):
    """`f` for the devices of `mesh`; args: (shape, type, partition) each."""
    args = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, p)) for s, t, p in args]
    with jax.set_mesh(mesh):
        lowered = jax.jit(f, out_shardings=out).lower(*args)
    return lowered.compile(compiler_options=compiler_options(mesh))


@pytest.fixture
def four_chips():
    # What is compiled for a TPU cannot be read from the cache without one.
    jax.config.update("jax_enable_compilation_cache", False)
    yield make_mesh(data=1, fsdp=4, devices=chips.topology("v5e:2x2").devices)
    jax.config.update("jax_enable_compilation_cache", True)


def test_a_padded_mlp_compiles_with_gradients_cut_twice(four_chips):
    # Over the devices, and to the width of the parameters: a compiler's weak spot.
    width, hidden = 256, 1000
    mlp = layers.SwiGLU(width, 1.5 * hidden / width + 1e-3, jnp.bfloat16)

    def loss(fc1, fc2, fc3, x):
        kernels = {"fc1": {"kernel": fc1}, "fc2": {"kernel": fc2}, "fc3": {"kernel": fc3}}
        kernels = layout.gather(kernels, "decoder/blocks/mlp", jnp.bfloat16)
        return jnp.mean(mlp.apply({"params": kernels}, x) ** 2)

    def spec(i, shape):
        return layout.param_spec(f"decoder/blocks/mlp/fc{i}/kernel", shape, four_chips)

    shapes = {1: (width, hidden), 2: (hidden, width), 3: (width, hidden)}
    args = [(shape, jnp.float32, spec(i, shape)) for i, shape in shapes.items()]
    out = [NamedSharding(four_chips, spec) for _, _, spec in args]
    args.append(((8, 128, width), jnp.bfloat16, jax.P("fsdp")))
    done = compiled(jax.grad(loss, (0, 1, 2)), four_chips, args, tuple(out))
    assert [leaf.shape for leaf in done.out_info] == [shape for shape, _, _ in args[:3]]
    assert any(1024 in s for i in hlo.instructions(done.as_text()) for _, s in hlo.shapes(i.text))


def test_the_own_kernels_compile_and_count_by_their_work(four_chips):
    batch, length, width, head_dim = 8, 256, 256, 64
    mask = np.ones((length, length), bool)
    mask[:, 128:] = False  # Half of the keys are left out.

    def loss(x, y, shift, scale, gate):
        x, y = kernels.normalize(x + 1, shift, scale)
        y = kernels.attend(y, y * 2, y * 3, head_dim, 8 / head_dim, mask, norm=True)
        return jnp.sum(kernels.add_gated(x, y, gate) ** 2)

    array = ((batch, length, width), jnp.bfloat16, jax.P("fsdp"))
    vector = ((batch, 2, width), jnp.bfloat16, jax.P("fsdp"))
    f = jax.grad(loss, (0, 1, 2, 3, 4))
    text = compiled(f, four_chips, [array, array, vector, vector, vector]).as_text()
    found = hlo.kernels(list(hlo.instructions(text)))
    one = batch // 4 * length * width  # Numbers of an array on one chip.
    products = 2 * one * length // 2
    assert sorted((k.head_dim or 0, k.flops, k.bytes // (2 * one)) for k in found) == sorted(
        [(0, 0, 2), (0, 0, 3), (0, 0, 3), (0, 0, 4)]
        + [(head_dim, 2 * products, 4), (head_dim, 5 * products, 7)]
    )
    assert all(k.times == 1 for k in found)


def test_a_kernel_takes_what_its_products_or_its_memory_take():
    chip = chips.CHIPS["v6e"]
    bound = hlo.Kernel(flops=10**12, bytes=0, head_dim=64, times=3)  # A quarter of 256 lanes.
    assert verdict._kernel_cycles(bound, chip) == 3 * 10**12 / (chip.flops_per_cycle / 4)
    moved = hlo.Kernel(flops=0, bytes=int(chip.bandwidth), head_dim=None, times=2)
    assert math.isclose(verdict._kernel_cycles(moved, chip), 2 * chip.clock)


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["topology=v9:2x2"], "the kinds are v4, v5e, v5p, v6e"),
        (["topology=v5e:3x5"], "topology 'v5e:3x5'"),
        (["config=vae.py:c16", "--program=vae"], "'vae' has train"),
        (["--config.batch_size=62"], "batch_size=62 must be a multiple of"),
        (["--config.compute.atention=xla"], "the config has no key .*atention"),
        (["--out=/proc/nowhere/out.json"], "error: .*/proc/nowhere"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(args, complaint):
    named = dict(arg.split("=") for arg in args if not arg.startswith("--"))
    done = run(*(arg for arg in args if arg.startswith("--")), **named)
    assert re.search(complaint, done.stderr) and "Traceback" not in done.stderr
    assert done.returncode == 1


def test_model_flops_are_those_of_the_formula():
    # One matrix of each kind, written out: D = 8, hidden 21, N = 4, R = 2.
    cfg = FlexTokConfig(
        vae=identity_vae(3), grid=(2, 2), num_tokens=2, levels=(2, 2), enc_width=8, enc_depth=3,
        dec_width=8, dec_depth=5, head_dim=4, time_frequencies=6,
    )  # fmt: skip
    block = 4 * 8 * 8 + 3 * 8 * 21
    encoder = 3 * block * 6 + 12 * 8 * 4 + 8 * 2 * 2
    decoder = 5 * (block * 6 + 8 * 96) + 12 * 8 * 4 + 2 * 8 * 2 + 6 * 8 + 8 * 8
    decoder += 8 * 16 + 8 * 12 * 4  # the head's modulation, the head
    pairs = 3 * (4 * 4 + 2 * 4 + 3) + 5 * 6 * 6
    assert flops.tokenizer(cfg) == 6 * (encoder + decoder) + 12 * pairs * 8
    cfg = ARConfig(vocab_size=10, num_tokens=4, width=8, depth=2, head_dim=4, mlp_hidden=16)
    assert flops.ar_model(cfg) == 6 * 4 * (2 * (4 * 64 + 3 * 128) + 80) + 12 * 2 * 10 * 8


def test_products_of_a_program_are_counted_once_and_without_zeros():
    kernel, x = jnp.zeros((3, 3, 8, 16)), jnp.zeros((2, 12, 12, 8))
    dense, scanned = jnp.zeros((16, 5)), jnp.zeros((7, 5, 5))

    def loss(kernel, dense, scanned, x):
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.cond(x.sum() > 0, lambda: x @ dense, lambda: x[..., :5])
        return jnp.sum(jax.lax.scan(lambda x, w: (x @ w, None), x, scanned)[0])

    positions = 2 * 6 * 6
    convolved, linear = 2 * positions * 9 * 8 * 16, 2 * positions * (16 * 5 + 7 * 5 * 5)
    args = kernel, dense, scanned, x
    assert flops.products(loss, *args) == convolved + linear
    # Twice as much backwards, but for images that have no gradient; then with it.
    assert flops.products(jax.grad(loss, (0, 1, 2)), *args) == 2 * convolved + 3 * linear
    assert flops.products(jax.grad(loss, (0, 1, 2, 3)), *args) == 3 * (convolved + linear)


def test_slices_lie_along_data_and_a_v4_is_one_device():
    two = chips.topology("2*v5e:2x2")
    mesh = make_mesh(data=2, fsdp=4, devices=two.devices)
    of = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert sorted(map(sorted, of)) == [[0], [1]]
    # Also where an axis is as long as no side of a slice.
    larger = make_mesh(data=8, fsdp=16, devices=chips.topology("2*v5e:8x8").devices)
    assert [{d.slice_index for d in half.flat} for half in np.split(larger.devices, 2)] == of
    with pytest.raises(ValueError, match="data=1 must be a multiple of the 2 slices"):
        make_mesh(data=1, fsdp=8, devices=two.devices)
    assert chips.topology("v4:2x2x1").num_chips == 4


def test_the_report_says_what_is_not_counted_between_slices():
    topologies = "v5e:2x4", "2*v5e:2x2"
    found = dict.fromkeys(["seconds", "seconds_without_kernels", "kernels", "open_loops"], 0)
    found |= dict(program="train", chips=8, mesh={"data": 8}, versions={}, compile_seconds=1.0)
    found |= dict(memory={"total": 1, "chip": 2}, collectives={}, collectives_seconds=0.1)
    one, two = (report(found | {"topology": t, "model_flops": None}) for t in topologies)
    assert "between slices not counted at their own rate" in two and "slices" not in one


PROGRAM = """HloModule toy
%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %fusion.1 = bf16[8,4]{1,0} fusion(%x), kind=kLoop, calls=%inside, metadata={op_name="a/b"}, \
backend_config={"estimated_cycles":"10"}
  %all-gather.1 = bf16[16,4]{1,0} all-gather(%fusion.1), channel_id=1, dimensions={0}
}
%inside (q: bf16[8,4]) -> bf16[8,4] {
  %all-reduce.3 = f32[8,4]{1,0} all-reduce(%q), channel_id=2, to_apply=%add
  %all-reduce.4 = f32[8,4]{1,0} all-reduce(%q), channel_id=2, to_apply=%add
}
%rest (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %fusion.4 = f32[3]{0} fusion(%y), kind=kLoop, calls=%none, \
backend_config={"estimated_cycles":"10"}
}
%condition (p: (s32[], bf16[8,4])) -> pred[] {
  %constant.1 = s32[] constant(7)
}
%open (p: (s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %while.1 = (s32[], bf16[8,4]) while(%t), condition=%condition, body=%body
  %while.2 = (s32[], bf16[8,4]) while(%t), condition=%open, body=%rest
  %fusion.2 = f32[3]{0} fusion(%y), kind=kLoop, calls=%other, \
backend_config={"estimated_cycles":"5"}
}
"""


def test_the_tables_of_the_pages_are_those_of_the_numbers_that_were_kept(tmp_path, monkeypatch):
    from benchmarks import tpu

    for name in ("PAGE", "COSTS"):
        page = getattr(tpu, name)
        monkeypatch.setattr(tpu, name, tmp_path / page.name)
        (tmp_path / page.name).write_text(page.read_text())
    tpu.write_pages(json.loads(tpu.RESULTS.read_text()))
    for page in ("tpu.md", "training.md"):
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()


def test_instructions_count_as_often_as_the_loops_around_them_run():
    found = list(hlo.instructions(PROGRAM))
    assert sum(instruction.cycles for instruction in found) == 7 * 10 + 10 + 5
    assert hlo.open_loops(found) == 1
    assert hlo.collectives(found) == {
        "all-gather": {"count": 7, "bytes": 7 * 16 * 4 * 2},
        "all-reduce": {"count": 7, "bytes": 7 * 8 * 4 * 4},  # From inside the fusion.
    }
