"""`flextok data check` and `flextok data pack`: what is in a data set, and one in shards."""

import io

import numpy as np
from tqdm import tqdm

from flextok_jax.commands import common, options
from flextok_jax.data import check as checks
from flextok_jax.data import reader, shards, sources
from flextok_jax.data.records import Record
from flextok_jax.evaluation import pictures as pics

SHEET = {"Software": "flextok data check"}  # Text in the contact sheet's file.


def check(args: options.Check) -> None:
    """Opens images and prints what they are; verifies shards."""
    out = common.out_file(args.out, args.source, lambda path: pics.is_png_of(path, SHEET))
    data = sources.parse(args.source)
    if data.source in (*sources.ENCODED, "array_record"):
        _verify(data, args.split)
    if data.source not in sources.ENCODED:
        _look(data, args, out)


def _look(data: sources.Data, args, out) -> None:
    split = args.split or "all"
    source = sources.make_source(data, split)
    count = len(source) if args.all else min(args.sample, len(source))
    indices = np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist()
    count = len(indices)
    looks = reader.read_ahead(source, indices, checks.look, text=True)
    found, unreadable = [], reader.UnreadableCount(count)
    for place, look in enumerate(tqdm(looks, total=count, unit="image", disable=None)):
        if isinstance(look, reader.Unreadable):
            unreadable[look.key] = look.reason
        elif place % -(-count // 2000):  # Millions of pictures do not fit in memory.
            found.append(look._replace(thumbnail=None))
        else:
            found.append(look)
    print(f"{data}, split {split}: {len(source)} images")
    print(f"  opened    {count} images, of which {len(unreadable)} unreadable")
    for what, words in checks.summary(found, source.classes) if found else ():
        print(f"  {what:<10}{words}")
    for line in source.skipped.lines():
        print(f"  skipped {line}")
    for name, why in list(unreadable.items())[: reader.MAX_LISTED]:
        print(f"  unreadable: {name}: {why}")
    if any(look.thumbnail is not None for look in found):
        pics.write_png(out, checks.contact_sheet(found, source.classes), SHEET)
        print(f"  some of them are shown in {out}")
    if count < len(source):
        print(f"  {len(source) - count} were not opened: --all opens every one")
    unreadable.check()


def _verify(data: sources.Data, split: str | None) -> None:
    """Reads every byte of every shard."""
    folders = [file.parent for file in shards.manifests(data.path)]
    folders = [folder for folder in folders if split in (None, "all", folder.name)]
    if not folders:
        shards.read_manifest(data.path, split or "train")  # Says what is missing.
    damaged = []
    for folder in folders:
        manifest = shards.read_manifest(folder.parent, folder.name)
        results = list(tqdm(shards.verify(folder), total=len(manifest["shards"]), disable=None))
        wrong = [f"{folder / name}: {why}" for name, why, _ in results if why]
        state = f"{len(wrong)} of them damaged" if wrong else "each as its manifest says"
        count = sum(count for *_, count in results)
        print(f"{folder}: {count} records in {len(results)} shards, {state}")
        for name, model in shards.models(manifest).items():
            where = model.get("source") or model.get("origin")
            print(f"  {name:<10}{where}, sha256 {model['fingerprint']}")
        for name, shape in manifest["arrays"].items():
            words = "files as they are" if shape is None else "x".join(map(str, shape))
            print(f"  {name:<10}{words}, {manifest.get('crops', 1)} of each image")
        print(f"  {'of':<10}{manifest['data']}, split {manifest['split']}")
        for name, why in manifest["unreadable"].items():
            print(f"  left out: {name}: {why}")
        damaged += wrong
    if damaged:
        raise ValueError("damaged shards; delete them and write them again:\n" + "\n".join(damaged))


def pack(args: options.Pack) -> None:
    """Writes the images of any source, as they are, into shards: --out/SPLIT."""
    out = common.out_folder(args.out, args.source)
    data = sources.parse(args.source)
    source = sources.make_image_source(data, args.split)

    def records(indices):
        return reader.read_ahead(source, indices, _record, text=True)

    total = common.write_shards(args, out, data, source, {"arrays": {"image": None}}, records)
    if total is not None:
        setting = f"--config.data.source=array_record --config.data.path={out}"
        print(f"{total} images in {out}; to train on them: {setting}")


def _record(picture: reader.Picture) -> Record:
    """One image as it is stored; an array becomes a PNG file."""
    image = picture.stored
    if not isinstance(image, bytes):
        stream = io.BytesIO()
        picture.image.save(stream, "PNG")
        image = stream.getvalue()
    arrays = {"image": np.frombuffer(image, np.uint8)}
    return Record(picture.key, arrays, picture.label, picture.caption, picture.embedding)
