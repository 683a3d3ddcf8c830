"""`flextok lengths`: the smallest number of tokens of each image that meets a target."""

import dataclasses
import zlib

import jax
import numpy as np
from tqdm import tqdm

from flextok_jax import criteria
from flextok_jax import lengths as search
from flextok_jax.commands import common, options
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.io import storage

CURVES = "curves.npz"
GROUP = 8  # Batches that are decided together.
SHOWN = 10  # Images of each length in the picture.


def lengths(args: options.Lengths) -> None:
    """Writes lengths.json, curves.npz and lengths.png; continues what was interrupted."""
    pictures = pics.Pictures(args.images, args.limit, args.split)
    out = common.out_results(args.out, args.images)
    criterion = make_criterion(args)
    tok = common.load_model(args)
    counts = search.check_counts(tok, args.counts)
    how, info = _sampling(args, tok, criterion)
    about = {"criterion": criterion.name, **criterion.metadata}
    about |= {name: getattr(args, name) for name in ("target", "within", "rule", "samples")}
    settings = {**info, **about, "counts": counts, "images": pictures.title, "limit": args.limit}
    with common.results_folder(out, settings):
        measured, examples = _read_curves(out / CURVES), {}
        with tqdm(total=len(pictures), unit="image", disable=None) as bar:
            for batch in pictures.batches(rec.side(tok), GROUP * args.batch_size):
                pixels = [zlib.crc32(image) for image in batch.images]
                known = [measured.get(name, (None,))[-1] for name in batch.names]
                new = [i for i, pair in enumerate(zip(pixels, known)) if len({*pair}) > 1]
                if new:
                    found = search.choose(
                        tok, batch.images[new], criterion, args.target, args.within, counts,
                        args.rule, args.samples, how, batch_size=args.batch_size,
                        seeds=batch.seeds[new], key=jax.random.key(args.seed),
                    )  # fmt: skip
                    crcs = [pixels[i] for i in new]
                    rows = zip(found.num_tokens, found.met, found.values, crcs)
                    measured |= dict(zip((batch.names[i] for i in new), rows))
                    _write_curves(out / CURVES, measured, counts)
                for name, image in zip(batch.names, batch.images):
                    row = examples.setdefault(int(measured[name][0]), [])
                    row += [image] * (len(row) < SHOWN)
                bar.update(len(batch.names))
        measured = {name: measured[name] for name in pictures.names if name in measured}
        k, met, values, _ = map(np.array, zip(*measured.values()))
        chosen = values[np.arange(len(k)), np.searchsorted(counts, k)]
        sheet = _picture(k, counts, examples)
        text = {"criterion": criterion.name, "target": args.target, "within": args.within}
        pics.write_png(out / "lengths.png", sheet, info | text)
        found = {
            **settings,
            "unreadable": pictures.unreadable,
            "mean_tokens": float(k.mean()),
            "share_met": float(met.mean()),
            "lengths": [
                {"name": name, "k": int(a), "met": bool(b), "value": float(c)}
                for name, a, b, c in zip(measured, k, met, chosen)
            ],
        }
        storage.write_json(out / "lengths.json", found)
    common.left_out(pictures.skipped, pictures.unreadable, len(pictures))
    print(
        f"{len(k)} images: {k.mean():.4g} tokens on average, {met.mean():.1%} meet, in {args.out}"
    )
    for count in counts:
        share = np.mean(k == count)
        print(f"{count:5} tokens: {share:6.1%} of the images")


def make_criterion(args: options.Lengths) -> criteria.Criterion:
    """That of --criterion, from the files that were named. Raises ValueError where one lacks."""
    files = {"lpips": ("lpips_vgg", "lpips_heads"), "dino": ("dinov2",), "clip": ("clip",)}
    names = files.get(args.criterion, ())
    if missing := [name for name in names if not getattr(args, name)]:
        words = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ValueError(f"--criterion {args.criterion} needs {words}")
    if not names:
        return criteria.find(args.criterion)
    return getattr(criteria, args.criterion)(*(getattr(args, name) for name in names))


def _sampling(args, tok, criterion) -> tuple[dict, dict]:
    """(fields of the sampler, what `reconstruction.metadata` says of it)."""
    if criterion.of == "velocity":
        for field in dataclasses.fields(options.Sampling):
            if field.name != "seed" and getattr(args, field.name) != field.default:
                option = field.name.replace("_", "-")
                raise ValueError(f"--{option}: --criterion {criterion.name} samples nothing")
        info = {"model": rec.identity(tok), "dtype": tok.compute.dtype, "seed": args.seed}
        return {}, info
    sampler = common.sampler(args, tok)
    return dataclasses.asdict(sampler) if sampler else {}, rec.metadata(tok, sampler, args.seed)


def _read_curves(path) -> dict[str, tuple]:
    """{name: (number of tokens, whether it meets, values, CRC-32 of pixels)}, measured before."""
    if not path.exists():
        return {}
    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
        names = saved["names"].tolist()
        fields = (saved[field] for field in ("num_tokens", "met", "values", "crc32"))
        return dict(zip(names, zip(*fields)))


def _write_curves(path, measured: dict, counts) -> None:
    k, met, values, crc32 = map(np.array, zip(*measured.values()))
    about = dict(names=np.array(list(measured)), counts=counts, crc32=crc32)
    common.write_arrays(path, num_tokens=k, met=met, values=values, **about)


def _picture(k: np.ndarray, counts, examples: dict):
    """A row for each number of tokens: the share of the images as a bar, and some of them."""
    shares = {n: np.mean(k == n) for n in counts if n in examples}
    most, rows, names = max(shares.values()), [], []
    for n, share in shares.items():
        bar = np.full_like(examples[n][0], 255)
        height, width = bar.shape[:2]
        bar[height // 4 : -(height // 4) or None, : max(1, round(width * share / most))] = 90
        rows.append([bar, *examples[n]])
        names.append(f"{n} tokens {share:.0%}")
    return pics.grid(rows, ["images", "such as"], names)
