"""A sweep: one set of reconstructions or samples, measured at many settings, in one folder.

The folder holds `settings.json` (what all settings share), `pictures.json` (a hash over all pixels
that were read), `points/NAME.json` (a result with its metadata), `points/NAME.npz` (some of its
images) and `reference.npz` (mean and covariance of the real images' features). A setting whose
result is there is not measured again.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np

from flextok_jax.conditions import Conditions
from flextok_jax.evaluation import environment, metrics, statistics
from flextok_jax.evaluation.generation import TokenSampling, sample_tokens
from flextok_jax.evaluation.networks import Networks
from flextok_jax.evaluation.pictures import Pictures, name_seeds, to_uint8
from flextok_jax.evaluation.reconstruction import Sampler, decode, encode, padded, side
from flextok_jax.evaluation.statistics import FeatureSet, Gaussian
from flextok_jax.generator import ImageGenerator
from flextok_jax.io import storage
from flextok_jax.io.paths import is_remote
from flextok_jax.tokenizer import FlexTok

POINTS, READ, REFERENCE = "points", "pictures.json", "reference.npz"
SHOWN = 8  # Images of each setting that are kept for the report.
AXES = ("num_tokens", "guidance", "steps", "token_guidance")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A point of a sweep.

    Attributes:
        num_tokens: k.
        guidance, steps: of the sampler; None for a model that decodes in one pass.
        token_guidance: the scale of guidance of the tokens, None: nothing is generated.
    """

    num_tokens: int
    guidance: float | None = None
    steps: int | None = None
    token_guidance: float | None = None

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
    files = [path for path in (out / POINTS).glob("*.json") if not path.name.startswith(".")]
    found = [(storage.read_json(path), path) for path in files]
    found.sort(key=lambda pair: [pair[0]["metadata"]["setting"][a] or 0 for a in reversed(AXES)])
    pictures = []
    for _, path in found:
        with (path.parent / f"{path.stem}.npz").open("rb") as file:
            pictures.append(dict(np.load(file, allow_pickle=False)))
    return [result for result, _ in found], pictures


@dataclasses.dataclass(frozen=True)
class Samples:
    """What a generator samples.

    Attributes:
        conditions: one per sample.
        how: how tokens are sampled; the scale of guidance is the setting's.
        labels: int [n], the classes that accuracy is measured by, where there are some.
    """

    gen: ImageGenerator
    conditions: Conditions
    how: TokenSampling
    labels: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        names = self.conditions.names or ("sample",) * len(self.conditions)
        return [f"{i:06d}_{name}" for i, name in enumerate(names)]


@dataclasses.dataclass
class _Data:
    """What all settings share.

    Attributes:
        names: of the images that are made, whose noise they seed.
        labels: int [n] of them, -1 unknown.
        tokens: int32 [n, K] by the scale of token guidance, filled when first needed.
        originals: uint8 [n, S, S, 3] to compare with; None for samples.
        real: features of the pictures, None without a network.
        titles: names of their classes or conditions; may be empty.
        read: what was read, in JSON terms.
        num_tokens: K.
    """

    names: list[str]
    labels: np.ndarray
    tokens: dict
    originals: np.ndarray | None
    real: FeatureSet | None
    titles: Sequence[str]
    read: dict
    num_tokens: int

    @property
    def shown(self) -> np.ndarray:
        """Which images are kept for the report: int [SHOWN at most], over all of them."""
        return np.unique(np.linspace(0, len(self.names) - 1, SHOWN).astype(int))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is measured, and with what.

    Attributes:
        out: a path object; the folder of `results_folder`.
        settings: what all settings share, in JSON terms, with "networks" and "reference".
        pictures: what is reconstructed, or what samples are compared with.
        samples: None: reconstructions.
        sampler, seed: of the decoder; steps and scale are the settings'. None: one pass.
        reference: what FID compares with, instead of the pictures.
        export: an .npz file for the images of the only setting as the array `arr_0`, uint8
            [n, S, S, 3], which the evaluator of ADM reads.
    """

    out: pathlib.Path
    settings: dict
    tok: FlexTok
    pictures: Pictures
    networks: Networks
    sampler: Sampler | None
    seed: int = 0
    batch_size: int = 32
    samples: Samples | None = None
    reference: Gaussian | None = None
    export: pathlib.Path | None = None

    def run(self, settings: Sequence[Setting]) -> list[dict]:
        """Measures the settings whose results are not there; returns the results of all.

        The pictures are read, encoded and shown to the feature network once.

        Raises:
            ValueError: not one picture could be read, they are not those of results in the folder,
                or images are not finite.
        """
        from tqdm import tqdm

        todo = [s for s in settings if self.export or not self._path(s, "json").exists()]
        if todo:
            count = len(self.samples.conditions if self.samples else self.pictures)
            total = len(self.pictures) + len(todo) * count
            with tqdm(total=total, unit="image", disable=None) as bar, self._file() as file:
                data = self._read(file, bar, max(setting.num_tokens for setting in todo))
                for setting in todo:
                    self._write(setting, data, *self._measure(setting, data, bar))
                    if bar.disable:
                        print(f"{setting.name}: measured", file=sys.stderr, flush=True)
        return [storage.read_json(self._path(s, "json")) for s in settings]

    def _path(self, setting: Setting, ending: str):
        return self.out / POINTS / f"{setting.name}.{ending}"

    @contextlib.contextmanager
    def _file(self):
        """An open file without a name, for images that do not fit into memory."""
        folder = None if is_remote(self.out) else self.out
        with tempfile.TemporaryFile(dir=folder) as file:
            yield file

    def _read(self, file, bar, num_tokens: int) -> _Data:
        """Reads all pictures once, and encodes them where they are reconstructed."""
        size, generated = side(self.tok), self.samples is not None
        names, labels, tokens, looked = [], [], [], []
        digest = hashlib.sha256()
        most = max(1, min(self.batch_size, len(self.pictures)))
        for batch in self.pictures.batches(size, most):
            names.extend(batch.names)
            labels.append(batch.labels)
            digest.update(batch.images.tobytes())
            if self.networks.features:
                looked.append(self.networks.features(batch.images, most))
            if not generated:
                tokens.append(encode(self.tok, batch.images, num_tokens, most))
                file.write(batch.images.tobytes())
            bar.update(len(batch.names))
        read = {"pixels_sha256": digest.hexdigest(), "read": len(names)}
        if (self.out / READ).exists():
            storage.same_or_refuse(self.out / READ, read, "results")
        labels, real, originals = np.concatenate(labels), None, None
        titles = [self.pictures.class_name(label) for label in labels]
        if looked:
            real = FeatureSet(*map(np.concatenate, zip(*looked)), labels)
        if generated:
            names, tokens, labels = self.samples.names, {}, self.samples.labels
            titles = self.samples.conditions.names
            labels = np.full(len(names), -1) if labels is None else labels
        else:
            originals, tokens = _mapped(file, size), {None: np.concatenate(tokens)}
        return _Data(names, labels, tokens, originals, real, titles, read, num_tokens)

    def _tokens(self, setting: Setting, data: _Data) -> np.ndarray:
        """int32 [n, K]."""
        scale = setting.token_guidance
        if scale not in data.tokens:
            s, seeds, parts = self.samples, name_seeds(data.names), []
            how = dataclasses.replace(s.how, guidance=scale)
            for rows in self._batches(data):
                options = (seeds[rows], data.num_tokens, how, self.seed, self.batch_size)
                parts.append(sample_tokens(s.gen, s.conditions.take(rows), *options))
            data.tokens[scale] = np.concatenate(parts)
        return data.tokens[scale]

    def _batches(self, data: _Data) -> list[slice]:
        return [slice(i, i + self.batch_size) for i in range(0, len(data.names), self.batch_size)]

    def _measure(self, setting: Setting, data: _Data, bar) -> tuple[dict, np.ndarray]:
        """(metrics, the images of `data.shown`)."""
        seeds, features = name_seeds(data.names), self.networks.features
        tokens = self._tokens(setting, data)
        sampler, scale = self.sampler, setting.guidance
        if sampler is not None:
            sampler = dataclasses.replace(sampler, steps=setting.steps, guidance_scale=scale)
        options = (sampler, self.seed, self.batch_size)
        looked, seconds, shown = [], [], []

        def stream(file) -> Iterator[tuple]:
            decode(self.tok, tokens[:1], setting.num_tokens, seeds[:1], *options)  # Compiles.
            for rows in self._batches(data):
                start = time.perf_counter()
                images = decode(self.tok, tokens[rows], setting.num_tokens, seeds[rows], *options)
                seconds.append((time.perf_counter() - start) / self.batch_size)
                images = to_uint8(images)
                inside = data.shown[(data.shown >= rows.start) & (data.shown < rows.stop)]
                shown.append(images[inside - rows.start])
                if features:
                    looked.append(features(images, self.batch_size))
                if file is not None:
                    file.write(images.tobytes())
                if data.originals is not None:
                    mask = np.arange(self.batch_size) < len(images)
                    both = (padded(x, self.batch_size) for x in (images, data.originals[rows]))
                    yield "", *both, mask
                bar.update(len(images))

        functions = [metrics.compare, lambda a, b: {"bands": metrics.error_by_frequency(a, b)}]
        functions += [self.networks.perceptual] if self.networks.perceptual else []
        with self._file() as file:
            values = metrics.per_image(stream(file if self.export else None), functions)
            if self.export:
                with storage.atomic(self.export) as temporary, temporary.open("wb") as target:
                    np.savez(target, arr_0=_mapped(file, side(self.tok)))
        bands = values.pop("bands", None)
        found = {"count": len(data.names), "standard_errors": {}}
        for name, value in values.items():
            found[name] = float(value.mean())
            found["standard_errors"][name] = float(value.std() / np.sqrt(len(value)))
        if bands is not None:
            found["bands"] = bands.mean(0).tolist()
        if features:
            made = FeatureSet(*map(np.concatenate, zip(*looked)), data.labels)
            found |= statistics.feature_metrics(made, data.real, features.classes, self.reference)
        tokens = tokens[:, : setting.num_tokens]
        used = metrics.codes(tokens, self.tok.config.vocab_size, [setting.num_tokens])
        found |= {name: v.get(setting.num_tokens, v) for name, v in used.items()}
        found["seconds_per_image"] = float(np.median(seconds))
        return found, np.concatenate(shown)

    def _write(self, setting: Setting, data: _Data, found: dict, shown: np.ndarray) -> None:
        metadata = {
            **self.settings,
            "data": self.settings.get("data", {}) | data.read,
            "setting": dataclasses.asdict(setting),
            **environment.environment(),
        }
        result = {
            "metadata": metadata,
            "metrics": found,
            "warnings": environment.warnings(metadata, found),
            "unreadable": dict(self.pictures.unreadable),
        }
        storage.same_or_refuse(self.out / READ, data.read, "results")
        if data.real is not None and len(data.real) > 1 and not (self.out / REFERENCE).exists():
            statistics.write_gaussian(self.out / REFERENCE, data.real.gaussian)
        with storage.atomic(self._path(setting, "npz")) as path, path.open("wb") as file:
            arrays = {"images": shown}
            arrays["titles"] = np.array(
                [data.titles[i] for i in data.shown] if data.titles else [], np.str_
            )
            if data.originals is not None:
                arrays["originals"] = data.originals[data.shown]
            np.savez_compressed(file, **arrays)
        storage.write_json(self._path(setting, "json"), result)


def _mapped(file, size: int) -> np.ndarray:
    """The images that were written to a file, read from it as they are needed."""
    file.flush()
    return np.memmap(file, np.uint8, "r").reshape(-1, size, size, 3)
