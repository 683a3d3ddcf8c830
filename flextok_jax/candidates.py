"""Candidates of a search over tokens: what there is to draw, and how they are drawn.

The candidates of one prompt are n sequences under way, which the programs `open`, `take` and
`extend` begin, pick from and go on with (see `nn.generation.State`): few of them, whatever the
numbers of tokens and prompts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.conditions import Conditions, condition_of
from flextok_jax.generator import ImageGenerator
from flextok_jax.nn import flextok, generation
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.generation import Branching, Sampling, State
from flextok_jax.parallel.rng import named
from flextok_jax.parallel.sharding import spread_batch
from flextok_jax.tokenizer import is_int

ALGORITHMS, BRANCHES, PRIORS = ("beam", "best_of"), ("first", "last"), ("model", "null", "uniform")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is searched; see `search`."""

    algorithm: str = "beam"
    beams: int = 4
    candidates: int = 8
    schedule: tuple[int, ...] = ()
    branch: str = "first"
    lookahead: int = 0
    prior: str = "model"
    results: int = 1
    search_steps: int = 4

    @property
    def pool(self) -> int:
        """n."""
        return self.candidates * (self.beams if self.algorithm == "beam" else 1)

    @property
    def kept(self) -> int:
        """Candidates that go on from a step."""
        return min(self.beams, self.pool)


def check(settings: Settings, most: int) -> None:
    """Raises ValueError with what does not fit."""
    for name, allowed in (("algorithm", ALGORITHMS), ("branch", BRANCHES), ("prior", PRIORS)):
        if (value := getattr(settings, name)) not in allowed:
            raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")
    for name, least in (("beams", 1), ("candidates", 1), ("results", 1), ("search_steps", 1),
                        ("lookahead", 0)):  # fmt: skip
        if not is_int(value := getattr(settings, name)) or value < least:
            raise ValueError(f"{name}={value!r}: must be an int, at least {least}")
    schedule = settings.schedule
    right = all(is_int(k) and 1 <= k <= most for k in schedule)
    if not right or any(a >= b for a, b in zip(schedule, schedule[1:])):
        raise ValueError(f"schedule={schedule}: must be ascending numbers of tokens in 1..{most}")
    if settings.algorithm == "best_of" and len(schedule) > 1:
        raise ValueError(f"schedule={schedule}: best_of has one step, give one number of tokens")
    if settings.results > settings.kept:
        raise ValueError(
            f"results={settings.results}: at most the {settings.kept} beams that are left at last"
        )
    if settings.prior == "uniform" and settings.lookahead:
        raise ValueError("lookahead: the prior 'uniform' finds no token likelier than another")


@dataclasses.dataclass(frozen=True, eq=False)
class Proposals:
    """Draws the candidates of prompts.

    Attributes:
        gen: the AR model; of the prior "uniform" its sizes alone.
        conditions: P of them.
        null: the null condition, for guidance or the prior "null".
        sampling: of tokens.
        settings: see `Settings`.
    """

    gen: ImageGenerator
    conditions: Conditions
    null: ARCondition | None
    sampling: Sampling
    settings: Settings

    def open(self, prompt: int, prefix: np.ndarray, stop: int) -> State:
        """Candidates that begin with int32 [n, k] tokens, and have room up to `stop`."""
        gen, settings = self.gen, self.settings
        start, most = prefix.shape[1], gen.num_tokens
        length = flextok.bucket(start, most) if start else 0
        prefix = np.pad(prefix, ((0, 0), (0, length - start)))
        with gen.on_mesh():
            (prefix,) = spread_batch(gen.mesh, (prefix,))
            if settings.prior == "uniform":
                return State(_filled(prefix, most), (), None, None)
            return _open(
                gen.params, gen.config, gen.compute, *self._condition(prompt), prefix,
                np.int32(start), length=max(length, self._room(stop)),
            )  # fmt: skip

    def take(self, state: State, index: np.ndarray, stop: int) -> State:
        """Those with the numbers int32 [n], with room up to `stop`."""
        room = state.caches[0].k.shape[2] if state.caches else 0
        with self.gen.on_mesh():
            (index,) = spread_batch(self.gen.mesh, (index,))
            return _take(state, index, max(room, self._room(stop) // self.gen.config.folds))

    def draw(self, state: State, key, start: int, stop: int) -> tuple[State, np.ndarray]:
        """Tokens at positions start .. stop - 1.

        Returns:
            (the state with them, int32 [n, k] with those of the look-ahead behind them).

        Raises:
            ValueError: the logits are not finite.
        """
        gen, settings = self.gen, self.settings
        with gen.on_mesh():
            how = self._branching(key, start, stop)
            rows = spread_batch(gen.mesh, (how.own, how.shared, how.rank))
            how = how._replace(own=rows[0], shared=rows[1], rank=rows[2])
            static = dict(cfg=gen.config, compute=gen.compute, most=settings.pool)
            params = gen.params if state.caches else None
            stops = np.int32(start), np.int32(stop)
            state = _extend(params, state, self.sampling, how, *stops, **static)
            ahead, last = state, self.last(stop)
            if last > stop:
                greedy = self.sampling._replace(temperature=np.float32(0))
                how, stops = how._replace(split=np.int32(-1)), (np.int32(stop), np.int32(last))
                ahead = _extend(params, state, greedy, how, *stops, **static)
        tokens = np.asarray(ahead.tokens)[: settings.pool, :last]
        if (tokens < 0).any():
            raise ValueError(
                f"{gen.origin}: the logits are not finite. Check the model's parameters, or try "
                "float32"
            )
        return state, tokens

    def last(self, stop: int) -> int:
        """The number of tokens that candidates of `stop` tokens are scored with."""
        return min(stop + self.settings.lookahead, self.gen.num_tokens)

    @property
    def branches(self) -> int:
        """Positions that the AR model computes for one token."""
        if self.settings.prior == "uniform":
            return 0
        return 1 if self.null is None or self.settings.prior == "null" else 2

    def _room(self, stop: int) -> int:
        """How many tokens the cache has room for."""
        most, need = self.gen.num_tokens, self.last(stop)
        first = generation.first_room(self.gen.config)
        return next(length for length in generation.rooms(first, most) if length >= need)

    def _condition(self, prompt: int) -> tuple[ARCondition, ARCondition | None]:
        """(condition, null condition) of one prompt; its text is padded as all others."""
        gen = self.gen
        if self.settings.prior == "null":
            return self.null or condition_of(gen.config, None, None, None, 1)[0], None
        one = self.conditions.take([prompt])
        condition, _ = condition_of(gen.config, one.labels, one.text, one.text_mask, 1)
        return generation.pad_texts(condition, self.null)

    def _branching(self, key, start: int, stop: int) -> Branching:
        """How the candidates are drawn: a function of the prompt's key and the positions alone.

        Candidate 0 draws what `generate_tokens` draws with this key.
        """
        settings = self.settings
        n, numbers = settings.pool, np.arange(settings.pool, dtype=np.int32)
        if settings.algorithm == "best_of":  # Independent from the first token on.
            return Branching(*_keys(key, n, np.int32(1)), numbers * 0, np.int32(-1))
        group = n if start == 0 else settings.candidates
        split = start if settings.branch == "first" else stop - 1
        return Branching(*_keys(key, n, np.int32(group)), numbers % group, np.int32(split))


# Programs.


@functools.partial(jax.jit, static_argnums=1)
def _keys(key, count, group):
    """([count] keys, the first of which is `key`; that of the first in its group, for each)."""
    others = jax.vmap(jax.random.fold_in, (None, 0))(named(key, "candidates"), jnp.arange(1, count))
    own, numbers = jnp.concatenate([key[None], others]), jnp.arange(count)
    return own, own[numbers - numbers % group]


_open = jax.jit(generation.open_state, static_argnames=("cfg", "compute", "length"))


@functools.partial(jax.jit, static_argnames="length")
def _take(state: State, index, length: int) -> State:
    return generation.grow(generation.take(state, index), length)


@functools.partial(jax.jit, static_argnames="most")
def _filled(prefix, most: int):
    """int32 [n, P] -> [n, most]."""
    return jnp.pad(prefix, ((0, 0), (0, most - prefix.shape[1])))


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "most"))
def _extend(
    params, state: State, sampling: Sampling, how: Branching, start, stop, cfg, compute, most
):
    """Draws positions start .. stop - 1; of a state without caches all ids are equally likely."""

    def pick(logits, i):
        return generation.branch(logits, i, how, sampling, most)

    if state.caches:
        return generation.advance(params, cfg, compute, state, sampling.guidance, pick, start, stop)
    equal = jnp.zeros((len(state.tokens), cfg.vocab_size))

    def step(i, tokens):
        return jax.lax.dynamic_update_slice_in_dim(tokens, pick(equal, i)[:, None], i, axis=1)

    return state._replace(tokens=jax.lax.fori_loop(start, stop, step, state.tokens))
