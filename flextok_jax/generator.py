"""ImageGenerator: an AR model and a tokenizer. Class or text to tokens to images."""

import dataclasses
import functools
import warnings
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from flextok_jax.conditions import Conditions, condition_of, null_condition_of
from flextok_jax.io import hub, sources, storage
from flextok_jax.io.formats import flexar
from flextok_jax.nn import ar, generation
from flextok_jax.nn.ar import ARCondition
from flextok_jax.nn.ar_config import ARConfig
from flextok_jax.nn.config import Compute
from flextok_jax.parallel.mesh import mesh_context, platform
from flextok_jax.parallel.rng import named
from flextok_jax.parallel.sharding import place, spread_batch
from flextok_jax.text import TextEncoder
from flextok_jax.token_sampling import (
    check_sampling,
    check_tokens,
    logits_program,
    sampling_program,
)
from flextok_jax.tokenizer import FlexTok, Key, is_int

Guidance = float | Callable[[int], float] | np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class ImageGenerator:
    """A generative model over the tokens of a tokenizer. Make one with `from_pretrained`.

    One program is compiled per batch size, number of prefix tokens (rounded up to a power of two)
    and use of guidance: not per number of tokens, temperature, filter or scale.

    Attributes:
        config: the AR model.
        params: {"ar": …}, float32 arrays.
        tokenizer: what makes images of tokens, None: tokens and logits only.
        compute: how the AR model is run (dtype, attention).
        mesh: the devices it is spread over, None for the default device.
        origin: where it came from, in words.
        text_encoder: what makes embeddings of prompts, None: they are given.
        null_text: embeddings [1, T, E] and mask [1, T] of the empty prompt; None: the text
            encoder's own, where there is one.
    """

    config: ARConfig
    params: dict
    tokenizer: FlexTok | None = None
    compute: Compute = Compute()
    mesh: Mesh | None = None
    origin: str = "memory"
    text_encoder: TextEncoder | None = None
    null_text: tuple[np.ndarray, np.ndarray] | None = None
    _file: flexar.LoadedAR | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self):
        if self.tokenizer is not None:
            _check_fit(self.config, self.tokenizer)
            self._warn_of_another_tokenizer()
        encoder, wanted = self.text_encoder, self.config.text_dim
        if encoder is not None and encoder.config.width != wanted:
            reads = f"embeddings of {wanted} channels" if wanted else "no text"
            raise ValueError(
                f"{self.origin} reads {reads}; the text encoder {encoder.origin} makes "
                f"{encoder.config.width} channels"
            )

    def _warn_of_another_tokenizer(self):
        info = self._file.info if self._file else {}
        learned = (info.get("tokenizer") or {}).get("fingerprint")
        # A fingerprint reads all parameters: only where there is one to compare with.
        if learned is not None and not self.tokenizer.decodes(learned):
            warnings.warn(
                f"{self.origin} learned tokens of a tokenizer with the sha256 {learned[:16]}…, not "
                f"of {self.tokenizer.origin} ({self.tokenizer.fingerprint[:16]}…): where their "
                "encoders differ, images will make no sense",
                stacklevel=5,
            )

    @classmethod
    def from_pretrained(
        cls,
        source,
        tokenizer: FlexTok | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        attention: str = "xla",
        revision: str | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> "ImageGenerator":
        """Loads an AR model.

        Args:
            source: a hub id, a folder or `model.safetensors` under the released names, a workdir
                of our own training (its averaged weights), or the name of a shipped demo model.
            tokenizer: whose tokens they are; None is enough for tokens and logits.
            dtype: "float32" or "bfloat16", of the computation; parameters stay float32.
            mesh: spread batches and parameters over these devices. Axes `data` and `tensor` suit
                generation; what is cut over `fsdp` is gathered for every token.
            attention: of `logits`: "xla", "cudnn" (CUDA GPUs with bfloat16) or "pallas" (TPUs).
            revision: branch, tag or commit of a hub id.
            text_encoder: of a text model, for prompts; `text_encoder_source` names which. A model
                that was trained with its own has it already.

        Raises:
            FileNotFoundError: the source is not there; the message says how to get it.
            ValueError: the file is not understood (one error lists every reason), or the
                tokenizer has other ids, or the text encoder another width, or these devices do not
                have that attention.
        """
        compute = Compute(dtype=dtype, attention=attention)
        compute.check_platform(platform(mesh))
        file = flexar.load(source, revision)
        params = place(mesh, {"ar": file.params["ar"]}, ar.shapes(file.config))
        if "text_encoder" in file.params:
            if text_encoder is not None:
                raise ValueError(f"{file.origin} has its own text encoder: give no text_encoder")
            text_encoder = TextEncoder.inside(file, dtype, mesh)
        file = dataclasses.replace(file, params={})  # the arrays on the devices are the ones
        return cls(
            file.config, params, tokenizer, compute, mesh, file.origin, text_encoder, _file=file
        )

    def __repr__(self) -> str:
        cfg = self.config
        by = f"{cfg.num_classes} classes" if cfg.num_classes else "nothing"
        by = f"text of {cfg.text_dim} channels" if cfg.text_dim else by
        return (
            f"ImageGenerator({self.origin!r}: {cfg.num_tokens} tokens, by {by}; {self.tokenizer})"
        )

    @property
    def num_tokens(self) -> int:
        """L, the most tokens that can be generated."""
        return self.config.num_tokens

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 over all parameters of the AR model."""
        return storage.fingerprint(self.params)

    @property
    def tokenizer_source(self) -> str | None:
        """The tokenizer whose tokens it learned, as training named it; None: the file is silent."""
        return self._about("tokenizer").get("source")

    @property
    def text_encoder_source(self) -> str | None:
        """The text encoder whose embeddings it learned from; None: the file is silent."""
        return self._about("text_encoder").get("source")

    @property
    def decoding(self) -> dict:
        """How its file wants images decoded: some of "steps", "guidance_scale", "norm_guidance"."""
        return self._about("decoding")

    def _about(self, name: str) -> dict:
        return (self._file and self._file.info.get(name)) or {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of class 0, 1, …; () where the file has none."""
        return tuple((self._file and self._file.info.get("classes")) or ())

    def generate_tokens(
        self,
        labels=None,
        num_tokens: int | None = None,
        prefix=None,
        guidance_scale: Guidance = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 0.0,
        key: Key = None,
        text_embeddings=None,
        text_mask=None,
        null_embeddings=None,
        null_mask=None,
        text=None,
        conditions: Conditions | None = None,
        passes: int | None = None,
    ) -> jax.Array:
        """Tokens, coarse to fine.

        Sample i depends on its condition, its prefix and its key alone, not on the rest of the
        batch (up to rounding). A position's sample does not depend on `num_tokens` or on where the
        prefix ends: fewer tokens are a prefix of more, and a continued prefix is the one run.
        A masked model, one with coarse ids, and a flow make all tokens, of which the first
        `num_tokens` are returned; a masked model's samples do depend on the prefix's length, and a
        flow has no prefix.

        Args:
            labels: int [B], classes; None for models without classes, and for the null branch,
                whose B is that of `prefix` (of [B, 0] too), else 1.
            num_tokens: how many tokens in all, the prefix counted; L by default.
            prefix: int [B, j], the first tokens, j < num_tokens.
            guidance_scale: logits are u + scale (c - u), c with and u without the condition: a
                number, a callable of the position (0 is the first token), an array of one per
                position, or None for the model's own. 1 everywhere halves the cost.
            temperature: 0 is greedy. Of a masked model it falls to 0 from pass to pass, and also
                says how random the choice is of what is kept. Of a flow it multiplies the noise.
            top_k: sample from the k likeliest tokens (and what equals the last of them); 0 is off.
            top_p: then drop the least likely tokens, while their probability together is at most
                1 - p; 0 is off. Among equals, all are kept.
            key: a key or an int seed, from which each sample gets its own; or [B] keys or seeds,
                one per sample. None means seed 0.
            text_embeddings: [B, T, E], for text models, in place of labels.
            text_mask: bool or 0/1 [B, T], what of them is no padding; all by default.
            null_embeddings, null_mask: [1, T', E] and [1, T'], of the empty prompt, for guidance;
                with a text encoder, or `null_text`, its own by default.
            text: B prompts, for text models with a text encoder.
            conditions: labels or texts in one object, in place of the arguments for them.
            passes: how many of a masked model, 8 by default (see `nn.masked.left`), or Euler steps
                of a flow, 20.

        Returns:
            int32 [B, num_tokens], the prefix first; of a flow float32 [B, num_tokens, F].

        Raises:
            ValueError: an argument has a wrong type, shape or value, or does not suit the model; or
                its logits are not finite.
        """
        cfg = self.config
        if conditions is not None:
            labels = conditions.labels
            text_embeddings, text_mask = conditions.text, conditions.text_mask
            if labels is None and text_embeddings is None and prefix is None:
                prefix = np.zeros((len(conditions), 0), np.int32)
        if text is not None:
            text_embeddings, text_mask = self._encode(text, text_embeddings)
        if cfg.channels and ((prefix is not None and np.size(prefix)) or top_k or top_p):
            raise ValueError(
                f"top_k={top_k}, top_p={top_p}, a prefix of shape {np.shape(prefix)}: a flow makes "
                "all tokens at once, and they are no ids; leave these out"
            )
        prefix = None if prefix is None else check_tokens(cfg, prefix, "prefix", least=0)
        given = 0 if prefix is None else prefix.shape[1]
        count = cfg.num_tokens if num_tokens is None else num_tokens
        if not is_int(count) or not given < count <= cfg.num_tokens:
            raise ValueError(
                f"num_tokens={count!r}: must be an int in {given + 1}..{cfg.num_tokens}, the "
                f"{given} tokens of the prefix counted"
            )
        texts = (text_embeddings, text_mask)
        known = None if prefix is None else len(prefix)
        condition, batch = condition_of(cfg, labels, *texts, known)
        scale = cfg.guidance_scale if guidance_scale is None else guidance_scale
        drawn = cfg.num_tokens if cfg.whole else int(count)
        scales = generation.guidance_schedule(scale, drawn, cfg.num_tokens)
        null = None
        if (labels is not None or cfg.text_dim) and not (scales[given:drawn] == 1).all():
            null = self.null_condition(batch, null_embeddings, null_mask)
        condition, null = generation.pad_texts(condition, null)
        how = generation.Sampling(scales, *check_sampling(temperature, top_k, top_p))
        prefix = np.zeros((batch, 0), np.int32) if prefix is None else prefix
        run, padded = sampling_program(cfg, prefix, int(count), passes)
        arrays = (condition, null, generation.sample_keys(key, batch), padded)
        with self.on_mesh():
            condition, null, keys, padded = spread_batch(self.mesh, arrays)
            tokens = run(self.params, cfg, self.compute, condition, null, how, keys, *padded)
        # Cut on the host: on the device each length would be a program of its own.
        tokens = np.asarray(tokens)[:batch, :count]
        bad = ~np.isfinite(tokens).all(axis=2) if cfg.channels else tokens < 0
        if wrong := int(np.sum(bad.any(axis=1))):
            what = "tokens" if cfg.channels else "logits"
            raise ValueError(
                f"{self.origin}: the {what} are not finite, for {wrong} of {batch} samples. Check "
                "the model's parameters, or try float32"
            )
        return jax.device_put(tokens)

    def encode_text(self, prompts) -> tuple[np.ndarray, np.ndarray]:
        """B prompts -> `text_embeddings` float32 [B, T, E] and `text_mask` bool [B, T].

        Raises:
            ValueError: not a text model, or it has no text encoder.
        """
        return self._encode(prompts, None)

    def logits(
        self,
        tokens,
        labels=None,
        text_embeddings=None,
        text_mask=None,
        null_embeddings=None,
        null_mask=None,
        text=None,
    ) -> jax.Array:
        """Teacher-forced logits: what is predicted for each token from those before it.

        Args:
            tokens: int [B, k], 1 <= k <= L. Of a masked model -1 where a token is not known. Of a
                model with coarse ids k = L, and logits are log p (see `nn.refiner.head`).
            labels: int [B]; None is the null branch.
            text_embeddings, text_mask: [B, T, E] and [B, T], for text models.
            null_embeddings, null_mask: [1, T, E] and [1, T]: the null branch, in their place; with
                a text encoder, or `null_text`, not needed for it.
            text: B prompts, for text models with a text encoder.

        Returns:
            float32 [B, k, V].

        Raises:
            ValueError: a wrong type, shape or value.
        """
        cfg = self.config
        if cfg.channels:
            raise ValueError(f"{self.origin} is a flow: its tokens are numbers, without logits")
        least = cfg.num_tokens if cfg.coarse else 1
        tokens = check_tokens(cfg, tokens, "tokens", least, hidden=cfg.masked)
        batch = len(tokens)
        if text is not None:
            text_embeddings, text_mask = self._encode(text, text_embeddings)
        if cfg.text_dim and text_embeddings is None:
            condition = self.null_condition(batch, null_embeddings, null_mask)
        else:
            condition, _ = condition_of(cfg, labels, text_embeddings, text_mask, batch)
        with self.on_mesh():
            tokens, condition = spread_batch(self.mesh, (tokens, condition))
            found = logits_program(cfg)(self.params, cfg, self.compute, tokens, condition)
        return found[:batch]

    def generate(
        self,
        labels=None,
        steps: int | None = None,
        image_guidance_scale: float | Callable[[float], float] | None = None,
        norm_guidance: bool | None = None,
        solver: str | None = None,
        key: Key = None,
        time_shift: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        **sampling,
    ) -> jax.Array:
        """Images: `generate_tokens`, then the tokenizer's `detokenize`.

        Args:
            labels, key, sampling: see `generate_tokens`. A sample's noise comes from its own key.
            steps, image_guidance_scale, norm_guidance, solver, time_shift, guidance_interval: of
                the tokenizer's decoder, see `FlexTok.detokenize`; None for those of `decoding`,
                else its own.

        Returns:
            float32 [B, H, W, 3], nominally in [-1, 1], not clipped.
        """
        tok = self.tokenizer
        if tok is None:
            raise ValueError("no tokenizer: images need from_pretrained(source, tokenizer=...)")
        tokens = self.generate_tokens(labels, key=key, **sampling)
        keys = generation.sample_keys(key, len(tokens))
        how = dict(
            steps=steps,
            guidance_scale=image_guidance_scale,
            norm_guidance=norm_guidance,
            solver=solver,
            time_shift=time_shift,
            guidance_interval=guidance_interval,
        )
        if tok.config.is_flow:
            how |= {name: x for name, x in self.decoding.items() if how[name] is None}
            shape = tok.config.latent_shape
            how["noise"] = jax.vmap(lambda k: jax.random.normal(named(k, "noise"), shape))(keys)
        return tok.detokenize(tokens, **how)

    def save_pretrained(self, folder) -> None:
        """Writes `model.safetensors` under the released names into `folder`.

        A model that came with a `config.yaml` gets it back. What neither names nor shapes say
        (guidance, whose tokens they are) lies in the file's header.
        """
        self._save(folder, self._info())

    def push_to_hub(
        self,
        repo: str,
        license: str,
        picture=None,
        numbers: hub.Table | None = None,
        private: bool = False,
        tokenizer_source: str | None = None,
    ) -> str:
        """Publishes the model on the Hugging Face hub, with a model card made from its run.

        Args:
            repo, license, picture, numbers, private: see `FlexTok.push_to_hub`.
            tokenizer_source: where others find the tokenizer, a hub id; None: what the model's file
                names, unless that is a path of this machine, which is left out.

        Returns, Raises: see `FlexTok.push_to_hub`.
        """
        cfg, info = self.config, self._info()
        for name in {"tokenizer", "text_encoder"} & info.keys():
            info[name] = {
                key: x
                for key, x in (info[name] or {}).items()
                if key != "origin" and (key != "source" or sources.is_public(x))
            }
        if tokenizer_source:
            info["tokenizer"] = (info.get("tokenizer") or {}) | {"source": tokenizer_source}
        source = (info.get("tokenizer") or {}).get("source")
        by = f"{cfg.num_classes} classes" if cfg.num_classes else "nothing"
        kind = f"{cfg.channels} numbers" if cfg.channels else f"{cfg.vocab_size:,} ids"
        about = {
            "tokens": f"{cfg.num_tokens} of {kind}",
            "of the tokenizer": source or "that is not published",
            "generates by": f"texts, {cfg.text_dim} channels" if cfg.text_dim else by,
            **hub.parameters(self.params, self.fingerprint),
        }
        given = f', tokenizer=FlexTok.from_pretrained("{source}")' if source else ""
        use = "from flextok_jax import FlexTok, ImageGenerator\n\n"
        use += f'gen = ImageGenerator.from_pretrained("{repo}"{given})'
        card = hub.model_card(
            repo, license, about, use, ["image-generation"], self._file and self._file.workdir,
            picture is not None, numbers,
        )  # fmt: skip
        return hub.push(repo, lambda folder: self._save(folder, info), card, picture, private)

    def _info(self) -> dict:
        """What the file's header says, see `flexar.LoadedAR`."""
        info = dict(self._file.info) if self._file else {}
        if info.get("tokenizer") is None and self.tokenizer is not None:
            info["tokenizer"] = {"fingerprint": self.tokenizer.fingerprint}
        return info

    def _save(self, folder, info: dict) -> None:
        params = self.params
        if flexar.text_encoder_config(info) is not None:
            if self.text_encoder is None:
                raise ValueError(
                    "the model's own text encoder was taken away: text_encoder is None"
                )
            params = params | {"text_encoder": self.text_encoder.params}
        file = self._file or flexar.LoadedAR(self.config, {})
        params = jax.tree.map(np.asarray, params)
        flexar.save(folder, dataclasses.replace(file, params=params, info=info))

    def null_condition(self, batch: int, text=None, mask=None) -> ARCondition:
        """The null condition of `batch` sequences; by default, of a text model, its null text."""
        cfg = self.config
        if text is None and cfg.text_dim and not cfg.channels:
            own = self.null_text or (self.text_encoder and self.text_encoder.null)
            text, mask = own or (None, mask)
        return null_condition_of(cfg, batch, text, mask)

    def _encode(self, prompts, embeddings) -> tuple[np.ndarray, np.ndarray]:
        """(embeddings, mask) of prompts."""
        if not self.config.text_dim:
            raise ValueError("not a text model: text means nothing, give labels or nothing")
        if embeddings is not None:
            raise ValueError("text and text_embeddings: give one of them")
        if self.text_encoder is None:
            source = self.text_encoder_source or "google/flan-t5-xl"
            raise ValueError(
                "text needs a text encoder: from_pretrained(..., text_encoder="
                f"TextEncoder.from_pretrained({source!r}))"
            )
        return self.text_encoder.encode(prompts, self._about("text_encoder").get("max_length"))

    def on_mesh(self):
        """The context in which computations run on the devices of `mesh`."""
        return mesh_context(self.mesh)


def _check_fit(cfg: ARConfig, tok: FlexTok) -> None:
    if cfg.channels != (0 if tok.discrete else tok.config.code_dim):
        kind = f"{tok.config.vocab_size} ids" if tok.discrete else f"{tok.config.code_dim} channels"
        raise ValueError(
            f"the model has tokens of {cfg.channels} channels, the tokenizer {tok.origin} of {kind}"
        )
    if cfg.vocab_size != tok.config.vocab_size or cfg.num_tokens not in tok.prefixes:
        raise ValueError(
            f"the AR model has {cfg.vocab_size} ids and {cfg.num_tokens} positions, the tokenizer "
            f"{tok.origin} {tok.config.vocab_size} ids and {tok.num_tokens} tokens: the ids must "
            "be as many, and so many positions must make an image (`FlexTok.prefixes`)"
        )
