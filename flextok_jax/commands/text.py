"""Prompts and captions: those of `flextok generate`, and `flextok embed`."""

import re
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from flextok_jax import conditions
from flextok_jax.commands import common, options
from flextok_jax.conditions import Conditions
from flextok_jax.data import reader, shards, sources
from flextok_jax.data.records import stored_floats
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.io import storage
from flextok_jax.io.formats import flexar
from flextok_jax.io.paths import as_path
from flextok_jax.text import TextEncoder

RECORD = ".text_embeddings.json"  # Which encoder made the embeddings of a folder.


class Texts(NamedTuple):
    """Encoded prompts.

    Attributes:
        conditions: of them.
        null: embeddings [1, T, E] and mask [1, T] of the empty prompt.
        about: "prompts" and "text_encoder", for settings.
    """

    conditions: Conditions
    null: tuple[np.ndarray, np.ndarray]
    about: dict


def encoded(args: options.Generate | options.Search) -> Texts | None:
    """The prompts of --text or --prompts; None for a class-conditional model.

    The encoder is freed again before the generator is loaded.

    Raises:
        ValueError: the options do not suit the model, or a prompt is empty.
    """
    if args.text is not None and args.prompts is not None:
        raise ValueError("--text and --prompts: give one of them")
    given, about = args.text is not None or args.prompts is not None, flexar.about(args.model)
    if not about["text"]:
        if given or args.text_encoder:
            raise ValueError(
                f"{args.model} is no text model: give --labels, not --text or --prompts"
            )
        return None
    if not given or args.labels is not None:
        raise ValueError(f"{args.model} is a text model: give --text or --prompts, not --labels")
    prompts = [args.text] if args.prompts is None else read_prompts(args.prompts)
    named = about.get("text_encoder") or {}
    if args.text_encoder and "config" in named:
        raise ValueError(f"{args.model} has its own text encoder: leave --text-encoder out")
    source = args.model if "config" in named else args.text_encoder or named.get("source")
    if not source:
        raise ValueError(f"{args.model} names no text encoder: pass --text-encoder SOURCE")
    encoder = _encoder(args, source)
    size, found = min(args.batch_size, len(prompts)), []
    for first in range(0, len(prompts), size):
        found.append(_encode(encoder, prompts[first : first + size], size, named.get("max_length")))
    longest = max(mask.shape[1] for _, mask in found)
    parts = [
        [np.pad(x, [(0, 0), (0, longest - x.shape[1])] + [(0, 0)] * (x.ndim - 2)) for x in part]
        for part in zip(*found)
    ]
    text, mask = map(np.concatenate, parts)
    about = {"prompts": prompts, "text_encoder": rec.identity(encoder)}
    return Texts(conditions.of_text(text, mask, prompts), encoder.null, about)


def read_prompts(path: str) -> list[str]:
    """The lines of a file, one prompt each.

    Raises:
        ValueError: a line is empty, or the file is not UTF-8.
    """
    try:
        text = as_path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path} is not UTF-8 ({error}); store it as UTF-8") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty or not lines:
        where = f"line {empty[0]} of it" if empty else "the file"
        raise ValueError(f"--prompts {path}: {where} is empty; every line must be a prompt")
    return lines


def slug(prompt: str) -> str:
    """A prompt as part of a file's name."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:40].strip("-") or "prompt"


def embed(args: options.Embed) -> None:
    """Writes NAME.npy beside every image with a caption, and null_text.npy."""
    data = sources.parse(args.data)
    if data.source != "folder":
        raise ValueError(
            f"--data {args.data} is of the kind {data.source}: embeddings are written beside image "
            "files; name a folder of them"
        )
    source, root = sources.make_source(data, "all"), as_path(data.path)
    encoder = _encoder(args, args.text_encoder)
    record = {"text_encoder": {**rec.identity(encoder), "dtype": args.dtype}}
    if (old := root / shards.NULL_TEXT).exists() and not (root / RECORD).exists():
        raise ValueError(f"{old} is there, and no {RECORD} says which encoder made it: remove it")
    storage.same_or_refuse(root / RECORD, record, "embeddings")
    write_npy(root / shards.NULL_TEXT, encoder.null[0][0])
    done, kept, without = 0, 0, 0
    captions = reader.ahead(lambda i: _caption(source, i), range(len(source)))
    with tqdm(captions, total=len(source), unit="image", disable=None) as bar:
        todo = []
        for key, caption in bar:
            path = (root / key).with_suffix(".npy")
            if caption is None:
                without += 1
            elif path.exists():
                kept += 1
            else:
                todo.append((path, caption))
            if len(todo) == args.batch_size:
                done += _write(encoder, todo, args.batch_size)
                todo = []
        done += _write(encoder, todo, args.batch_size)
    common.left_out(source.skipped, {}, len(source))
    if not done + kept:
        raise ValueError(f"{args.data}: none of {len(source)} images has a caption (docs/data.md)")
    more = f"; {kept} were there" if kept else ""
    more += f"; {without} images have no caption" if without else ""
    print(f"{done} captions embedded by {encoder.origin} in {args.data}{more}")


def _caption(source, index: int) -> tuple[str, str | None]:
    """(the key of an image, its caption, None also where its file cannot be read)"""
    try:
        return source.key(index), source.caption(index)
    except OSError:
        return source.key(index), None


def write_npy(path, embedding: np.ndarray) -> None:
    """Writes float16 [T, E], whole or not at all. Raises ValueError where that is not finite."""
    try:
        embedding = stored_floats(embedding)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with storage.atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, embedding)


def _write(encoder: TextEncoder, todo: list, size: int) -> int:
    if todo:
        paths, captions = zip(*todo)
        for path, text, mask in zip(paths, *_encode(encoder, captions, size)):
            write_npy(path, text[mask])
    return len(todo)


def _encode(encoder: TextEncoder, prompts, size: int, max_length: int | None = None):
    """`TextEncoder.encode`, run as `size` prompts."""
    filled = [*prompts, *[""] * (size - len(prompts))]
    text, mask = encoder.encode(filled, max_length)
    return text[: len(prompts)], mask[: len(prompts)]


def _encoder(args: options.Devices, source: str) -> TextEncoder:
    return TextEncoder.from_pretrained(source, dtype=args.dtype, mesh=common.all_devices())
