"""`flextok reconstruct`: images from their first tokens, and numbers."""

import time

from flextok_jax.commands import common
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.reconstruction import check_counts, evaluate, identity, side
from flextok_jax.evaluation.results import results_folder


def reconstruct(args) -> None:
    """Writes grid.png, k0016/NAME.png for every k and image, and metrics.json into --out."""
    common.check_apart(args.images, args.out)
    pictures = pics.Pictures(args.images, args.limit)
    tok = common.load_model(args)
    counts = check_counts(tok, args.num_tokens)
    sampling = common.sampling(args)
    about = {**identity(tok), **sampling.about(tok)}
    png_name = dict(zip(pictures.names, pics.png_names(pictures.names)))
    settings = {**about, "images": str(args.images), "limit": args.limit, "num_tokens": counts}
    with results_folder(args.out, settings | {"dtype": tok.compute.dtype}) as results:

        def path(name, k):
            return results.folder / f"k{k:04d}" / png_name[name]

        def write(batch, drawn):
            for k, images in drawn.items():
                for name, image in zip(batch.names, pics.to_uint8(images)):
                    pics.write_png(path(name, k), image, metadata(about, k))

        before, started = len(results.records), time.perf_counter()
        result = evaluate(tok, pictures, counts, sampling, args.batch_size, write, results)
        seconds = time.perf_counter() - started
        shown = [i for i, n in enumerate(pictures.names) if n in results.records]
        rows = [
            [
                pictures.image(place, side(tok)),
                *(pics.read_png(path(pictures.names[place], k)) for k in counts),
            ]
            for place in shown[: pics.GRID_ROWS]
        ]
        sheet = pics.grid(rows, ["original", *(f"k = {k}" for k in counts)])
        about_sheet = metadata(about, ",".join(map(str, counts)))
        pics.write_png(results.folder / "grid.png", sheet, about_sheet)
        common.write_json(results.folder / "metrics.json", result)
    common.report_unreadable(pictures)
    print(f"{result['count']} images from their first k tokens, in {args.out}")
    print(common.table(result, common.QUALITY))
    common.print_speed(result["count"] - before, seconds)


def metadata(about: dict, num_tokens) -> dict:
    """What a PNG file says of itself."""
    about = dict(about)
    return {"model": about.pop("origin"), "num_tokens": num_tokens, **about}
