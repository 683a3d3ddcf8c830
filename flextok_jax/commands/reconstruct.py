"""`flextok reconstruct`: images from their first tokens, and metrics."""

import functools
import time

import numpy as np
from tqdm import tqdm

from flextok_jax.commands import common, options
from flextok_jax.evaluation import metrics
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.io import storage


def reconstruct(args: options.Reconstruct) -> None:
    """Writes grid.png, k0016/NAME.png for every k and image, and metrics.json into --out.

    Pictures that an interrupted run with the same settings wrote are kept.
    """
    pictures = pics.Pictures(args.images, args.limit)
    out = common.out_results(args.out, args.images)
    tok = common.load_model(args)
    counts = rec.check_counts(tok, args.num_tokens)
    sampler = common.sampler(args, tok)
    info = rec.metadata(tok, sampler, args.seed)
    settings = {**info, "images": str(args.images), "limit": args.limit, "num_tokens": counts}
    files = dict(zip(pictures.names, pics.png_names(pictures.names)))
    size, tokens, rows, names = min(args.batch_size, len(pictures)), [], [], []

    def stream(bar):
        """See `metrics.per_image`."""
        for batch in pictures.batches(rec.side(tok), size):
            tokens.append(rec.encode(tok, batch.images, counts[-1], size))
            columns = [batch.images]
            for k in counts:
                paths = [out / f"k{k:04d}" / files[name] for name in batch.names]
                how = (k, batch.seeds, sampler, args.seed, size)
                make = functools.partial(rec.decode, tok, tokens[-1], *how)
                text = [common.png_metadata(info, k)] * len(paths)
                columns.append(pics.saved_pictures(paths, text, make))
                both = (rec.padded(x, size) for x in (columns[-1], batch.images))
                yield f"/{k}", *both, np.arange(size) < len(paths)
            shown = pics.GRID_ROWS - len(rows)
            rows.extend(list(zip(*columns))[:shown])
            names.extend(pictures.class_name(label) for label in batch.labels[:shown])
            bar.update(len(batch.names))

    started = time.perf_counter()
    with common.results_folder(out, settings):
        with tqdm(total=len(pictures), unit="image", disable=None) as bar:
            means: dict = {}
            for name, value in metrics.means(stream(bar)):
                metric, k = name.split("/")
                means.setdefault(metric, {})[int(k)] = value
        tokens = np.concatenate(tokens)
        sheet = pics.grid(rows, ["original", *(f"k = {k}" for k in counts)], names)
        pics.write_png(out / "grid.png", sheet, common.png_metadata(info, counts))
        result = {
            **info,
            "images": pictures.title,
            "count": len(tokens),
            "unreadable": pictures.unreadable,
            "num_tokens": counts,
            **means,
            **metrics.codes(tokens, tok.config.vocab_size, counts),
        }
        storage.write_json(out / "metrics.json", result)
    common.left_out(pictures.unreadable, len(pictures))
    print(f"{len(tokens)} images from their first k tokens, in {args.out}")
    for k in counts:
        print(f"{k:5} tokens:" + "".join(f"  {n.upper()} {x[k]:.4g}" for n, x in means.items()))
    common.print_speed(len(tokens), time.perf_counter() - started)
