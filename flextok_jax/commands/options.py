"""What the subcommands' options share: groups of them, their words, and the types of values."""

import argparse
import math
import textwrap

SOURCE = (
    "a folder or model.safetensors in the released format, a workdir of training (its averaged "
    "weights), a hub id such as EPFL-VILAB/flextok_d12_d12_in1k, or demo-digits"
)
IMAGES = (
    "a folder of images or of tar shards, searched with its subfolders, packed shards, or "
    "tfds:NAME@DIR"
)
DATA = (
    "a folder of images (its subfolders are the classes), of tar shards (WebDataset), or of shards "
    "that flextok wrote; tfds:NAME@DIR; KIND:PATH says the "
    "kind: folder, webdataset, array_record"
)


def command(commands, name, function, summary, example, description):
    """A subcommand's parser; `function` is MODULE:FUNCTION below flextok_jax.commands."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 80),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(function=function)
    return parser


def add_model(parser):
    parser.add_argument("--model", required=True, metavar="SOURCE", help=SOURCE)


def add_images(parser, flag):
    parser.add_argument(flag, required=True, metavar="FOLDER", help=IMAGES)
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images")


def add_counts(parser, text):
    parser.add_argument("--num-tokens", type=counts, metavar="K[,K...]", help=text)


def add_generation(parser, several: bool = False):
    """How tokens are drawn; `several`: at more than one scale of guidance."""
    group = parser.add_argument_group("generating")
    group.add_argument("--tokenizer", metavar="SOURCE", help="of the AR model (what it names)")
    group.add_argument(
        "--per-label", type=positive, default=1, metavar="N", help="samples of each label (1)"
    )
    group.add_argument(
        "--token-guidance",
        type=numbers if several else finite,
        metavar="SCALE[,SCALE...]" if several else "SCALE",
        help="guidance scale of the logits; 1: none, at half the cost (the model's own default)",
    )
    group.add_argument(
        "--temperature", type=finite, default=1.0, metavar="T", help="0 is greedy (1)"
    )
    group.add_argument(
        "--top-k", type=seed, default=0, metavar="N", help="of the N likeliest tokens (0: off)"
    )
    group.add_argument(
        "--top-p", type=finite, default=0.0, metavar="P", help="of the likeliest up to P (0: off)"
    )


def add_sampling(parser, several: bool = False):
    """How images are drawn; `several`: at more than one number of steps and scale of guidance."""
    group = parser.add_argument_group("drawing")
    group.add_argument(
        "--steps",
        type=counts if several else positive,
        default=[20] if several else 20,
        metavar="N[,N...]" if several else "N",
        help="Euler steps (20)",
    )
    group.add_argument(
        "--guidance",
        type=numbers if several else finite,
        metavar="SCALE[,SCALE...]" if several else "SCALE",
        help="guidance scale; 1: none, at half the cost (the model's own default)",
    )
    group.add_argument(
        "--no-norm-guidance",
        dest="norm_guidance",
        action="store_false",
        help="plain guidance instead of adaptive projected guidance",
    )
    group.add_argument("--seed", type=seed, default=0, metavar="N", help="of the noise (0)")


def add_measuring(parser):
    """What images are compared by and with."""
    group = parser.add_argument_group("measuring")
    add_split(group, "all")
    group.add_argument(
        "--inception",
        metavar="FILE",
        help="pt_inception-2015-12-05-6726825d.pth, or .safetensors: FID, Inception score, "
        "precision, recall",
    )
    group.add_argument("--lpips-vgg", metavar="FILE", help="vgg16-397923af.pth or .safetensors")
    group.add_argument("--lpips-heads", metavar="FILE", help="weights/v0.1/vgg.pth of lpips")
    group.add_argument(
        "--reference",
        metavar="FILE.npz",
        help="arrays mu and sigma for FID, such as DIR/reference.npz of another evaluation (those "
        "of --data)",
    )
    group.add_argument(
        "--export", metavar="FILE.npz", help="write the images of one setting as the array arr_0"
    )
    add_process(group, "--out")


def add_num_tokens(parser):
    parser.add_argument(
        "--num-tokens",
        type=positive,
        metavar="K",
        help="tokens per image (all); the cost follows their number",
    )


def add_split(parser, default="train"):
    parser.add_argument(
        "--split", metavar="SPLIT", help=f"train, test or all; of TFDS any of its own ({default})"
    )


def add_shards(parser, title):
    group = parser.add_argument_group(title)
    add_split(group)
    group.add_argument(
        "--crops",
        type=positive,
        metavar="N",
        help="crops per image (1): the first is the centre crop, the others are random",
    )
    group.add_argument(
        "--crop-scale",
        type=fraction,
        metavar="SHARE",
        help="least share of an image's area that a random crop keeps (0.8; 1: the centre crop)",
    )
    group.add_argument(
        "--flip", action="store_true", default=None, help="mirror half of the random crops"
    )
    group.add_argument(
        "--shift", type=seed, metavar="PIXELS", help="shift random crops by up to so many (0)"
    )
    group.add_argument("--seed", type=seed, metavar="N", help="of the random crops (0)")
    add_files(group)


def add_files(parser):
    parser.add_argument("--shard-size", type=positive, metavar="N", help="images per file (4096)")
    add_process(parser, "the work")


def add_process(parser, shared):
    parser.add_argument(
        "--process",
        type=process,
        default=(0, 1),
        metavar="I/N",
        help=f"this is process I, from 0, of N that share {shared} (0/1)",
    )


def add_compute(parser):
    group = parser.add_argument_group("computing")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    group.add_argument(
        "--attention",
        choices=("xla", "cudnn", "pallas"),
        default="xla",
        help="cudnn: GPUs with bfloat16; pallas: TPUs",
    )
    group.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="images at a time (32)"
    )


def positive(text: str) -> int:
    return whole(text, 1, None)


def seed(text: str) -> int:
    return whole(text, 0, 2**32 - 1)


def process(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or seed(index) >= positive(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def counts(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def numbers(text: str) -> list[float]:
    return [finite(part) for part in text.split(",")]


def whole(text: str, low: int, high: int | None) -> int:
    if not text.strip().isdecimal() or not low <= int(text) <= (math.inf if high is None else high):
        allowed = f"from {low} on" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
    return int(text)


def fraction(text: str) -> float:
    value = finite(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share above 0, at most 1")
    return value


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value
