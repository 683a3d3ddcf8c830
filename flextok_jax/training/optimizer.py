"""AdamW with warm-up, cosine decay, clipping, weight decay by name and muP learning rates."""

import re
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax.traverse_util import flatten_dict, unflatten_dict

from flextok_jax.nn.layout import path_string

_MAIN = ""  # The label of what is in no group.
# Besides convolutions, what Muon is for.
_HIDDEN = re.compile(r"(^|/)blocks/(attn|mlp)/\w+/kernel$")
_MATRICES = {3: (1,), 4: (0, 1, 2)}  # Axes that a kernel of so many dimensions reads.


def lr_schedule(config) -> optax.Schedule:
    """Learning rate of update number n = 0, 1, ...: linear warm-up, then cosine.

    Update n of the warm-up uses lr * (n + 1) / warmup_steps; after it the rate falls along half a
    cosine and reaches lr * final_lr_fraction at n = total_steps, where it stays.
    """
    lr, final = config.optim.lr, config.optim.final_lr_fraction
    warmup, total = config.optim.warmup_steps, config.total_steps

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum(1.0, (count + 1) / max(1, warmup))
        progress = jnp.clip((count - warmup) / max(1, total - warmup), 0.0, 1.0)
        fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return lr * rise * fall

    return schedule


def make_optimizer(config) -> optax.GradientTransformation:
    """The update rule of `config.optim`, for a tree of trainable parameters only.

    `optim.groups` = {name: {key: value}} gives the parameters below "name/" an optimizer of their
    own, clipping included: that of `optim` with these values instead.

    Raises:
        ValueError: a group sets a key that it cannot.
    """
    groups = config.optim.get("groups") or {}
    if not groups:
        return _chain(config)
    rules = {name: _chain(_of_group(config, name)) for name in groups} | {_MAIN: _chain(config)}

    def label(path, _):
        first = path_string(path).split("/")[0]
        return first if first in groups else _MAIN

    return optax.partition(rules, lambda tree: jax.tree_util.tree_map_with_path(label, tree))


def _of_group(config, name: str):
    """The configuration with the values of one group."""
    config, values = config.copy_and_resolve_references(), config.optim.groups[name].to_dict()
    unknown = sorted(values.keys() - (set(config.optim) - {"groups", "accumulate"}))
    if unknown:
        raise ValueError(f"optim.groups.{name} cannot set {unknown}: allowed are keys of optim")
    config.optim.update(values)
    return config


def _chain(config) -> optax.GradientTransformation:
    optim = config.optim
    parts = [
        _direction(optim),
        optax.add_decayed_weights(optim.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(lr_schedule(config)),
    ]
    if optim.get("grad_clip"):
        parts.insert(0, optax.clip_by_global_norm(optim.grad_clip))
    if optim.get("mup_base_width"):
        parts.append(scale_by_mup(optim.mup_base_width))
    return optax.chain(*parts)


def _direction(optim) -> optax.GradientTransformation:
    """Adam, or with `optim.rule="muon"` Muon for matrices of hidden layers and Adam for the rest.

    Muon (Jordan et al., 2024; momentum, orthogonalised) is for the kernels of convolutions [height,
    width, in, out], as matrices from height * width * in to out, and for those of attention and
    MLPs in stacks of blocks [depth, in, out].
    """
    if (kind := optim.get("mu_dtype")) not in (None, "float32", "bfloat16"):
        raise ValueError(f"optim.mu_dtype={kind!r}: allowed are 'float32' and 'bfloat16'")
    adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=optim.get("mu_dtype"))
    rule = optim.get("rule", "adam")
    if rule not in ("adam", "muon"):
        raise ValueError(f"optim.rule={rule!r}: allowed are 'adam' and 'muon'")
    if rule == "adam":
        return adam
    if optim.get("mup_base_width"):
        raise ValueError("optim.mup_base_width is for optim.rule='adam': unset it for 'muon'")
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(_MATRICES[x.ndim], (x.ndim - 1,)), tree
        ),
        mu_dtype=optim.get("mu_dtype"),
    )

    def label(path, x):
        hidden = x.ndim == 4 or _HIDDEN.search(path_string(path))
        return "muon" if hidden else "adam"

    return optax.partition(
        {"muon": muon, "adam": adam},
        lambda tree: jax.tree_util.tree_map_with_path(label, tree),
    )


def _is_kernel(path) -> bool:
    return path_string(path).rsplit("/", 1)[-1] == "kernel"


def decayed(params):
    """True for every matrix named `kernel`: no biases, norms, embeddings or learned vectors."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_kernel(path), params)


def scale_by_mup(base_width: int) -> optax.GradientTransformation:
    """Multiplies the update of each kernel by min(1, base_width / fan_in).

    The Adam column of muP (Yang et al., arXiv 2203.03466, table 3): the rate of a matrix falls with
    its fan-in, the second last dimension (stacked kernels lead with the depth). The minimum leaves
    alone what reads a narrow input instead of the width (patches, codes), as muP asks.
    """

    def scale(path, update):
        return update * min(1.0, base_width / update.shape[-2]) if _is_kernel(path) else update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def trainable_paths(params, is_trainable, freeze: Collection[str]) -> frozenset[str]:
    """The paths that are trained: `is_trainable(path)` and matched whole by no regex of `freeze`.

    Raises:
        ValueError: a pattern is none, or matches no parameter, or nothing is left to train.
    """
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"freeze: {pattern!r} is no regular expression: {error}") from None
    unused = [p for p in freeze if not any(re.fullmatch(p, path) for path in paths)]
    if unused:
        raise ValueError(
            f"freeze: the patterns {unused} match no parameter; they must match a whole path, such "
            f"as 'encoder/.*', of: {', '.join(paths)}"
        )
    kept = [p for p in paths if is_trainable(p) and not any(re.fullmatch(f, p) for f in freeze)]
    if not kept:
        raise ValueError(f"freeze={tuple(freeze)} leaves no parameter to train")
    return frozenset(kept)


def select(tree: dict, paths: Collection[str]) -> dict:
    """The part of a nested dictionary whose leaves lie at `paths`; emptied branches are dropped."""
    flat = flatten_dict(tree, sep="/")
    return unflatten_dict({path: flat[path] for path in flat if path in paths}, sep="/")


def overlay(tree: dict, part: dict) -> dict:
    """`tree` with the leaves of `part` (from `select`) put in their places."""
    return unflatten_dict(flatten_dict(tree, keep_empty_nodes=True) | flatten_dict(part))
