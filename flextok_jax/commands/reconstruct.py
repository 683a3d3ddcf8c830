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
    rows, classes = {}, {}
    with results_folder(args.out, settings, [pictures.path]) as out:

        def save(batch, k, make):
            paths = [out / f"k{k:04d}" / png_name[name] for name in batch.names]
            text = [common.png_metadata(info, k)] * len(paths)
            images = pics.saved_pictures(paths, text, make)
            for name, label, original, image in zip(*batch[1:], images):
                if name in rows or len(rows) < pics.GRID_ROWS:
                    rows.setdefault(name, [original]).append(image)
                    classes[name] = pictures.class_name(label)
            return images

        start = time.perf_counter()
        options = (counts, sampler, args.seed, args.batch_size)
        result = reconstruction.evaluate(tok, pictures, *options, save=save)
        seconds = time.perf_counter() - start
        titles = ["original", *(f"k = {k}" for k in counts)]
        sheet = pics.grid(list(rows.values()), titles, list(classes.values()))
        pics.write_png(out / "grid.png", sheet, common.png_metadata(info, counts))
        storage.write_json(out / "metrics.json", result)
    common.report_unreadable(pictures)
    print(f"{result['count']} images from their first k tokens, in {args.out}")
    for k in counts:
        found = {name: result[name][k] for name in ("psnr", "mae", "ssim") if name in result}
        print(f"{k:5} tokens:" + "".join(f"  {n.upper()} {x:.4g}" for n, x in found.items()))
    common.print_speed(result["count"], seconds)
