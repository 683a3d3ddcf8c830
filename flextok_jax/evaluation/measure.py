"""Numbers about drawn images: each beside its original, and all of them beside real ones."""

import dataclasses

import numpy as np

from flextok_jax.evaluation import metrics, statistics
from flextok_jax.evaluation.chunks import Chunks
from flextok_jax.evaluation.networks import FeatureNetwork, Perceptual
from flextok_jax.evaluation.pictures import Pictures, from_uint8
from flextok_jax.evaluation.statistics import Gaussian, Moments

NEIGHBOURS = 3  # Of precision and recall.
SPLITS = 10  # Of the Inception score.


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the drawn images as a whole are compared with.

    Attributes:
        pictures: real images; None: the statistics alone.
        statistics: of a file, instead of those of the pictures.
    """

    pictures: Pictures | None
    statistics: Gaussian | None = None


@dataclasses.dataclass(frozen=True)
class Instruments:
    """The networks that images are looked at with; None leaves out what needs it."""

    features: FeatureNetwork | None = None
    perceptual: Perceptual | None = None

    def about(self) -> dict:
        """For the stamp."""
        return {
            "features": self.features and self.features.about,
            "perceptual": self.perceptual and self.perceptual.about,
        }

    def look(self, images: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """uint8 [n, S, S, 3] -> "features" [n, D] and "logits" [n, V], or nothing."""
        return self.features(images, batch_size) if self.features else {}

    def compare(
        self, images: np.ndarray, originals: np.ndarray, batch_size: int
    ) -> dict[str, np.ndarray]:
        """uint8 [n, S, S, 3] twice -> float64: psnr, mae, ssim, lpips [n], bands [n, bands]."""
        a, b = from_uint8(images), from_uint8(originals)
        found = metrics.compare(a, b)
        if self.perceptual:
            found["lpips"] = self.perceptual(images, originals, batch_size)
        return found | {"bands": metrics.error_by_frequency(a, b)}


def summarise(
    made: Chunks, real: Chunks, reference: Reference, instruments: Instruments, labels: np.ndarray
) -> dict:
    """The numbers of a point, from what is known of each image. Sums are float64.

    Args:
        made: chunks of `Instruments.look` and `Instruments.compare`, and "seconds".
        real: chunks of `Instruments.look`.
        labels: int [n], of the drawn images.

    Returns:
        "count"; means over images of what is there, and their "standard_errors"; "fid",
        "inception_score" (and its deviation), "precision", "recall", "accuracy"; "real_count",
        of the images compared with; "bands": the error by frequency; "seconds_per_image".
    """
    out = {"count": len(labels), "standard_errors": {}}
    there = made.read(0)
    for name in ("psnr", "mae", "ssim", "lpips"):
        if name in there:
            values = made.joined(name)
            out[name] = float(values.mean())
            out["standard_errors"][name] = float(values.std() / np.sqrt(len(values)))
    if "bands" in there:
        out["bands"] = made.joined("bands").mean(0).tolist()
    if instruments.features:
        out |= _of_features(made, real, reference, instruments.features, labels)
    return out | {"seconds_per_image": float(np.median(made.joined("seconds")))}


def codes(tokens: np.ndarray, vocab_size: int) -> dict:
    """int [n, k] -> the share of all ids that occur, and `metrics.code_usage` by position."""
    share = len(np.unique(tokens)) / vocab_size
    return {"codebook_usage": share, "codes": metrics.code_usage(tokens)}


def moments(chunks: Chunks) -> Moments | None:
    """Of all features; None of no chunks."""
    total = None
    for chunk in chunks:
        total = total or Moments.empty(chunk["features"].shape[1])
        total = total.add(chunk["features"])
    return total


def _of_features(made, real, reference, network, labels) -> dict:
    out, drawn, known, of_real = {}, moments(made), moments(real), reference.statistics
    if known is not None:
        out["real_count"] = known.count
        if of_real is None and known.count > 1:
            of_real = known.gaussian()
    if of_real is not None and drawn.count > 1:
        out["fid"] = statistics.fid(drawn.gaussian(), of_real)
    logits = made.joined("logits")
    if len(logits) >= SPLITS:
        score = statistics.inception_score(logits, SPLITS)
        out["inception_score"], out["inception_score_deviation"] = score
    if known is not None and min(len(logits), known.count) > NEIGHBOURS:
        sets = real.joined("features"), made.joined("features")
        out["precision"], out["recall"] = statistics.precision_recall(*sets, NEIGHBOURS)
    if network.classes:
        out["accuracy"] = float(np.mean(logits.argmax(1) == labels))
        if out.get("real_count"):
            right = real.joined("logits").argmax(1) == real.joined("labels")
            out["real_accuracy"] = float(np.mean(right))
    return out
