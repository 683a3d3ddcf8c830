"""Whether a number of tokens for each image is better than one for all, on the validation digits.

    python -m benchmarks.lengths

Criteria of each of the 297 validation digits are measured at 1, 2, 4, 8 and 16 tokens with some
noises. By them, by one alone and by the mean of all, `flextok_jax.lengths.smallest` chooses the
number of tokens. The choice is judged by other, fresh noises, in two ways: the share of images that
meet the goal, and the mean quality. It is compared with the best mixture of fixed numbers that has
the same mean number of tokens: two numbers, drawn without looking at the images. `gain` is the
difference, with its standard error over images; who wins, wins by more than twice that.

Criteria: psnr (dB); flow (the share of the loss that tokens explain; its quality is 1 - L(k) /
L(null)); read (1 where the small classifier of examples/digits reads the digit as the class that
it reads the original as).

A second table: the number of tokens predicted from the registers by ridge regression, in ten folds,
against the constant that is right most often in the other folds, and against the best mixture. Of
a grid of penalties it gets the best for the very folds it is judged by, in its favour.
"""

import argparse

import jax
import numpy as np

from examples.digits import arrays
from examples.digits.classifier import features, parameters
from flextok_jax import FlexTok, lengths
from flextok_jax.nn.images import psnr, to_float, to_uint8

COUNTS = (1, 2, 4, 8, 16)
BATCH = 99
TARGETS = {  # (name of the argument of `smallest`, value)
    "psnr": [("target", 18), ("target", 20), ("target", 22), ("within", 0.5), ("within", 1)],
    "flow": [("target", 0.7), ("target", 0.9), ("within", 0.05)],
    "read": [("target", 1)],
}
PENALTIES = (1, 10, 100, 1000, 10000)
FOLDS = 10
PREDICTED = [
    ("psnr", "target", 18), ("psnr", "target", 20), ("psnr", "within", 0.5),
    ("flow", "target", 0.9), ("flow", "within", 0.05),
]  # fmt: skip


def decoded_curves(tok: FlexTok, tokens, images, draws: range) -> dict[str, np.ndarray]:
    """{"psnr", "read"}: [draws, n, counts], by one noise for each image and draw."""
    shape = (len(draws), len(images), len(COUNTS))
    found = {"psnr": np.zeros(shape), "read": np.zeros(shape)}
    wanted = read(images)
    for d, draw in enumerate(draws):
        noise = jax.random.normal(jax.random.key(draw), (len(images), *tok.config.latent_shape))
        for c, k in enumerate(COUNTS):
            parts = [slice(i, i + BATCH) for i in range(0, len(images), BATCH)]
            made = [np.asarray(tok.detokenize(tokens[p], k, noise=noise[p])) for p in parts]
            made = to_uint8(np.concatenate(made))
            found["psnr"][d, :, c] = psnr(to_float(made), to_float(images))
            found["read"][d, :, c] = read(made) == wanted
    return found


def read(images) -> np.ndarray:
    """int [n], the classes that the classifier sees."""
    return np.argmax(features(parameters(), to_float(images))[1], axis=1)


def flow_curves(tok: FlexTok, tokens, images, draws: range) -> dict[str, np.ndarray]:
    """{"flow", "explained"}: [draws, n, counts], each the mean of 16 times and noises."""
    found = {"flow": [], "explained": []}
    for draw in draws:
        loss = []
        for k in (0, *COUNTS):
            keep = np.full(BATCH, k, np.int32)
            parts = [np.arange(i, i + BATCH) for i in range(0, len(images), BATCH)]
            loss.append(np.concatenate([
                lengths.flow_loss(
                    tok.params, tokens[p, :k], keep, p, to_float(images[p]), jax.random.key(draw),
                    tok.config, tok.compute, lengths.DRAWS,
                )
                for p in parts
            ]))  # fmt: skip
        null, *rest = loss
        gain = np.maximum(null - rest[-1], lengths.LEAST * null)
        found["flow"].append(np.stack([(null - x) / gain for x in rest], 1))
        found["explained"].append(np.stack([1 - x / null for x in rest], 1))
    return {name: np.stack(curves) for name, curves in found.items()}


def choose(curve, rule: str, **target):
    """`lengths.smallest` on a measured curve [n, counts]: (indices of counts [n], met [n])."""
    k, met, _ = lengths.smallest(
        lambda rows, k: curve[rows, COUNTS.index(k)], len(curve), COUNTS, rule=rule, **target
    )
    return np.searchsorted(COUNTS, k), met


def mixture(quality, mean: float) -> np.ndarray:
    """[n]: the expected quality of each image under the best mixture of two fixed numbers.

    Args:
        quality: [n, counts].
        mean: number of tokens of the mixture.
    """
    best = None
    for low in range(len(COUNTS)):
        for high in range(low, len(COUNTS)):
            if COUNTS[low] <= mean <= COUNTS[high]:
                weight = (mean - COUNTS[low]) / max(COUNTS[high] - COUNTS[low], 1)
                mixed = (1 - weight) * quality[:, low] + weight * quality[:, high]
                if best is None or mixed.mean() > best.mean():
                    best = mixed
    return best


def judge(quality, index) -> str:
    """Cells of a table: chosen, fixed, gain, who wins; of a quality [n, counts]."""
    mean = float(np.mean(np.array(COUNTS)[index]))
    chosen, fixed = quality[np.arange(len(index)), index], mixture(quality, mean)
    gain, error = np.mean(chosen - fixed), np.std(chosen - fixed) / np.sqrt(len(index))
    winner = "neither" if abs(gain) <= 2 * error else ("adaptive" if gain > 0 else "fixed")
    return f"{chosen.mean():.3f} | {fixed.mean():.3f} | {gain:+.3f} ± {error:.3f} | {winner}"


def qualities(fresh: dict, name: str, goal: str, value: float) -> tuple:
    """([n, counts] how often the goal is met with fresh noise, [n, counts] mean quality)."""
    curves = fresh[name]
    limit = value if goal == "target" else curves[:, :, -1:] - value
    mean = fresh["explained" if name == "flow" else name].mean(0)
    return (curves >= limit).mean(0), mean


def compare(chooser: dict, fresh: dict) -> None:
    """Prints the first table."""
    print(
        "| criterion | noises | goal | rule | tokens | met | meet again: chosen | fixed | gain "
        "| wins | quality: chosen | fixed | gain | wins |"
    )
    print("|---" * 14 + "|")
    for name, goals in TARGETS.items():
        for goal, value in goals:
            both = qualities(fresh, name, goal, value)
            for noises in (1, len(chooser[name])):
                curve = chooser[name][:noises].mean(0)
                for rule in lengths.RULES:
                    index, met = choose(curve, rule, **{goal: value})
                    mean = np.mean(np.array(COUNTS)[index])
                    times = lengths.DRAWS * noises if name == "flow" else noises
                    cells = " | ".join(judge(quality, index) for quality in both)
                    print(
                        f"| {name} | {times} | {goal} {value} | {rule} | {mean:.2f} "
                        f"| {met.mean():.0%} | {cells} |"
                    )


def ridge(x, y, new, penalty: float):
    """Ridge regression of y [n, m] on x [n, d], standardised, at `new` [l, d]: [l, m]."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    a, b = (x - mean) / scale, (new - mean) / scale
    weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ (y - y.mean(0)))
    return b @ weights + y.mean(0)


def predict(registers, chooser: dict, fresh: dict) -> None:
    """Prints the second table."""
    print(
        "| criterion | goal | best constant right | ridge right | tokens | meet again: ridge "
        "| fixed | gain | wins |"
    )
    print("|---" * 9 + "|")
    n = len(registers)
    folds = np.random.RandomState(0).permutation(n) % FOLDS
    for name, goal, value in PREDICTED:
        curve, results = chooser[name].mean(0), []
        right, _ = choose(curve, "first", **{goal: value})
        constant = np.zeros(n, int)
        for fold in range(FOLDS):
            constant[folds == fold] = np.bincount(right[folds != fold]).argmax()
        for penalty in PENALTIES:
            made = np.zeros_like(curve)
            for fold in range(FOLDS):
                learn = folds != fold
                made[~learn] = ridge(registers[learn], curve[learn], registers[~learn], penalty)
            index, _ = choose(made, "first", **{goal: value})
            results.append((np.mean(index == right), index))
        best, index = max(results, key=lambda found: found[0])
        meets, _ = qualities(fresh, name, goal, value)
        print(
            f"| {name} | {goal} {value} | {np.mean(constant == right):.0%} | {best:.0%} "
            f"| {np.mean(np.array(COUNTS)[index]):.2f} | {judge(meets, index)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-digits", help="a tokenizer of the digits")
    parser.add_argument("--draws", type=int, default=8, help="to choose, and fresh ones (8)")
    args = parser.parse_args()
    tok, images = FlexTok.from_pretrained(args.model), arrays("test")[0]
    tokens, registers = np.asarray(tok.tokenize(images)), np.asarray(tok.registers(images))
    sets = []
    for draws in (range(args.draws), range(args.draws, 2 * args.draws)):
        found = decoded_curves(tok, tokens, images, draws)
        sets.append(found | flow_curves(tok, tokens, images, draws))
    report(*sets, registers.reshape(len(registers), -1))


def report(chooser: dict, fresh: dict, registers) -> None:
    """Prints the means, and both tables."""
    for name, curves in fresh.items():
        means = ", ".join(f"{x:.3f}" for x in curves.mean((0, 1)))
        falls = [np.mean((np.diff(x, axis=1) < 0).any(1)) for x in (curves[0], curves.mean(0))]
        print(
            f"{name} at {COUNTS}: {means}; not monotone with one noise {falls[0]:.0%}, in the "
            f"mean of {len(curves)} {falls[1]:.0%} of the images"
        )
    for name, goal, value in PREDICTED:
        a, b = (choose(x[name][0], "first", **{goal: value})[0] for x in (chooser, fresh))
        print(f"{name}, {goal} {value}: another noise chooses otherwise for {np.mean(a != b):.0%}")
    compare(chooser, fresh)
    predict(registers, chooser, fresh)


if __name__ == "__main__":
    main()
