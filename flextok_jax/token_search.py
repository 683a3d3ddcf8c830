"""Search over tokens at test time: candidates are drawn, decoded and scored, and the best go on.

One loop over a schedule of numbers of tokens serves best-of-N, beam search and look-ahead. Prompts
are searched one after the other, in the same programs. Candidates of a prompt are decoded with one
noise, so that only their tokens differ, in few steps; what is returned is chosen among the last
beams once more, by images of full steps (docs/search.md).

P prompts, n candidates of a prompt, k tokens, L tokens at most, R tokens of a full image.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from flextok_jax import candidates as drawing
from flextok_jax import conditions as of
from flextok_jax.candidates import Proposals, Settings
from flextok_jax.conditions import Conditions
from flextok_jax.generator import Guidance, ImageGenerator
from flextok_jax.nn import flextok, generation
from flextok_jax.nn.generation import Sampling
from flextok_jax.nn.images import to_uint8
from flextok_jax.parallel.rng import named
from flextok_jax.parallel.sharding import padded
from flextok_jax.token_sampling import check_sampling
from flextok_jax.tokenizer import Key, is_int
from flextok_jax.verifiers import LOOKS_AT, Ensemble, Verifier


class Step(NamedTuple):
    """One step of the search of a prompt.

    Attributes:
        num_tokens: k, of the candidates.
        tokens: int32 [n, k], and behind them those of the look-ahead.
        scores: float32 [n].
        parents: int32 [n], which candidate of the step before each goes on from; 0 in the first.
        kept: int32 [beams], the best candidates, best first.
        images: uint8 [beams, H, W, 3] of those; None where nothing looks at images.
        cost: see `Found`.
    """

    num_tokens: int
    tokens: np.ndarray
    scores: np.ndarray
    parents: np.ndarray
    kept: np.ndarray
    images: np.ndarray | None
    cost: dict[str, float]


class Result(NamedTuple):
    """What was found for one prompt; see `Found`."""

    tokens: np.ndarray
    images: np.ndarray | None
    scores: np.ndarray
    judged: dict[str, np.ndarray]
    cost: dict[str, float]


class Found(NamedTuple):
    """What `search` returns.

    Attributes:
        tokens: int32 [P, results, k], best first.
        images: float32 [P, results, H, W, 3], of full steps, not clipped; None without a tokenizer.
        scores: float32 [P, results], of these images.
        judged: {name: float32 [P, results]}, scores of the judges; of two with one name the second
            is "NAME 2".
        steps: of each prompt its `Step`s, without images.
        cost: what it took, of all prompts: "positions" of the AR model, conditions and null
            conditions each; "passes of K tokens" of the decoder, likewise; "images" that the VAE
            decoded; "scores" by verifiers; "seconds".
    """

    tokens: np.ndarray
    images: np.ndarray | None
    scores: np.ndarray
    judged: dict[str, np.ndarray]
    steps: tuple[tuple[Step, ...], ...]
    cost: dict[str, float]


def search(
    gen: ImageGenerator,
    verifier: Verifier | Ensemble,
    labels=None,
    text: Sequence[str] | None = None,
    conditions: Conditions | None = None,
    algorithm: str = "beam",
    beams: int = 4,
    candidates: int = 8,
    schedule: Sequence[int] | None = None,
    branch: str = "first",
    lookahead: int = 0,
    prior: str = "model",
    results: int = 1,
    search_steps: int = 4,
    steps: int | None = None,
    key: Key = None,
    batch_size: int = 32,
    judges: Sequence[Verifier | Ensemble] = (),
    on_step: Callable[[int, Step], None] | None = None,
    **how,
) -> Found:
    """Images of conditions that a verifier likes, by search over their tokens.

    Each step of the schedule draws `candidates` continuations of every beam to the next number of
    tokens (beams times candidates of the empty one in the first step), decodes and scores them, and
    keeps the best `beams` of all. At the end those are decoded with full steps and scored again.
    A prompt's draws and noise depend on its key alone.

    Args:
        gen: the AR model, with its tokenizer (unless nothing but tokens is looked at).
        verifier: see `verifiers`.
        labels, text, conditions: what to draw, P of them: classes, prompts, or either in one
            object; nothing for a model without conditions.
        algorithm: "beam"; or "best_of": `candidates` independent samples in one step.
        beams: how many go on from each step, and are decoded with full steps at the end.
        candidates: of each beam.
        schedule: ascending numbers of tokens; 1, 2, 4, ... up to L by default, of "best_of" L.
        branch: where candidates of a beam go apart. "first": at their first new token, where no two
            get the same; "last": at their last one, so that they share all other tokens.
        lookahead: tokens that each candidate is continued by, greedily, to be scored; what goes on
            is the candidate without them.
        prior: what proposes tokens: the "model"; the model given the "null" condition, without
            guidance; or "uniform", any id alike.
        results: best of each prompt that are returned, at most `beams`.
        search_steps: of decoding candidates.
        steps: of decoding the last beams; the default is that of `ImageGenerator.generate`.
        key: as in `generate_tokens`: P keys, or one from which each prompt gets its own.
        batch_size: candidates that are decoded at a time; it does not change the result.
        judges: verifiers that score the results and do not steer.
        on_step: called with the number of the prompt and each step.
        how: `guidance_scale`, `temperature`, `top_k` and `top_p` of tokens, as in
            `generate_tokens`; `image_guidance_scale`, `norm_guidance`, `solver`, `time_shift` and
            `guidance_interval` of images, as in `ImageGenerator.generate`.

    Raises:
        ValueError: an argument does not fit the model or the others; or a verifier's scores have a
            wrong shape or are not finite: the message has its name.
    """
    settings = Settings(
        algorithm, beams, candidates, tuple(schedule or ()), branch, lookahead, prior, results,
        search_steps,
    )  # fmt: skip
    conditions = conditions_of(gen, labels, text, conditions, prior)
    task = prepare(gen, verifier, conditions, settings, steps, key, batch_size, judges, **how)
    found, tree = [], []
    for prompt in range(len(conditions)):
        taken: list[Step] = []

        def note(step):
            if on_step:
                on_step(prompt, step)
            taken.append(step._replace(images=None))

        found.append(run(task, prompt, on_step=note))
        tree.append(tuple(taken))
    cost: collections.Counter = collections.Counter()
    for one in found:
        cost.update(one.cost)
    return Found(
        np.stack([one.tokens for one in found]),
        None if found[0].images is None else np.stack([one.images for one in found]),
        np.stack([one.scores for one in found]),
        {name: np.stack([one.judged[name] for one in found]) for name in found[0].judged},
        tuple(tree),
        dict(cost),
    )


# Setting it up.


def conditions_of(gen, labels=None, text=None, conditions=None, prior="model") -> Conditions:
    """What is to be drawn, in one object. Raises ValueError for several, or none where needed."""
    if sum(x is not None for x in (labels, text, conditions)) > 1:
        raise ValueError("labels, text and conditions: give one of them")
    if conditions is not None:
        return conditions
    if text is not None and prior == "uniform" and gen.text_encoder is None:
        return Conditions(names=tuple(text))
    if text is not None:
        return of.of_text(*gen.encode_text(text), text)
    if labels is not None:
        return of.of_labels(of.check_labels(gen.config, labels), gen.class_names)
    if prior == "model" and (gen.config.num_classes or gen.config.text_dim):
        raise ValueError(f"{gen.origin} draws from conditions: give labels or text")
    return of.of_nothing(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A search that is set up, for `run`; made by `prepare`."""

    gen: ImageGenerator
    verifier: Verifier | Ensemble
    judges: dict  # By name.
    proposals: Proposals
    prepared: dict  # {verifier: arrays [P, ...]}
    decoding: tuple[dict, dict]  # Arguments of `detokenize`, to search and at the end.
    keys: jax.Array  # [P]
    batch_size: int

    @property
    def settings(self) -> Settings:
        """What is searched."""
        return self.proposals.settings

    @property
    def looks_at_images(self) -> bool:
        """Whether candidates are decoded."""
        return any(member.looks_at == "images" for member in self.verifier.members)


def prepare(
    gen: ImageGenerator,
    verifier: Verifier | Ensemble,
    conditions: Conditions,
    settings: Settings,
    steps: int | None = None,
    key: Key = None,
    batch_size: int = 32,
    judges: Sequence[Verifier | Ensemble] = (),
    guidance_scale: Guidance = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    **decoding,
) -> Task:
    """Checks everything, and lets the verifiers look at the prompts. See `search`."""
    cfg, tok, count = gen.config, gen.tokenizer, len(conditions)
    if not settings.schedule:
        last = (cfg.num_tokens,)
        schedule = last if settings.algorithm == "best_of" else flextok.lengths(cfg.num_tokens)
        settings = dataclasses.replace(settings, schedule=schedule)
    drawing.check(settings, cfg.num_tokens)
    if cfg.whole:
        raise ValueError(
            f"{gen.origin} draws tokens again or at once: a search needs an order, so give a model "
            "without masked, coarse and channels"
        )
    if not is_int(batch_size) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: must be an int, at least 1")
    used = [member for one in (verifier, *judges) for member in _members(one)]
    scale = cfg.guidance_scale if guidance_scale is None else guidance_scale
    scales = generation.guidance_schedule(scale, cfg.num_tokens, cfg.num_tokens)
    conditional = cfg.text_dim or cfg.num_classes
    null = None
    if settings.prior == "uniform":  # Logits are equal: nothing to guide or to filter.
        temperature, top_k, top_p = 1.0, 0, 0.0
    elif conditional and (settings.prior == "null" or not (scales == 1).all()):
        null = gen.null_condition(1)
    sampling = Sampling(scales, *check_sampling(temperature, top_k, top_p))
    wants_images = any(member.looks_at == "images" for member in used)
    if tok is None and wants_images:
        raise ValueError("no tokenizer: images need from_pretrained(source, tokenizer=...)")
    how = _decoding(gen, settings.search_steps, steps, decoding) if tok else ({}, {})
    keys = generation.sample_keys(key, count)
    prepared = {member: member.prepare(conditions) for member in used}
    proposals = Proposals(gen, conditions, null, sampling, settings)
    return Task(gen, verifier, _by_name(judges), proposals, prepared, how, keys, batch_size)


def _by_name(verifiers: Sequence) -> dict:
    """A second one of the same name is "NAME 2", and so on."""
    found: dict = {}
    for verifier in verifiers:
        same = sum(other.name == verifier.name for other in found.values())
        found[f"{verifier.name} {same + 1}" if same else verifier.name] = verifier
    return found


def _members(verifier) -> tuple[Verifier, ...]:
    if not isinstance(verifier, (Verifier, Ensemble)):
        raise ValueError(
            f"verifier {verifier!r}: make one with `verifiers`, of a function of your own with "
            "verifiers.function(f)"
        )
    for member in verifier.members:
        if member.looks_at not in LOOKS_AT:
            raise ValueError(f"verifier {member.name} looks at {member.looks_at!r}: {LOOKS_AT}")
    return verifier.members


def _decoding(gen, search_steps: int, steps: int | None, how: dict) -> tuple[dict, dict]:
    """Arguments of `detokenize` to search and at the end; two empty ones of a single pass."""
    cfg = gen.tokenizer.config
    how = {"guidance_scale" if k == "image_guidance_scale" else k: v for k, v in how.items()}
    how = {name: value for name, value in (how | {"steps": steps}).items() if value is not None}
    if not cfg.is_flow:
        if how:
            raise ValueError(f"{', '.join(how)}: {gen.tokenizer.origin} decodes in one pass")
        return {}, {}
    how = gen.decoding | how
    cfg.sampler_with(**how)
    return how | {"steps": search_steps}, how


# Running it.


def run(
    task: Task,
    prompt: int,
    done: Sequence[Step] = (),
    on_step: Callable[[Step], None] | None = None,
) -> Result:
    """Searches one prompt.

    Args:
        prompt: its number.
        done: its first steps, from an earlier run of the same task: it goes on after them.
        on_step: called with each further step.
    """
    settings, proposals, steps, state = task.settings, task.proposals, list(done), None
    key = task.keys[prompt]
    noise = _noise(task, key)
    for stop in settings.schedule[len(steps) :]:
        begin, cost, start = time.perf_counter(), collections.Counter(), 0
        parents, prefix = np.zeros(settings.pool, np.int32), np.zeros((settings.pool, 0), np.int32)
        if steps:
            start = steps[-1].num_tokens
            parents = np.repeat(steps[-1].kept, settings.candidates).astype(np.int32)
            prefix = steps[-1].tokens[parents, :start]
        if state is None:
            state = proposals.open(prompt, prefix, stop)
            cost["positions"] += settings.pool * start * proposals.branches
        else:
            state = proposals.take(state, parents, stop)
        state, shown = proposals.draw(state, key, start, stop)
        new = proposals.last(stop) - start
        cost["positions"] += settings.pool * new * proposals.branches
        scores, images = _scored(task, prompt, shown, noise, cost)
        kept = np.argsort(-scores, kind="stable")[: settings.kept].astype(np.int32)
        cost["seconds"] = time.perf_counter() - begin
        images = None if images is None else images[kept]
        steps.append(Step(stop, shown, scores, parents, kept, images, dict(cost)))
        if on_step:
            on_step(steps[-1])
    return _finish(task, prompt, steps, noise)


def _finish(task: Task, prompt: int, steps: list[Step], noise) -> Result:
    """The best of the last beams, by images of full steps."""
    last, settings, cost = steps[-1], task.settings, collections.Counter()
    begin = time.perf_counter()
    tokens, scores, images = last.tokens[last.kept], last.scores[last.kept], None
    if task.looks_at_images:
        scores, images = _scored(task, prompt, tokens, noise, cost, final=True)
    best = np.argsort(-scores, kind="stable")[: settings.results]
    tokens, scores = tokens[best], scores[best]
    if images is not None:
        images = images[best]
    elif task.gen.tokenizer is not None:
        images = _decoded(task, tokens, noise, cost, final=True)
    judged = {}
    for name, judge in task.judges.items():
        values = [_values(task, prompt, m, tokens, images, cost) for m in judge.members]
        judged[name] = judge.combine(np.stack(values)).astype(np.float32)
    cost["seconds"] = time.perf_counter() - begin
    for step in steps:
        cost.update(step.cost)
    return Result(tokens, images, scores, judged, dict(cost))


# Decoding and scoring.


def _scored(task, prompt, tokens, noise, cost, final=False) -> tuple[np.ndarray, np.ndarray | None]:
    """(scores float32 [n], images or None): uint8 to search, float32 at the end."""
    size, parts, kept = min(task.batch_size, len(tokens)), [], []
    for first in range(0, len(tokens), size):
        some, images = tokens[first : first + size], None
        if task.looks_at_images:
            images = _decoded(task, some, noise, cost, final, size)
            kept.append(images if final else to_uint8(images))
        members = task.verifier.members
        parts.append(
            np.stack([_values(task, prompt, m, some, images, cost, size) for m in members])
        )
    scores = task.verifier.combine(np.concatenate(parts, axis=1)).astype(np.float32)
    return scores, np.concatenate(kept) if kept else None


def _decoded(task, tokens, noise, cost, final, size=None) -> np.ndarray:
    """float32 [m, H, W, 3] of tokens [m, k], run as `size` images, m by default."""
    tok, how = task.gen.tokenizer, task.decoding[final]
    filled = padded(tokens, size or len(tokens))
    bucket, passes = flextok.bucket(tokens.shape[1], tok.num_tokens), 1
    if noise is not None:
        how = how | {"noise": np.broadcast_to(noise, (len(filled), *noise.shape))}
        sampler = {name: value for name, value in how.items() if name != "noise"}
        passes = tok.config.sampler_with(**sampler).passes
    cost[f"passes of {bucket} tokens"] += len(tokens) * passes
    cost["images"] += len(tokens)
    return np.asarray(tok.detokenize(filled, **how))[: len(tokens)]


def _values(task, prompt, verifier: Verifier, tokens, images, cost, size=None) -> np.ndarray:
    """Scores [m] of one verifier; raises ValueError with its name for what is none."""
    candidates = tokens if verifier.looks_at == "tokens" else images.clip(-1, 1)
    prepared = jax.tree.map(lambda array: array[prompt], task.prepared[verifier])
    cost["scores"] += len(tokens)
    filled = padded(candidates, size or len(candidates))
    try:
        found = np.asarray(verifier.function(verifier.params, prepared, filled))
    except Exception as error:
        error.add_note(f"raised by the verifier {verifier.name}, at prompt {prompt}")
        raise
    if found.shape != (len(filled),):
        raise ValueError(
            f"verifier {verifier.name}: it returned shape {found.shape} for {len(filled)} "
            f"candidates, must be ({len(filled)},)"
        )
    found = found[: len(tokens)]
    if not np.isfinite(found).all():
        raise ValueError(
            f"verifier {verifier.name}: its score is not finite for "
            f"{np.sum(~np.isfinite(found))} of {len(found)} candidates of prompt {prompt}"
        )
    return found


def _noise(task: Task, key) -> np.ndarray | None:
    """The noise of a prompt, that of `ImageGenerator.generate`: float32 [h, w, C]."""
    tok = task.gen.tokenizer
    if tok is None or not tok.config.is_flow:
        return None
    return np.asarray(_normal(key, tok.config.latent_shape))


# Programs.


@functools.partial(jax.jit, static_argnums=1)
def _normal(key, shape):
    return jax.random.normal(named(key, "noise"), shape)
