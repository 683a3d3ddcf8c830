"""From a step to its batch.

A batch is a pure function of (seed, step): the order of the examples and every augmentation follow
from them, for the global batch, of which a process makes its own rows only. So resuming is asking
for another step, and the global batch is the same for any number of processes.

    p = make_pipeline(config.data, seed=0, batch_size=256, train=True)
    p[1000]                         # the batch of step 1000
    for batch in p.iterate(1000):   # the same, then 1001, ..., made ahead of time by threads
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from flextok_jax.data import reader, sources
from flextok_jax.data.decode import reason
from flextok_jax.data.reader import Unreadable, UnreadableCount
from flextok_jax.data.source import LOOKED_AT, Source, log
from flextok_jax.data.transforms import NUM_DRAWS, Transform

CaptionArrays = Callable[[str | None], dict]  # A caption, or None -> arrays of an example.


def make_pipeline(
    cfg,
    *,
    seed: int,
    batch_size: int,
    train: bool,
    process_index: int | None = None,
    process_count: int | None = None,
    text: CaptionArrays | None = None,
    embedding: tuple[int, int] | None = None,
) -> "Pipeline":
    """Builds the pipeline that the `data` part of a config describes.

    Args:
        cfg: what `sources.make_source` and, for images, `transforms.Transform` read, and split,
            eval_split, max_unreadable.
        seed: of the order and the augmentations, 0 .. 2**32 - 1.
        batch_size: of the global batch.
        train: read `cfg.split`; otherwise `cfg.eval_split`.
        process_index, process_count: this process among all; those of JAX by default.
        text: what becomes of a caption, None: captions are not used.
        embedding: (T, E) of the embeddings of captions, which then are in a batch too.

    Raises:
        ValueError: the settings do not fit the data.
    """
    if process_index is None or process_count is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    source = sources.make_source(cfg, cfg.split if train else cfg.eval_split)
    for line in source.skipped.lines() if train else ():
        log.warning("%s: skipped %s", cfg.path, line)
    if embedding and all(source.embedding(i) is None for i in range(min(len(source), LOOKED_AT))):
        raise ValueError(
            f"{cfg.path}: no embedding of a caption beside the first {LOOKED_AT} images: make them "
            "with `flextok embed` (docs/data.md)"
        )
    if cfg.source in sources.ENCODED:
        examples = Crops.of(cfg.source, source, text, embedding)
    else:
        names = (field.name for field in dataclasses.fields(Transform))
        transform = Transform(**{name: getattr(cfg, name) for name in names})
        examples = Images(transform, text, cfg.paired, embedding)
    process = process_index, process_count
    return Pipeline(source, examples, seed, batch_size, process, cfg.max_unreadable)


@dataclasses.dataclass(frozen=True)
class Images:
    """How images become a batch: "image" uint8 [B, S, S, 3] and "label" int32 [B].

    With `captions` also the arrays that it makes of each. With `paired` an image is two of one size
    side by side, and the right half becomes "target", uint8 [B, S, S, 3], cropped and turned as the
    left one. With `embedding`, (T, E), also what `padded_text` makes of that of the caption. An
    example gets `num_draws` uniform random numbers in [0, 1).
    """

    transform: Transform
    captions: CaptionArrays | None = None
    paired: bool = False
    embedding: tuple[int, int] | None = None
    num_draws = NUM_DRAWS

    def without_randomness(self) -> "Images":
        return dataclasses.replace(self, transform=self.transform.without_randomness())

    def read(self, source: Source, index: int, draws: np.ndarray) -> dict | Unreadable:
        """One example. Raises ValueError where the settings do not fit the image."""
        found = reader.read(source, index, self.transform.least, bool(self.embedding))
        if isinstance(found, Unreadable):
            return found
        names = ("image", "target") if self.paired else ("image",)
        width, rest = divmod(found.image.width, len(names))
        try:
            if rest:
                raise ValueError(f"a pair is {found.image.width} pixels wide: must be even")
            parts = (
                found.image.crop((i * width, 0, (i + 1) * width, found.image.height))
                for i in range(len(names))
            )
            images = {n: self.transform.fit(part, draws) for n, part in zip(names, parts)}
            text = padded_text(found.embedding, self.embedding) if self.embedding else {}
        except ValueError as error:
            raise ValueError(f"{found.key}: {error}") from None
        text |= self.captions(found.caption) if self.captions else {}
        return images | {"label": np.int32(found.label), **text}

    def augment(self, batch: dict, draws: np.ndarray) -> dict:
        """What is done for a whole batch; draws: [B, num_draws]."""
        images = {name: batch[name] for name in ("image", "target") if name in batch}
        return batch | {n: self.transform.augment(x, draws) for n, x in images.items()}


@dataclasses.dataclass(frozen=True)
class Crops:
    """How records become a batch (as `Images`): one crop of each image.

    A batch holds the arrays of `names`, [B, ...] each ("tokens" int32, all others float16),
    "length" int32 [B] of tokens that have lengths, "label" int32 [B], and for a data set with text
    "text" float16 [B, T, E], "text_mask" bool [B, T]; in place of these with `captions` the arrays
    that it makes of each.

    It is a random crop, or crop 0, the plain one. `names` are the arrays that are wanted, `text` is
    (T, E) or None.
    """

    names: tuple[str, ...]
    text: tuple[int, int] | None
    captions: CaptionArrays | None = None
    random: bool = True
    num_draws = 1

    @classmethod
    def of(cls, kind: str, source, captions: CaptionArrays | None = None, embedding=None):
        """The tokens of a `shards.ShardSource`, or all its other arrays ("encoded")."""
        arrays = source.manifest["arrays"]
        names = tuple(name for name in arrays if (name == "tokens") == (kind == "tokens"))
        if not names:
            raise ValueError(f"data.source is {kind!r}, but the data has {', '.join(arrays)} only")
        return cls(names, None if captions else embedding or source.text, captions)

    def without_randomness(self) -> "Crops":
        return dataclasses.replace(self, random=False)

    def read(self, source, index: int, draws: np.ndarray) -> dict | Unreadable:
        try:
            record = source.record(index)
        except Exception as error:  # A damaged file breaks in any way there is.
            return Unreadable(source.key(index), reason(error))
        out = {"label": np.int32(record.label)}
        for name in self.names:
            crops = record.arrays[name]
            crop = crops[int(draws[0] * len(crops)) if self.random else 0]
            out[name] = crop.astype(np.int32 if name == "tokens" else np.float16)
        if source.has_lengths and "tokens" in out:
            most = len(out["tokens"])
            out["length"] = np.int32(most if record.length is None else record.length)
        if self.captions:
            return out | self.captions(record.caption)
        return out if self.text is None else out | padded_text(record.embedding, self.text)

    def augment(self, batch: dict, draws: np.ndarray) -> dict:
        return batch


def padded_text(embedding: np.ndarray | None, shape: tuple[int, int]) -> dict:
    """ "text": float16 [T, E] and "text_mask": bool [T]; longer ones are cut; None: all padding.

    Padding is zeros. Raises ValueError for other channels.
    """
    text, count = np.zeros(shape, np.float16), 0
    if embedding is not None:
        if embedding.shape[1] != shape[1]:
            raise ValueError(f"the embedding has {embedding.shape[1]} channels, not {shape[1]}")
        count = min(len(embedding), shape[0])
        text[:count] = embedding[:count]
    return {"text": text, "text_mask": np.arange(shape[0]) < count}


class Pipeline:
    """An endless sequence of batches, and one ordered pass for evaluation.

    Every epoch visits every example once, in an order of its own; an epoch may end inside a batch.

    Attributes:
        source: the examples.
        num_examples: how many there are.
        unreadable: {key: reason} of the examples that could not be read so far. Each is warned of
            once, and another one takes its place. A single one never stops a run; more than the
            share `max_unreadable` of all examples do, with the list.
    """

    def __init__(self, source, examples: Images | Crops, seed, batch_size, process, max_unreadable):
        self.source, self.num_examples = source, len(source)
        self.unreadable = UnreadableCount(len(source), max_unreadable)
        self._examples, self._seed, self._batch_size = examples, seed, batch_size
        self._process = process  # (index, count)
        self._local(batch_size)  # Refuses a size that does not divide.
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.RandomState([seed, int(epoch)]).permutation(len(source))
        )

    def __getitem__(self, step: int) -> dict:
        """The batch of `step`: this process's rows of what `Images` or `Crops` describe."""
        rows, shape = self._local(self._batch_size), (self._batch_size, self._examples.num_draws)
        # RandomState, because its streams are frozen: no NumPy release changes a run's data.
        draws = np.random.RandomState([self._seed, step, 1]).random_sample(shape)[rows]
        places = step * self._batch_size + np.arange(rows.start, rows.stop)
        indices = [self._order(epoch)[i] for epoch, i in zip(*np.divmod(places, self.num_examples))]
        examples = [self._read(*item, self._examples)[0] for item in zip(indices, draws)]
        return self._examples.augment(_stack(examples), draws)

    def iterate(self, start_step: int = 0) -> Iterator[dict]:
        """The batches from `start_step` on, each equal to `self[step]`, made ahead by threads."""
        return reader.ahead(self.__getitem__, itertools.count(start_step), reader.threads() + 4)

    def eval_batches(self, batch_size: int) -> Iterator[dict]:
        """Every example once, in the source's order and without randomness, also when training.

        "mask", bool [B_local], is False for rows that do not count: those that fill up the last
        batch, and unreadable examples. `batch_size` is global; every process yields as many.
        """
        rows, examples = self._local(batch_size), self._examples.without_randomness()
        draws = np.zeros((rows.stop - rows.start, examples.num_draws))

        def make(first: int) -> dict:
            indices = np.arange(first + rows.start, first + rows.stop)
            read = [self._read(i % self.num_examples, draws[0], examples) for i in indices]
            found, readable = zip(*read)
            mask = np.array(readable) & (indices < self.num_examples)
            return examples.augment(_stack(found), draws) | {"mask": mask}

        firsts = range(0, self.num_examples, batch_size)
        return reader.ahead(make, firsts, reader.threads() + 4)

    def _local(self, batch_size: int) -> slice:
        """This process's rows of a global batch."""
        index, count = self._process
        if batch_size < 1 or batch_size % count:
            raise ValueError(f"batch_size is {batch_size}; allowed: multiples of {count} processes")
        local = batch_size // count
        return slice(index * local, (index + 1) * local)

    def _read(self, index: int, draws: np.ndarray, examples) -> tuple[dict, bool]:
        """An example, and whether it is the one that was asked for: the first readable one."""
        found = examples.read(self.source, int(index), draws)
        if not isinstance(found, Unreadable):
            return found, True
        self.unreadable.add(found)
        for other in np.random.RandomState(index).permutation(self.num_examples):
            found = examples.read(self.source, int(other), draws)
            if not isinstance(found, Unreadable):
                return found, False
            self.unreadable.add(found)
        raise self.unreadable.error("not a single one")


def _stack(examples) -> dict:
    """Dictionaries of arrays as one, with a leading dimension."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
