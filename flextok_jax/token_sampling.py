"""How each kind of AR model samples tokens, and gives logits of them: one program for each."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from flextok_jax.flow.sampler import Sampler
from flextok_jax.nn import ar, flextok, generation, masked, refiner, token_flow
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.tokenizer import is_int

PASSES, STEPS = 8, 20  # Of a masked model, and of a flow.

_program = functools.partial(jax.jit, static_argnames=("cfg", "compute"))
_in_order = _program(generation.generate)
_in_passes = _program(masked.generate)
_coarse_first = _program(refiner.generate)
_by_flow = _program(token_flow.generate)
_logits = _program(ar.logits)
_refined_logits = _program(refiner.logits)


def sampling_program(
    cfg: ARConfig, prefix: np.ndarray, count: int, passes: int | None
) -> tuple[Callable, tuple[np.ndarray, ...]]:
    """What samples `count` tokens or more, those of the prefix given.

    Args:
        cfg: of the AR model.
        prefix: int32 [B, j], j < count.
        count: how many tokens are wanted.
        passes: of a masked model or a flow; None: as many as is usual.

    Returns:
        (a program of (params, cfg, compute, condition, null, sampling, keys, *tokens); those
        tokens: int32 [B, P] with the prefix, padded; of a flow none). It makes int32 [B, L], of
        which the `count` first ones are drawn, negative where logits are not finite; of a flow
        float32 [B, L, F].

    Raises:
        ValueError: `passes` does not suit the model.
    """
    given, start = prefix.shape[1], np.int32(prefix.shape[1])
    if cfg.channels:
        passes = _passes(passes, STEPS)
        schedule = Sampler(passes, guidance_scale=1.0).schedule()
        return functools.partial(_by_flow, schedule=schedule, stop=np.int32(passes)), ()
    if cfg.masked:
        still = masked.left(cfg.num_tokens - given, _passes(passes, PASSES))
        run = functools.partial(_in_passes, masked=np.array(still, np.int32))
        return run, (_pad(prefix, cfg.num_tokens, ar.SOS),)
    if passes is not None:
        raise ValueError(f"passes={passes!r}: the model draws tokens in their order; leave it out")
    tokens = (_pad(prefix, flextok.bucket(given, cfg.num_tokens) if given else 0, 0),)
    if cfg.coarse:
        return functools.partial(_coarse_first, start=start), tokens
    return functools.partial(_in_order, start=start, stop=np.int32(count)), tokens


def logits_program(cfg: ARConfig) -> Callable:
    """Teacher-forced logits, a program of (params, cfg, compute, tokens, condition)."""
    return _refined_logits if cfg.coarse else _logits


def check_tokens(cfg: ARConfig, tokens, name: str, least: int, hidden: bool = False) -> np.ndarray:
    """int32 [B, k] with k of `least` or more. Raises ValueError, with this name, for what is none.

    `hidden`: whether -1 is allowed, for a token that is not known.
    """
    tokens = np.asarray(tokens)
    integers = np.issubdtype(tokens.dtype, np.integer) or not tokens.size
    fits = tokens.ndim == 2 and len(tokens) and least <= tokens.shape[1] <= cfg.num_tokens
    if not (integers and fits):
        raise ValueError(
            f"{name} are {tokens.dtype} of shape {tokens.shape}: must be integers [B, k] with "
            f"B >= 1 and k in {least}..{cfg.num_tokens}"
        )
    wrong = tokens[(tokens < (ar.SOS if hidden else 0)) | (tokens >= cfg.vocab_size)]
    if wrong.size:
        also = ", or -1 where it is not known" if hidden else ""
        raise ValueError(f"token id {wrong[0]} in {name}: must be in 0..{cfg.vocab_size - 1}{also}")
    return tokens.astype(np.int32)


def check_sampling(temperature, top_k, top_p) -> tuple:
    """(temperature, top_k, top_p) as arrays."""
    number = (int, float, np.integer, np.floating)
    if not isinstance(temperature, number) or not 0 <= temperature < np.inf:
        raise ValueError(f"temperature={temperature!r}: must be a number, 0 (greedy) or more")
    if not is_int(top_k) or top_k < 0:
        raise ValueError(f"top_k={top_k!r}: must be an int, 0 (off) or more")
    if not isinstance(top_p, number) or not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p!r}: must be a number in 0 (off) .. 1")
    return np.float32(temperature), np.int32(min(top_k, 2**31 - 1)), np.float32(top_p)


def _passes(passes: int | None, usual: int) -> int:
    passes = usual if passes is None else passes
    if not is_int(passes) or passes < 1:
        raise ValueError(f"passes={passes!r}: must be an int, at least 1")
    return int(passes)


def _pad(tokens: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])), constant_values=value)
