"""The `flextok` command. Importing this file is cheap: each subcommand imports what it needs."""

import argparse
import importlib
import sys

from flextok_jax import __version__
from flextok_jax.commands import options

_PACKAGES = {  # Where the package is not called like the module.
    "PIL": "Pillow",
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        The exit code: 0; 2 for what a person can put right, told on stderr; 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A notebook's cannot.
            stream.reconfigure(errors="backslashreplace")  # Names of files may be any bytes.
    args = _parser().parse_args(argv)
    module, function = args.function.split(":")
    try:
        getattr(importlib.import_module(f"flextok_jax.commands.{module}"), function)(args)
    except KeyboardInterrupt as error:
        what = "nothing half-written is left; the same command goes on from what is finished"
        # A `Paused` says how it goes on. A plain one may hold the words of what it came in between.
        what = what if type(error) is KeyboardInterrupt else str(error)
        print(f"interrupted: {what}", file=sys.stderr)
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
    checkpoint = sys.modules.get("flextok_jax.io.checkpoint")  # Imports orbax: maybe absent.
    told = (ValueError, OSError, *([checkpoint.WorkdirError] if checkpoint else []))
    return str(error) if isinstance(error, told) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flextok",
        description="Images as ordered tokens: any first part of an image's tokens draws it;\n"
        "the more tokens, the closer.",
        epilog="example:\n  flextok reconstruct --model demo-digits --images FOLDER --limit 10 "
        "--out reconstructions",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flextok_jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    p = options.command(
        commands,
        "reconstruct",
        "reconstruct:reconstruct",
        "images from their first k tokens: a grid, pictures, metrics",
        "flextok reconstruct --model EPFL-VILAB/flextok_d12_d12_in1k --images my_photos "
        "--num-tokens 1,4,16,64,256 --out reconstructions",
        "Writes DIR/grid.png (each original beside its reconstructions), DIR/k0016/NAME.png and so "
        "on, and DIR/metrics.json. Images of any size are cropped and resized to the model's.",
    )
    options.add_model(p)
    options.add_images(p, "--images")
    options.add_counts(p, "numbers of tokens, separated by commas (1, 2, 4, ... up to all)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    options.add_sampling(p)
    options.add_compute(p)

    p = options.command(
        commands,
        "tokenize",
        "tokens:tokenize",
        "images to a file of tokens, or a data set to shards of tokens to train on",
        "flextok tokenize --model EPFL-VILAB/flextok_d12_d12_in1k --images my_photos "
        "--num-tokens 16 --out tokens.npz\n"
        "  flextok tokenize --model demo-digits --data FOLDER --split train --crops 10 --shift 1 "
        "--out digit_tokens",
        "Of --images: writes int32 tokens [images, K], the images' names and the model's identity "
        "as .npz. Of --data: writes DIR/SPLIT with shards and manifest.json, for the AR stage; the "
        "same command continues what was interrupted.",
    )
    options.add_model(p)
    p_from = p.add_mutually_exclusive_group(required=True)
    p_from.add_argument("--images", metavar="FOLDER", help=options.IMAGES)
    p_from.add_argument("--data", metavar="DATA", help=f"a data set: {options.DATA}")
    p.add_argument("--limit", type=options.positive, metavar="N", help="only the first N images")
    options.add_num_tokens(p)
    p.add_argument(
        "--out", required=True, metavar="OUT", help="FILE.npz for --images, a folder for --data"
    )
    options.add_shards(p, "with --data")
    options.add_compute(p)
    p.set_defaults(vae=None, dinov2=None, image_size=None)

    p = options.command(
        commands,
        "encode",
        "encode:encode",
        "a data set to shards of tokens, latents or features to train on",
        "flextok encode --vae runs/vae --model runs/mine --data FOLDER --split train --crops 10 "
        "--flip --out encoded\n"
        "  for i in 0 1 2 3; do flextok encode ... --process $i/4 & done",
        "Writes DIR/SPLIT with shards and manifest.json: for every crop of every image what the "
        "named models make of it. The same command continues what was interrupted; several "
        "processes, also on several machines with one file system, share the work by --process.",
    )
    p.add_argument("--data", required=True, metavar="DATA", help=options.DATA)
    p.add_argument("--model", metavar="SOURCE", help=f"tokens, of {options.SOURCE}")
    options.add_num_tokens(p)
    p.add_argument(
        "--vae",
        metavar="SOURCE",
        help="moments of the posterior, of a workdir of the VAE stage, a folder in the diffusers "
        "layout, or a hub id; for configs/tokenizer.py with data.source=encoded",
    )
    p.add_argument(
        "--dinov2", metavar="SOURCE", help="features for REPA, of facebook/dinov2-large or a folder"
    )
    p.add_argument(
        "--dinov2-size",
        type=options.positive,
        default=518,
        metavar="PIXELS",
        help="side that crops are resized to for DINOv2 (518, whose features are 2.8 MB per crop "
        "with the large model; 224: 0.5 MB)",
    )
    p.add_argument(
        "--image-size",
        type=options.positive,
        metavar="PIXELS",
        help="side of the crops (the tokenizer's own; without one 256)",
    )
    p.add_argument("--limit", type=options.positive, metavar="N", help="only the first N images")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for DIR/SPLIT")
    options.add_shards(p, "crops and shards")
    options.add_compute(p)

    p = options.command(
        commands,
        "detokenize",
        "tokens:detokenize",
        "a file of tokens to images",
        "flextok detokenize --model EPFL-VILAB/flextok_d12_d12_in1k --tokens tokens.npz "
        "--num-tokens 4,16 --out pictures",
        "Writes DIR/k0016/NAME.png and so on. The model must be the one that made the tokens.",
    )
    options.add_model(p)
    p.add_argument("--tokens", required=True, metavar="FILE.npz", help="made by flextok tokenize")
    options.add_counts(p, "use only the first so many, several separated by commas (all there are)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures")
    options.add_sampling(p)
    options.add_compute(p)

    p = options.command(
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
    options.add_counts(p, "draw from the first so many tokens, several separated by commas (all)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    options.add_generation(p)
    options.add_sampling(p)
    options.add_compute(p)

    p = options.command(
        commands,
        "evaluate",
        "evaluate:evaluate",
        "numbers and a report: reconstructions, generated images, registers",
        "flextok evaluate --model demo-digits --data FOLDER --num-tokens 1,2,4,8,16 "
        "--guidance 1,3 --out evaluation\n"
        "  flextok evaluate --task generation --model demo-digits-ar --data FOLDER --per-label 100 "
        "--out samples_evaluation\n"
        "  flextok evaluate --task probe --model demo-digits --data FOLDER --out evaluation",
        "Draws at every combination of --num-tokens, --steps and --guidance and writes "
        "DIR/points/NAME.json, numbers with a stamp of how they were made, and DIR/report.html; "
        "goes on where it was stopped. Reconstruction: PSNR, MAE, SSIM, LPIPS, error by frequency, "
        "codebook usage, FID, Inception score, precision, recall. Generation: those that need no "
        "original. Probe: classes read linearly from the first k registers. The digits have a "
        "network of their own in place of Inception.",
    )
    p.add_argument(
        "--task",
        choices=("reconstruction", "generation", "probe"),
        default="reconstruction",
        help="of --data, of new images compared with --data, of registers (reconstruction)",
    )
    p.add_argument(
        "--model",
        required=True,
        metavar="SOURCE",
        help=f"{options.SOURCE}; for generation an AR model",
    )
    p.add_argument("--data", required=True, metavar="DATA", help=options.DATA)
    p.add_argument("--limit", type=options.positive, metavar="N", help="only the first N images")
    options.add_counts(
        p, "numbers of tokens, by commas (1, 2, 4, ... up to all; for generation all)"
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    options.add_sampling(p, several=True)
    options.add_measuring(p)
    options.add_generation(p, several=True)
    options.add_compute(p)

    p = options.command(
        commands,
        "compare",
        "compare:compare",
        "two results of evaluate: how their numbers and their protocols differ",
        "flextok compare a/points/k0016_steps20_guidance3.json "
        "b/points/k0016_steps20_guidance3.json",
        "Prints the numbers side by side, and every line in which the stamps differ.",
    )
    p.add_argument("first", metavar="A.json", help="a result of flextok evaluate")
    p.add_argument("second", metavar="B.json", help="another")

    p = options.command(
        commands,
        "convert",
        "model:convert",
        "a model from any source to the released format",
        "flextok convert --model runs/digits --out my-model",
        "Writes FOLDER/model.safetensors, of a workdir its averaged weights.",
    )
    options.add_model(p)
    p.add_argument("--out", required=True, metavar="FOLDER", help="folder for model.safetensors")

    p = options.command(
        commands,
        "info",
        "model:info",
        "what a model is: configuration, parameter counts, sha256",
        "flextok info demo-digits --json",
        "Prints the origin, the step of a workdir, the configuration, the parameter counts, and "
        "the sha256 over all parameters.",
    )
    p.add_argument("source", metavar="SOURCE", help=options.SOURCE)
    p.add_argument("--json", action="store_true", help="everything, as JSON")

    data = commands.add_parser("data", help="data sets: check what is in one, pack one in shards")
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    p = options.command(
        commands,
        "check",
        "data:check",
        "what is in a data set, what cannot be read, and a picture of it",
        "flextok data check photos\n"
        "  flextok data check tfds:imagenet2012@/data --split validation --all",
        "Opens images and tells their number, formats, sizes, labels and captions, names every "
        "one that cannot be read, and draws a contact sheet. Of shards that flextok wrote it "
        "verifies every byte. Fails where training would.",
    )
    p.add_argument("source", metavar="DATA", help=options.DATA)
    options.add_split(p, "all")
    p_how_many = p.add_mutually_exclusive_group()
    p_how_many.add_argument(
        "--sample",
        type=options.positive,
        default=1000,
        metavar="N",
        help="open so many, evenly chosen (1000)",
    )
    p_how_many.add_argument("--all", action="store_true", help="open every image")
    p.add_argument(
        "--out", default="data_check.png", metavar="FILE.png", help="picture (data_check.png)"
    )
    p = options.command(
        commands,
        "pack",
        "data:pack",
        "the images of a data set, as they are, in ArrayRecord shards",
        "flextok data pack FOLDER --split train --out packed",
        "Writes DIR/SPLIT with shards and manifest.json: images, labels, captions and their "
        "embeddings, for data.source=array_record. Few large files instead of many small ones, "
        "which a mounted bucket or a network disk reads much faster.",
    )
    p.add_argument("source", metavar="DATA", help=options.DATA)
    options.add_split(p)
    p.add_argument("--limit", type=options.positive, metavar="N", help="only the first N images")
    p.add_argument("--out", required=True, metavar="DIR", help="folder for DIR/SPLIT")
    options.add_files(p)
    return parser


if __name__ == "__main__":
    sys.exit(main())
