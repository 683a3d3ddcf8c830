"""A sweep: one set of reconstructions or samples, measured at many settings, in one folder.

The folder holds `pictures.json` (a hash over all pixels that were read), `points/NAME.json` (a
result with its metadata), `points/NAME.npz` (some of its images) and `reference.npz` (moments of
the real images' features). A setting whose result is there is not measured again.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flextok_jax.conditions import Conditions
from flextok_jax.evaluation import environment, metrics, statistics
from flextok_jax.evaluation import reconstruction as rec
from flextok_jax.evaluation.networks import Networks
from flextok_jax.evaluation.pictures import Pictures, name_seeds
from flextok_jax.evaluation.statistics import FeatureSet, Gaussian
from flextok_jax.flow.sampler import Sampler
from flextok_jax.generator import ImageGenerator
from flextok_jax.io import storage
from flextok_jax.io.paths import is_remote
from flextok_jax.nn.images import to_uint8
from flextok_jax.parallel.sharding import padded
from flextok_jax.tokenizer import FlexTok

POINTS, READ, REFERENCE = "points", "pictures.json", "reference.npz"
SHOWN = 8  # Images of each setting that are kept for the report.
AXES = ("num_tokens", "guidance", "steps", "token_guidance")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A point of a sweep."""

    num_tokens: int
    guidance: float | None = None  # of the sampler; None: decoded in one pass
    steps: int | None = None  # as well
    token_guidance: float | None = None  # None: nothing is generated

    @property
    def name(self) -> str:
        """Of its files: "k0016_steps20_guidance3"."""
        others = {"steps": self.steps, "guidance": self.guidance, "tokens": self.token_guidance}
        parts = [f"{word}{value:g}" for word, value in others.items() if value is not None]
        return "_".join([f"k{self.num_tokens:04d}", *parts])


def grid(
    counts: Sequence[int],
    guidances: Sequence[float | None],
    steps: Sequence[int | None],
    token_guidances: Sequence[float | None] = (None,),
) -> list[Setting]:
    """Every combination; the numbers of tokens change fastest, so that a curve is soon there."""
    combinations = itertools.product(token_guidances, guidances, steps, sorted(counts))
    return [Setting(k, g, s, t) for t, g, s, k in combinations]


def results(out) -> tuple[list[dict], list[dict]]:
    """All results in a folder, in order of their settings, and some images of each.

    Returns:
        (results, {"images": uint8 [n, S, S, 3], "titles": str [n]; of reconstructions also
        "originals"} of each).
    """
    found = []
    for path in (out / POINTS).glob("[!.]*.json"):
        with (path.parent / f"{path.stem}.npz").open("rb") as file:
            found.append((storage.read_json(path), dict(np.load(file, allow_pickle=False))))
    found.sort(key=lambda pair: [pair[0]["metadata"]["setting"][a] or 0 for a in reversed(AXES)])
    return [result for result, _ in found], [pictures for _, pictures in found]


class Samples(NamedTuple):
    """What a generator samples."""

    gen: ImageGenerator
    conditions: Conditions  # n of them
    labels: np.ndarray  # int [n]: the classes that accuracy is measured by, -1 unknown
    how: dict  # arguments of `ImageGenerator.generate_tokens` beside the scale of guidance


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is measured, and with what."""

    out: pathlib.Path
    settings: dict  # what all settings share, in JSON terms, with "networks" and "reference"
    tok: FlexTok
    pictures: Pictures  # what is reconstructed, or what samples are compared with
    networks: Networks
    sampler: Sampler | None  # but for steps and scale; None: one pass
    seed: int = 0
    batch_size: int = 32
    samples: Samples | None = None  # None: reconstructions
    reference: Gaussian | None = None  # what FID compares with, instead of the pictures
    export: pathlib.Path | None = None  # an .npz for the images of one setting

    def run(self, settings: Sequence[Setting]) -> list[dict]:
        """Measures the settings whose results are not there; returns the results of all.

        The pictures are read, encoded and shown to the feature network once.

        Raises:
            ValueError: no picture can be read, they are not those of the folder's results, or
                images are not finite.
        """
        from tqdm import tqdm

        todo = [s for s in settings if self.export or not self._path(s, "json").exists()]
        if todo:
            count = len(self.samples.labels if self.samples else self.pictures)
            total = len(self.pictures) + len(todo) * count
            with tqdm(total=total, unit="image", disable=None) as bar:
                data = self._read(bar, max(setting.num_tokens for setting in todo))
                for setting in todo:
                    self._write(setting, data, *self._measure(setting, data, bar))
                    if bar.disable:
                        print(f"{setting.name}: measured", file=sys.stderr, flush=True)
        return [storage.read_json(self._path(s, "json")) for s in settings]

    def _path(self, setting: Setting, ending: str):
        return self.out / POINTS / f"{setting.name}.{ending}"

    def _on_disk(self, count: int) -> np.ndarray:
        """uint8 [count, S, S, 3] in a temporary file: many images do not fit into memory."""
        file = tempfile.TemporaryFile(dir=None if is_remote(self.out) else self.out)
        size = rec.side(self.tok)
        if hasattr(os, "posix_fallocate"):  # Else a full disk ends the process by a signal.
            os.posix_fallocate(file.fileno(), 0, count * size * size * 3)
        return np.memmap(file, np.uint8, "w+", shape=(count, size, size, 3))

    def _read(self, bar, num_tokens: int) -> types.SimpleNamespace:
        """Reads all pictures once, and encodes them where they are reconstructed.

        Returns names, labels, titles, seeds and tokens (by token guidance) of the images that are
        made, their originals or None, features of the real ones, and the hash of what was read.
        """
        most, digest = min(self.batch_size, len(self.pictures)), hashlib.sha256()
        names, labels, tokens, looked = [], [], [], []
        originals = None if self.samples else self._on_disk(len(self.pictures))
        for batch in self.pictures.batches(rec.side(self.tok), most):
            digest.update(batch.images.tobytes())
            if self.networks.features:
                looked.append(self.networks.features(batch.images, most))
            if originals is not None:
                originals[len(names) : len(names) + len(batch.names)] = batch.images
                tokens.append(rec.encode(self.tok, batch.images, num_tokens, most))
            names.extend(batch.names)
            labels.append(batch.labels)
            bar.update(len(batch.names))
        read = {"pixels_sha256": digest.hexdigest(), "read": len(names)}
        if (self.out / READ).exists():
            storage.same_or_refuse(self.out / READ, read, "results")
        labels = np.concatenate(labels)
        real = FeatureSet(*map(np.concatenate, zip(*looked)), labels) if looked else None
        data = types.SimpleNamespace(real=real, read=read, num_tokens=num_tokens, tokens={})
        if self.samples:
            data.titles, data.labels = self.samples.conditions.names, self.samples.labels
            data.names = [f"{i:06d}_{name}" for i, name in enumerate(data.titles)]
        else:
            data.names, data.labels = names, labels
            data.titles = [self.pictures.class_name(label) for label in labels]
            data.tokens[None] = np.concatenate(tokens)
        data.originals = originals
        data.seeds = name_seeds(data.names)
        count, size = len(data.names), self.batch_size
        data.batches = [slice(i, min(i + size, count)) for i in range(0, count, size)]
        data.shown = np.unique(np.linspace(0, count - 1, SHOWN).astype(int))
        return data

    def _tokens(self, setting: Setting, data) -> np.ndarray:
        """int32 [n, K] by a scale of token guidance, K the setting's number or more."""
        scale = setting.token_guidance
        if self.samples is None and self.tok.config.tokens.revised:
            k, tokens, images = setting.num_tokens, data.tokens[None], data.originals
            parts = (
                rec.tokens_for(self.tok, tokens[rows], images[rows], k, self.batch_size)
                for rows in data.batches
            )
            return np.concatenate(list(parts))
        if scale not in data.tokens:
            gen, conditions, _, how = self.samples
            options = (data.num_tokens, how | {"guidance_scale": scale}, self.seed, self.batch_size)
            parts = (
                rec.sample_tokens(gen, conditions.take(rows), data.seeds[rows], *options)
                for rows in data.batches
            )
            data.tokens[scale] = np.concatenate(list(parts))
        return data.tokens[scale]

    def _measure(self, setting: Setting, data, bar) -> tuple[dict, np.ndarray]:
        """(metrics, the images of `data.shown`)."""
        tokens, features = self._tokens(setting, data), self.networks.features
        changes = {"steps": setting.steps, "guidance_scale": setting.guidance}
        sampler = self.sampler and dataclasses.replace(self.sampler, **changes)
        size = self.batch_size
        made, looked, seconds = self._on_disk(len(data.names)), [], []

        def make(rows):
            options = (setting.num_tokens, data.seeds[rows], sampler, self.seed, size)
            return to_uint8(rec.decode(self.tok, tokens[rows], *options))

        def stream():
            make(slice(0, 1))  # Compiles.
            for rows in data.batches:
                start = time.perf_counter()
                images = made[rows] = make(rows)
                seconds.append((time.perf_counter() - start) / size)
                if features:
                    looked.append(features(images, size))
                if data.originals is not None:
                    both = (padded(x, size) for x in (images, data.originals[rows]))
                    yield "", *both, np.arange(size) < len(images)
                bar.update(len(images))

        functions = [metrics.compare, lambda a, b: {"bands": metrics.error_by_frequency(a, b)}]
        functions += [self.networks.perceptual] if self.networks.perceptual else []
        values = metrics.per_image(stream(), functions)
        if self.export:
            with storage.atomic(self.export) as temporary, temporary.open("wb") as file:
                np.savez(file, arr_0=made)
        found = {"count": len(data.names), "standard_errors": {}}
        if "bands" in values:
            found["bands"] = values.pop("bands").mean(0).tolist()
        for name, value in values.items():
            found[name] = float(value.mean())
            found["standard_errors"][name] = float(value.std() / np.sqrt(len(value)))
        if features:
            both = FeatureSet(*map(np.concatenate, zip(*looked)), data.labels), data.real
            found |= statistics.feature_metrics(*both, features.classes, self.reference)
        k = setting.num_tokens
        used = metrics.codes(tokens[:, :k], self.tok.config.vocab_size, [k])
        found |= {name: value.get(k, value) for name, value in used.items()}
        found["seconds_per_image"] = float(np.median(seconds))
        return found, made[data.shown]

    def _write(self, setting: Setting, data, found: dict, shown: np.ndarray) -> None:
        metadata = self.settings | {"setting": dataclasses.asdict(setting)}
        metadata["data"] = metadata.get("data", {}) | data.read
        metadata |= environment.environment()
        storage.same_or_refuse(self.out / READ, data.read, "results")
        if data.real is not None and len(data.real) > 1 and not (self.out / REFERENCE).exists():
            statistics.write_gaussian(self.out / REFERENCE, data.real.gaussian)
        arrays = {"images": shown, "titles": np.array([data.titles[i] for i in data.shown])}
        if data.originals is not None:
            arrays["originals"] = data.originals[data.shown]
        with storage.atomic(self._path(setting, "npz")) as path, path.open("wb") as file:
            np.savez_compressed(file, **arrays)
        warnings = environment.warnings(metadata, found)
        result = {"metadata": metadata, "metrics": found, "warnings": warnings}
        result["unreadable"] = self.pictures.unreadable
        storage.write_json(self._path(setting, "json"), result)
