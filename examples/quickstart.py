"""The quickstart's report: the shipped models of the digits beside those trained here just now.

python -m examples.quickstart --shipped demo-digits \
    --shipped-ar demo-digits-ar --runs quickstart --out quickstart/report.html \
    --picture quickstart/digits.png
"""

import argparse
import pathlib
import sys

from examples import quickstart_parts as parts
from flextok_jax.evaluation import pictures, report
from flextok_jax.io import storage
from flextok_jax.io.checkpoint import WorkdirError

COMMANDS = """./launch/quickstart.sh

# or by hand: train the three stages, then compare
python -m flextok_jax.main --config=configs/vae.py:digits --workdir={runs}/vae \\
    --config.total_steps={vae}
python -m flextok_jax.main --config=configs/tokenizer.py:digits --workdir={runs}/tokenizer \\
    --config.total_steps={tokenizer}
python -m flextok_jax.main --config=configs/ar.py:digits --workdir={runs}/ar \\
    --config.tokenizer.source={runs}/tokenizer --config.total_steps={ar}
python -m examples.quickstart --shipped {shipped} \\
    --shipped-ar {shipped_ar} --runs {runs} --out {out}"""


def main(argv: list[str] | None = None) -> int:
    """Evaluates the models and writes the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shipped", required=True, help="a tokenizer of the digits")
    parser.add_argument("--shipped-ar", required=True, help="an AR model of its tokens")
    parser.add_argument(
        "--runs", required=True, help="a folder with the workdirs vae, tokenizer and ar"
    )
    parser.add_argument("--out", required=True, help="the HTML file")
    parser.add_argument("--picture", help="a PNG file for the grids of the shipped models")
    args = parser.parse_args(argv)
    try:
        content = _content(args)
        if args.picture:
            with storage.atomic(args.picture) as temporary:
                whole = parts.picture(content.shipped, content.shipped_samples)
                pictures.write_png(temporary, whole, _about(content))
        title = "An image in one token, or two, or sixteen"
        report.write_report(args.out, title, parts.sections(content))
    except (ValueError, OSError, WorkdirError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"The report is {args.out}")
    return 0


def _content(args) -> parts.Content:
    runs = pathlib.Path(args.runs)
    training = {stage: parts.read_training(runs / stage) for stage in parts.STAGES}
    shipped = parts.judged("the shipped model", args.shipped)
    trained = parts.judged("the model trained here", runs / "tokenizer")
    return parts.Content(
        shipped,
        trained,
        parts.sampled(shipped.name, args.shipped_ar, shipped.tok),
        parts.sampled(trained.name, runs / "ar", trained.tok),
        training,
        COMMANDS.format(
            runs=_short(args.runs),
            shipped=args.shipped,
            shipped_ar=args.shipped_ar,
            out=_short(args.out),
            **{stage: run.config.get("total_steps", run.steps) for stage, run in training.items()},
        ),
    )


def _about(content: parts.Content) -> dict:
    """What the picture says of itself."""
    about = {k: content.shipped.result[k] for k in ("steps", "guidance", "seed")}
    about["num_tokens"] = ",".join(map(str, parts.COUNTS))
    about["model"] = content.shipped.tok.origin
    about["ar_model"] = content.shipped_samples.gen.origin
    return about


def _short(path: str) -> str:
    """Relative to the current folder where it lies inside."""
    here, full = pathlib.Path.cwd(), pathlib.Path(path).absolute()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(path)


if __name__ == "__main__":
    sys.exit(main())
