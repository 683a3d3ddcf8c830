"""Search over the tokens of digits, judged by what did not steer it.

    python -m examples.digits.search

Each row is a way to search, with the shipped models, for `--prompts` digits and each of `--seeds`
noise seeds. "steering" draws digits of a class like a given validation digit, by the cosine of the
classifier's features; the judge is the PSNR to that digit. "class" draws digits that the classifier
reads as their class; the judge is logistic regression on the pixels. Numbers are the mean over
seeds, and the standard deviation of the seeds' means.
"""

import argparse
import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

from examples.digits import arrays
from examples.digits.classifier import features, parameters
from flextok_jax import FlexTok, ImageGenerator, search, verifiers
from flextok_jax.nn.images import to_float
from flextok_jax.verifiers import Verifier

BEAM = dict(algorithm="beam", beams=2, candidates=6)
BEST = dict(algorithm="best_of", beams=2)
STEERING = {  # Ways to search for a digit like another.
    "one sample": dict(BEST, candidates=1),
    "best of 20": dict(BEST, candidates=20),
    "best of 60": dict(BEST, candidates=60),
    "beam, branch last": dict(BEAM, branch="last"),
    "beam, branch first": dict(BEAM, branch="first"),
    "beam, branch first, 1, 2, 3, 4, 8 tokens": dict(BEAM, schedule=(1, 2, 3, 4, 8)),
    "beam of a uniform prior, 1, 2, 3, 4, 6 tokens": dict(
        BEAM, prior="uniform", schedule=(1, 2, 3, 4, 6)
    ),
}
CLASS = {
    "one sample": dict(BEST, candidates=1),
    "best of 4": dict(BEST, candidates=4),
    "best of 20, 2 steps": dict(BEST, candidates=20, search_steps=2),
    "beam of a uniform prior, 1, 2, 3 tokens": dict(
        BEAM, candidates=12, prior="uniform", schedule=(1, 2, 3)
    ),
}
TOKENS = {  # By the AR model itself: no candidate is decoded.
    "best of 20 by likelihood": "likelihood",
    "best of 20 by agreement": "agreement",
}


def like(references: np.ndarray) -> Verifier:
    """The cosine of the classifier's features to those of uint8 [P, 16, 16, 3]."""

    @jax.jit
    def unit(params, images):
        found = features(params, images)[0]
        return found / jnp.linalg.norm(found, axis=1, keepdims=True)

    def score(params, wanted, images):
        return unit(params, images) @ wanted

    def prepare(conditions):
        return np.asarray(unit(parameters(), to_float(references)))

    return Verifier("cosine", jax.jit(score), prepare, params=parameters())


def reads() -> Verifier:
    """The log-probability that the small classifier gives the class."""
    return verifiers.classifier(lambda params, x: features(params, x)[1], params=parameters())


@functools.cache
def regression():
    """Logistic regression on the pixels of the training digits."""
    from sklearn.linear_model import LogisticRegression

    images, labels = arrays("train")
    return LogisticRegression(C=0.1, max_iter=2000).fit(_pixels(images), labels)


def _pixels(images):
    return images[..., 0].reshape(len(images), -1) / 255.0


def judge(labels: np.ndarray) -> Verifier:
    """1 where logistic regression reads the class, else 0."""

    def right(images, prompts):
        return (regression().predict(_pixels(images)) == labels[prompts]).astype(np.float32)

    return verifiers.function(right)


def measure(gen, verifier: Verifier, labels, judges, seeds: int, **how) -> tuple:
    """{name: [seeds], means over prompts}, and the mean decodes of a prompt."""
    found: dict = collections.defaultdict(list)
    images = 0
    for seed in range(seeds):
        result = search(gen, verifier, labels=labels, key=seed, judges=judges, **how)
        for name, values in {verifier.name: result.scores, **result.judged}.items():
            found[name].append(float(values.mean()))
        images += result.cost["images"]
    return {name: np.array(values) for name, values in found.items()}, images / seeds / len(labels)


def show(name: str, found: dict, decodes: float) -> None:
    """A row of a table."""
    cells = (f"{values.mean():.3f} ± {values.std(ddof=1):.3f}" for values in found.values())
    print(f"| {name} | {decodes:.0f} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=50, help="digits of each seed (50)")
    parser.add_argument("--seeds", type=int, default=5, help="of noise and draws (5)")
    parser.add_argument("--search-steps", type=int, default=4, help="of decoding candidates (4)")
    parser.add_argument("--table", choices=("steering", "class"), help="that one only")
    args = parser.parse_args()
    tok = FlexTok.from_pretrained("demo-digits")
    gen = ImageGenerator.from_pretrained("demo-digits-ar", tokenizer=tok)
    if args.table != "class":
        steering(gen, args)
    if args.table != "steering":
        classes(gen, args)


def steering(gen, args) -> None:
    """Prints the table of digits like given ones."""
    originals, labels = arrays("test")
    rows = np.random.RandomState(0).permutation(len(originals))[: args.prompts]
    judges = [verifiers.psnr_to(originals[rows])]
    print("| steering | decodes | cosine | PSNR, dB |\n|---|---|---|---|")
    for name, how in STEERING.items():
        how = dict(search_steps=args.search_steps, seeds=args.seeds) | how
        show(name, *measure(gen, like(originals[rows]), labels[rows], judges, **how))


def classes(gen, args) -> None:
    """Prints the table of digits of a class."""
    labels = np.arange(args.prompts) % 10
    print("| class | decodes | score | read right |\n|---|---|---|---|")
    for name, how in CLASS.items():
        how = dict(search_steps=args.search_steps, seeds=args.seeds) | how
        show(name, *measure(gen, reads(), labels, [judge(labels)], **how))
    for name, verifier in TOKENS.items():
        found, how = getattr(verifiers, verifier)(gen), dict(BEST, candidates=20, seeds=args.seeds)
        show(name, *measure(gen, found, labels, [judge(labels)], **how))


if __name__ == "__main__":
    main()
