"""The AR stage: a Transformer that predicts each token of an image from the tokens before it."""

import dataclasses
import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from flextok_jax.data import reader, shards, sources
from flextok_jax.data.pipeline import make_pipeline, padded_text
from flextok_jax.data.source import check_labels
from flextok_jax.io import models
from flextok_jax.io.formats import flexar, text_tokens
from flextok_jax.io.sources import pinned
from flextok_jax.nn import ar, flextok, layout, masked, refiner, t5, token_flow
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Compute
from flextok_jax.nn.cross_entropy import cross_entropy
from flextok_jax.nn.images import to_float
from flextok_jax.nn.t5 import T5Config
from flextok_jax.parallel.rng import named
from flextok_jax.training import logs
from flextok_jax.training.batches import Validation, bins
from flextok_jax.training.stage import Stage

TOKENS = "tokens"
CAPTIONS = 100_000  # How many at most a tokenizer of texts is made of.
SCALE_IMAGES = 256  # Whose tokens say the scale of continuous ones.

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
class Perplexity(metrics.Average):
    """exp of an average of cross-entropies."""

    def compute(self):
        return jnp.exp(super().compute())


class Tokens(NamedTuple):
    """What is known of the tokens before training.

    `tokenizer` is the identity of what makes them, see `ARStage.export_config`. `num_classes` is 0
    for images without labels, None where it is not known. `text_dim` counts the channels of the
    captions' embeddings, 0 without; `channels` those of continuous tokens, whose standard deviation
    is `scale`.
    """

    tokenizer: dict
    vocab_size: int
    num_tokens: int
    num_classes: int | None
    classes: tuple[str, ...] = ()
    text_dim: int = 0
    channels: int = 0
    scale: float = 1.0


PAPER = Tokens({}, vocab_size=64_000, num_tokens=256, num_classes=1000)  # Of FlexTok on ImageNet.


class ARStage(Stage):
    """Cross-entropy of every token, conditioned on the class or the text, or on nothing."""

    def __init__(self, config, tokens: Tokens | None = None):
        """Sizes that are None in `model` are taken from the data.

        That is either tokens (`data.source="tokens"`, `data.path`: what `flextok tokenize` wrote)
        or images, which `tokenizer.source` turns into tokens in every step. With `tokens` given
        (such as PAPER) it is not opened.

        Raises:
            ValueError: the model does not fit the tokens or their labels, or splits differ.
        """
        self.compute = Compute(**config.compute)
        self._drop, self._loss = config.condition.null_prob, config.loss
        self._time_shift = config.time_shift
        self._data, self._evaluation = config.data, config.evaluation
        self._source = config.tokenizer.source
        model, found = config.model.to_dict(), tokens
        text, self._t5 = config.text_encoder.to_dict(), None
        self._text_source, self._text_length = text.pop("source"), text.pop("length")
        if model["text_dim"] and not self._text_source:
            self._t5 = T5Config(width=model["text_dim"], **text)
        if tokens is None:
            if (config.data.source == TOKENS) == bool(self._source):
                raise ValueError(
                    f"data.source={config.data.source!r} and tokenizer.source={self._source!r}: "
                    "the data is either tokens, or images and a tokenizer"
                )
            found = self._online(model) if self._source else self._stored(model)
        for name in ("vocab_size", "num_tokens", "num_classes"):
            if model[name] is None:
                unused = name == "num_classes" and model["text_dim"]
                model[name] = 0 if unused else getattr(found, name) or 0
        if tokens is None:
            if self.captions:  # It says what is wrong with them before anything runs.
                found = found._replace(text_dim=model["text_dim"])
            _check_fit(model, found)
        model["scale"] = found.scale
        self.model, self._tokens_info = ARConfig(**model), found
        if self._loss.z_loss and (self.model.channels or self.model.coarse):
            raise ValueError(
                f"loss.z_loss={self._loss.z_loss}: a flow has no logits, and with coarse ids they "
                "are normalised; set it to 0"
            )
        if self._time_shift != 1 and not self.model.channels:
            raise ValueError(f"time_shift={self._time_shift}: only a flow has times; set it to 1")

    def _sources(self) -> dict:
        """{split: source} of the splits that training and evaluation read."""
        evaluated = [self._data.eval_split] if self._evaluation.num_images else []
        names = dict.fromkeys([self._data.split, *evaluated])
        return {name: sources.make_source(self._data, name) for name in names}

    def _stored(self, model) -> Tokens:
        """Of tokens that were made before."""
        found, splits = None, self._sources()
        for split, source in splits.items():
            if model["text_dim"]:
                _say_missing(split, source.without_text, len(source), "embedding of a caption")
            same = {key: source.manifest[key] for key in ("tokenizer", "vocab_size", "num_tokens")}
            shards.check_same(found or same, same, f"{self._data.path}/{split}")
            found = same
        text_dim = source.manifest.get("text_dim") or 0
        return Tokens(**found, **_labels(splits, model), text_dim=text_dim)

    def _online(self, model) -> Tokens:
        """Of images, which the frozen tokenizer turns into tokens."""
        self._source = pinned(self._source)
        if model["text_dim"] and not self._t5:
            raise ValueError(
                "embeddings of captions come with tokens made before; of images the model learns "
                "with text_encoder.source='', a text encoder that is trained with it"
            )
        loaded, fingerprint = models.load_once(self._source)
        cfg = self._tokenizer = loaded.config
        size = self._data.image_size
        if cfg.image_size != (size, size):
            raise ValueError(f"data.image_size={size}: {self._source} has {cfg.image_size}")
        count = model["num_tokens"]
        if count is not None and 0 < count < cfg.num_tokens and count not in cfg.prefixes:
            raise ValueError(
                f"model.num_tokens={count}: {self._source} makes images of {cfg.prefixes} tokens"
            )
        if model["coarse"] and tuple(model["levels"]) != cfg.bottleneck.levels:
            raise ValueError(
                f"model.levels={model['levels']}: {self._source} has {cfg.bottleneck.levels}"
            )
        info = {"source": self._source, "origin": loaded.origin, "fingerprint": fingerprint}
        found = Tokens(info, cfg.vocab_size, cfg.num_tokens, **_labels(self._sources(), model))
        if cfg.discrete:
            return found
        how = dict(seed=0, batch_size=SCALE_IMAGES, train=True, process_index=0, process_count=1)
        images = to_float(make_pipeline(self._data, **how)[0]["image"])
        tokens = flextok.tokens_of(loaded.params, cfg, Compute(), images)[1]
        return found._replace(channels=cfg.code_dim, scale=float(jnp.std(tokens)))

    @functools.cached_property
    def _text_tokenizer(self) -> str:
        """The tokenizer.json of a text encoder that is trained: of the captions of the training."""
        source = sources.make_source(self._data, self._data.split)
        count = min(len(source), CAPTIONS)
        rows = np.linspace(0, len(source) - 1, count).astype(int).tolist()
        found = [text for text in reader.ahead(source.caption, rows) if text]
        if not found:
            raise ValueError(
                f"{self._data.path}: no image has a caption, and text_encoder.source='' trains a "
                "text encoder on captions (docs/data.md)"
            )
        return text_tokens.train(found, self._t5.vocab_size)

    @functools.cached_property
    def captions(self):
        """Of a text encoder that is trained: caption -> "text_ids" int32 [T], "text_mask" [T].

        None is the empty caption.
        """
        if not self._t5:
            return None
        tokenizer, length = text_tokens.parse(self._text_tokenizer, "tokenizer"), self._text_length

        def arrays(caption: str | None) -> dict:
            row = text_tokens.cut(tokenizer.encode(caption or "").ids, length)
            ids, mask = text_tokens.padded([row], length)
            return {"text_ids": ids[0], "text_mask": mask[0]}

        return arrays

    def init(self, key):
        """{"ar"}, and {"text_encoder"} where it is trained, float32."""
        params = ar.init(self.model, key)
        if self._t5:
            params["text_encoder"] = t5.init(self._t5, named(key, "text_encoder"))
        return params

    def init_from(self, source: str):
        """The AR model of a released folder, or of a workdir of ours."""
        params = flexar.load(source).params
        if self._t5 and "text_encoder" not in params:
            raise ValueError(f"init_from={source}: it holds no text encoder to go on with")
        return params

    def load_frozen(self):
        """{"tokenizer"}: VAE and encoder, where images are tokenised in the step; {"null_text"}."""
        if self._source:
            params, like = models.load_once(self._source)[0].params, flextok.shapes(self._tokenizer)
            parts = {n: params[n] for n in ("vae", "encoder", "bottleneck") if n in params}
            return {"tokenizer": layout.box(parts, {n: like[n] for n in parts})}
        if not self.model.text_dim or self._t5:
            return {}
        source = shards.ShardSource(self._data.path, self._data.split)
        return {"null_text": padded_text(source.null_text, source.text)}

    def loss(self, params, frozen, batch, key, step):
        """The mean of -log p(token i | tokens before i, condition) over images and positions.

        Of a masked model that of -log p(token i | tokens not hidden, condition), over hidden ones;
        of one with coarse ids the sum of both steps (nn/refiner.py). Of a flow the mean squared
        error of the velocity, plus `loss.kl_weight` times `token_flow.source_loss`.

        Positions from an image's length on, where its tokens have one, do not count.

        An image's condition is dropped with probability `condition.null_prob`. `loss.z_loss` times
        the mean of log_z^2 keeps the logits from drifting (PaLM, arXiv 2204.02311, section 5).

        Args:
            batch: "tokens": int32 [B, k], perhaps with "length": int32 [B], or "image": uint8
                [B, H, W, 3]; "label": int32 [B]; for a text model "text": [B, T, E] (or what
                `captions` makes) and "text_mask": bool [B, T].
        """
        tokens = self._tokens(frozen, batch)
        null = jax.random.bernoulli(named(key, "null"), self._drop, tokens.shape[:1])
        if self.model.channels:
            out = self._flow(params, frozen, batch, tokens, null, key)
            loss = jnp.mean(out.flow) + self._loss.kl_weight * jnp.mean(out.source)
            logged = {"loss_flow": _average(out.flow), "loss_source": _average(out.source)}
            return loss, logged | {"loss_null": _average(out.flow, null)}
        condition = self._condition(params, frozen, batch, null)
        out, counted = self._predict(params, tokens, batch, condition, named(key, "mask"))
        logged = self._metrics(out, counted)
        del logged["loss"]
        loss = jnp.mean(out.loss, where=counted)
        if self._loss.z_loss:
            loss += self._loss.z_loss * jnp.mean(jnp.square(out.log_z), where=counted)
        if self.model.conditional:
            logged["loss_null"] = _average(out.loss, counted & null[:, None])
        return loss, logged | {"log_z": _average(out.log_z, counted)}

    def _tokens(self, frozen, batch):
        """int32 [B, L]: the first L tokens of each image."""
        count = self.model.num_tokens
        if not self._source:
            return batch["tokens"][:, :count]
        # In float32, as `flextok tokenize`: rounding would turn ids into their neighbours.
        params, images = frozen["tokenizer"], to_float(batch["image"])
        return flextok.tokens_of(params, self._tokenizer, Compute(), images, count)[1]

    def _condition(self, params, frozen, batch, null) -> ar.ARCondition:
        """The batch's condition, null where `null` (bool [B]) or where an image has none."""
        if self._t5:
            rest = self.captions(None)
            ids, mask = (
                jnp.where(null[:, None], jnp.asarray(rest[name])[None], batch[name])
                for name in ("text_ids", "text_mask")
            )
            text = t5.encode(params["text_encoder"], self._t5, self.compute, ids, mask)
            return ar.ARCondition(text=text, text_mask=mask)
        if self.model.text_dim:
            null |= ~jnp.any(batch["text_mask"], axis=1)
            rest = frozen["null_text"]
            text = jnp.where(null[:, None, None], rest["text"][None], batch["text"])
            mask = jnp.where(null[:, None], rest["text_mask"][None], batch["text_mask"])
            return ar.ARCondition(text=text, text_mask=mask)
        return ar.ARCondition(labels=jnp.where(null, -1, batch["label"]))

    def _predict(self, params, tokens, batch, condition, key):
        """(cross-entropies, bool [B, L] which of them count)."""
        known, counted = tokens, _counted(tokens, batch)
        if self.model.masked:
            hidden_ones = masked.draw(key, *tokens.shape)
            known, counted = jnp.where(hidden_ones, ar.SOS, tokens), counted & hidden_ones
        net = refiner if self.model.coarse else ar
        hidden = net.hidden(params, self.model, self.compute, known, condition)
        weights = net.head_weights(params, hidden.dtype)
        head = functools.partial(net.head, *([self.model] if net is refiner else []), weights)
        return cross_entropy(head, hidden, tokens, self._loss.chunk), counted

    def _flow(self, params, frozen, batch, tokens, null, key) -> token_flow.Losses:
        text = bool(self.model.text_dim)
        condition = self._condition(params, frozen, batch, null & (not text))
        args = self.model, self.compute, tokens, condition, null, named(key, "flow")
        return token_flow.losses(params, *args, self._time_shift)

    def _metrics(self, out, counted) -> dict[str, metrics.Metric]:
        """Of the positions that count, bool [B, L]; also by position: 1, 2, 3-4, 5-8, ..."""
        found = {
            "loss": _average(out.loss, counted),
            "perplexity": Perplexity.from_model_output(out.loss, mask=counted),
            "accuracy": _average(out.correct.astype(jnp.float32), counted),
        }
        for name, positions in bins(self.model.num_tokens).items():
            in_bin = _average(out.loss[:, positions], counted[:, positions])
            found[f"loss_by_position/{name}"] = in_bin
        return found

    def evaluators(self):
        """ "validation": loss (nats), loss_by_position/BIN, accuracy, perplexity = exp(loss)."""
        if not self._evaluation.num_images:
            return {}
        images = Validation(self._data, self._evaluation, text=self.captions)

        def validation(params, frozen, mesh):
            found = (self._evaluate(params, frozen, batch) for batch in images.batches(mesh))
            for name, value in logs.compute(functools.reduce(logs.merge, found)).items():
                yield name, float(value)

        return {"validation": validation}

    @functools.partial(jax.jit, static_argnums=0)
    def _evaluate(self, params, frozen, batch):
        tokens, mask = self._tokens(frozen, batch), batch["mask"]
        if self.model.channels:
            none = jnp.zeros_like(mask)
            out = self._flow(params, frozen, batch, tokens, none, jax.random.key(0))
            return {"loss": _average(out.flow, mask), "loss_source": _average(out.source, mask)}
        condition = self._condition(params, frozen, batch, jnp.zeros_like(mask))
        key = jax.random.key(0)  # The same hidden tokens in every evaluation.
        out, counted = self._predict(params, tokens, batch, condition, key)
        return self._metrics(out, counted & mask[:, None])

    def export_config(self):
        """What `ImageGenerator.from_pretrained` needs to rebuild the model from a workdir.

        "tokenizer" has "source" (of the hub with its commit), "origin" and "fingerprint" (sha256
        over the parameters); "classes" are names, [] without; "text_encoder" of a text model, see
        `flexar.LoadedAR`.
        """
        found = {
            "kind": "ar",
            "config": dataclasses.asdict(self.model),
            "tokenizer": self._tokens_info.tokenizer,
            "classes": list(self._tokens_info.classes) if self.model.num_classes else [],
        }
        if self._t5:
            found["text_encoder"] = {
                "config": dataclasses.asdict(self._t5),
                "tokenizer": self._text_tokenizer,
                "max_length": self._text_length,
            }
        elif self.model.text_dim:
            found["text_encoder"] = {"source": self._text_source}
        return found


def _counted(tokens, batch):
    """bool [B, L]: the positions before an image's length; all of them where it has none."""
    length = batch.get("length", jnp.full(len(tokens), tokens.shape[1]))
    return jnp.arange(tokens.shape[1])[None] < length[:, None]


def _average(values, mask=None) -> metrics.Average:
    return metrics.Average.from_model_output(values, mask=mask)


def _check_fit(fields: dict, tokens: Tokens) -> None:
    classes, known = fields["num_classes"], tokens.num_classes
    fits = classes == known if tokens.classes else known is None or 0 < known <= classes
    wrong = {
        "vocab_size": fields["vocab_size"] != tokens.vocab_size,
        "num_tokens": fields["num_tokens"] > tokens.num_tokens,
        "text_dim": fields["text_dim"] not in (0, tokens.text_dim),
        "num_classes": classes and not fits,
        "channels": fields["channels"] != tokens.channels,
    }
    for name in wrong:
        if wrong[name]:
            raise ValueError(f"model.{name}={fields[name]}: the data has {getattr(tokens, name)}")


def _labels(splits: dict, model: dict) -> dict:
    """{"num_classes", "classes"} of sources, which must agree; logs how many have no label."""
    (first, *_), largest = splits, []
    for split, source in splits.items():
        absent = check_labels(source, None if split == first else splits[first])
        if not model["text_dim"] and model["num_classes"] != 0:
            _say_missing(split, absent, len(source), "label")
        if source.labels is not None:
            largest.append(int(np.max(source.labels, initial=-1)))
    classes = tuple(splits[first].classes)
    if largest and max(largest) == -1:
        return {"num_classes": 0, "classes": ()}
    count = len(classes) or (max(largest) + 1 if largest else None)
    return {"num_classes": count, "classes": classes}


def _say_missing(split: str, absent: int, count: int, what: str) -> None:
    say = log.warning if 2 * absent > count else log.info
    say("split %r: %d of %d examples have no %s", split, absent, count, what)
