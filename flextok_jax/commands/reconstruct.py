"""`flextok reconstruct` and `flextok evaluate`: images from their first tokens, and numbers."""

from flextok_jax.commands import common
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.digits_judge import evaluate_digits
from flextok_jax.evaluation.reconstruction import check_counts, evaluate, identity


def reconstruct(args) -> None:
    """Writes grid.png, k0016/NAME.png for every k and image, and metrics.json into --out."""
    common.check_apart(args.images, args.out)
    pictures = pics.Pictures(args.images, args.limit)
    tok = common.load_model(args)
    counts = check_counts(tok, args.num_tokens)
    sampling = common.sampling(args)
    about = {**identity(tok), **sampling.about(tok)}
    png_name = dict(zip(pictures.names, pics.png_names(pictures.names)))
    rows = []
    with pics.results_folder(args.out) as folder:

        def write(batch, drawn):
            drawn = {k: pics.to_uint8(images) for k, images in drawn.items()}
            for i, name in enumerate(batch.names):
                for k, images in drawn.items():
                    path = folder / f"k{k:04d}" / png_name[name]
                    pics.write_png(path, images[i], metadata(about, k))
                if len(rows) < pics.GRID_ROWS:
                    rows.append([batch.images[i], *(images[i] for images in drawn.values())])

        result = evaluate(tok, pictures, counts, sampling, args.batch_size, write)
        sheet = pics.grid(rows, ["original", *(f"k = {k}" for k in counts)])
        pics.write_png(folder / "grid.png", sheet, metadata(about, ",".join(map(str, counts))))
        common.write_json(folder / "metrics.json", result)
    common.report_unreadable(pictures)
    print(f"{result['count']} images from their first k tokens, in {args.out}")
    print(common.table(result, common.QUALITY))


def metadata(about: dict, num_tokens) -> dict:
    """What a PNG file says of itself."""
    about = dict(about)
    return {"model": about.pop("origin"), "num_tokens": num_tokens, **about}


def evaluate_command(args) -> None:
    """Writes the metrics of a whole set of images by number of tokens."""
    pictures = pics.Pictures(args.data, args.limit)
    tok = common.load_model(args)
    counts = check_counts(tok, args.num_tokens)
    if args.data == pics.DIGITS:
        result = evaluate_digits(
            tok,
            counts,
            args.steps,
            args.guidance,
            args.seed,
            norm_guidance=args.norm_guidance,
            batch_size=args.batch_size,
            limit=args.limit,
        )
    else:
        result = evaluate(tok, pictures, counts, common.sampling(args), args.batch_size)
        common.report_unreadable(pictures)
    common.write_json(args.out, result)
    print(f"{result['count']} images from their first k tokens; everything is in {args.out}")
    print(common.table(result, common.QUALITY | common.USAGE))
    if "real_recognition" in result:
        print(f"The originals are recognised to {result['real_recognition']:.1%}.")
