"""`flextok data check` and `flextok data pack`: what is in a data set, and one in shards."""

import functools
import io
from collections.abc import Iterator

import numpy as np

from flextok_jax.commands import common, options
from flextok_jax.data import check as checks
from flextok_jax.data import reader, shards, sources
from flextok_jax.data.records import Record
from flextok_jax.io import storage


def check(args: options.Check) -> None:
    """Opens images and tells what they are; verifies shards."""
    out = common.out_file(args.out)
    data = sources.parse(args.source)
    if data.source in (*sources.ENCODED, "array_record"):
        _verify(data, args.split)
    if data.source not in sources.ENCODED:
        _look(data, args, out)


def _look(data: sources.Data, args, out) -> None:
    from tqdm import tqdm

    source = sources.make_source(data, args.split or "all")
    count = len(source) if args.all else min(args.sample, len(source))
    places = np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist()
    looks = reader.ahead(functools.partial(checks.look, source), places)
    found = list(tqdm(looks, total=len(places), unit="image", disable=None))
    print(f"{data}, split {args.split or 'all'}: {len(source)} images")
    for what, about in checks.summary(found, source.classes):
        print(f"  {what:<10}{about}")
    for line in source.skipped.lines():
        print(f"  passed over {line}")
    bad = [look for look in found if look.error]
    for look in bad[: reader.MAX_LISTED]:
        print(f"  unreadable: {look.name}: {look.error}")
    if len(bad) < len(found):
        with storage.atomic(out) as temporary:
            checks.contact_sheet(found, source.classes).save(temporary)
        print(f"  {min(checks.SHOWN, len(found) - len(bad))} of them are shown in {args.out}")
    if len(places) < len(source):
        print(f"  {len(source) - len(places)} were not opened: --all opens every one")
    unreadable = reader.UnreadableCount(len(found))
    unreadable.update({look.name: look.error for look in bad})
    if unreadable.too_many:
        raise ValueError(
            f"{len(bad)} of {len(found)} images are unreadable: training would stop, because that "
            f"is more than {reader.MAX_UNREADABLE:.0%} (data.max_unreadable)"
        )


def _verify(data: sources.Data, split: str | None) -> None:
    """Reads every byte of every shard."""
    from tqdm import tqdm

    folders = [file.parent for file in shards.manifests(data.path)]
    folders = [folder for folder in folders if split in (None, "all", folder.name)]
    if not folders:
        shards.read_manifest(data.path, split or "train")  # Says what is missing.
    damaged = []
    for folder in folders:
        manifest = shards.read_manifest(folder.parent, folder.name)
        steps = tqdm(shards.verify(folder), total=len(manifest["shards"]), disable=None)
        results = list(steps)
        wrong = [f"{folder / name}: {why}" for name, why, _ in results if why]
        damaged += wrong
        print(
            f"{folder}: {sum(count for *_, count in results)} records in {len(results)} shards, "
            + (f"{len(wrong)} of them damaged" if wrong else "each as its manifest says")
        )
        for name, model in shards.models(manifest).items():
            where = model.get("source") or model.get("origin")
            print(f"  {name:<10}{where}, sha256 {model['fingerprint']}")
        for name, shape in manifest["arrays"].items():
            words = "files as they are" if shape is None else "x".join(map(str, shape))
            crops = f", {manifest['crops']} crops of each image" if "crops" in manifest else ""
            print(f"  {name:<10}{words}{crops}")
        print(f"  {'of':<10}{manifest['data']}, split {manifest['split']}")
        for name, why in list(manifest["unreadable"].items())[: reader.MAX_LISTED]:
            print(f"  left out: {name}: {why}")
    if damaged:
        raise ValueError(
            "delete these shards, and give the command that wrote them again:\n  "
            + "\n  ".join(damaged)
        )


def pack(args: options.Pack) -> None:
    """Writes the images of any source, as they are, into shards: --out/SPLIT."""
    from tqdm import tqdm

    out = common.out_folder(args.out, args.source)
    data = sources.parse(args.source)
    source = sources.make_image_source(data, args.split)
    count, size = min(len(source), args.limit or len(source)), args.shard_size
    folder = out / args.split
    settings = {
        "arrays": {"image": None},
        "data": str(data),
        "split": args.split,
        **shards.source_settings(source, count),
        "shard_size": size,
        "num_shards": -(-count // size),
    }
    with tqdm(total=count, unit="image", disable=None) as bar:

        def make_shard(index: int) -> Iterator[Record | reader.Unreadable]:
            bar.update(index * size - bar.n)  # What is there already counts as done.
            places = range(index * size, min(index * size + size, count))
            for made in reader.read_ahead(source, places, _record, text=True):
                yield made
                bar.update()

        write = functools.partial(shards.write_split, folder, settings, make_shard)
        manifest = write(shards.null_text(data.path), args.process)
        bar.update(count - bar.n)
    common.passed_over(source)
    total = common.report_shards(manifest, folder)
    if total is not None:
        print(
            f"{total} images in {folder}; to train on them: --config.data.source=array_record "
            f"--config.data.path={args.out}"
        )


def _record(picture: reader.Picture) -> Record:
    """One image as it is stored; an array becomes a PNG file."""
    image = picture.stored
    if not isinstance(image, bytes):
        stream = io.BytesIO()
        picture.image.save(stream, "PNG")
        image = stream.getvalue()
    arrays = {"image": np.frombuffer(image, np.uint8)}
    return Record(picture.key, arrays, picture.label, picture.caption, picture.embedding)
