"""Digits drawn by text: the share that is classified as what was asked for.

    python -m examples.digits.prompts runs/digits_text

prints it for each kind of caption, and for other ways to write them.
"""

import argparse
import json

import numpy as np

from examples.digits import captions_of
from examples.digits.classifier import CLASSES, correct
from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.nn.images import to_uint8

KINDS = ("7", "seven", "a seven", "the digit seven", "the number 7", "a handwritten seven")
# Prompts that no caption is: other words between known ones, other letters.
OTHERS = ("THE DIGIT {word}", "draw {word}", "a picture of the number {word}", "digit: {digit}")


def share(gen: ImageGenerator, prompts: list[str], per_prompt: int, key: int, **sampling) -> float:
    """The share of digits that the classifier reads as asked.

    Args:
        gen: a text model of digits with its tokenizer.
        prompts: one for each digit, in order.
        per_prompt: samples of each.
        key: of the samples.
        sampling: arguments of `ImageGenerator.generate`.
    """
    text = np.repeat(prompts, per_prompt).tolist()
    images = to_uint8(np.asarray(gen.generate(text=text, key=key, **sampling)))
    return float(correct(images, np.repeat(np.arange(CLASSES), per_prompt)).mean())


def main() -> None:
    """Prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", help="a workdir or a folder of `configs/ar.py:digits_text`")
    parser.add_argument("--tokenizer", default="demo-digits")
    parser.add_argument("--per-prompt", type=int, default=20, help="samples of each prompt (20)")
    parser.add_argument("--guidance", type=float, help="of the logits (the model's own)")
    args = parser.parse_args()
    tok = FlexTok.from_pretrained(args.tokenizer)
    gen = ImageGenerator.from_pretrained(args.generator, tokenizer=tok)
    columns = dict(zip(KINDS, zip(*map(captions_of, range(CLASSES)))))
    for form in OTHERS:
        rows = [captions_of(digit) for digit in range(CLASSES)]
        columns[form] = [form.format(digit=row[0], word=row[1]) for row in rows]
    found = {
        kind: share(gen, list(prompts), args.per_prompt, i, guidance_scale=args.guidance)
        for i, (kind, prompts) in enumerate(columns.items())
    }
    captions = [found[kind] for kind in KINDS]
    numbers = {
        "samples of each kind": CLASSES * args.per_prompt,
        "drawn as asked, all captions": round(float(np.mean(captions)), 4),
        **{f"drawn as asked, {kind!r}": round(value, 4) for kind, value in found.items()},
    }
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()
