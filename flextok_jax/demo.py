"""What the page of `flextok demo` shows, as arrays: prefixes, other noise, mixtures, new images.

Everything is a function of its arguments, so that several people can use one `Demo` at once. One
image is decoded at a time: few programs to compile, and each picture is there once it is made.
"""

import concurrent.futures
import dataclasses
import functools
import io
import math
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from flextok_jax import conditions, verifiers
from flextok_jax.conditions import Conditions
from flextok_jax.data import decode, transforms
from flextok_jax.evaluation import pictures
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.generator import ImageGenerator
from flextok_jax.io import sources
from flextok_jax.io.paths import as_path
from flextok_jax.nn import flextok
from flextok_jax.nn.images import psnr, to_float, to_uint8
from flextok_jax.text import TextEncoder
from flextok_jax.token_search import search
from flextok_jax.tokenizer import FlexTok

ALL_SHOWN = 32  # With at most so many tokens, every prefix is shown; else 1, 2, 4, ... up to all.
MOST_PIXELS = 50_000_000  # Of an image that is read: some 200 MB.
BEAMS = 4  # Of a search, and candidates of each.
_PICTURES = 20  # To pick from.
_JPEG_QUALITIES = (1, 75)  # The smallest files that Pillow writes, and its default.


class How(NamedTuple):
    """How tokens are decoded; None: the model's own."""

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


class Size(NamedTuple):
    """What an image costs in bytes, and how close (PSNR, dB) the decoded one comes."""

    name: str
    count: int
    psnr: float


@dataclasses.dataclass(frozen=True, eq=False)
class Demo:
    """Models to play with. Make one with `load`.

    Attributes:
        tokenizer: of square images.
        generator: of new images, whose tokenizer it is; None: none.
        pictures: uint8 [n, S, S, 3], to pick from.
        name: of the tokenizer, for people: no path.
    """

    tokenizer: FlexTok
    generator: ImageGenerator | None
    pictures: np.ndarray
    name: str

    @property
    def side(self) -> int:
        """S, pixels of a side."""
        return self.tokenizer.config.image_size[0]

    @functools.cached_property
    def counts(self) -> tuple[int, ...]:
        """The numbers of tokens that are shown beside each other."""
        return shown(self.tokenizer, self.tokenizer.num_tokens)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of a class-conditional generator, else ()."""
        gen = self.generator
        count = gen.config.num_classes if gen and not gen.config.text_dim else 0
        return tuple(gen.class_names if gen else ()) or tuple(f"class {i}" for i in range(count))

    def read(self, data: bytes) -> np.ndarray:
        """An image file of any format and size, its centre: uint8 [S, S, 3].

        Raises:
            ValueError: it is no image that can be read, or too large; for a person to read.
        """
        image = None
        try:
            width, height = decode.opened(data).size
            if width * height <= MOST_PIXELS:
                image = decode.upright(data)
        except Exception as error:  # Files break in any way there is.
            why = decode.reason(error)
            raise ValueError(f"This file cannot be read as an image ({why}).") from error
        if image is None:
            raise ValueError(
                f"This image has {width} x {height} pixels, more than the {MOST_PIXELS // 10**6} "
                "million that are read here. Make it smaller and try again."
            )
        return transforms.center_crop(image, self.side)

    def tokens(self, image: np.ndarray) -> np.ndarray:
        """All tokens of uint8 [S, S, 3]: int32 [R], or float32 [R, F]."""
        return np.asarray(self.tokenizer.tokenize(image[None]))[0]

    def decode(self, tokens: np.ndarray, k: int, how: How = How()) -> np.ndarray:
        """The image, uint8 [S, S, 3], of the first k tokens. Its noise is the seed's alone."""
        options = {}
        if self.tokenizer.config.is_flow:
            options = dict(steps=how.steps, guidance_scale=how.guidance, key=how.seed)
        return to_uint8(np.asarray(self.tokenizer.detokenize(tokens[None], k, **options)))[0]

    def prefixes(self, tokens: np.ndarray, how: How = How()) -> Iterator[tuple[int, np.ndarray]]:
        """(k, image from the first k tokens), for each of `counts`."""
        for k in self.counts:
            yield k, self.decode(tokens, k, how)

    def noises(self, tokens: np.ndarray, k: int, how: How, seeds: Sequence[int]) -> Iterator:
        """(seed, image): the same tokens with other noise."""
        for seed in seeds:
            yield seed, self.decode(tokens, k, how._replace(seed=seed))

    def mixed(self, first: np.ndarray, rest: np.ndarray, k: int, how: How = How()) -> np.ndarray:
        """The image of the first k tokens of one image and the others of another."""
        return self.decode(np.concatenate([first[:k], rest[k:]]), len(rest), how)

    def mixtures(self, first: np.ndarray, rest: np.ndarray, how: How = How()) -> Iterator:
        """(k, `mixed`), from none of the first image's tokens to all."""
        for k in (0, *self.counts):
            yield k, self.mixed(first, rest, k, how)

    def condition(self, label: int | None = None, text: str | None = None) -> Conditions:
        """What one new image is generated from. Raises ValueError for an empty prompt."""
        gen = self.generator
        if gen.config.text_dim:
            if not (text or "").strip():
                raise ValueError("The prompt is empty: write what the image should show.")
            return conditions.of_text(*gen.encode_text([text]), [text])
        if gen.config.num_classes:
            return conditions.of_labels([label], self.class_names)
        return conditions.of_nothing(1)

    def grow(
        self, condition: Conditions, how: How = How()
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A new image as its tokens come: (the first k tokens [k, ...], the image of them).

        Tokens are sampled in parts of 1, 1, 2, 4, ..., so that few programs are compiled, or all at
        once where that is the model's way; the seed is of the tokens and of the noise.
        """
        gen, tokens, before = self.generator, None, 0
        whole = gen.config.whole
        for part in (gen.num_tokens,) if whole else flextok.lengths(gen.num_tokens):
            tokens = np.asarray(
                gen.generate_tokens(
                    conditions=condition, num_tokens=part, prefix=tokens, key=how.seed
                )
            )
            for k in shown(self.tokenizer, gen.num_tokens):
                if before < k <= part:
                    yield tokens[0, :k], self.decode(tokens[0], k, how)
            before = part

    def search(self, condition: Conditions, wanted: np.ndarray, how: How = How()) -> Iterator:
        """A search for tokens of the generator whose image is like `wanted`, uint8 [S, S, 3].

        Yields:
            (k, images uint8 [BEAMS, S, S, 3] best first, their PSNR in dB) after each step, from k
            tokens decoded in few steps; at last the same of the one that was found, in all steps.
        """
        done: queue.SimpleQueue = queue.SimpleQueue()
        decoding = {}
        if self.tokenizer.config.is_flow:
            decoding = dict(steps=how.steps, image_guidance_scale=how.guidance)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            found = pool.submit(
                search, self.generator, verifiers.psnr_to(wanted), conditions=condition,
                beams=BEAMS, candidates=BEAMS, key=how.seed, batch_size=BEAMS**2,
                on_step=lambda _, step: done.put(step), **decoding,
            )  # fmt: skip
            found.add_done_callback(lambda _: done.put(None))
            while (step := done.get()) is not None:
                yield step.num_tokens, step.images, step.scores[step.kept]
            result = found.result()
        yield self.generator.num_tokens, to_uint8(result.images[0]), result.scores[0]

    def sizes(self, image: np.ndarray, k: int, decoded: np.ndarray) -> list:
        """`Size` of the first k tokens, of which `decoded` was made, and of JPEG files."""
        found = [
            Size(f"{k} token{'s' * (k > 1)}", token_bytes(self.tokenizer, k), _psnr(decoded, image))
        ]
        for quality in _JPEG_QUALITIES:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality, optimize=True)
            size, read = file.tell(), np.asarray(Image.open(file))
            found.append(Size(f"JPEG, quality {quality}", size, _psnr(read, image)))
        return found

    def programs(self) -> list[Callable[[], object]]:
        """Calls that compile all that the page needs with the model's own guidance."""
        tokens = self.tokens(np.zeros((self.side, self.side, 3), np.uint8))
        how = How(steps=1) if self.tokenizer.config.is_flow else How()
        counts = flextok.doublings(self.tokenizer.prefixes)
        calls = [functools.partial(self.decode, tokens, k, how) for k in counts]
        if self.generator:
            text = "a" if self.generator.config.text_dim else None
            calls.append(lambda: list(self.grow(self.condition(0, text), how)))
        return calls


def load(
    model: str | None = None,
    generator: str | None = None,
    text_encoder: str | None = None,
    images: str | None = None,
    dtype: str = "float32",
) -> Demo:
    """Loads models by their sources.

    Args:
        model: of the tokenizer. None: the one that `generator` names, else a shipped demo model.
        generator: an AR model; None: of a shipped demo model the one that belongs to it.
        text_encoder: of a text model; None: the one that it names.
        images: a data set, whose first images can be picked; None: those that a demo has.
        dtype: of the computation.

    Raises:
        FileNotFoundError, ValueError: a source is not there, not understood, or they do not fit.
    """
    gen = ImageGenerator.from_pretrained(generator, dtype=dtype) if generator else None
    if gen and not model:
        model = gen.tokenizer_source
        if not model:
            raise ValueError(f"{gen.origin} names no tokenizer: pass --model SOURCE")
    model = model or next(iter(sources.DEMOS))
    tok = FlexTok.from_pretrained(model, dtype=dtype)
    if gen is None and f"{model}-ar" in sources.DEMOS:
        gen = ImageGenerator.from_pretrained(f"{model}-ar", dtype=dtype)
    if gen is not None:
        gen = dataclasses.replace(gen, tokenizer=tok)
        if gen.config.text_dim and gen.text_encoder is None:
            source = text_encoder or gen.text_encoder_source
            if not source:
                raise ValueError(f"{gen.origin} names no text encoder: pass --text-encoder SOURCE")
            gen = dataclasses.replace(
                gen, text_encoder=TextEncoder.from_pretrained(source, dtype=dtype)
            )
    side = rec.side(tok)
    if not images and model in sources.DEMOS:
        folder = sources.DEMO_FOLDER / sources.DEMOS[model] / "images"
        images = str(folder) if folder.is_dir() else None
    found = np.zeros((0, side, side, 3), np.uint8)
    if images:
        found = next(pictures.Pictures(images, _PICTURES).batches(side, _PICTURES)).images
    local = model not in sources.DEMOS and as_path(model).exists()
    return Demo(tok, gen, found, as_path(model).absolute().name if local else model)


def shown(tok: FlexTok, most: int) -> tuple[int, ...]:
    """The numbers of tokens, up to `most`, that are shown beside each other."""
    counts = tuple(k for k in tok.prefixes if k <= most)
    return counts if most <= ALL_SHOWN else flextok.doublings(counts)


def token_bytes(tok: FlexTok, k: int) -> int:
    """The fewest bytes that hold k tokens: k log2(V) bits, all ids alike; codes are float32."""
    bits = math.log2(tok.config.vocab_size) if tok.discrete else 32 * tok.config.code_dim
    return math.ceil(k * bits / 8)


def spread(images: Sequence[np.ndarray]) -> np.ndarray:
    """Where images differ: the standard deviation of uint8 [S, S, 3], the largest white."""
    deviation = np.std(np.stack(images).astype(np.float32), axis=0).mean(-1)
    scaled = 255 * deviation / max(float(deviation.max()), 1e-6)
    return np.repeat(scaled.round().astype(np.uint8)[..., None], 3, axis=-1)


def _psnr(image: np.ndarray, original: np.ndarray) -> float:
    return float(psnr(to_float(image[None]), to_float(original[None]))[0])
