"""Estimates of the TPU compiler, made without a TPU."""

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

from configs import ar as ar_config
from configs import tokenizer as tokenizer_config
from configs import vae as vae_config
from flextok_jax import compile as estimates
from flextok_jax.nn import ar, kernels
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.parallel.mesh import compiler_options, make_mesh

SMALL = "ar.py:c2i_d24,depth=2,width=256,batch=64,vocab=1024,num_tokens=128"  # hidden width 768
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


def test_instructions_count_as_often_as_the_loops_around_them_run():
    found = list(estimates.instructions(PROGRAM))
    assert estimates.cycles(found) == 7 * 10 + 10 + 5
    assert estimates.collectives(found) == {
        "all-gather": {"count": 7, "bytes": 7 * 16 * 4 * 2},
        "all-reduce": {"count": 7, "bytes": 7 * 8 * 4 * 4},  # From inside the fusion.
    }


def kernel(name, flops, size):
    target = 'custom_call_target="tpu_custom_call"'
    return f'%{name} = f32[] custom-call(), {target}, {{"flops":"{flops}","bytes_accessed":"{size}"'


def test_a_kernel_takes_what_its_products_or_its_memory_take():
    chip = estimates.CHIPS["v6e"]
    bound = [(kernel("attention_64.1", 10**12, 0), 3)]  # A quarter of 256 lanes.
    assert estimates.kernel_cycles(bound, chip) == (3, 3 * 10**12 / (chip.flops_per_cycle / 4))
    moved = [(kernel("normalize.2", 0, int(chip.bandwidth)), 2), ("%add.1 = f32[] add()", 5)]
    count, cycles = estimates.kernel_cycles(moved, chip)
    assert count == 2 and cycles == pytest.approx(2 * chip.clock)


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
    args, count = (kernel, dense, scanned, x), estimates.count_flops
    assert count(loss, *args) == convolved + linear
    # Twice as much backwards, except for images, which have no gradient; then with it.
    assert count(jax.grad(loss, (0, 1, 2)), *args) == 2 * convolved + 3 * linear
    assert count(jax.grad(loss, (0, 1, 2, 3)), *args) == 3 * (convolved + linear)


def small_ar():
    return ar_config.get_config(SMALL.partition(":")[2])


def test_model_flops_of_every_stage():
    """6 x matrices x positions, and some more: attention; and for a VAE, networks run twice."""
    found = estimates.model_flops(small_ar())
    matrices = 2 * (4 * 256 * 256 + 3 * 256 * 768) + 256 * 1024
    assert 1 < found / (6 * matrices * 128) < 1.1
    small = "d18_d28,enc_depth=1,dec_depth=1,width=64,batch=4,image=64"
    tokenizer = tokenizer_config.get_config(small)
    grouped = estimates.model_flops(tokenizer)
    tokenizer.model.tokens.keep, tokenizer.model.target.flow.null_prob = "fixed", 0.0
    found = estimates.model_flops(tokenizer)
    blocks = 2 * (4 * 64 * 64 + 3 * 64 * 171) * (16 + 256)
    assert 1 < found / (6 * blocks) < 2
    assert 0.2 < grouped / found < 0.8  # Most images keep few of the 256 tokens.
    vae = vae_config.get_config("c4,width=32,layers=1,batch=4,image=64")
    whole = estimates.model_flops(vae)
    vae.loss.update(gan_weight=0.0, lpips_weight=0.0)
    assert whole > estimates.model_flops(vae) > 0


def test_a_result_replaces_its_row_of_the_table(tmp_path):
    from benchmarks import tpu

    page = tmp_path / "tpu.md"
    page.write_text((ROOT / "docs/tpu.md").read_text())
    before = page.read_text().splitlines()
    tpu.write("| ar c2i_d24 | v5e:4x4 | new |", page)
    tpu.write("| ar other | v5e:4x4 | new |", page)
    lines = page.read_text().splitlines()
    assert len(lines) == len(before) + 1 and lines.count("| ar c2i_d24 | v5e:4x4 | new |") == 1
    assert len(set(before) - set(lines)) == 1


# --- With the TPU compiler ------------------------------------------------------------------------


@pytest.fixture
def four_chips():
    pytest.importorskip("libtpu", reason="the TPU compiler is for Linux on x86_64")
    # What is compiled for a TPU cannot be read from the cache without one.
    jax.config.update("jax_enable_compilation_cache", False)
    yield make_mesh(data=1, fsdp=4, devices=estimates.topology("v5e:2x2")[1])
    jax.config.update("jax_enable_compilation_cache", True)


def run(config, *args, topology="v5e:2x2"):
    command = [
        sys.executable, "-m", "flextok_jax.compile", f"--config={ROOT}/configs/{config}",
        f"--topology={topology}", *args,
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


def small_step(monkeypatch):
    """(the estimate, the program's text) of a small AR model's training step."""
    texts, read = [], estimates.instructions
    monkeypatch.setattr(estimates, "instructions", lambda text: texts.append(text) or read(text))
    config = small_ar()
    config.mesh.update(data=1, fsdp=4)
    config.compute.update(attention="pallas", remat="dots")
    chip, devices = estimates.topology("v5e:2x2")
    return estimates.train_step(config, chip, make_mesh(1, 4, 1, devices)), texts[0]


@pytest.mark.slow
def test_a_training_step_compiles_for_four_chips(four_chips, monkeypatch):
    found, text = small_step(monkeypatch)
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
    assert found["model_flops"] == 64 * estimates.model_flops(small_ar())
    assert 0 < found["mfu"] < found["mfu_without_kernels"] < 1
    assert found["kernels"] == 2 + 2  # forwards and backwards
    assert found["collectives"]["all-gather"]["bytes"] > 0
    assert f"{found['mfu']:.1%}" in estimates.report("v5e:2x2", found)

    # No matrix of a block is gathered whole in float32.
    gathered = [
        shape
        for line, _ in estimates.instructions(text)
        if " all-gather" in line
        for shape in estimates.shapes(line)
    ]
    assert any(kind == "bf16" for kind, _ in gathered)
    whole = {shape[-2:] for kind, shape in gathered if kind == "f32" and len(shape) >= 2}
    assert not whole & {(256, 256), (256, 768), (768, 256), (256, 1024)}


@pytest.mark.slow
def test_the_command_prints_an_estimate():
    pytest.importorskip("libtpu")
    config = "tokenizer.py:d18_d28,enc_depth=1,dec_depth=1,width=64,batch=4,image=64"
    done = run(config, "--config.mesh.data=1", "--config.mesh.fsdp=4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"total +\d+\.\d\d\n  of 16", done.stdout)
    assert 0 < float(re.search(r"MFU ([\d.]+)%", done.stdout)[1]) < 100


@pytest.mark.slow
@pytest.mark.parametrize(
    "args, key",
    [
        (["topology=v9:2x2"], "v9:2x2"),
        (["topology=v5e:3x5"], "v5e:3x5"),
        (["--config.batch_size=62"], "batch_size=62"),
        (["--config.compute.atention=xla"], "atention"),
    ],
)
def test_what_cannot_be_compiled_is_refused(args, key):
    pytest.importorskip("libtpu")
    named = dict(arg.split("=") for arg in args if not arg.startswith("--"))
    done = run(SMALL, *(arg for arg in args if arg.startswith("--")), **named)
    assert key in done.stderr and "Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.slow
def test_the_kernels_compile_and_count_by_their_work(four_chips):
    batch, length, width, head_dim = 8, 256, 256, 64
    mask = np.ones((length, length), bool)
    mask[:, 128:] = False  # Half of the keys are left out.

    def loss(x, y, shift, scale, gate):
        x, y = kernels.normalize(x + 1, shift, scale)
        y = kernels.attend(y, y * 2, y * 3, head_dim, 8 / head_dim, mask, norm=True)
        return jnp.sum(kernels.add_gated(x, y, gate) ** 2)

    def array(*shape):
        place = NamedSharding(four_chips, jax.P("fsdp"))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

    x, vector = array(batch, length, width), array(batch, 2, width)
    with jax.set_mesh(four_chips):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).lower(x, x, vector, vector, vector)
    text = lowered.compile(compiler_options=compiler_options(four_chips)).as_text()
    lines = list(estimates.instructions(text))
    costs = [re.search(r'"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', line) for line, _ in lines]
    one = batch // 4 * length * width  # Numbers of an array on one chip.
    products = 2 * one * length // 2
    assert sorted((int(c[1]), int(c[2]) // (2 * one)) for c in costs if c) == sorted(
        [(0, 2), (0, 3), (0, 3), (0, 4), (2 * products, 4), (5 * products, 7)]
    )
    assert estimates.kernel_cycles(lines, estimates.CHIPS["v5e"])[0] == 6


@pytest.mark.slow
def test_slices_are_parts_of_the_data_axis_and_a_v4_is_one_device(four_chips):
    _, two = estimates.topology("2*v5e:2x2")
    mesh = make_mesh(data=2, fsdp=4, devices=two)
    of = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert sorted(map(sorted, of)) == [[0], [1]]
    # Also where an axis is as long as no side of a slice.
    larger = make_mesh(data=8, fsdp=16, devices=estimates.topology("2*v5e:8x8")[1])
    assert [{d.slice_index for d in half.flat} for half in np.split(larger.devices, 2)] == of
    with pytest.raises(ValueError, match="data=1"):
        make_mesh(data=1, fsdp=8, devices=two)
    assert len(estimates.topology("v4:2x2x1")[1]) == 4
