"""What an evaluation draws: reconstructions of pictures, or samples of a generator.

Both give tokens once, and images from the first k of them at every point of a sweep.
"""

import dataclasses
import hashlib
import time
from typing import Protocol

import numpy as np

from flextok_jax.evaluation.generation import TokenSampling, sample_tokens
from flextok_jax.evaluation.pictures import Pictures, name_seeds, to_uint8
from flextok_jax.evaluation.reconstruction import Sampling, draw, encode, side
from flextok_jax.generator import ImageGenerator
from flextok_jax.tokenizer import FlexTok


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a sweep.

    Attributes:
        num_tokens: k.
        guidance: the scale of guidance, None: the model's own default.
        steps: Euler steps.
        token_guidance: of the logits, None: the model's own default, or nothing is generated.
    """

    num_tokens: int
    guidance: float | None
    steps: int
    token_guidance: float | None = None


class Subject(Protocol):
    """What is drawn.

    Attributes:
        tok: the tokenizer that draws.
        count: how many things there are.
        batch_size: how many are drawn at a time.
        key: a name for what is prepared, among all that one folder of results may have.
    """

    tok: FlexTok
    count: int
    batch_size: int
    key: str

    def prepare(self, places: range) -> dict[str, np.ndarray]:
        """Tokens by their names, "labels" and "names" of those of the places that can be read.

        Of the others "unreadable", their names, and "reasons".
        """

    def tokens(self, prepared: dict, point: Point) -> np.ndarray:
        """The tokens of a point: int32 [n, K]."""

    def originals(self, prepared: dict) -> np.ndarray | None:
        """What the drawn images should be: uint8 [n, S, S, 3]; None where nothing is."""


@dataclasses.dataclass(frozen=True)
class Reconstructions:
    """Pictures, from their own tokens.

    Attributes:
        num_tokens: how many tokens are made of each.
    """

    tok: FlexTok
    pictures: Pictures
    num_tokens: int
    batch_size: int

    @property
    def count(self) -> int:
        return len(self.pictures)

    @property
    def key(self) -> str:
        return f"k{self.num_tokens:04d}"

    def prepare(self, places: range) -> dict[str, np.ndarray]:
        readable, images, labels = self.pictures.read(places, side(self.tok))
        parts = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        tokens = [encode(self.tok, part, self.num_tokens, self.batch_size) for part in parts]
        return {
            "tokens": np.concatenate([np.zeros((0, self.num_tokens), np.int32), *tokens]),
            "labels": labels,
            "places": readable,
            "sha256": digest(images),
            "names": np.array([self.pictures.names[place] for place in readable], np.str_),
            **missed(self.pictures, places, readable),
        }

    def tokens(self, prepared: dict, point: Point) -> np.ndarray:
        return prepared["tokens"]

    def originals(self, prepared: dict) -> np.ndarray:
        images = self.pictures.read(prepared["places"], side(self.tok))[1]
        if not np.array_equal(digest(images), prepared["sha256"]):
            raise ValueError(
                f"the pictures of {self.pictures.title} have changed since their tokens were made: "
                "delete the results, or pass another --out"
            )
        return images


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a generator makes of labels.

    Attributes:
        labels: int [count].
        num_tokens: how many tokens are drawn for each.
        hows: ways of drawing tokens; a point's has its scale of guidance.
        seed: of the tokens.
    """

    gen: ImageGenerator
    labels: np.ndarray
    num_tokens: int
    hows: tuple[TokenSampling, ...]
    seed: int
    batch_size: int

    @property
    def tok(self) -> FlexTok:
        return self.gen.tokenizer

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def key(self) -> str:
        return "_".join([f"k{self.num_tokens:04d}", *(str(how.guidance) for how in self.hows)])

    def prepare(self, places: range) -> dict[str, np.ndarray]:
        names = [f"{place:06d}_class{self.labels[place]}" for place in places]
        nothing = np.array([], np.str_)
        found = {"labels": self.labels[list(places)], "names": np.array(names, np.str_)}
        found |= {"unreadable": nothing, "reasons": nothing}
        for number, how in enumerate(self.hows):
            rows = []
            for i in range(0, len(names), self.batch_size):
                part = slice(i, i + self.batch_size)
                labels, seeds = found["labels"][part], name_seeds(names[part])
                tokens = sample_tokens(
                    self.gen, labels, seeds, self.num_tokens, how, self.seed, self.batch_size
                )
                rows.append(tokens)
            found[f"tokens{number}"] = np.concatenate(rows)
        return found

    def tokens(self, prepared: dict, point: Point) -> np.ndarray:
        scales = [how.guidance for how in self.hows]
        return prepared[f"tokens{scales.index(point.token_guidance)}"]

    def originals(self, prepared: dict) -> None:
        return None


def digest(images: np.ndarray) -> np.ndarray:
    """The sha256 of images as an array: uint8 [1, 32]."""
    return np.frombuffer(hashlib.sha256(images.tobytes()).digest(), np.uint8)[None]


def missed(pictures: Pictures, places, readable) -> dict[str, np.ndarray]:
    """Arrays "unreadable" and "reasons", of those of the places that are not readable."""
    names = [pictures.names[place] for place in sorted(set(places) - set(readable.tolist()))]
    reasons = [pictures.unreadable[name] for name in names]
    return {"unreadable": np.array(names, np.str_), "reasons": np.array(reasons, np.str_)}


def draw_point(
    subject: Subject, prepared: dict, point: Point, sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
    """The images of a chunk at a point of a sweep, rounded to 8 bits as files have them.

    Args:
        prepared: of `subject.prepare`.
        sampling: the seed and the kind of guidance; steps and scale are the point's.

    Returns:
        (uint8 [n, S, S, 3], seconds per batch of `batch_size` images [number of batches]).
    """
    tokens, seeds = subject.tokens(prepared, point), name_seeds(prepared["names"].tolist())
    batch_size = subject.batch_size
    sampling = dataclasses.replace(sampling, steps=point.steps, guidance=point.guidance)
    size = side(subject.tok)
    images, seconds = [np.zeros((0, size, size, 3), np.uint8)], []
    for i in range(0, len(tokens), batch_size):
        part = slice(i, i + batch_size)
        started = time.perf_counter()
        drawn = draw(subject.tok, tokens[part], point.num_tokens, seeds[part], sampling, batch_size)
        seconds.append(time.perf_counter() - started)
        images.append(to_uint8(drawn))
    return np.concatenate(images), np.array(seconds)
