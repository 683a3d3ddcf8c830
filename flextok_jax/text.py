"""TextEncoder: prompts to embeddings, by T5."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flextok_jax.io import sources, storage
from flextok_jax.io.formats import flexar, text_tokens
from flextok_jax.io.formats import t5 as files
from flextok_jax.nn import t5
from flextok_jax.nn.config import Compute
from flextok_jax.nn.t5 import T5Config
from flextok_jax.parallel.mesh import mesh_context
from flextok_jax.parallel.sharding import place, spread_batch

MAX_LENGTH = 512  # Tokens of a prompt that T5 was trained with.

_encode = jax.jit(t5.encode, static_argnames=("cfg", "compute"))


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """The encoder of a T5 and its tokenizer. Make one with `from_pretrained`.

    One program is compiled per number of prompts and length, rounded up to a power of two.

    Attributes:
        config: the network.
        params: its parameters, in the type of the computation.
        tokenizer: a `tokenizers.Tokenizer`.
        compute: how it is run.
        mesh: the devices it is spread over, None for the default device.
        origin: where it came from, in words.
    """

    config: T5Config
    params: dict
    tokenizer: Any
    compute: Compute = Compute()
    mesh: Mesh | None = None
    origin: str = "memory"

    def __post_init__(self):
        if (size := self.tokenizer.get_vocab_size()) > self.config.vocab_size:
            raise ValueError(
                f"{self.origin}: its tokenizer has {size} ids, its embedding "
                f"{self.config.vocab_size} rows: they are of different models"
            )

    def __repr__(self) -> str:
        return f"TextEncoder({self.origin!r}: {self.config.width} channels)"

    @classmethod
    def from_pretrained(
        cls,
        source,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        revision: str | None = None,
    ) -> "TextEncoder":
        """Loads an encoder; of a whole T5 nothing else is read.

        Args:
            source: a hub id such as "google/flan-t5-xl", or a folder with `config.json`,
                `tokenizer.json` and the weights (safetensors or PyTorch, one file or several); or
                an AR model of this project that was trained with its own text encoder.
            dtype: "float32" or "bfloat16", of the parameters and of matrix products. The residual
                stream, norms and the softmax are float32.
            mesh: spread batches and parameters over these devices.
            revision: branch, tag or commit of a hub id.

        Raises:
            FileNotFoundError: the source is not there; the message says how to get it.
            ValueError: it is not understood (one error lists every reason), or the dtype.
        """
        if dtype == "float16":
            raise ValueError(
                "dtype='float16': T5's activations exceed 65504, what float16 holds, and become "
                "infinite. Use 'bfloat16', which is as small, or 'float32'"
            )
        if sources.is_local(source) and sources.kind_of(source) == "ar":
            return cls.inside(flexar.load(source, revision), dtype, mesh)
        compute = Compute(dtype=dtype)
        found = files.load(source, np.dtype(jax.numpy.dtype(dtype)), revision)
        tokenizer = text_tokens.parse(found.tokenizer, found.origin)
        params = place(mesh, found.params, t5.shapes(found.config))
        return cls(found.config, params, tokenizer, compute, mesh, found.origin)

    @classmethod
    def inside(cls, file: flexar.LoadedAR, dtype: str = "float32", mesh: Mesh | None = None):
        """The text encoder that was trained with an AR model. Its parameters stay float32.

        Raises:
            ValueError: the AR model's file holds none.
        """
        cfg = flexar.text_encoder_config(file.info)
        if cfg is None:
            raise ValueError(f"{file.origin} holds no text encoder: it was trained with another's")
        tokenizer = text_tokens.parse(file.info["text_encoder"]["tokenizer"], file.origin)
        params = place(mesh, file.params["text_encoder"], t5.shapes(cfg))
        return cls(cfg, params, tokenizer, Compute(dtype=dtype), mesh, file.origin)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 over all parameters."""
        return storage.fingerprint(self.params)

    def tokenize(
        self, prompts: Sequence[str], max_length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [B, T] and mask bool [B, T], False at padding; T is a power of two.

        Args:
            prompts: B texts, taken as they are.
            max_length: tokens at most, 512 by default. Of a longer prompt the first ones and the
                end of the text are kept, with a warning.

        Raises:
            ValueError: `prompts` is no list of texts, or empty.
        """
        rows = text_tokens.ids_of(self.tokenizer, prompts, max_length or MAX_LENGTH)
        length = 1 << (max(map(len, rows)) - 1).bit_length()
        return text_tokens.padded(rows, length)

    def encode(
        self, prompts: Sequence[str], max_length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of prompts, as text models take them.

        Args:
            prompts, max_length: see `tokenize`.

        Returns:
            (float32 [B, T, E], bool [B, T]), False at padding, whose embeddings mean nothing.

        Raises:
            ValueError: as `tokenize`.
        """
        ids, mask = self.tokenize(prompts, max_length)
        with mesh_context(self.mesh):
            arrays = spread_batch(self.mesh, (ids, mask))
            found = _encode(self.params, self.config, self.compute, *arrays)
        return np.asarray(found)[: len(ids)], mask

    @functools.cached_property
    def null(self) -> tuple[np.ndarray, np.ndarray]:
        """What `encode` makes of the empty prompt, float32 [1, T, E] and bool [1, T]: kept."""
        return self.encode([""])
