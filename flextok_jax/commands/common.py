"""What several commands do with their options."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flextok_jax.commands import options
from flextok_jax.data import shards
from flextok_jax.data.source import Skipped
from flextok_jax.data.sources import parse
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.reconstruction import Sampler, default_sampler
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path, is_remote
from flextok_jax.parallel import mesh
from flextok_jax.tokenizer import FlexTok

SETTINGS, PROBE_SETTINGS = "settings.json", "probe_settings.json"


def announce(args: options.Devices) -> None:
    """The first line of every long command: the devices and the type of the computation."""
    print(mesh.describe(all_devices(), args.dtype), file=sys.stderr)


def all_devices() -> jax.sharding.Mesh | None:
    """A mesh over all devices of this machine; None for a single one."""
    return mesh.make_mesh() if jax.device_count() > 1 else None


def load_model(args: options.Compute, source: str | None = None) -> FlexTok:
    """The tokenizer of `source`, --model by default, computing as --dtype and --attention say."""
    tok = FlexTok.from_pretrained(
        source or args.model, dtype=args.dtype, attention=args.attention, mesh=all_devices()
    )
    note_texts(tok)
    return tok


def note_texts(tok: FlexTok) -> None:
    """Says of a tokenizer that reads texts that commands give it none."""
    if tok.config.text.dim:
        print(
            f"note: {tok.origin} can read a text with each image; commands give it none, not the "
            "captions of the images either (call `tokenize` and `detokenize` from Python)",
            file=sys.stderr,
        )


def sampler(args: options.Sampling, tok: FlexTok, defaults: dict | None = None) -> Sampler | None:
    """How images are sampled: the model's own way, but for `defaults` and what the options say."""
    given = {"steps": args.steps, "guidance_scale": args.guidance}
    given = {name: value for name, value in given.items() if value is not None}
    defaults = defaults if defaults and tok.config.is_flow else {}
    return default_sampler(tok, **(defaults | given | sampling(args)))


def sampling(args: options.Sampling) -> dict:
    """What the options say of fields of `Sampler` that no command varies."""
    given = {
        "norm_guidance": None if args.norm_guidance else False,
        "solver": args.solver,
        "time_shift": args.time_shift,
        "guidance_interval": args.guidance_interval,
    }
    return {name: value for name, value in given.items() if value is not None}


# Where results go. Commands find it out before they load a model.


def out_file(out: str, images: str = "", ours: Callable = lambda path: False):
    """The path of --out, a file that can be written. Raises as `out_folder`.

    A file that is there is replaced only where `ours(path)`: where the same command made it.
    """
    path = _outside(_writable(out, folder=False), images)
    if path.exists() and not ours(path):
        raise ValueError(f"{path} is another file: pass another name, or remove it")
    return path


def out_folder(out: str, images: str = "", new: Sequence[str] = ()):
    """The path of --out, a folder that can be written, outside the folder of `images`.

    There, results would be images the next time. No file `new` may be in it. Raises ValueError or
    PermissionError.
    """
    path = _outside(_writable(out, folder=True), images)
    if there := [name for name in new if (path / name).exists()]:
        raise ValueError(f"--out {out} holds {there[0]}: pass another folder or remove that")
    return path


def _outside(path, images: str):
    data = parse(images) if images else None
    if data and data.source == "folder" and not is_remote(path):
        if path.resolve().is_relative_to(data.path):
            raise ValueError(f"{path} lies in the image folder {images}: write to another one")
    return path


def out_results(out: str, images: str = ""):
    """`out_folder`, which must be empty or hold results; then `results_folder` opens it."""
    path = out_folder(out, images)
    found = sorted(p.name for p in path.iterdir()) if path.exists() else []
    if found and not {SETTINGS, PROBE_SETTINGS} & set(found):
        raise ValueError(f"--out {out} holds {found[0]} but no {SETTINGS}: pass another folder")
    return path


def _writable(out: str, folder: bool):
    path = as_path(out)
    if not is_remote(path):
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if there.is_dir() != (folder or there != path):
            raise ValueError(f"--out {out}: {there} is a {'file' if there.is_file() else 'folder'}")
        if not os.access(there, os.W_OK):
            raise PermissionError(f"--out {out}: {there} cannot be written")
    return path


@contextlib.contextmanager
def results_folder(out, settings: dict, record: str = SETTINGS) -> Iterator[None]:
    """Records in `out` all that the results depend on; ValueError where it differs from a record.

    A block that fails before it writes leaves no record.
    """
    recorded = (out / record).exists()
    storage.same_or_refuse(out / record, settings, "results")
    try:
        yield
    except BaseException:
        if not recorded and [path.name for path in out.iterdir()] == [record]:
            (out / record).unlink()
            out.rmdir()
        raise


def left_out(skipped: Skipped, unreadable: dict[str, str], count: int) -> None:
    """Warns of what was skipped, and of the images of `count` that could not be read, by name."""
    for line in skipped.lines():
        print(f"warning: skipped {line}", file=sys.stderr)
    if unreadable:
        print(
            f"warning: {len(unreadable)} of {count} images could not be read and were left out:"
            f"{pics.listed(unreadable)}",
            file=sys.stderr,
        )


def write_arrays(path, **arrays) -> None:
    """Writes an .npz file, whole or not at all."""
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


# Lengths of images in tokens.


class KnownLengths(NamedTuple):
    """The file of `flextok lengths`: {name: length}, and what the lengths are, in JSON terms."""

    path: str
    lengths: dict[str, int]
    settings: dict

    def of(self, names: Sequence[str]) -> np.ndarray:
        """int32 [n], of images by name. Raises ValueError with those that have none."""
        if missing := {name: "it is not in the file" for name in names if name not in self.lengths}:
            raise ValueError(
                f"--lengths {self.path} has no length for {len(missing)} of {len(names)} images: "
                f"run flextok lengths on the same images{pics.listed(missing)}"
            )
        return np.array([self.lengths[name] for name in names], np.int32)


def read_lengths(path: str, tok: FlexTok, names: Sequence[str]) -> KnownLengths:
    """The lengths in a file, of these images by the tokens of this model.

    Raises:
        FileNotFoundError, ValueError: it is no such file, of another model, or lacks images; or
            fewer tokens of this model are other tokens.
    """
    if tok.config.tokens.revised:
        raise ValueError(
            f"--lengths {path}: the encoder of {tok.origin} is told how many tokens are kept, or "
            "revises them from round to round, so the tokens of a shorter image are not the first "
            "of all: call `choose_length` from Python, which returns them"
        )
    found = storage.read_json(path)
    try:
        lengths = {one["name"]: int(one["k"]) for one in found["lengths"]}
        model, unreadable = found["model"], found["unreadable"]
        settings = {key: found[key] for key in ("criterion", "target", "within", "rule")}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no lengths.json of `flextok lengths`") from None
    if model["fingerprint"] != tok.fingerprint:
        raise ValueError(
            f"{path} has lengths of {model['origin']}, sha256 {model['fingerprint']}, not of "
            f"--model {tok.origin}, sha256 {tok.fingerprint}: pass the model that they are of"
        )
    digest = hashlib.sha256(json.dumps(lengths, sort_keys=True).encode()).hexdigest()
    known = KnownLengths(path, lengths, settings | {"sha256": digest})
    known.of([name for name in names if name not in unreadable])
    return known


# Shards.


def write_shards(args, out, data, source, settings: dict, records: Callable) -> int | None:
    """Writes the shards of --out/SPLIT that are not there yet, and their manifest.

    Args:
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
    left_out(source.skipped, manifest["unreadable"], count)
    done, wanted = len(manifest["shards"]), manifest["num_shards"]
    if done < wanted:
        print(f"{done} of {wanted} shards are in {folder}; the other processes write the rest")
        return None
    return sum(shard["records"] for shard in manifest["shards"].values())
