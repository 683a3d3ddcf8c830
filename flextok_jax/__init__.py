"""FlexTok in JAX: images as ordered tokens whose cost follows their number.

    from flextok_jax import FlexTok
    tok = FlexTok.from_pretrained("demo-emoji")

and models that generate such tokens:

    from flextok_jax import ImageGenerator
    gen = ImageGenerator.from_pretrained("path/of/an/AR/model", tokenizer=tok)
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flextok_jax.data.reader import load_images as load_images
    from flextok_jax.data.reader import to_pil as to_pil
    from flextok_jax.generator import ImageGenerator as ImageGenerator
    from flextok_jax.text import TextEncoder as TextEncoder
    from flextok_jax.token_search import search as search
    from flextok_jax.tokenizer import FlexTok as FlexTok
    from flextok_jax.tokenizer import Tokenizer as Tokenizer

_LAZY = {
    "FlexTok": "flextok_jax.tokenizer",
    "ImageGenerator": "flextok_jax.generator",
    "TextEncoder": "flextok_jax.text",
    "Tokenizer": "flextok_jax.tokenizer",
    "load_images": "flextok_jax.data.reader",
    "search": "flextok_jax.token_search",
    "to_pil": "flextok_jax.data.reader",
}
__all__ = [
    "FlexTok",
    "ImageGenerator",
    "TextEncoder",
    "Tokenizer",
    "load_images",
    "search",
    "to_pil",
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])
