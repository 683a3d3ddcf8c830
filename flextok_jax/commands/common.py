"""What several commands do with their options."""

import sys
from collections.abc import Callable

import jax
from tqdm import tqdm

from flextok_jax.commands import options
from flextok_jax.data import shards
from flextok_jax.data.sources import parse
from flextok_jax.evaluation.generation import TokenSampling
from flextok_jax.evaluation.pictures import Pictures
from flextok_jax.evaluation.reconstruction import Sampler, default_sampler
from flextok_jax.evaluation.results import writable
from flextok_jax.io.paths import as_path, is_remote
from flextok_jax.parallel import mesh
from flextok_jax.tokenizer import FlexTok

LISTED = 10  # Images that could not be read, by name.


def announce(args: options.Compute) -> None:
    """The first line of every long command: the devices and the type of the computation."""
    print(mesh.describe(all_devices(), args.dtype), file=sys.stderr)


def all_devices() -> jax.sharding.Mesh | None:
    """A mesh over all devices of this machine, which a batch is cut over; None for a single one."""
    return mesh.make_mesh() if jax.device_count() > 1 else None


def load_model(args: options.Compute, source: str | None = None) -> FlexTok:
    """The tokenizer of `source`, --model by default, computing as --dtype and --attention say."""
    return FlexTok.from_pretrained(
        source or args.model, dtype=args.dtype, attention=args.attention, mesh=all_devices()
    )


def sampler(args: options.Sampling, tok: FlexTok) -> Sampler:
    """How images are sampled: the model's own way, but for what the options say."""
    return default_sampler(
        tok,
        steps=args.steps,
        guidance_scale=args.guidance,
        norm_guidance=None if args.norm_guidance else False,
    )


def token_sampling(args: options.TokenSampling) -> TokenSampling:
    """How tokens are sampled."""
    return TokenSampling(args.token_guidance, args.temperature, args.top_k, args.top_p)


def png_metadata(info: dict, num_tokens) -> dict:
    """The text of a PNG file: `info` of `reconstruction.metadata`, and the number of tokens."""
    info = dict(info)
    model = info.pop("model")
    what = {"model": model["origin"], "fingerprint": model["fingerprint"]}
    return what | {"num_tokens": num_tokens} | info


def out_folder(out: str, images: str = ""):
    """The path of --out, a folder that results can be written to: found out before the work.

    Args:
        images: the data that results are made of. Inside of their folder, results would be read
            as images the next time.

    Raises:
        ValueError, OSError: it cannot be written, or lies in the folder of images.
    """
    path = as_path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {out} is a file: pass a folder")
    data = parse(images) if images else None
    if data and data.source == "folder" and not is_remote(path):
        if path.resolve().is_relative_to(data.path):
            raise ValueError(
                f"--out {out} lies in the image folder {images}, where its files would be taken "
                "for images the next time: pass a folder outside of it"
            )
    return writable(path)


def out_file(out: str):
    """The path of --out, a file that can be written. Raises as `out_folder`."""
    path = as_path(out)
    if path.is_dir():
        raise ValueError(f"--out {out} is a folder: pass the name of a file")
    return writable(path)


def print_speed(images: int, seconds: float) -> None:
    """How fast a long run was."""
    if images:
        print(f"{images / seconds:.2f} images/s over {seconds:.0f} s, compilation included")


def report_unreadable(pictures: Pictures) -> None:
    """Names the pictures that were left out."""
    left_out(pictures.unreadable, len(pictures))


def left_out(unreadable: dict[str, str], count: int) -> None:
    """Warns of the images of `count` that were left out: {name: reason}."""
    if unreadable:
        lines = [f"\n  {name}: {why}" for name, why in list(unreadable.items())[:LISTED]]
        more = f"\n  and {len(unreadable) - LISTED} more" if len(unreadable) > LISTED else ""
        print(
            f"warning: {len(unreadable)} of {count} images could not be read and were left out:"
            f"{''.join(lines)}{more}",
            file=sys.stderr,
        )


def write_shards(args, out, data, source, settings: dict, records: Callable) -> int | None:
    """Writes the shards of --out/SPLIT that are not there yet, and their manifest.

    Args:
        args: has the options of `options.Shards` and --limit.
        data, source: what is read, in words and opened.
        settings: of the manifest, beside those that all shards have.
        records: indices -> the `Record` or `Unreadable` of each example, in order.

    Returns:
        The number of records; None as long as shards of other processes are missing.
    """
    count, size = min(len(source), args.limit or len(source)), args.shard_size
    settings |= {"data": str(data), "split": args.split, **shards.source_settings(source, count)}
    settings |= {"shard_size": size, "num_shards": -(-count // size)}
    folder, text = out / args.split, shards.null_text(data.path)
    with tqdm(total=count, unit="image", disable=None) as bar:

        def make_shard(index: int):
            first = index * size
            bar.update(first - bar.n)  # What is there already counts as done.
            for made in records(range(first, min(first + size, count))):
                yield made
                bar.update()

        manifest = shards.write_split(folder, settings, make_shard, text, args.process)
        bar.update(count - bar.n)
    for line in source.skipped.lines():
        print(f"warning: skipped {line}", file=sys.stderr)
    left_out(manifest["unreadable"], count)
    done, wanted = len(manifest["shards"]), manifest["num_shards"]
    if done < wanted:
        print(f"{done} of {wanted} shards are in {folder}; the other processes write the rest")
        return None
    return sum(shard["records"] for shard in manifest["shards"].values())
