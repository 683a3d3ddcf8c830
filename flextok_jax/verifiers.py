"""What candidates of `search` are scored by: a number for each, larger is better.

`likelihood`, `agreement` and `psnr_to` need no file; `classifier` and `function` take functions of
the user's; `similar_to`, `clip` and `aesthetic` are networks of the user's files. `ensemble` joins
several.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax import criteria
from flextok_jax.conditions import Conditions, condition_of
from flextok_jax.io import storage
from flextok_jax.io.formats import clip as clip_files
from flextok_jax.io.formats import networks
from flextok_jax.nn import ar, flextok
from flextok_jax.nn import clip as clip_network
from flextok_jax.nn.config import Compute
from flextok_jax.nn.cross_entropy import cross_entropy
from flextok_jax.nn.images import psnr, to_float, to_uint8
from flextok_jax.parallel.sharding import spread_batch

CHUNK = 16  # Positions whose logits exist at a time.
LOOKS_AT = ("images", "tokens")


@dataclasses.dataclass(frozen=True, eq=False)
class Verifier:
    """A score for each candidate of a prompt.

    Attributes:
        name: for messages and files.
        function: (params, prepared, candidates) -> float [n], larger is better. Candidates are
            images float32 [n, H, W, 3] in [-1, 1], or tokens int32 [n, k].
        prepare: (conditions of P prompts) -> arrays [P, ...], made once; `function` gets those of
            its prompt. By default the number of the prompt.
        looks_at: "images" or "tokens"; where nothing looks at images, none are decoded to search.
        params: of a network.
        metadata: which network it is, in JSON terms.
    """

    name: str
    function: Callable
    prepare: Callable[[Conditions], Any] = lambda conditions: np.arange(len(conditions))
    looks_at: str = "images"
    params: dict = dataclasses.field(default_factory=dict, repr=False)
    metadata: dict = dataclasses.field(default_factory=dict)

    @property
    def members(self) -> tuple["Verifier", ...]:
        """The verifiers that it is made of."""
        return (self,)

    def combine(self, scores: np.ndarray) -> np.ndarray:
        """Scores of the members [1, n] -> [n]."""
        return scores[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Ensemble:
    """Several verifiers; make one with `ensemble`.

    Attributes:
        members: each looks at the same candidates.
        weights: float [m], together 1.
        how: "rank" or "zscore", of a member's score among the candidates of a prompt.
    """

    members: tuple[Verifier, ...]
    weights: np.ndarray
    how: str = "rank"

    @property
    def name(self) -> str:
        """Those of the members."""
        return "+".join(member.name for member in self.members)

    @property
    def metadata(self) -> dict:
        """How, and the members by position: two may have the same name."""
        about = [{"verifier": m.name, **m.metadata} for m in self.members]
        return {"how": self.how, "weights": self.weights.tolist(), "members": about}

    def combine(self, scores: np.ndarray) -> np.ndarray:
        """Scores of the members [m, n] -> [n].

        "rank": the share of the other candidates that are worse, equals counting half; "zscore":
        how many standard deviations above the mean. Then the weighted mean over members.
        """
        if self.how == "rank":
            worse = np.sum(scores[:, :, None] > scores[:, None], axis=2)
            equal = np.sum(scores[:, :, None] == scores[:, None], axis=2) - 1
            each = (worse + equal / 2) / max(scores.shape[1] - 1, 1)
        else:
            spread = np.std(scores, axis=1, keepdims=True)
            each = (scores - np.mean(scores, axis=1, keepdims=True)) / np.maximum(spread, 1e-12)
        return self.weights @ each


def ensemble(members: Sequence, how: str = "rank") -> Ensemble:
    """Several verifiers as one.

    Args:
        members: verifiers, or pairs of a verifier and its weight (1).
        how: "rank" or "zscore", see `Ensemble.combine`.
    """
    pairs = [pair if isinstance(pair, tuple) else (pair, 1.0) for pair in members]
    weights = np.array([weight for _, weight in pairs], np.float64)
    if how not in ("rank", "zscore"):
        raise ValueError(f"how={how!r}: allowed are rank, zscore")
    if not pairs or not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(f"weights {weights.tolist()}: give verifiers, each with a weight above 0")
    return Ensemble(tuple(member for member, _ in pairs), weights / weights.sum(), how)


# The AR model's own.


def likelihood(gen) -> Verifier:
    """Mean log p(token | condition) over a candidate's tokens: unguided, at temperature 1.

    Args:
        gen: an `ImageGenerator`.
    """

    def function(params, condition, tokens):
        return _log_probability(gen, params, condition, tokens)

    return _of_model("likelihood", gen, function)


def agreement(gen) -> Verifier:
    """Mean log p(token | condition) - log p(token | null): how much the condition explains.

    Args:
        gen: an `ImageGenerator` with classes or texts.
    """
    if not (gen.config.num_classes or gen.config.text_dim):
        raise ValueError(f"agreement: {gen.origin} has no conditions to compare with none")
    null = gen.null_condition(1)
    null = jax.tree.map(lambda array: array[0], null)

    def function(params, condition, tokens):
        both = (_log_probability(gen, params, c, tokens) for c in (condition, null))
        return next(both) - next(both)

    return _of_model("agreement", gen, function)


def _of_model(name: str, gen, function: Callable) -> Verifier:
    if gen.config.whole:
        raise ValueError(
            f"{name}: {gen.origin} does not draw tokens in their order, each given those before "
            "it; give a model that does"
        )

    def prepare(conditions: Conditions):
        if gen.config.text_dim and conditions.text is None:
            raise ValueError(f"{name}: the prompts have no embeddings; give gen a text_encoder")
        given = conditions.labels, conditions.text, conditions.text_mask
        return condition_of(gen.config, *given, len(conditions))[0]

    about = {"model": gen.origin}
    return Verifier(name, function, prepare, "tokens", gen.params, about)


def _log_probability(gen, params, condition: ar.ARCondition, tokens) -> np.ndarray:
    """Mean log-probability of tokens [n, k] under one condition, by one program per length."""
    count, length = len(tokens), flextok.bucket(tokens.shape[1], gen.num_tokens)
    filled = np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))
    with gen.on_mesh():
        (filled,) = spread_batch(gen.mesh, (filled,))
        found = _log_probabilities(
            params, gen.config, gen.compute, filled, np.int32(tokens.shape[1]), condition
        )
    return np.asarray(found)[:count]


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def _log_probabilities(params, cfg, compute: Compute, tokens, count, condition):
    """Tokens [n, K], of which the first `count` are meant, and one condition -> float32 [n]."""
    rows, length = tokens.shape
    condition = jax.tree.map(lambda x: jnp.repeat(x[None], rows, axis=0), condition)
    hidden = ar.hidden(params, cfg, compute, tokens, condition)
    weights = ar.head_weights(params, hidden.dtype)
    loss = cross_entropy(functools.partial(ar.head, weights), hidden, tokens, CHUNK).loss
    known = (jnp.arange(length) < count)[None]
    return -jnp.sum(jnp.where(known, loss, 0.0), axis=1) / count


# Functions.


def function(f: Callable, name: str | None = None) -> Verifier:
    """Any function of the user's: (images uint8 [n, H, W, 3], prompts int [n]) -> [n].

    It runs on the host, in NumPy; `prompts` are numbers, the same for all images of a call.
    """

    def call(params, prompt, images):
        return f(to_uint8(np.asarray(images)), np.full(len(images), prompt))

    return Verifier(name or _name(f), call)


def classifier(f: Callable, labels=None, params: dict | None = None) -> Verifier:
    """The log-probability of the class that is asked for.

    Args:
        f: (params, images float32 [n, H, W, 3] in [-1, 1]) -> logits [n, classes], for JAX.
        labels: int [P], of each prompt; those that are generated from by default.
        params: of f.
    """

    @jax.jit
    def score(params, label, images):
        return jax.nn.log_softmax(f(params, images).astype(jnp.float32))[:, label]

    def prepare(conditions):
        found = conditions.labels if labels is None else np.asarray(labels, np.int32)
        if found is None or len(found) != len(conditions):
            raise ValueError(f"classifier: give labels, one for each of {len(conditions)} prompts")
        return found

    return Verifier("classifier", score, prepare, params=jax.device_put(params or {}))


def _name(f: Callable) -> str:
    return getattr(f, "__name__", type(f).__name__)


# Reference images.


def psnr_to(images) -> Verifier:
    """PSNR in dB to a reference.

    Args:
        images: one, [H, W, 3], or one for each prompt, [P, H, W, 3]; uint8 or float in [-1, 1].
    """
    score = jax.jit(lambda params, wanted, images: psnr(images, wanted[None]))
    return Verifier("psnr", score, functools.partial(_references, "psnr", images))


def similar_to(images, dinov2, size: int = 224) -> Verifier:
    """The cosine of DINOv2's class token to a reference's: the same things, wherever they are.

    Args:
        images: as for `psnr_to`.
        dinov2: a folder, or a hub id, see `networks.load_dinov2`.
        size: images are resized to so many pixels a side, rounded to whole patches.
    """
    features, params, metadata = criteria.dino_features(dinov2, size)

    @jax.jit
    def unit(params, images):
        found = features(params, images)
        norm = jnp.linalg.norm(found, axis=1, keepdims=True)
        return found / jnp.maximum(norm, criteria.TINY)

    score = jax.jit(lambda params, wanted, images: unit(params, images) @ wanted)

    def prepare(conditions):
        return np.asarray(unit(params, _references("dino", images, conditions)))

    return Verifier("dino", score, prepare, "images", params, metadata)


def _references(name: str, images, conditions: Conditions) -> np.ndarray:
    """float32 [P, H, W, 3]."""
    images, count = np.asarray(images), len(conditions)
    images = to_float(images) if images.dtype == np.uint8 else images.astype(np.float32)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or len(images) not in (1, count):
        raise ValueError(
            f"{name}: reference images of shape {images.shape}: must be one, or one for each of "
            f"{count} prompts"
        )
    return np.broadcast_to(images, (count, *images.shape[1:]))


# CLIP.


def clip(source) -> Verifier:
    """exp(logit_scale) times the cosine of prompt and image: CLIP's logit, or PickScore's score.

    A class-conditional model's prompts are the names of its classes.

    Args:
        source: a folder, or a hub id, see `formats.clip.load`.
    """
    found = clip_files.load(source)
    text = jax.jit(functools.partial(clip_network.text_features, cfg=found.config,
                                     compute=Compute()))  # fmt: skip
    params = jax.device_put(found.params)

    @jax.jit
    def score(params, wanted, images):
        made = clip_network.image_features(params, found.config, Compute(), images)
        return jnp.exp(params["logit_scale"]) * (made @ wanted)

    def prepare(conditions):
        if not any(conditions.names):
            raise ValueError("clip: the prompts have no words; generate from text or named classes")
        ids = found.tokenize(list(conditions.names))
        return np.concatenate([np.asarray(text(params, ids=row[None])) for row in ids])

    about = {"source": found.origin, "sha256": storage.fingerprint(found.params)}
    return Verifier("clip", score, prepare, "images", params, about)


def aesthetic(source, head) -> Verifier:
    """How much people like an image: an affine map of CLIP's vector of it.

    Args:
        source: the CLIP, openai/clip-vit-large-patch14 for the published head.
        head: a file of linear layers without activations between them, whose names end in
            NUMBER.weight and NUMBER.bias, such as sac+logos+ava1-l14-linearMSE.pth.
    """
    found = clip_files.load(source)
    weight, bias = _affine(networks.read(head), found.config.projection, head)
    params = {"vision": found.params["vision"], "weight": weight, "bias": bias}

    @jax.jit
    def score(params, wanted, images):
        made = clip_network.image_features(params, found.config, Compute(), images)
        return made @ params["weight"] + params["bias"]

    about = {"source": found.origin, "sha256": storage.fingerprint(params)}
    return Verifier("aesthetic", score, params=jax.device_put(params), metadata=about)


def _affine(tensors: dict, channels: int, where) -> tuple[np.ndarray, np.ndarray]:
    """Linear layers, one after the other, as one: (weight float32 [channels], bias [])."""
    names = [name for name in tensors if re.search(r"\b\d+\.weight$", name)]
    weight, bias = np.eye(channels), np.zeros(channels)
    try:
        for name in sorted(names, key=lambda name: int(name.split(".")[-2])):
            layer = np.asarray(tensors[name], np.float64)
            bias = layer @ bias + tensors[name.removesuffix("weight") + "bias"]
            weight = layer @ weight
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where} is no chain of linear layers: {error}") from None
    if weight.shape != (1, channels):
        raise ValueError(f"{where} maps to {len(weight)} numbers from {channels}, must be to 1")
    return weight[0].astype(np.float32), bias[0].astype(np.float32)
