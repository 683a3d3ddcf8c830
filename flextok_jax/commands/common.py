"""What several commands do with their arguments."""

import json
import pathlib
import sys

from flextok_jax.data.shards import MANIFEST
from flextok_jax.data.sources import parse
from flextok_jax.evaluation.generation import TokenSampling
from flextok_jax.evaluation.pictures import Pictures
from flextok_jax.evaluation.reconstruction import Sampling
from flextok_jax.io import storage
from flextok_jax.tokenizer import FlexTok

DATA_OPTIONS = {  # Of `flextok encode`, with what they are when not given.
    "split": "train",
    "crops": 1,
    "crop_scale": 0.8,
    "flip": False,
    "shift": 0,
    "seed": 0,
    "shard_size": 4096,
}


def load_model(args, source: str | None = None) -> FlexTok:
    """The tokenizer of `source`, --model by default, computing as --dtype and --attention say."""
    return FlexTok.from_pretrained(
        source or args.model, dtype=args.dtype, attention=args.attention, mesh=all_devices()
    )


def all_devices():
    """A mesh over all devices of this machine, which a batch is cut over; None for a single one."""
    import jax

    from flextok_jax.parallel.mesh import make_mesh

    return make_mesh() if jax.device_count() > 1 else None


def sampling(args) -> Sampling:
    """--steps, --guidance, --no-norm-guidance and --seed."""
    return Sampling(args.steps, args.guidance, args.norm_guidance, args.seed)


def token_sampling(args) -> TokenSampling:
    """--token-guidance, --temperature, --top-k and --top-p."""
    return TokenSampling(args.token_guidance, args.temperature, args.top_k, args.top_p)


def pictures(args, split: str | None = None) -> Pictures:
    """The images of --data and --limit, of --split by default."""
    return Pictures(args.data, args.limit, split or args.split)


def check_apart(images: str, out: str) -> None:
    """Refuses results inside the folder of images: the next run would read them as images."""
    data = parse(images)
    if data.source != "folder":
        return
    folder, results = pathlib.Path(data.path), pathlib.Path(out).expanduser().resolve()
    if results.is_relative_to(folder):
        raise ValueError(
            f"--out {out} lies in the image folder {images}, where its pictures would be taken for "
            "images the next time: pass a folder outside of it"
        )


def write_json(path, content: dict) -> None:
    """Writes a whole file or nothing."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass the name of a file")
    with storage.atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def print_speed(images: int, seconds: float) -> None:
    """What a long run is judged by."""
    if images:
        print(f"{images / seconds:.2f} images/s over {seconds:.0f} s, compilation included")


def report_unreadable(pictures: Pictures) -> None:
    """Names the images that were left out."""
    if pictures.unreadable:
        print(
            f"warning: {len(pictures.unreadable)} of {len(pictures)} images could not be read and "
            f"were left out:{pictures.complaint()}",
            file=sys.stderr,
        )


def report(manifest: dict, folder: pathlib.Path) -> None:
    """What was left out of shards, and what is still missing."""
    unreadable = manifest["unreadable"]
    if unreadable:
        lines = [f"\n  {name}: {why}" for name, why in list(unreadable.items())[:10]]
        print(
            f"warning: {len(unreadable)} of {manifest['num_images']} images could not be read and "
            f"were left out (all in {MANIFEST}):{''.join(lines)}",
            file=sys.stderr,
        )
    done, wanted = len(manifest["shards"]), manifest["num_shards"]
    if done < wanted:
        print(f"{done} of {wanted} shards are in {folder}; the other processes write the rest")


def table(result: dict, columns: dict[str, tuple[str, str]]) -> str:
    """Numbers by k as lines of text.

    Args:
        result: of `reconstruction.evaluate`.
        columns: {key of the result: (title, format)}.
    """
    columns = {key: about for key, about in columns.items() if key in result}
    lines = ["  tokens" + "".join(f"{title:>14}" for title, _ in columns.values())]
    for k in result["num_tokens"]:
        numbers = (format(result[key][k], form) for key, (_, form) in columns.items())
        lines.append(f"{k:8}" + "".join(f"{number:>14}" for number in numbers))
    return "\n".join(lines)


QUALITY = {
    "psnr": ("PSNR (dB)", ".2f"),
    "mae": ("MAE", ".4f"),
    "recognition": ("recognised", ".1%"),
}
