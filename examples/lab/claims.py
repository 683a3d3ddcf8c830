"""What is claimed of the variants of configs/lab.py, written before anything was trained."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Results = dict[str, dict]  # Of one seed: variant -> what `measuring.measure` found.


class Claim(NamedTuple):
    """What is claimed of a variant: that `margin` of the results of a seed is above 0."""

    variant: str
    sentence: str
    margin: Callable[[Results], float]


def _more(name: str, a: str, b: str, least: float = 0.0) -> Callable[[Results], float]:
    """Margin of "`name` of a is above that of b", or at most -`least` below it."""
    return lambda found: found[a][name] - found[b][name] - least


def _points(a: str, b: str, lost: float) -> Callable[[Results], float]:
    """Margin, in points (hundredths), of "a costs at most `lost` points of accuracy beside b"."""
    return lambda found: 100 * (found[a]["accuracy"] - found[b]["accuracy"]) + lost


def _rises(variant: str) -> Callable[[Results], float]:
    """Margin of "each doubling of the tokens has a higher PSNR": the smallest gain in dB."""
    return lambda found: float(np.min(np.diff(list(found[variant]["psnr by tokens"].values()))))


def _lost(result: dict) -> float:
    """How much accuracy, in points, a flow loses by fewer steps."""
    return 100 * (result["accuracy"] - result["accuracy of 2 steps"])


RISES = "Every doubling of the tokens adds to the PSNR (dB)"
NEEDS = "Tokens for one error follow the number of digits (rank correlation above 0.5)"
CLAIMS = (
    Claim(
        "one_pass",
        "One pass has a higher PSNR than a flow (dB)",
        _more("psnr", "one_pass", "flow"),
    ),
    Claim(
        "one_pass",
        "A flow is nearer to the distribution of images (Frechet distance)",
        _more("frechet", "one_pass", "flow"),
    ),
    Claim(
        "continuous",
        "Tokens of four numbers have a higher PSNR than ids (dB)",
        _more("psnr", "continuous", "flow"),
    ),
    Claim(
        "llamagen",
        "Tokens that see the whole image have a higher PSNR than a grid's (dB)",
        _more("psnr", "one_pass", "llamagen"),
    ),
    Claim(
        "imagefolder",
        "The codebook that follows features says more of the digit (points of a probe's accuracy)",
        lambda found: (
            100 * (found["imagefolder"]["probe last"] - found["imagefolder"]["probe first"])
        ),
    ),
    Claim(
        "imagefolder",
        "Two codebooks cost at most 0.5 dB beside one, for as many bits",
        _more("psnr", "imagefolder", "one_pass", -0.5),
    ),
    Claim("one_d_piece", RISES, _rises("one_d_piece")),
    Claim("elastictok", RISES, _rises("elastictok")),
    Claim("spectral", "Every scale adds to the PSNR (dB)", _rises("spectral")),
    Claim(
        "spectral",
        "A scale is at most 0.5 dB worse, at its own resolution, than all scales made smaller",
        lambda found: found["spectral"]["own resolution"] + 0.5,
    ),
    Claim("canvas", NEEDS, lambda found: found["canvas"]["correlation"] - 0.5),
    Claim("canvas_elastic", NEEDS, lambda found: found["canvas_elastic"]["correlation"] - 0.5),
    Claim("alit", NEEDS, lambda found: found["alit"]["correlation"] - 0.5),
    Claim(
        "alit",
        "Rounds follow the number of digits more closely than ordered tokens (rank correlation)",
        _more("correlation", "alit", "canvas"),
    ),
    Claim(
        "binformer",
        "Ink of worn pages is found better than by Sauvola's threshold (F-measure)",
        lambda found: found["binformer"]["f"] - found["binformer"]["sauvola"],
    ),
    Claim(
        "cleaner",
        "Sixteen ordered tokens find the ink better than Sauvola's threshold (F-measure)",
        lambda found: found["cleaner"]["f"] - found["cleaner"]["sauvola"],
    ),
    Claim(
        "textok",
        "Captions add to the PSNR of four tokens (dB)",
        _more("psnr", "textok", "textless"),
    ),
    Claim(
        "textok",
        "Captions of other canvases lower the PSNR (dB)",
        lambda found: found["textless"]["psnr"] - found["textok"]["psnr of others"],
    ),
    Claim(
        "tatitok",
        "A decoder that reads captions alone gains less than with the encoder (dB)",
        _more("psnr", "textok", "tatitok"),
    ),
    Claim(
        "pairs",
        "Two tokens at once lose what they say of each other (nats per token)",
        _more("loss", "pairs", "single"),
    ),
    Claim(
        "pairs",
        "Half the steps cost at most 2 points of accuracy",
        _points("pairs", "single", 2),
    ),
    Claim(
        "folded",
        "Half the positions cost at most 2 points of accuracy beside pairs",
        _points("folded", "pairs", 2),
    ),
    Claim(
        "doubling",
        "5 steps cost at most 5 points of accuracy beside 16",
        _points("doubling", "single", 5),
    ),
    Claim(
        "masked",
        "8 passes cost at most 2 points of accuracy beside 16 steps",
        _points("masked", "single", 2),
    ),
    Claim(
        "coarse",
        "Ids drawn at once lose what they say of each other (nats per token)",
        _more("loss", "coarse", "single"),
    ),
    Claim(
        "coarse",
        "Coarse ids first bring samples nearer to the images (Frechet distance)",
        _more("frechet", "single", "coarse"),
    ),
    Claim(
        "token_flow",
        "A flow over numbers costs at most 2 points of accuracy beside ids one by one",
        _points("token_flow", "single", 2),
    ),
    Claim(
        "flowtok",
        "From a text a flow loses less accuracy by 2 steps in place of 20 than from noise (points)",
        lambda found: _lost(found["token_flow"]) - _lost(found["flowtok"]),
    ),
)


def verdict(margins: list[float]) -> str:
    """ "shown" where the mean is more than two standard errors above 0, "contrary" below it.

    Else "not shown", and "one seed" of a single one.
    """
    if len(margins) < 2:
        return "one seed"
    mean, error = np.mean(margins), np.std(margins, ddof=1) / len(margins) ** 0.5
    return "shown" if mean > 2 * error else "contrary" if mean < -2 * error else "not shown"
