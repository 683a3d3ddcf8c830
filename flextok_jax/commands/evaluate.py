"""`flextok evaluate`: numbers of reconstructions, and of generated images."""

from flextok_jax.commands import common
from flextok_jax.commands.generate import load_generator
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation.digits_judge import evaluate_digits
from flextok_jax.evaluation.digits_samples import evaluate_samples
from flextok_jax.evaluation.reconstruction import check_counts
from flextok_jax.evaluation.reconstruction import evaluate as evaluate_reconstruction


def evaluate(args) -> None:
    """Writes the metrics of a whole set of images as JSON."""
    (_generation if args.task == "generation" else _reconstruction)(args)


def _reconstruction(args) -> None:
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
        sampling = common.sampling(args)
        result = evaluate_reconstruction(tok, pictures, counts, sampling, args.batch_size)
        common.report_unreadable(pictures)
    common.write_json(args.out, result)
    print(f"{result['count']} images from their first k tokens; everything is in {args.out}")
    print(common.table(result, common.QUALITY | common.USAGE))
    if "real_recognition" in result:
        print(f"The originals are recognised to {result['real_recognition']:.1%}.")


def _generation(args) -> None:
    if args.data != pics.DIGITS:
        raise ValueError(
            f"--data {args.data}: generated images are judged for the digits only so far"
        )
    gen = load_generator(args)
    counts = check_counts(gen.tokenizer, args.num_tokens or [gen.num_tokens], gen.num_tokens)
    if len(counts) > 1:
        raise ValueError(f"--num-tokens {','.join(map(str, counts))}: one number to generate from")
    (k,) = counts
    how, sampling = common.token_sampling(args), common.sampling(args)
    result = evaluate_samples(gen, args.per_label, k, how, sampling, args.batch_size)
    common.write_json(args.out, result)
    near = result["nearest"]
    print(f"{result['count']} samples from {k} tokens; everything is in {args.out}")
    print(f"{result['recognition']:.1%} are read as the class that was asked for.")
    print(
        f"Distance to the closest training digit, median: {near['samples']:.3f}; of real held-out "
        f"digits {near['held_out']:.3f}. {near['closer']:.1%} lie closer than 95 % of those do."
    )
