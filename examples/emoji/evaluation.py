"""Tokenizers and generators of the emoji, measured through the public interface.

    python -m examples.emoji.evaluation data/emoji demo-emoji --generator demo-emoji-ar \
        --text-generator demo-emoji-t2i --picture emoji.png --neighbours neighbours.png

prints the numbers of docs and model pages as JSON: reconstructions of the validation emoji, which
training never saw, generated emoji of each group, and emoji drawn from names; and draws some.
"""

import argparse
import json

import numpy as np

from examples.emoji.classifier import GROUPS, arrays, features, groups, parameters
from flextok_jax import FlexTok, ImageGenerator, to_pil
from flextok_jax.evaluation.metrics import psnr
from flextok_jax.evaluation.statistics import FeatureSet, fid
from flextok_jax.nn.flextok import lengths
from flextok_jax.nn.images import to_float, to_uint8

BATCH = 100
PROMPTS = 400  # Names of training emoji.
SHOWN = 10  # Samples of each group in the picture.


def reconstruct(tok: FlexTok, images: np.ndarray, **sampling) -> dict[int, np.ndarray]:
    """Images from their first k tokens: {k: uint8 [n, 64, 64, 3]}.

    Args:
        tok: a tokenizer of 64 x 64 pixels.
        images: uint8 [n, 64, 64, 3].
        sampling: arguments of `FlexTok.detokenize`. The key of batch i is i.
    """
    tokens = [tok.tokenize(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return {
        k: np.concatenate(
            [to_uint8(tok.detokenize(t, k, key=i, **sampling)) for i, t in enumerate(tokens)]
        )
        for k in lengths(tok.num_tokens)
    }


def feature_set(images: np.ndarray) -> FeatureSet:
    """What the classifier says of uint8 images."""
    parts = [features(parameters(), to_float(images[i : i + BATCH]))
             for i in range(0, len(images), BATCH)]  # fmt: skip
    found, logits = (np.concatenate(x) for x in zip(*parts))
    return FeatureSet(found, logits, np.full(len(images), -1))


def nearest(images: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The closest of `others` for each image: (index [n], root mean square over [-1, 1] [n])."""
    a, b = (to_float(x).reshape(len(x), -1) for x in (images, others))
    index = ((b**2).sum(1) - 2 * a @ b.T).argmin(axis=1)
    return index, np.sqrt(np.mean((a - b[index]) ** 2, axis=1))


def reconstruction_numbers(made: dict[int, np.ndarray], images, labels) -> dict:
    """PSNR, agreement of the classifier and the Frechet distance of its features, by k.

    Agreement counts the images that it reads right before they are tokenized.
    """
    right = groups(images) == labels
    real = feature_set(images).gaussian
    return {
        "images": len(images),
        "read right": int(right.sum()),
        "psnr": {k: round(float(np.mean(psnr(to_float(x), to_float(images)))), 2)
                 for k, x in made.items()},
        "agree": {k: int((groups(x) == labels)[right].sum()) for k, x in made.items()},
        "frechet": {k: round(fid(feature_set(x).gaussian, real), 2) for k, x in made.items()},
    }  # fmt: skip


def generation_numbers(samples: np.ndarray, train, validation) -> dict:
    """How many samples of each group are read as it, and whether they are copies.

    Args:
        samples: uint8 [9, n, 64, 64, 3], by group.
        train, validation: uint8 images.
    """
    read = [int((groups(x) == number).sum()) for number, x in enumerate(samples)]
    flat = samples.reshape(-1, *samples.shape[2:])
    ours, real = nearest(flat, train)[1], nearest(validation, train)[1]
    return {
        "samples of each group": samples.shape[1],
        "read as asked": dict(zip(GROUPS, read)),
        "read as asked, all": sum(read),
        "distance to the nearest training emoji": round(float(np.median(ours)), 3),
        "the same of validation emoji": round(float(np.median(real)), 3),
        "closer than 95 % of those": round(float(np.mean(ours < np.quantile(real, 0.05))), 3),
    }


def text_numbers(gen: ImageGenerator, folder) -> dict:
    """How many emoji that are drawn from names are read as the group of the name.

    Args:
        gen: a generator by text. The key of batch i is i.
        folder: made by make_data. Names are the validation emoji's, and as many of the training's.
    """
    numbers = {}
    for split, count in (("validation", None), ("train", PROMPTS)):
        _, labels, names = arrays(folder, split)
        rows = np.linspace(0, len(names) - 1, count or len(names)).astype(int)
        parts = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        made = [gen.generate(text=[names[i] for i in part], key=i) for i, part in enumerate(parts)]
        right = np.concatenate([groups(to_uint8(x)) for x in made]) == labels[rows]
        numbers[f"{split} names"] = len(rows)
        numbers[f"{split} names, read as their group"] = int(right.sum())
    return numbers


def middles(labels: np.ndarray) -> list[int]:
    """For each group the index of the image in the middle of its images."""
    return [(found := np.flatnonzero(labels == c))[len(found) // 2] for c in range(len(GROUPS))]


def picture(made, images, labels, samples=None) -> np.ndarray:
    """uint8 [H, W, 3]: a row for each group, its image in the middle, the prefixes, and samples."""
    rows = middles(labels)
    grid = _grid(np.stack([images[rows], *(x[rows] for x in made.values())], axis=1))
    if samples is None:
        return grid
    gap = np.full((len(grid), 24, 3), 255, np.uint8)
    return np.concatenate([grid, gap, _grid(samples[:, :SHOWN])], axis=1)


def neighbours(samples: np.ndarray, train: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3]: of each group a row of samples, and below each the closest training emoji.

    Args:
        samples: uint8 [9, n, 64, 64, 3], by group.
        train: uint8 images.
    """
    rows = [row for x in samples for row in (x[:SHOWN], train[nearest(x[:SHOWN], train)[0]])]
    return _grid(np.stack(rows))


def _grid(images):
    images = np.pad(images, [(0, 0), (0, 0), (3, 3), (3, 3), (0, 0)], constant_values=255)
    rows, columns, height, width, _ = images.shape
    return images.swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def main() -> None:
    """Prints JSON, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a folder made by examples.emoji.make_data")
    parser.add_argument("tokenizer", help="of 64 x 64 pixels: a workdir, a folder or a demo")
    parser.add_argument("--generator", help="of its tokens, by the nine groups")
    parser.add_argument("--text-generator", help="of its tokens, by the emoji's names")
    parser.add_argument("--per-group", type=int, default=50, help="samples of each group (50)")
    parser.add_argument("--picture", help="an image file to write")
    parser.add_argument("--neighbours", help="another: samples above the closest training emoji")
    parser.add_argument("--guidance", type=float, help="of decoding; default: the model's")
    parser.add_argument("--steps", type=int, help="of decoding; default: the model's")
    args = parser.parse_args()
    if args.neighbours and not args.generator:
        parser.error("--neighbours are of samples: name a --generator")
    sampling = {"guidance_scale": args.guidance, "steps": args.steps}
    tok = FlexTok.from_pretrained(args.tokenizer)
    images, labels, _ = arrays(args.data, "validation")
    made = reconstruct(tok, images, **sampling)
    numbers, samples = reconstruction_numbers(made, images, labels), None
    if args.generator:
        gen = ImageGenerator.from_pretrained(args.generator, tokenizer=tok)
        samples = np.stack([to_uint8(gen.generate(labels=[c] * args.per_group, key=c))
                            for c in range(len(GROUPS))])  # fmt: skip
        train = arrays(args.data, "train")[0]
        numbers |= generation_numbers(samples, train, images)
        if args.neighbours:
            to_pil(neighbours(samples, train)[None])[0].save(args.neighbours)
    if args.text_generator:
        gen = ImageGenerator.from_pretrained(args.text_generator, tokenizer=tok)
        numbers |= text_numbers(gen, args.data)
    if args.picture:
        to_pil(picture(made, images, labels, samples)[None])[0].save(args.picture)
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
