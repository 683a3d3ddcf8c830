"""`flextok reconstruct`: images from their first tokens, and metrics."""

import time

from flextok_jax.commands import common
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation import reconstruction
from flextok_jax.evaluation.results import check_folder, results_folder
from flextok_jax.io import storage


def reconstruct(args) -> None:
    """Writes grid.png, k0016/NAME.png for every k and image, and metrics.json into --out.

    Pictures that an interrupted run with the same settings wrote are kept.
    """
    pictures = pics.Pictures(args.images, args.limit)
    check_folder(args.out, [pictures.path])
    tok = common.load_model(args)
    counts = reconstruction.check_counts(tok, args.num_tokens)
    sampler = common.sampler(args, tok)
    info = reconstruction.metadata(tok, sampler, args.seed)
    settings = {**info, "images": str(args.images), "limit": args.limit, "num_tokens": counts}
    png_name = dict(zip(pictures.names, pics.png_names(pictures.names)))
    rows, classes = [], []

    def show(batch, images):
        for i in range(min(len(batch.names), pics.GRID_ROWS - len(rows))):
            rows.append([batch.images[i], *(pics.to_uint8(part[i]) for part in images.values())])
            classes.append(pictures.class_name(batch.labels[i]))

    with results_folder(args.out, settings, [pictures.path]) as out:

        def save(batch, k, make):
            paths = [out / f"k{k:04d}" / png_name[name] for name in batch.names]
            return pics.saved_pictures(paths, [common.png_metadata(info, k)] * len(paths), make)

        start = time.perf_counter()
        options = (counts, sampler, args.seed, args.batch_size)
        result = reconstruction.evaluate(tok, pictures, *options, visit=show, save=save)
        seconds = time.perf_counter() - start
        sheet = pics.grid(rows, ["original", *(f"k = {k}" for k in counts)], classes)
        pics.write_png(out / "grid.png", sheet, common.png_metadata(info, counts))
        storage.write_json(out / "metrics.json", result)
    common.report_unreadable(pictures)
    print(f"{result['count']} images from their first k tokens, in {args.out}")
    for k in counts:
        found = {name: result[name][k] for name in ("psnr", "mae", "ssim") if name in result}
        print(f"{k:5} tokens:" + "".join(f"  {n.upper()} {x:.4g}" for n, x in found.items()))
    common.print_speed(result["count"], seconds)
