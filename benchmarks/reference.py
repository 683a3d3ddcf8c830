"""Time against the reference implementation, side by side on one machine.

    python -m benchmarks.reference --reference ml-flextok --python torch/bin/python
    python -m benchmarks.reference --reference ml-flextok --python torch/bin/python \
        --device cuda --dtype bfloat16 --batch 16 --repeats 20

`--reference` is a checkout of the reference's PyTorch code (a folder that holds its package
`flextok`), `--python` a Python that has torch and what that package asks for. Neither is a
dependency of this project.

Both load one file of random weights in the released layout and see the same images. Each runs in
a process of its own, by its public interface, and they take turns, call by call, so that other
load on the machine affects both. Before the timing both must do the same in float32: the output
says how many of the tokens are equal, and how far apart the images are that both decode from the
same 16 tokens and the same noise.

"tokenize" is from pixels to all tokens. A guided step is the time of decoding k tokens in
1 + `--steps` steps less that in one step, divided by `--steps`: the VAE's decoder cancels out.
Ratios are the reference's time over ours in the same round: the median, the lowest and the highest
over the rounds. With bfloat16 the reference's VAE stays in float32, as its configuration says, and
the rest runs under autocast.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

KS = (256, 16, 1)
GUIDANCE = 7.5


def load_ours(args):
    """Writes weights, images and tokens into the folder; returns (tokenize, detokenize)."""
    import jax

    from benchmarks.tokens import model_config, random_params
    from flextok_jax import FlexTok
    from flextok_jax.io.formats.flextok_config import write_config
    from flextok_jax.nn import flextok
    from flextok_jax.nn.config import Compute

    jax.config.update("jax_default_matmul_precision", "highest")  # float32 on GPUs as well
    cfg = model_config(args.model)
    cfg = dataclasses.replace(cfg, vae=dataclasses.replace(cfg.vae, sample_posterior=False))
    FlexTok(cfg, random_params(flextok.shapes(cfg))).save_pretrained(args.folder)
    (args.folder / "config.json").write_text(json.dumps(write_config(cfg)))
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (args.batch, *cfg.image_size, 3)).astype(np.float32)
    tokens = rng.integers(cfg.vocab_size, size=(args.batch, cfg.num_tokens))
    np.save(args.folder / "images.npy", images)
    np.save(args.folder / "tokens.npy", tokens)
    model = FlexTok.from_pretrained(args.folder)
    attention = "cudnn" if args.device == "cuda" else "xla"
    models = {
        "float32": model,
        "bfloat16": dataclasses.replace(model, compute=Compute("bfloat16", attention)),
    }

    def tokenize(dtype):
        return np.asarray(models[dtype].tokenize(images))

    def detokenize(dtype, k, steps):
        how = dict(steps=steps, solver="euler", guidance_scale=GUIDANCE, norm_guidance=True)
        noise = np.load(args.folder / "noise.npy")
        return np.asarray(models[dtype].detokenize(tokens[:, :k], noise=noise, **how))

    return tokenize, detokenize


def load_reference(args):
    """Reads that folder and writes the noise into it; returns (tokenize, detokenize)."""
    sys.path[0] = str(args.reference)  # In place of the folder of this file.
    import torch
    from flextok.flextok_wrapper import FlexTokFromHub

    model = FlexTokFromHub.from_pretrained(args.folder).to(args.device).eval()
    images = np.load(args.folder / "images.npy").transpose(0, 3, 1, 2)
    images = torch.from_numpy(images.copy()).to(args.device)
    tokens = torch.from_numpy(np.load(args.folder / "tokens.npy")).to(args.device)

    def generator():
        return torch.Generator(args.device).manual_seed(0)

    # As the pipeline draws it, image by image.
    shape, drawn = (1, model.pipeline.out_channels, 32, 32), generator()
    noise = [torch.randn(shape, generator=drawn, device=args.device) for _ in images]
    np.save(args.folder / "noise.npy", torch.cat(noise).cpu().numpy().transpose(0, 2, 3, 1))

    @contextlib.contextmanager
    def running(dtype):
        low = dtype == "bfloat16"
        torch.backends.cudnn.allow_tf32 = low  # Else float32 is float32.
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=low):
            yield

    def tokenize(dtype):
        with running(dtype):
            return torch.cat(model.tokenize(images)).cpu().numpy()

    def detokenize(dtype, k, steps):
        how = dict(guidance_scale=GUIDANCE, perform_norm_guidance=True, verbose=False)
        with running(dtype):
            found = model.detokenize(
                list(tokens[:, :k].split(1)), timesteps=steps, generator=generator(), **how
            )
        return found.float().cpu().numpy().transpose(0, 2, 3, 1)

    return tokenize, detokenize


def work(args):
    """Answers each line of a request, [name of a function, arguments], by the seconds it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    tokenize, detokenize = {"ours": load_ours, "reference": load_reference}[args.side](args)
    calls = {"tokenize": tokenize, "detokenize": detokenize}
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        begin = time.perf_counter()
        result = calls[name](*arguments)
        seconds = time.perf_counter() - begin
        np.save(args.folder / f"{args.side}.npy", result)
        print(json.dumps(seconds), file=answers, flush=True)


class Worker:
    """A process of one side."""

    def __init__(self, args, side, python, module):
        settings = "--reference --folder --model --device --dtype --batch".split()
        values = {name: str(getattr(args, name[2:])) for name in settings}
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if args.device == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        self.side, self.result = side, args.folder / f"{side}.npy"
        self.process = subprocess.Popen(
            [python, *module, "--side", side, *(x for pair in values.items() for x in pair)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._answer()

    def _answer(self):
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"the process of {self.side} ended; its messages are above")
        return line

    def call(self, name, *arguments) -> float:
        """Seconds of a call."""
        print(json.dumps([name, arguments]), file=self.process.stdin, flush=True)
        return float(self._answer())


def compare(workers) -> str:
    """What both give in float32, in words."""
    for worker in workers:
        worker.call("tokenize", "float32")
    ours, theirs = (np.load(worker.result) for worker in workers)
    equal = np.mean(ours == theirs)
    for worker in workers:
        worker.call("detokenize", "float32", 16, 1)
    ours, theirs = (np.load(worker.result) for worker in workers)
    apart = np.abs(ours - theirs).max() / theirs.std()
    return (
        f"float32: {equal:.2%} of the tokens are equal; decoded images differ by at most "
        f"{apart:.1e} of their standard deviation"
    )


def measure(workers, args) -> dict:
    """{row: seconds [repeats, 2], ours and the reference's}, after one call of each."""
    long = 1 + args.steps
    calls = {"tokenize": ("tokenize", args.dtype)} | {
        (k, steps): ("detokenize", args.dtype, k, steps) for k in KS for steps in (1, long)
    }
    for name, call in calls.items():
        if name == "tokenize" or name[1] == 1:  # Compiles; more steps run the same programs.
            for worker in workers:
                worker.call(*call)
    rows = {"tokenize": []} | {f"guided step, k={k}": [] for k in KS}
    for i in range(args.repeats):
        now = {
            name: np.array([worker.call(*call) for worker in workers])
            for name, call in calls.items()
        }
        rows["tokenize"].append(now["tokenize"])
        for k in KS:
            rows[f"guided step, k={k}"].append((now[k, long] - now[k, 1]) / args.steps)
        ratios = ", ".join(f"{name}: {x[-1][1] / x[-1][0]:.2f}" for name, x in rows.items())
        print(f"round {i + 1}, reference / ours: {ratios}", flush=True)
    return {name: np.array(x) for name, x in rows.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of its code")
    parser.add_argument("--python", help="a Python that has torch")
    parser.add_argument("--model", default="d12_d12", help="dE_dD: depths, widths 64 per layer")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8, help="steps that a step's time is taken of")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return work(args)
    if not args.python or not (args.reference / "flextok").is_dir():
        parser.error(
            f"--reference {args.reference} must hold the package flextok, and --python is needed"
        )
    args.reference = args.reference.absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        args.folder = Path(folder)
        workers = []
        for side, start in (
            ("ours", (sys.executable, ["-m", "benchmarks.reference"])),
            ("reference", (args.python, [__file__])),
        ):
            workers.append(Worker(args, side, *start))
            stack.callback(workers[-1].process.terminate)
        print(compare(workers), flush=True)
        rows = measure(workers, args)
    print(f"{args.model}, batch {args.batch}, {args.dtype}, {args.device}: median seconds")
    print(f"{'':<22}{'ours':>9}{'reference':>11}    reference / ours: median (lowest, highest)")
    for name, seconds in rows.items():
        ratios = seconds[:, 1] / seconds[:, 0]
        cells = "".join(f"{x:>10.3f}" for x in np.median(seconds, axis=0))
        spread = f"({ratios.min():.2f}, {ratios.max():.2f})"
        print(f"{name:<20}{cells}    {np.median(ratios):.2f} {spread}")


if __name__ == "__main__":
    main()
