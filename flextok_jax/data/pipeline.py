"""From a step to its batch.

A batch is a pure function of (seed, step): the order of the examples and every augmentation are
drawn from them, for the global batch, of which a process makes its own rows only. So resuming is
asking for another step, and the global batch is the same for any number of processes.

    p = make_pipeline(config.data, seed=0, batch_size=256, train=True)
    p[1000]                         # the batch of step 1000
    for batch in p.iterate(1000):   # the same, then 1001, ..., made ahead of time by threads
"""

import functools
import logging
import operator
import os
import threading
from collections.abc import Iterator

import grain
import numpy as np

from flextok_jax.data import sources
from flextok_jax.data.transforms import NUM_DRAWS, Transform

MAX_STEPS = 2**31 - 1
MAX_UNREADABLE_IN_A_ROW = 100

_log = logging.getLogger(__name__)


def make_pipeline(
    cfg,
    *,
    seed: int,
    batch_size: int,
    train: bool,
    process_index: int | None = None,
    process_count: int | None = None,
) -> "Pipeline":
    """Builds the pipeline that the `data` part of a config describes.

    Args:
        cfg: attributes source, path, name, split, eval_split, image_size, crop, crop_scale, flip,
            shift, rotate, zoom (see `sources.make_source` and `transforms.Transform`).
        seed: of the order and the augmentations, 0 .. 2**32 - 1.
        batch_size: of the global batch.
        train: read `cfg.split`, augmented as configured; otherwise `cfg.eval_split`, without
            randomness in the images.
        process_index, process_count: this process among all; those of JAX by default.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the config or the data, and the remedy.
    """
    if process_index is None or process_count is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    transform = Transform(
        image_size=cfg.image_size,
        crop=cfg.crop,
        crop_scale=tuple(cfg.crop_scale),
        flip=cfg.flip,
        shift=cfg.shift,
        rotate=cfg.rotate,
        zoom=cfg.zoom,
    )
    return Pipeline(
        sources.make_source(cfg, cfg.split if train else cfg.eval_split),
        transform if train else transform.without_randomness(),
        seed=seed,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


class Pipeline:
    """An endless sequence of batches, and one ordered pass for evaluation.

    Every epoch visits every example once, in an order of its own; an epoch may end inside a batch.

    Attributes:
        source: the examples.
        num_examples: how many there are.
        unreadable: name → reason of the images that could not be read so far. Each was named once
            by a warning, and the next readable one stands in for it.
    """

    def __init__(
        self,
        source,
        transform: Transform,
        *,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; allowed: 0 .. 2**32 - 1.")
        if not len(source):
            raise ValueError("The split holds no examples; choose another one in data.split.")
        self.source = source
        self.num_examples = len(source)
        self.unreadable: dict[str, str] = {}
        self._transform = transform
        self._seed = seed
        self._batch_size = batch_size
        self._process = process_index, process_count
        self._local(batch_size)  # Refuses a size that does not divide.
        self._lock = threading.Lock()
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def __getitem__(self, step: int) -> dict:
        """The batch of `step`: image uint8 [B_local, S, S, 3], label int32 [B_local]."""
        step = operator.index(step)
        if not 0 <= step < MAX_STEPS:
            raise IndexError(f"step is {step}; allowed: 0 .. {MAX_STEPS - 1}.")
        rows = self._local(self._batch_size)
        # RandomState, because its streams are frozen: no NumPy release changes a run's data.
        draws = np.random.RandomState([self._seed, step, 1]).random_sample(
            (self._batch_size, NUM_DRAWS)
        )[rows]
        epochs, offsets = np.divmod(
            step * self._batch_size + np.arange(rows.start, rows.stop), self.num_examples
        )
        indices = np.concatenate([self._order(e)[offsets[epochs == e]] for e in np.unique(epochs)])
        images, labels, _ = zip(*map(self._read, indices, draws))
        return {
            "image": self._transform.augment(np.stack(images), draws),
            "label": np.array(labels, np.int32),
        }

    def iterate(self, start_step: int = 0) -> Iterator[dict]:
        """The batches from `start_step` on, each equal to `self[step]`, made ahead by threads."""
        return _prefetch(grain.MapDataset.range(start_step, MAX_STEPS).map(self.__getitem__))

    def eval_batches(self, batch_size: int) -> Iterator[dict]:
        """Every example once, in the source's order and without randomness, also when training.

        Args:
            batch_size: of the global batch.

        Yields:
            image uint8 [B_local, S, S, 3], label int32 [B_local], mask bool [B_local]. The mask is
            False for the padding of the last batch and for unreadable images; every process yields
            the same number of batches.
        """
        rows = self._local(batch_size)
        transform = self._transform.without_randomness()
        size, no_draws = transform.image_size, np.zeros(NUM_DRAWS)
        padding = np.zeros((size, size, 3), np.uint8), -1, False

        def make(batch: int) -> dict:
            indices = batch * batch_size + np.arange(rows.start, rows.stop)
            images, labels, mask = zip(
                *(
                    self._read(i, no_draws, transform) if i < self.num_examples else padding
                    for i in indices
                )
            )
            return {
                "image": np.stack(images),
                "label": np.array(labels, np.int32),
                "mask": np.array(mask),
            }

        return _prefetch(grain.MapDataset.range(-(-self.num_examples // batch_size)).map(make))

    def _local(self, batch_size: int) -> slice:
        """This process's rows of a global batch."""
        index, count = self._process
        if batch_size < 1 or batch_size % count:
            raise ValueError(
                f"batch_size is {batch_size}; allowed: positive multiples of {count}, the number "
                "of processes."
            )
        local = batch_size // count
        return slice(index * local, (index + 1) * local)

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of one epoch (8 bytes per example)."""
        return np.random.RandomState([self._seed, int(epoch)]).permutation(self.num_examples)

    def _read(self, index: int, draws: np.ndarray, transform: Transform | None = None):
        """Image uint8 [S, S, 3], label, and False where the next readable image had to stand in."""
        for tried in range(min(self.num_examples, MAX_UNREADABLE_IN_A_ROW)):
            index_tried = int((index + tried) % self.num_examples)
            try:
                example = self.source[index_tried]
                image = example["image"]
                if isinstance(image, bytes):
                    image = sources.decode_image(image)
            except Exception as error:  # Pillow raises nearly anything for a broken file.
                self._record(self.source.name(index_tried), error)
                continue
            try:
                image = (transform or self._transform).fit(image, draws)
            except ValueError as error:
                raise ValueError(f"{self.source.name(index_tried)}: {error}") from None
            return image, example["label"], tried == 0
        raise self._too_many(f"the last {tried + 1} tried in a row")

    def _record(self, name: str, error: Exception) -> None:
        with self._lock:
            if name in self.unreadable:
                return
            self.unreadable[name] = f"{type(error).__name__}: {error}"
            count = len(self.unreadable)
        _log.warning("Unreadable image %d, skipped: %s (%s)", count, name, self.unreadable[name])
        if 2 * count > self.num_examples:
            raise self._too_many("more than half")

    def _too_many(self, which: str) -> RuntimeError:
        first = "\n".join(f"  {n} ({r})" for n, r in list(self.unreadable.items())[:10])
        return RuntimeError(
            f"Of {self.num_examples} images, {which} could not be read. Remove or repair them, or "
            f"check that data.path is right. So far {len(self.unreadable)} were unreadable, among "
            f"them\n{first}"
        )


def _prefetch(dataset: grain.MapDataset) -> Iterator[dict]:
    # A batch is made by one thread, so decoding on a large host needs as many threads as cores; on
    # a small one a few still hide the reading of files.
    threads = min(max(os.cpu_count() or 1, 4), 32)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 4)
    return iter(dataset.to_iter_dataset(options))
