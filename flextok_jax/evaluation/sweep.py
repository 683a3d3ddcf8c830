"""A sweep: one set of pictures or samples, drawn and measured at many settings.

Everything is kept in one folder: `points/NAME.json` (a result with its stamp), `points/NAME.npz`
(its first images), `reference.npz` (mean and covariance of the real images' features) and `.work/`
(chunks of what is unfinished). A run that was stopped goes on; a folder of other settings is
refused; several processes may share one.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence

import numpy as np

from flextok_jax.evaluation import measure, npz_images, protocol, statistics
from flextok_jax.evaluation.chunks import Chunks
from flextok_jax.evaluation.measure import Instruments, Reference
from flextok_jax.evaluation.reconstruction import Sampling, side
from flextok_jax.evaluation.subjects import Point, Subject, digest, draw_point, missed
from flextok_jax.io import storage

SETTINGS, POINTS, WORK, REFERENCE = "settings.json", "points", ".work", "reference.npz"
SHARED = PREPARED, REAL = "prepared", "real"  # In WORK, beside a folder for each point.
SHOWN = 8  # Images of each point that are kept to be looked at.


def name(point: Point) -> str:
    """Of the files of a point: "k0016_steps20_guidance3"."""
    parts = [f"k{point.num_tokens:04d}", f"steps{point.steps}", f"guidance{point.guidance:g}"]
    if point.token_guidance is not None:
        parts.append(f"tokens{point.token_guidance:g}")
    return "_".join(parts)


def grid(
    counts: Sequence[int],
    guidances: Sequence[float],
    steps: Sequence[int],
    token_guidances: Sequence[float | None] = (None,),
) -> list[Point]:
    """Every combination; the numbers of tokens change fastest, so that a curve is soon there."""
    combinations = itertools.product(token_guidances, guidances, steps, sorted(counts))
    return [Point(k, g, s, t) for t, g, s, k in combinations]


def everything(out: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """All results in a folder, in order of their settings, and the first images of each.

    Returns:
        (results, {"images", and "originals" where there are: uint8 [n, S, S, 3]} of each).
    """
    files = (out / POINTS).glob("[!.]*.json")  # Those with a dot are being written, or were.
    found = [(storage.read_json(file), file) for file in files]
    axes = ("token_guidance", "guidance", "steps", "num_tokens")
    found.sort(key=lambda pair: [pair[0]["stamp"]["point"][axis] or 0 for axis in axes])
    pictures = []
    for _, file in found:
        with np.load(file.with_suffix(".npz"), allow_pickle=False) as arrays:
            pictures.append(dict(arrays))
    return [result for result, _ in found], pictures


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is drawn and measured where.

    Attributes:
        out: the folder; see above.
        stamp: what all points share; see `protocol.stamp`.
        subject: what is drawn.
        reference: real images to compare with.
        instruments: networks.
        sampling: the seed and the kind of guidance; steps and scale are the points'.
        process: (i, of n) that share the folder. The first one finishes results, when all chunks
            are there.
        export: an .npz file for the images of the only point; see `npz_images`.
    """

    out: pathlib.Path
    stamp: dict
    subject: Subject
    reference: Reference
    instruments: Instruments
    sampling: Sampling
    process: tuple[int, int] = (0, 1)
    export: pathlib.Path | None = None

    def run(self, points: Sequence[Point]) -> list[dict]:
        """Draws and measures what is not there yet.

        Returns:
            the results of the points that are finished: all, unless chunks of other processes are
            missing.

        Raises:
            ValueError: the folder has results of other settings or pictures, the pictures changed
                while it ran, or not one could be read.
        """
        from tqdm import tqdm

        self._claim()
        todo = [p for p in points if self.export or not self._path(p, "json").exists()]
        count = self.subject.count
        total = count * (len(points) + 1) + self._real.count
        with tqdm(total=total, unit="image", disable=None) as bar:
            bar.update(count * (len(points) - len(todo)))
            if todo:
                prepared = self._prepared
                self._retry()
                self._fill(prepared, bar, lambda i: self.subject.prepare(prepared.places(i)))
                self._fill(self._real, bar, self._look_at_real)
                self._check_pictures()
            for point in todo:
                chunks = self._chunks(point)
                self._warm_up(chunks, point)
                self._fill(chunks, bar, lambda i, point=point: self._measure(point, i))
                every = (self._prepared, self._real, chunks)
                if self.process[0] == 0 and not any(part.missing() for part in every):
                    self._finish(point, chunks)
                    if bar.disable:
                        print(f"{name(point)}: measured", file=sys.stderr, flush=True)
        found = [path for path in (self._path(p, "json") for p in points) if path.exists()]
        if self.process[0] == 0:
            self._tidy()
        return [json.loads(path.read_text(encoding="utf-8")) for path in found]

    def _tidy(self) -> None:
        """Removes what all points shared, where no point is unfinished."""
        work = self.out / WORK
        if all(path.name.startswith(SHARED) for path in work.glob("*")):
            shutil.rmtree(work, ignore_errors=True)

    @property
    def _prepared(self) -> Chunks:
        return Chunks(self.out / WORK / f"{PREPARED}_{self.subject.key}", self.subject.count)

    @property
    def _real(self) -> Chunks:
        pictures = self.reference.pictures
        return Chunks(self.out / WORK / REAL, 0 if pictures is None else len(pictures))

    def _chunks(self, point: Point) -> Chunks:
        """With all images, where they are to be exported, and only the first ones else."""
        folder = f"{name(point)}_images" if self.export else name(point)
        return Chunks(self.out / WORK / folder, self.subject.count)

    def _path(self, point: Point, ending: str) -> pathlib.Path:
        return self.out / POINTS / f"{name(point)}.{ending}"

    def _claim(self) -> None:
        """Makes the folder of this stamp, or sees that it is."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file: pass a folder")
        path, stamp = self.out / SETTINGS, json.loads(json.dumps(self.stamp))
        if path.exists():
            different = list(protocol.differences(storage.read_json(path), stamp))
            if different:
                lines = "".join(f"\n  {line}" for line in different)
                raise ValueError(
                    f"{self.out} holds results of other settings (there | now); pass another --out"
                    f", or delete it:{lines}"
                )
            return
        with storage.atomic(path) as temporary:
            temporary.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")

    def _retry(self) -> None:
        """Forgets chunks with unreadable pictures, unless something was drawn of them already."""
        if all(path.name.startswith(SHARED) for path in (self.out / WORK).glob("*")):
            for chunks in (self._prepared, self._real):
                for index in chunks.there(self.process):
                    if len(chunks.read(index)["unreadable"]):
                        chunks.forget(index)

    def _check_pictures(self) -> None:
        """Raises ValueError where none can be read, or they are not those of the results here."""
        if not self._prepared.missing() and not len(self._prepared.joined("labels")):
            lines = [f"\n  {name}: {why}" for name, why in list(self._unreadable().items())[:10]]
            count = self._prepared.count
            raise ValueError(f"not one of {count} images could be read:{''.join(lines)}")
        now = self._pixels()
        for path in (self.out / POINTS).glob("[!.]*.json"):
            then = storage.read_json(path)["stamp"]["pixels_sha256"]
            if now is not None and then not in (None, now):
                raise ValueError(
                    f"{path} was measured with other pictures than {self.reference.pictures.title} "
                    "has now: pass another --out, or delete that one"
                )

    def _pixels(self) -> str | None:
        """The sha256 over the pixels of all real pictures; None: not all are there, or none."""
        if self._real.missing() or not self._real.count:
            return None
        return hashlib.sha256(self._real.joined("sha256").tobytes()).hexdigest()

    def _fill(self, chunks: Chunks, bar, make: Callable[[int], dict]) -> None:
        missing = chunks.missing(self.process)
        bar.update(chunks.count - sum(len(chunks.places(index)) for index in missing))
        for index in missing:
            chunks.write(index, make(index))
            bar.update(len(chunks.places(index)))

    def _look_at_real(self, index: int) -> dict:
        places, size = self._real.places(index), side(self.subject.tok)
        readable, images, labels = self.reference.pictures.read(places, size)
        shown = images[: 0 if index else SHOWN]
        found = {"labels": labels, "sha256": digest(images), "images": shown}
        found |= missed(self.reference.pictures, places, readable)
        return found | self.instruments.look(images, self.subject.batch_size)

    def _warm_up(self, chunks: Chunks, point: Point) -> None:
        """Draws once, so that compiling is in nobody's seconds."""
        for index in chunks.missing(self.process)[:1]:
            have = {key: array[:1] for key, array in self._prepared.read(index).items()}
            draw_point(self.subject, have, point, self.sampling)

    def _measure(self, point: Point, index: int) -> dict:
        have = self._prepared.read(index)
        images, seconds = draw_point(self.subject, have, point, self.sampling)
        found = self.instruments.look(images, self.subject.batch_size)
        originals = self.subject.originals(have)
        if originals is not None:
            found |= self.instruments.compare(images, originals, self.subject.batch_size)
        kept = images if self.export else images[: 0 if index else SHOWN]
        about = {"seconds": seconds / self.subject.batch_size, "images": kept}
        return found | about | {"circumstances": np.array([json.dumps(protocol.circumstances())])}

    def _unreadable(self) -> dict[str, str]:
        """Name -> reason, of pictures that were to be drawn or compared with."""
        found = {}
        for chunks in (self._prepared, self._real):
            if chunks.count:
                names, reasons = (chunks.joined(part) for part in ("unreadable", "reasons"))
                found |= dict(zip(names.tolist(), reasons.tolist()))
        return found

    def _finish(self, point: Point, chunks: Chunks) -> None:
        """Writes the result of a point whose chunks are all there."""
        labels = self._prepared.joined("labels")
        numbers = measure.summarise(chunks, self._real, self.reference, self.instruments, labels)
        tokens = [self.subject.tokens(have, point) for have in self._prepared]
        tokens = np.concatenate(tokens)[:, : point.num_tokens]
        numbers |= measure.codes(tokens, self.subject.tok.config.vocab_size)
        stamp = {
            **self.stamp,
            "point": dataclasses.asdict(point),
            "pixels_sha256": self._pixels(),
            **protocol.together([json.loads(x) for x in chunks.joined("circumstances").tolist()]),
        }
        result = {
            "stamp": stamp,
            "metrics": numbers,
            "warnings": protocol.warnings(stamp, numbers),
            "unreadable": self._unreadable(),
        }
        if self.export:
            npz_images.write(self.export, (chunk["images"] for chunk in chunks), len(labels))
        if self.instruments.features and not (self.out / REFERENCE).exists():
            known = measure.moments(self._real)
            if known is not None and known.count > 1:
                statistics.write_gaussian(self.out / REFERENCE, known.gaussian())
        shown = {"images": chunks.read(0)["images"][:SHOWN]}
        if len(self._real):
            shown["originals"] = self._real.read(0)["images"]
        with storage.atomic(self._path(point, "npz")) as path, path.open("wb") as file:
            np.savez_compressed(file, **shown)
        with storage.atomic(self._path(point, "json")) as path:
            path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        chunks.delete()
