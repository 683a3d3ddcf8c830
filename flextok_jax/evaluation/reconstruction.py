"""Images to tokens and back, over whole sets of images of any number."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from flextok_jax.evaluation import metrics
from flextok_jax.evaluation.pictures import Batch, Pictures, from_uint8, to_uint8
from flextok_jax.evaluation.results import Results
from flextok_jax.nn import flextok
from flextok_jax.tokenizer import FlexTok


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are drawn from tokens.

    Attributes:
        steps: Euler steps.
        guidance: the scale, None: the model's own default.
        norm_guidance: adaptive projected guidance instead of plain guidance.
        seed: of the noise. Every image has noise of its own, a function of the seed and of its
            name (`pictures.name_seeds`), so that the size of the batches changes nothing.
    """

    steps: int = 20
    guidance: float | None = None
    norm_guidance: bool = True
    seed: int = 0

    def about(self, tok: FlexTok) -> dict:
        """What is used, in words for a file."""
        scale = tok.config.guidance_scale if self.guidance is None else self.guidance
        return {
            "steps": self.steps,
            "guidance": scale,
            "norm_guidance": self.norm_guidance and scale != 1,
            "seed": self.seed,
        }


def identity(tok: FlexTok) -> dict:
    """Which model it is: its origin in words, and the sha256 over all its parameters."""
    return {"origin": tok.origin, "fingerprint": tok.fingerprint}


def side(tok: FlexTok) -> int:
    """The side of the model's images in pixels.

    Raises:
        ValueError: they are not square.
    """
    height, width = tok.config.image_size
    if height != width:
        raise ValueError(
            f"the model is made for images of {height} x {width} pixels; only square ones are "
            "cropped here: call `tokenize` from Python with arrays of that size"
        )
    return height


def check_counts(tok: FlexTok, counts: Sequence[int] | None, available: int | None = None):
    """The numbers of tokens asked for, ascending; 1, 2, 4, ... up to all where None.

    Args:
        available: how many there are, R by default.

    Raises:
        ValueError: a number is not in 1..available.
    """
    most = tok.num_tokens if available is None else available
    if counts is None:
        return list(flextok.lengths(most))
    wrong = [k for k in counts if not 1 <= k <= most]
    if wrong:
        what = "the model has" if available is None else "there are"
        raise ValueError(
            f"num_tokens={','.join(map(str, wrong))}: {what} {most} tokens per image, allowed are "
            f"1 to {most}"
        )
    return sorted(set(counts))


def encode(tok: FlexTok, images: np.ndarray, num_tokens: int, batch_size: int) -> np.ndarray:
    """uint8 [n, S, S, 3] -> int32 [n, num_tokens]; run as `batch_size` images, n or more."""
    return np.asarray(tok.tokenize(padded(images, batch_size), num_tokens))[: len(images)]


def draw(
    tok: FlexTok,
    tokens: np.ndarray,
    num_tokens: int,
    seeds: np.ndarray,
    sampling: Sampling,
    batch_size: int,
) -> np.ndarray:
    """int32 [n, k] -> float32 [n, S, S, 3], clipped to [-1, 1].

    Args:
        num_tokens: how many of the tokens are used.
        seeds: uint32 [n], of the images' noise, beside `sampling.seed`.
        batch_size: the number of images it is run as, n or more.
    """
    cfg = tok.config
    latent = (*(s // cfg.vae.downsample for s in cfg.image_size), cfg.vae.latent_channels)
    images = tok.detokenize(
        padded(tokens[:, :num_tokens], batch_size),
        steps=sampling.steps,
        guidance_scale=sampling.guidance,
        norm_guidance=sampling.norm_guidance,
        noise=_noise(np.uint32(sampling.seed), padded(seeds, batch_size), latent),
    )
    return np.clip(np.asarray(images)[: len(tokens)], -1, 1)


def evaluate(
    tok: FlexTok,
    pictures: Pictures,
    counts: Sequence[int],
    sampling: Sampling = Sampling(),
    batch_size: int = 32,
    visit: Callable[[Batch, dict[int, np.ndarray]], None] | None = None,
    results: Results | None = None,
) -> dict:
    """Reconstructs every picture from its first k tokens, for each k of `counts`.

    Args:
        visit: is given each batch and {k: float32 [n, S, S, 3] in [-1, 1]}.
        results: pictures that are finished there are not done again, those done now are added.

    Returns:
        "model", "images", "count", "unreadable", the sampling; by k: "psnr" (dB, range 2) and
        "mae" (of a range of 2), means over images, and "codebook_usage", the share of all ids that
        occur among the first k tokens; "codes": `metrics.code_usage` by position.
    """
    from tqdm import tqdm

    counts = check_counts(tok, counts)
    size, batch_size = side(tok), min(batch_size, len(pictures))
    records = {} if results is None else dict(results.records)
    done = len(records) * len(counts)
    total = len(pictures) * len(counts)
    with tqdm(total=total, initial=done, unit="image", disable=None) as bar:
        for batch in pictures.batches(size, batch_size, skip=records):
            originals = from_uint8(batch.images)
            tokens = encode(tok, batch.images, counts[-1], batch_size)
            drawn, psnr, mae = {}, [], []
            for k in counts:
                images = draw(tok, tokens, k, batch.seeds, sampling, batch_size)
                drawn[k] = from_uint8(to_uint8(images))  # As files have them.
                psnr.append(metrics.psnr(drawn[k], originals))
                mae.append(metrics.mae(drawn[k], originals))
                bar.update(len(originals))
            if visit is not None:
                visit(batch, drawn)
            rows = zip(np.stack(psnr, 1).tolist(), np.stack(mae, 1).tolist(), tokens.tolist())
            rows = [dict(zip(("psnr", "mae", "tokens"), row)) for row in rows]
            new = dict(zip(batch.names, rows))
            records.update(new)
            if results is not None:
                results.add(new)
    tokens = np.array([record["tokens"] for record in records.values()])

    def mean(name):
        means = np.mean([record[name] for record in records.values()], axis=0)
        return dict(zip(counts, means.tolist()))

    return {
        "model": identity(tok),
        "images": pictures.title,
        "count": len(tokens),
        "unreadable": dict(pictures.unreadable),
        **sampling.about(tok),
        "dtype": tok.compute.dtype,
        "num_tokens": counts,
        "psnr": mean("psnr"),
        "mae": mean("mae"),
        "codebook_usage": {
            k: len(np.unique(tokens[:, :k])) / tok.config.vocab_size for k in counts
        },
        "codes": metrics.code_usage(tokens),
    }


def padded(array: np.ndarray, size: int) -> np.ndarray:
    """Copies of the last row, so that one program serves every batch."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1), mode="edge")


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seed, seeds, shape):
    """Noise of each image: [n, *shape]."""
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(seeds)
