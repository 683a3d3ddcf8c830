"""Sampling a flow: a sampler is a value; times, solvers, guidance, adaptive projected guidance."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.flow.path import shift_time

APG_MOMENTUM = -0.5  # Sadat et al., arXiv 2410.02416, applied to velocities
APG_NORM = 2.5
SOLVERS = {"euler": 1, "midpoint": 2, "multistep": 1}  # evaluations of the velocity per step
LENGTH = 64  # Steps of a program: schedules are padded to a multiple of it, and cut into windows.


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a flow is sampled.

    Attributes:
        steps: number of steps from noise (t = 1) to data (t = 0).
        guidance_scale: g, a number, or a callable of t; 1 is no guidance, at half the cost.
        norm_guidance: adaptive projected guidance (APG) in place of plain guidance.
        solver: "euler"; "midpoint" (second order, two evaluations per step); "multistep" (second
            order, one evaluation per step: see `multistep_weights`).
        time_shift: s > 0, moves the uniform grid of times by t -> s t / (1 + (s - 1) t); above 1
            there are more steps near noise, below 1 near data.
        guidance_interval: (low, high). Steps that begin at a time outside are not guided and have
            no null pass (arXiv 2404.07724).
    """

    steps: int = 20
    guidance_scale: float | Callable[[float], float] = 7.5
    norm_guidance: bool = True
    solver: str = "euler"
    time_shift: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        steps, scale, interval = self.steps, self.guidance_scale, self.guidance_interval
        if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps={steps!r}: must be an int, at least 1")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: allowed are {', '.join(SOLVERS)}")
        if not callable(scale) and (np.ndim(scale) or np.asarray(scale).dtype.kind not in "iuf"):
            raise ValueError(f"guidance_scale={scale!r}: must be a number or a callable of t")
        if not callable(scale) and not 0 <= scale < np.inf:
            raise ValueError(f"guidance_scale={scale!r}: must be finite, from 0 on")
        if not 0 < self.time_shift < np.inf:
            raise ValueError(f"time_shift={self.time_shift!r}: must be positive and finite")
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval={interval!r}: must be two times, 0 <= low <= high <= 1"
            )

    @property
    def guided(self) -> bool:
        """Whether there is a null pass: unless the scale is the constant 1."""
        return callable(self.guidance_scale) or self.guidance_scale != 1

    @property
    def normalized(self) -> bool:
        """Whether guidance is APG."""
        return bool(self.norm_guidance) and self.guided

    @property
    def method(self) -> "Method":
        """What is compiled of it."""
        partly = self.guided and tuple(self.guidance_interval) != (0, 1)
        return Method(self.solver, self.guided, self.normalized, partly)

    @property
    def passes(self) -> int:
        """Evaluations of the velocity for one image, with those of guidance."""
        scales = self.schedule().scales[: self.steps]
        null = np.sum(scales != 1) if self.method.partly else self.steps * self.guided
        return SOLVERS[self.solver] * int(self.steps + null)

    def times(self) -> np.ndarray:
        """float64 [steps + 1], falling from 1 to 0."""
        return shift_time(1.0 - np.arange(self.steps + 1) / self.steps, self.time_shift)

    def schedule(self) -> "Schedule":
        """Times and scales as arrays.

        Raises:
            ValueError: a callable scale gives something negative or not finite.
        """
        times, scale, (low, high) = self.times(), self.guidance_scale, self.guidance_interval
        every = [scale(float(t)) if callable(scale) else scale for t in times[:-1]]
        every = [g if low <= t <= high else 1.0 for g, t in zip(every, times)]
        scales = np.asarray(every, np.float32)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise ValueError(f"guidance_scale={scale!r} gives {scales}: must be finite, from 0 on")
        fill = -self.steps % LENGTH

        def padded(x):
            return np.pad(x.astype(np.float32), (0, fill))

        lengths, weights = times[:-1] - times[1:], multistep_weights(times)
        return Schedule(*map(padded, (times[:-1], lengths, scales, weights)))


class Method(NamedTuple):
    """What of a sampler decides the program.

    Attributes:
        solver: one of SOLVERS.
        guided: whether there is a null pass.
        normalized: APG in place of plain guidance.
        partly: no null pass in steps whose scale is 1.
    """

    solver: str = "euler"
    guided: bool = False
    normalized: bool = False
    partly: bool = False


class Schedule(NamedTuple):
    """What each step needs, padded beyond the last one.

    Attributes:
        times: float32 [S], where a step begins.
        lengths: float32 [S], how far it goes.
        scales: float32 [S], guidance scale.
        weights: float32 [S], see `multistep_weights`.
    """

    times: jax.Array
    lengths: jax.Array
    scales: jax.Array
    weights: jax.Array

    def window(self, first: int) -> tuple["Schedule", int]:
        """(the LENGTH steps around step `first`, the place of that step among them).

        All windows have one shape, so a flow of any number of steps runs one program.
        """
        place = first % LENGTH
        return Schedule(*(x[first - place : first - place + LENGTH] for x in self)), place


def multistep_weights(times: np.ndarray) -> np.ndarray:
    """How much a step subtracts of the difference between its velocity and the one before.

    Adams-Bashforth of second order with steps of any length: the velocity is continued on the line
    through its last two values, which adds h^2 / (2 h_before) times their difference to an Euler
    step. The first step is an Euler step.

    Args:
        times: float64 [steps + 1], falling from 1 to 0.

    Returns:
        float64 [steps].
    """
    lengths = times[:-1] - times[1:]
    return np.append(0.0, lengths[1:] ** 2 / (2 * lengths[:-1]))


class State(NamedTuple):
    """Between two steps.

    Attributes:
        x: float32 [B, h, w, C].
        momentum: of APG, like x.
        clean: the data that the last velocity points to, like x.
        velocity: the last one, like x; for "multistep".
    """

    x: jax.Array
    momentum: jax.Array
    clean: jax.Array
    velocity: jax.Array


def start(noise: jax.Array) -> State:
    """The state before the first step."""
    x = jnp.asarray(noise, jnp.float32)
    return State(x, *(jnp.zeros_like(x) for _ in range(3)))


def classifier_free(v_cond, v_null, scale):
    """v_null + g (v_cond - v_null)."""
    return v_null + scale * (v_cond - v_null)


def adaptive_projected(v_cond, v_null, scale, momentum):
    """APG: momentum, norm limit, and only the part of the difference orthogonal to v_cond.

    Args:
        v_cond, v_null: [B, ...].
        scale: g, a scalar.
        momentum: like v_cond, zero at the first step; carried before the norm limit.

    Returns:
        (guided velocity, new momentum).
    """
    axes = tuple(range(1, v_cond.ndim))

    def norm(x):
        return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))

    momentum = v_cond - v_null + APG_MOMENTUM * momentum
    update = momentum * jnp.minimum(1.0, APG_NORM / norm(momentum))
    unit = v_cond / jnp.maximum(norm(v_cond), 1e-12)  # an untrained model's velocity is zero
    update = update - jnp.sum(update * unit, axis=axes, keepdims=True) * unit
    return v_cond + (scale - 1.0) * update, momentum


def settled_momentum(v_cond, v_null):
    """The momentum that APG leaves as it is, so that its guidance is a function of x and t alone.

    Many small steps approach it; few steps begin with more guidance than that.
    """
    return (v_cond - v_null) / (1 - APG_MOMENTUM)


def integrate(
    velocities: Callable,
    state: State,
    schedule: Schedule,
    first,
    stop,
    method: Method,
) -> State:
    """Steps `first` .. `stop` - 1, in float32.

    Args:
        velocities: (x [B, ...], t [1], length [1], guided) -> (v_cond, v_null) if guided, else
            (v_cond,). `length` is that of the step, for decoders that write a step's average.
        state: before step `first`.
        schedule: see `Sampler.schedule`.
        first, stop: int32 []; traced, so that their number does not compile anew.
        method: static.
    """

    def evaluate(guided, x, t, length, scale, momentum):
        found = velocities(x, t.reshape(1), length.reshape(1), guided)
        v, *null = (v.astype(jnp.float32) for v in found)
        if guided and method.normalized:
            return adaptive_projected(v, null[0], scale, momentum)
        return (classifier_free(v, null[0], scale) if guided else v), momentum

    def velocity(*where):
        if not method.partly:
            return evaluate(method.guided, *where)
        ways = (functools.partial(evaluate, guided) for guided in (True, False))
        return jax.lax.cond(where[3] != 1, *ways, *where)

    def step(i, state):
        x, momentum, _, before = state
        t, length, scale, weight = (a[i] for a in schedule)
        v, momentum = velocity(x, t, length, scale, momentum)
        clean, last = x - t * v, v
        if method.solver == "midpoint":
            middle = x - 0.5 * length * v, t - 0.5 * length
            v, momentum = velocity(*middle, length, scale, momentum)
        x = x - length * v
        if method.solver == "multistep":
            x = x - weight * (last - before)
        return State(x, momentum, clean, last)

    schedule = Schedule(*(jnp.asarray(a) for a in schedule))
    return jax.lax.fori_loop(first, stop, step, state)
