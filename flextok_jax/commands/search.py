"""`flextok search`: images that a verifier likes, by search over their tokens."""

import dataclasses
import json

import jax
import numpy as np
from tqdm import tqdm

from flextok_jax import token_search, verifiers
from flextok_jax.candidates import Settings
from flextok_jax.commands import common, images, options, text
from flextok_jax.data.reader import load_images
from flextok_jax.evaluation import pictures as pics
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.evaluation import report
from flextok_jax.generator import ImageGenerator
from flextok_jax.io import storage
from flextok_jax.io.paths import as_path
from flextok_jax.nn.images import to_uint8
from flextok_jax.token_search import Result, Step

STEPS = "steps"  # The folder of what is done.
SHOWN = 8  # Prompts in the report.
WITH_SOURCE = ("dino", "clip", "aesthetic")
KINDS = ("likelihood", "agreement", "psnr", *WITH_SOURCE)


def search(args: options.Search) -> None:
    """Writes pictures, search.json, tokens.npz and report.html; continues what was interrupted."""
    steering, judging = parse(args.verifier), parse(args.judge or "")
    out = common.out_results(args.out)
    texts = text.encoded(args)
    gen, wanted = images.asked(args, images.load_generator(args), texts)
    references = _references(args, gen, len(wanted.names))
    verifier = _made(args, gen, references, steering)
    judges = [_made(args, gen, references, [one]) for one in judging]
    fields = {f.name for f in dataclasses.fields(Settings)}
    given = {name: getattr(args, name) for name in fields} | {"schedule": args.schedule or ()}
    sampler = common.sampler(args, gen.tokenizer, gen.decoding)
    scale = gen.config.guidance_scale if args.token_guidance is None else args.token_guidance
    filters = images.token_filters(args)
    decoding = {} if sampler is None else dataclasses.asdict(sampler)
    if decoding:
        decoding["image_guidance_scale"] = decoding.pop("guidance_scale")
    key = jax.random.key(args.seed)
    seeds = pics.name_seeds(wanted.names)
    task = token_search.prepare(
        gen, verifier, wanted.conditions, Settings(**given),
        key=jax.vmap(jax.random.fold_in, (None, 0))(key, seeds), batch_size=args.batch_size,
        judges=judges, guidance_scale=scale, **filters, **decoding,
    )  # fmt: skip
    info = rec.metadata(gen.tokenizer, sampler, args.seed) | filters | {"token_guidance": scale}
    info |= {"ar_model": gen.origin, "ar_fingerprint": gen.fingerprint}
    info |= dataclasses.asdict(task.settings) | {"verifier": verifier.name}
    about = [{"name": one.name, **one.metadata} for one in (verifier, *judges)]
    settings = {**info, **wanted.about, "verifiers": about}
    if references is not None:
        settings["reference_sha256"] = storage.fingerprint({"reference": references})
    with common.results_folder(out, settings):
        found, tree = _run(task, wanted, out, info)
        _write(out, task, wanted, settings, found, tree)
    best = np.mean([one.scores[0] for one in found])
    words = "".join(f", {name} {np.mean([one.judged[name][0] for one in found]):.4g}"
                    for name in found[0].judged)  # fmt: skip
    print(f"{len(found)} searches, {verifier.name} {best:.4g}{words} on average, in {args.out}")


def parse(words: str) -> list[tuple[str, str]]:
    """ "clip:DIR,agreement" -> [("clip", "DIR"), ("agreement", "")]. Raises ValueError."""
    found = []
    for part in filter(None, words.split(",")):
        kind, _, source = part.partition(":")
        if kind not in KINDS or bool(source) != (kind in WITH_SOURCE):
            allowed = ", ".join(f"{k}:SOURCE" if k in WITH_SOURCE else k for k in KINDS)
            raise ValueError(f"verifier {part!r}: allowed are {allowed}")
        found.append((kind, source))
    return found


def _made(args: options.Search, gen: ImageGenerator, references, parts: list[tuple[str, str]]):
    """The verifier of `parse`; of several an ensemble."""
    made = []
    for kind, source in parts:
        if kind in ("psnr", "dino") and references is None:
            raise ValueError(f"verifier {kind} needs --reference, images to compare with")
        if kind == "aesthetic" and not args.aesthetic_head:
            raise ValueError("verifier aesthetic needs --aesthetic-head, its linear layers")
        make = {
            "likelihood": lambda source: verifiers.likelihood(gen),
            "agreement": lambda source: verifiers.agreement(gen),
            "psnr": lambda source: verifiers.psnr_to(references),
            "dino": lambda source: verifiers.similar_to(references, source),
            "clip": verifiers.clip,
            "aesthetic": lambda source: verifiers.aesthetic(source, args.aesthetic_head),
        }
        made.append(make[kind](source))
    return made[0] if len(made) == 1 else verifiers.ensemble(made, args.ensemble)


def _references(args: options.Search, gen: ImageGenerator, count: int) -> np.ndarray | None:
    """uint8 [count, S, S, 3] of --reference, or None."""
    if not args.reference:
        return None
    side, path = rec.side(gen.tokenizer), as_path(args.reference)
    if path.is_file():
        found = load_images(path, side)
    else:
        pictures = pics.Pictures(args.reference)
        (batch,) = pictures.batches(side, len(pictures))
        if pictures.unreadable:
            raise ValueError(f"--reference: unreadable are{pics.listed(pictures.unreadable)}")
        found = batch.images
    asked = count // args.per_label
    if len(found) not in (1, asked):
        raise ValueError(
            f"--reference {args.reference} has {len(found)} images: must be one, or one for each "
            f"of {asked} labels or prompts"
        )
    return np.repeat(found, count // len(found), axis=0)


def _run(task, wanted: images.Asked, out, info: dict) -> tuple[list[Result], list[list[Step]]]:
    """Every prompt, from where it was left; its steps and its result are files."""
    found, tree = [], []
    total = len(wanted.names) * len(task.settings.schedule)
    with tqdm(total=total, unit="step", disable=None) as bar:
        for prompt, name in enumerate(wanted.names):
            folder = out / STEPS / f"{prompt:06d}"
            steps = _read_steps(folder)
            bar.update(len(steps))

            def note(step):
                _write_step(folder / f"{len(steps):02d}.npz", step)
                steps.append(step)
                bar.update()
                bar.set_postfix_str(f"best {step.scores.max():.4g}")

            saved = _read_result(folder, out, task, name)
            if saved is None:
                saved = token_search.run(task, prompt, done=tuple(steps), on_step=note)
                _write_result(folder, out, saved, name, info | wanted.texts[prompt])
            found.append(saved)
            tree.append(steps)
    return found, tree


def _files(name: str, count: int) -> list[str]:
    """The pictures of a prompt, best first."""
    stem = name.removesuffix(".png")
    return [name] + [f"{stem}_{rank}.png" for rank in range(2, count + 1)]


def _write_step(path, step: Step) -> None:
    arrays = {name: value for name, value in step._asdict().items() if value is not None}
    common.write_arrays(path, **arrays | {"cost": json.dumps(step.cost)})


def _read_steps(folder) -> list[Step]:
    steps: list[Step] = []
    while (path := folder / f"{len(steps):02d}.npz").exists():
        saved = _arrays(path)
        saved |= {"num_tokens": int(saved["num_tokens"]), "cost": json.loads(str(saved["cost"]))}
        steps.append(Step(**{"images": None} | saved))
    return steps


def _write_result(folder, out, result: Result, name: str, info: dict) -> None:
    """The pictures, and then what says that they are there."""
    files = _files(name, len(result.scores))
    for file, image, score in zip(files, to_uint8(result.images), result.scores):
        more = images.png_metadata(info, result.tokens.shape[1]) | {"score": float(score)}
        pics.write_png(out / file, image, more)
    judged = {f"judged {judge}": scores for judge, scores in result.judged.items()}
    common.write_arrays(folder / "result.npz", tokens=result.tokens, scores=result.scores,
                        cost=json.dumps(result.cost), **judged)  # fmt: skip


def _read_result(folder, out, task, name: str) -> Result | None:
    if not (folder / "result.npz").exists():
        return None
    saved = _arrays(folder / "result.npz")
    made = [pics.read_png(out / file) for file in _files(name, len(saved["scores"]))]
    judged = {judge: saved[f"judged {judge}"] for judge in task.judges}
    cost = json.loads(str(saved["cost"]))
    return Result(saved["tokens"], np.stack(made), saved["scores"], judged, cost)


def _arrays(path) -> dict[str, np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
        return dict(saved)


def _write(out, task, wanted, settings: dict, found: list[Result], tree) -> None:
    """search.json, tokens.npz and the report."""
    files = [_files(name, task.settings.results) for name in wanted.names]
    cost: dict[str, float] = {}
    for one in found:
        cost = {name: cost.get(name, 0) + one.cost.get(name, 0) for name in cost | one.cost}
    searches = [
        {
            **about,
            "files": names,
            "scores": one.scores.tolist(),
            "judged": {judge: scores.tolist() for judge, scores in one.judged.items()},
            "steps": [
                {"num_tokens": step.num_tokens, "best": step.scores[step.kept].tolist(),
                 "mean": float(step.scores.mean()), "from": step.parents[step.kept].tolist()}
                for step in steps
            ],
        }
        for about, names, one, steps in zip(wanted.texts, files, found, tree)
    ]  # fmt: skip
    storage.write_json(out / "search.json", settings | {"cost": cost, "searches": searches})
    tokens = np.concatenate([one.tokens for one in found])
    images.write_tokens(out / "tokens.npz", task.gen.tokenizer, tokens, sum(files, []))
    _report(out, task, wanted, settings, cost, files, tree)


def _report(out, task, wanted, settings, cost, files, tree) -> None:
    """The page: what it took, and of each search what was found and the beams of every step."""
    curves = {"best": [], "mean of the candidates": []}
    for steps in zip(*tree):
        k = steps[0].num_tokens
        curves["best"].append((k, np.mean([step.scores.max() for step in steps])))
        curves["mean of the candidates"].append((k, np.mean([s.scores.mean() for s in steps])))
    name, numbers = task.verifier.name, {name: f"{cost[name]:.4g}" for name in sorted(cost)}
    chart = report.chart(name, "mean over all searches", curves, "tokens", log2=True)
    sections = [("", [report.row(chart, report.fact_table(numbers))])]
    for words, names, steps in list(zip(wanted.conditions.names, files, tree))[:SHOWN]:
        results = [pics.read_png(out / file) for file in names]
        tables = [report.picture_table("Found", "best first", [""] * len(results), [results])]
        if steps[-1].images is not None:
            titles = [f"beam {i}" for i in range(1, len(steps[-1].kept) + 1)]
            labels = [f"k = {step.num_tokens}" for step in steps]
            rows = [list(step.images) for step in steps]
            tables.append(report.picture_table("Beams", "best first", titles, rows, labels))
        pieces = [report.row(*tables), report.number_table(*_tree(steps))]
        sections.append((words or names[0], pieces))
    sections.append(("Setup", [report.code(json.dumps(settings, indent=2))]))
    report.write_report(out / "report.html", f"Search by {name}", sections)


def _tree(steps: list[Step]) -> tuple[list[str], list[list[str]]]:
    """The score of each beam that was kept, and the beam before that it goes on from."""
    rows, before = [], None
    for step in steps:
        cells = [str(step.num_tokens)]
        for one in step.kept:
            origin = "" if before is None else f" from {before.index(step.parents[one]) + 1}"
            cells.append(f"{step.scores[one]:.4g}{origin}")
        rows.append(cells)
        before = step.kept.tolist()
    return ["tokens", *(f"beam {i + 1}" for i in range(len(before)))], rows
