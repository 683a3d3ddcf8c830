"""The `flextok` command. Importing this file is cheap: each subcommand imports what it needs."""

import argparse
import importlib
import math
import sys
import textwrap

from flextok_jax import __version__

_SOURCE = (
    "a folder or model.safetensors in the released format, a workdir of training (its averaged "
    "weights), a hub id such as EPFL-VILAB/flextok_d12_d12_in1k, or demo-digits"
)
_PACKAGES = {  # Where the package is not called like the module.
    "PIL": "Pillow",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}
_IMAGES = "a folder, searched with its subfolders; or digits: the held-out digits of the demo"


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        The exit code: 0; 2 for what a person can put right, told on stderr; 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    module, function = args.function.split(":")
    try:
        getattr(importlib.import_module(f"flextok_jax.commands.{module}"), function)(args)
    except KeyboardInterrupt as error:
        print(f"interrupted: {error or 'nothing half-written is left'}", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


def _message(error: Exception) -> str | None:
    """What to tell a person, None: a bug, whose traceback is wanted."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        package = _PACKAGES.get(module, module)
        return None if module == "flextok_jax" else f"this needs {package}: pip install {package}"
    if "RESOURCE_EXHAUSTED" in str(error):
        reason = str(error).splitlines()[0]
        return f"out of memory: try a smaller --batch-size, or --dtype bfloat16 ({reason})"
    checkpoint = sys.modules.get("flextok_jax.interop.checkpoint")  # Imports orbax: maybe absent.
    told = (ValueError, OSError, *([checkpoint.WorkdirError] if checkpoint else []))
    return str(error) if isinstance(error, told) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flextok",
        description="Images as ordered tokens: any first part of an image's tokens draws it;\n"
        "the more tokens, the closer.",
        epilog="example:\n  flextok reconstruct --model demo-digits --images digits --limit 10 "
        "--out reconstructions",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flextok_jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = _command(
        commands,
        "reconstruct",
        "reconstruct:reconstruct",
        "images from their first k tokens: a grid, pictures, metrics",
        "flextok reconstruct --model EPFL-VILAB/flextok_d12_d12_in1k --images photos "
        "--num-tokens 1,4,16,64,256 --out reconstructions",
        "Writes DIR/grid.png (each original beside its reconstructions), DIR/k0016/NAME.png and so "
        "on, and DIR/metrics.json. Images of any size are cropped and resized to the model's.",
    )
    _add_model(p)
    _add_images(p, "--images")
    _add_counts(p, "numbers of tokens, separated by commas (1, 2, 4, ... up to all)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    _add_sampling(p)
    _add_compute(p)

    p = _command(
        commands,
        "tokenize",
        "tokens:tokenize",
        "images to a file of tokens, or a data set to shards of tokens to train on",
        "flextok tokenize --model EPFL-VILAB/flextok_d12_d12_in1k --images photos "
        "--num-tokens 16 --out tokens.npz\n"
        "  flextok tokenize --model demo-digits --data digits --split train --crops 10 --shift 1 "
        "--out digit_tokens",
        "Of --images: writes int32 tokens [images, K], the images' names and the model's identity "
        "as .npz. Of --data: writes DIR/SPLIT with shards and manifest.json, for the AR stage; the "
        "same command continues what was interrupted.",
    )
    _add_model(p)
    p_from = p.add_mutually_exclusive_group(required=True)
    p_from.add_argument("--images", metavar="FOLDER", help=_IMAGES)
    p_from.add_argument(
        "--data",
        metavar="FOLDER",
        help="a data set: a folder whose subfolders are the classes; or digits. Beside NAME.jpg "
        "may lie a caption, NAME.txt, and its embedding, NAME.npy",
    )
    p.add_argument("--limit", type=_positive, metavar="N", help="only the first N images")
    p.add_argument(
        "--num-tokens",
        type=_positive,
        metavar="K",
        help="tokens per image (all); the cost follows their number",
    )
    p.add_argument(
        "--out", required=True, metavar="OUT", help="FILE.npz for --images, a folder for --data"
    )
    _add_shards(p)
    _add_compute(p)

    p = _command(
        commands,
        "detokenize",
        "tokens:detokenize",
        "a file of tokens to images",
        "flextok detokenize --model EPFL-VILAB/flextok_d12_d12_in1k --tokens tokens.npz "
        "--num-tokens 4,16 --out pictures",
        "Writes DIR/k0016/NAME.png and so on. The model must be the one that made the tokens.",
    )
    _add_model(p)
    p.add_argument("--tokens", required=True, metavar="FILE.npz", help="made by flextok tokenize")
    _add_counts(p, "use only the first so many, several separated by commas (all there are)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    _add_sampling(p)
    _add_compute(p)

    p = _command(
        commands,
        "generate",
        "generate:generate",
        "classes to tokens to images, with an AR model",
        "flextok generate --model demo-digits-ar --labels 0-9 --per-label 10 --out samples",
        "Writes DIR/grid.png, DIR/k0016/NUMBER_classLABEL.png for every number of tokens and "
        "sample, DIR/tokens.npz (for flextok detokenize) and DIR/generation.json.",
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="SOURCE",
        help="the AR model: a folder or model.safetensors under the released names, a workdir of "
        "training, a hub id, or demo-digits-ar",
    )
    p.add_argument(
        "--labels",
        default="all",
        metavar="LABELS",
        help="classes: all, numbers and ranges such as 0-9,42, or a file with one per line (all)",
    )
    _add_counts(p, "draw from the first so many tokens, several separated by commas (all)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    _add_generation(p)
    _add_sampling(p)
    _add_compute(p)

    p = _command(
        commands,
        "evaluate",
        "evaluate:evaluate",
        "numbers: reconstructions by number of tokens, or generated images",
        "flextok evaluate --model demo-digits --data digits --num-tokens 1,2,4,8,16 "
        "--out evaluation.json\n"
        "  flextok evaluate --task generation --model demo-digits-ar --data digits --per-label 100 "
        "--out samples.json",
        "Reconstruction: PSNR, MAE and codebook usage of a whole set of images; for the digits "
        "also the share that a classifier of real digits still recognises. Generation, of digits "
        "so far: the share taken for the class asked for, and the distance to the training set.",
    )
    p.add_argument(
        "--task",
        choices=("reconstruction", "generation"),
        default="reconstruction",
        help="of --data, or of new images (reconstruction)",
    )
    p.add_argument(
        "--model", required=True, metavar="SOURCE", help=f"{_SOURCE}; for generation an AR model"
    )
    _add_images(p, "--data")
    _add_counts(p, "numbers of tokens, by commas (1, 2, 4, ... up to all); to generate, one (all)")
    p.add_argument("--out", required=True, metavar="FILE.json", help="file for the numbers")
    _add_sampling(p)
    _add_generation(p)
    _add_compute(p)

    p = _command(
        commands,
        "convert",
        "model:convert",
        "a model from any source to the released format",
        "flextok convert --model runs/digits --out my-model",
        "Writes FOLDER/model.safetensors, of a workdir its averaged weights.",
    )
    _add_model(p)
    p.add_argument("--out", required=True, metavar="FOLDER", help="folder for model.safetensors")

    p = _command(
        commands,
        "info",
        "model:info",
        "what a model is: configuration, parameter counts, sha256",
        "flextok info demo-digits --json",
        "Prints the origin, the step of a workdir, the configuration, the parameter counts, and "
        "the sha256 over all parameters.",
    )
    p.add_argument("source", metavar="SOURCE", help=_SOURCE)
    p.add_argument("--json", action="store_true", help="everything, as JSON")
    return parser


def _command(commands, name, function, summary, example, description):
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 80),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(function=function)
    return parser


def _add_model(parser):
    parser.add_argument("--model", required=True, metavar="SOURCE", help=_SOURCE)


def _add_images(parser, flag):
    parser.add_argument(flag, required=True, metavar="FOLDER", help=_IMAGES)
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N images")


def _add_counts(parser, text):
    parser.add_argument("--num-tokens", type=_counts, metavar="K[,K...]", help=text)


def _add_generation(parser):
    group = parser.add_argument_group("generating")
    group.add_argument("--tokenizer", metavar="SOURCE", help="of the AR model (what it names)")
    group.add_argument(
        "--per-label", type=_positive, default=1, metavar="N", help="samples of each label (1)"
    )
    group.add_argument(
        "--token-guidance",
        type=_finite,
        metavar="SCALE",
        help="guidance scale of the logits; 1: none, at half the cost (the model's own default)",
    )
    group.add_argument(
        "--temperature", type=_finite, default=1.0, metavar="T", help="0 is greedy (1)"
    )
    group.add_argument(
        "--top-k", type=_seed, default=0, metavar="N", help="of the N likeliest tokens (0: off)"
    )
    group.add_argument(
        "--top-p", type=_finite, default=0.0, metavar="P", help="of the likeliest up to P (0: off)"
    )


def _add_sampling(parser):
    group = parser.add_argument_group("drawing")
    group.add_argument("--steps", type=_positive, default=20, metavar="N", help="Euler steps (20)")
    group.add_argument(
        "--guidance",
        type=_finite,
        metavar="SCALE",
        help="guidance scale; 1: none, at half the cost (the model's own default)",
    )
    group.add_argument(
        "--no-norm-guidance",
        dest="norm_guidance",
        action="store_false",
        help="plain guidance instead of adaptive projected guidance",
    )
    group.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the noise (0)")


def _add_shards(parser):
    group = parser.add_argument_group("with --data")
    group.add_argument("--split", choices=("train", "test", "all"), help="of the data set (train)")
    group.add_argument(
        "--crops",
        type=_positive,
        metavar="N",
        help="crops per image (1): the first is the centre crop, the others are random",
    )
    group.add_argument(
        "--crop-scale",
        type=_fraction,
        metavar="SHARE",
        help="least share of an image's area that a random crop keeps (0.8)",
    )
    group.add_argument(
        "--flip", action="store_true", default=None, help="mirror half of the random crops"
    )
    group.add_argument(
        "--shift", type=_seed, metavar="PIXELS", help="shift random crops by up to so many (0)"
    )
    group.add_argument("--seed", type=_seed, metavar="N", help="of the random crops (0)")
    group.add_argument(
        "--shard-size", type=_positive, metavar="N", help="images per file (4096)"
    )


def _add_compute(parser):
    group = parser.add_argument_group("computing")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    group.add_argument(
        "--attention", choices=("xla", "cudnn"), default="xla", help="cudnn: GPUs with bfloat16"
    )
    group.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="images at a time (32)"
    )


def _positive(text: str) -> int:
    return _whole(text, 1, None)


def _seed(text: str) -> int:
    return _whole(text, 0, 2**32 - 1)


def _counts(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _whole(text: str, low: int, high: int | None) -> int:
    if not text.strip().isdecimal() or not low <= int(text) <= (math.inf if high is None else high):
        allowed = f"from {low} on" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
    return int(text)


def _fraction(text: str) -> float:
    value = _finite(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, at most 1")
    return value


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


if __name__ == "__main__":
    sys.exit(main())
