"""The AR stage: a Transformer that predicts each token of an image from the tokens before it."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
from clu import metrics

from flextok_jax.data import encoded, shards
from flextok_jax.io import models, storage
from flextok_jax.io.formats import flexar
from flextok_jax.nn import ar, flextok, vae
from flextok_jax.nn.config import ARConfig, Compute
from flextok_jax.nn.cross_entropy import cross_entropy
from flextok_jax.nn.images import to_float
from flextok_jax.parallel.rng import named
from flextok_jax.training.batches import held_out

TOKENS = "tokens"


@jax.tree_util.register_dataclass
class Perplexity(metrics.Average):
    """exp of an average of cross-entropies."""

    def compute(self):
        return jnp.exp(super().compute())


class ARStage:
    """Cross-entropy of every token, conditioned on the class or the text, or on nothing."""

    def __init__(self, config, made_by: dict | None = None):
        """Reads `model`, `compute`, `tokenizer`, `condition`, `loss`, `evaluation` and `data`.

        The data is either tokens (`data.source="tokens"`, `data.path`: what `flextok tokenize`
        wrote) or images, which `tokenizer.source` turns into tokens in every step. With `made_by`,
        the identity of the tokenizer that makes the tokens, nothing is looked up.

        Raises:
            ValueError: the model does not fit the tokens, or splits were made by different
                tokenizers.
        """
        fields = {f.name for f in dataclasses.fields(ARConfig)}
        unknown = sorted(set(config.model) - fields)
        if unknown:
            raise ValueError(f"config.model has unknown keys {unknown}; allowed: {sorted(fields)}")
        self.model = ARConfig(**config.model)
        self.compute = Compute(**config.compute)
        self._drop, self._loss = config.condition.null_prob, config.loss
        self._data, self._evaluation = config.data, config.evaluation
        self._source = config.tokenizer.source
        if (config.data.source == TOKENS) == bool(self._source):
            raise ValueError(
                f"data.source={config.data.source!r} and tokenizer.source={self._source!r}: either "
                "the data is tokens, which name their tokenizer, or images and a tokenizer"
            )
        if made_by is None:
            made_by = self._online() if self._source else self._made_before()
        self._about = made_by

    def _made_before(self) -> dict:
        """The identity of the tokenizer that made the data; refuses what does not fit."""
        data, found = self._data, None
        splits = {data.split, data.eval_split if self._evaluation.num_images else data.split}
        for split in sorted(splits):
            manifest = shards.read_manifest(data.path, split)
            made_by = {"tokenizer": manifest["tokenizer"]}
            shards.check_same(made_by, found or made_by, f"{data.path}/{split}")
            found = made_by
            most = max(about["max_label"] for about in manifest["shards"].values())
            _check_fit(self.model, manifest["vocab_size"], manifest["num_tokens"], data.path)
            if self.model.num_classes and most >= self.model.num_classes:
                raise ValueError(
                    f"{data.path} has the label {most}: model.num_classes="
                    f"{self.model.num_classes} must be more than that"
                )
            if self.model.text_dim and manifest.get("text_dim") != self.model.text_dim:
                raise ValueError(
                    f"model.text_dim={self.model.text_dim}: the text embeddings of {data.path} "
                    f"have {manifest.get('text_dim')} channels (None: it has no text)"
                )
        return found["tokenizer"]

    def _online(self) -> dict:
        """The identity of the frozen tokenizer; refuses what does not fit."""
        if pathlib.Path(self._source).exists():
            self._source = str(pathlib.Path(self._source).resolve())
        if self.model.text_dim:
            raise ValueError("a text model learns from tokens made before, with text embeddings")
        loaded, fingerprint = _tokenizer(self._source)
        cfg = self._tokenizer = loaded.config
        _check_fit(self.model, cfg.vocab_size, cfg.num_tokens, self._source)
        return {
            "source": self._source,
            "origin": loaded.origin,
            "fingerprint": fingerprint,
            "levels": list(cfg.levels),
        }

    def init(self, key):
        """{"ar"}, float32."""
        return ar.init(self.model, key)

    def init_from(self, source: str):
        """The AR model of a released folder, or of a workdir of ours."""
        return flexar.load(source).params

    def load_frozen(self):
        """{"tokenizer"}: VAE and encoder, where images are tokenised in the step; {"null_text"}."""
        if self._source:
            params = _tokenizer(self._source)[0].params
            return {"tokenizer": {name: params[name] for name in ("vae", "encoder")}}
        if not self.model.text_dim:
            return {}
        source = shards.ShardSource(self._data.path, self._data.split)
        null = encoded.padded_text(source.null_text, source.text)
        return {"null_text": null}

    def trainable(self, path: str) -> bool:
        return True

    def loss(self, params, frozen, batch, key, step):
        """The mean of -log p(token i | tokens before i, condition) over images and positions.

        The condition of an image is dropped with probability `condition.null_prob`. With
        `loss.z_loss` the mean of that times log_z^2 is added (PaLM, arXiv 2204.02311, section 5),
        which keeps the logits from drifting.

        Args:
            batch: "tokens": int32 [B, k], or "image": uint8 [B, H, W, 3]; "label": int32 [B]; for
                a text model "text": [B, T, E] and "text_mask": bool [B, T].
        """
        tokens = self._tokens(frozen, batch)
        null = jax.random.bernoulli(named(key, "null"), self._drop, tokens.shape[:1])
        out = self._predict(params, tokens, self._condition(frozen, batch, null))
        loss = mean = jnp.mean(out.loss)
        if self._loss.z_loss:
            loss = mean + self._loss.z_loss * jnp.mean(jnp.square(out.log_z))
        average = metrics.Average.from_model_output
        by_position = self._by_position(out, jnp.ones_like(null))
        logged = {f"loss_by_position/{name}": m for name, m in by_position.items()}
        if self.model.conditional:
            by_image = jnp.mean(out.loss, axis=1)
            logged["loss_null"] = average(by_image, mask=null)
        return loss, logged | {
            "accuracy": average(out.correct.astype(jnp.float32).reshape(-1)),
            "perplexity": Perplexity.from_model_output(mean),
            "log_z": average(out.log_z.reshape(-1)),
        }

    def _tokens(self, frozen, batch):
        """int32 [B, L]: the first L tokens of each image."""
        count = self.model.num_tokens
        if not self._source:
            return batch["tokens"][:, :count]
        # In float32, as `flextok tokenize` by default: rounding would turn ids into their
        # neighbours.
        cfg, params = self._tokenizer, frozen["tokenizer"]
        images = to_float(batch["image"])
        latents = vae.images_to_latents(params["vae"], cfg.vae, images, jnp.float32)
        registers = flextok.encode(params, cfg, Compute(), latents, count)
        return flextok.quantize(registers, cfg)[1]

    def _condition(self, frozen, batch, null) -> ar.ARCondition:
        """The batch's condition, null where `null` (bool [B]) or where an image has none."""
        if self.model.text_dim:
            null |= ~jnp.any(batch["text_mask"], axis=1)
            rest = frozen["null_text"]
            text = jnp.where(null[:, None, None], rest["text"][None], batch["text"])
            mask = jnp.where(null[:, None], rest["text_mask"][None], batch["text_mask"])
            return ar.ARCondition(text=text, text_mask=mask)
        return ar.ARCondition(labels=jnp.where(null, -1, batch["label"]))

    def _predict(self, params, tokens, condition):
        cfg = self.model
        hidden = ar.hidden(params, cfg, self.compute, tokens, condition)
        head = functools.partial(ar.head, ar.head_weights(params, hidden.dtype))
        return cross_entropy(head, hidden, tokens, self._loss.chunk)

    def _by_position(self, out, mask) -> dict[str, metrics.Average]:
        """Mean cross-entropies of the positions 1, 2, 3-4, 5-8, ..., of the images that count."""
        bins, low = {}, 0
        for high in flextok.lengths(self.model.num_tokens):
            name = f"{low + 1}-{high}" if high > low + 1 else f"{high}"
            by_image = jnp.mean(out.loss[:, low:high], axis=1)
            bins[name] = metrics.Average.from_model_output(by_image, mask=mask)
            low = high
        return bins

    def evaluators(self):
        """ "held_out": cross-entropy of held-out images; see `_held_out`."""
        return {"held_out": self._held_out} if self._evaluation.num_images else {}

    def _held_out(self, params, frozen, mesh):
        """Yields (loss, nats), (loss_by_position/BIN, nats), (accuracy, share), (perplexity, exp).

        Of the first held-out images, each with its condition.
        """
        total = None
        for batch in held_out(self._data, self._evaluation, mesh):
            found = jax.device_get(self._evaluate(params, frozen, batch))
            total = found if total is None else {k: total[k].merge(found[k]) for k in found}
        for name, metric in total.items():
            yield name, float(metric.compute())

    @functools.partial(jax.jit, static_argnums=0)
    def _evaluate(self, params, frozen, batch):
        """Metrics of one batch."""
        tokens, mask = self._tokens(frozen, batch), batch["mask"]
        condition = self._condition(frozen, batch, jnp.zeros_like(mask))
        out = self._predict(params, tokens, condition)
        by_image = jnp.mean(out.loss, axis=1)
        accuracy = jnp.mean(out.correct.astype(jnp.float32), axis=1)
        by_position = self._by_position(out, mask)
        return {
            "loss": metrics.Average.from_model_output(by_image, mask=mask),
            "perplexity": Perplexity.from_model_output(by_image, mask=mask),
            "accuracy": metrics.Average.from_model_output(accuracy, mask=mask),
            **{f"loss_by_position/{name}": m for name, m in by_position.items()},
        }

    def export_config(self):
        """What `ImageGenerator.from_pretrained` needs to rebuild the model from a workdir.

        "tokenizer" is the identity of the tokenizer whose tokens these are: "source" as it was
        named, "origin", "fingerprint" (sha256 over its parameters) and "levels".
        """
        return {
            "kind": "ar",
            "config": dataclasses.asdict(self.model),
            "tokenizer": self._about,
        }


def _check_fit(cfg: ARConfig, vocab_size: int, num_tokens: int, where) -> None:
    if cfg.vocab_size != vocab_size or cfg.num_tokens > num_tokens:
        raise ValueError(
            f"model.vocab_size={cfg.vocab_size}, model.num_tokens={cfg.num_tokens}: {where} has "
            f"{vocab_size} ids and {num_tokens} tokens per image; the ids must be as many, the "
            "tokens at most as many"
        )


@functools.lru_cache(maxsize=1)
def _tokenizer(source: str) -> tuple[models.Loaded, str]:
    """A tokenizer's file, and the sha256 over its parameters."""
    loaded = models.load(source)
    return loaded, storage.fingerprint(loaded.params)
