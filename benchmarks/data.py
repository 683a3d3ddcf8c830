"""Images per second of the data pipeline, beside a bare loop that decodes and crops.

    taskset -c 0 python -m benchmarks.data

JPEGs of ImageNet's usual size (500x375, quality 92), made from the photographs of scikit-image,
random resized crop to 256x256 with flip, batches of 64. The loop is one thread, of bytes in memory;
the pipeline (`data.pipeline`) reads the same images from a folder. They run in turn; medians of the
rounds, in seconds of CPU per image, which other load changes little.
"""

import argparse
import io
import pathlib
import tempfile
import time
import types

import numpy as np
from PIL import Image, ImageOps

from flextok_jax.data.decode import upright
from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.data.reader import threads
from flextok_jax.data.transforms import NUM_DRAWS, Transform

SIZE, BATCH, BATCHES = 256, 64, 3
NAMES = ("astronaut", "chelsea", "coffee", "rocket", "retina")  # Of scikit-image.


def jpegs(size) -> list[bytes]:
    """Photographs fitted to (width, height)."""
    from skimage import data

    out = []
    for name in NAMES:
        stream, photo = io.BytesIO(), Image.fromarray(getattr(data, name)())
        ImageOps.fit(photo, size, Image.Resampling.LANCZOS).save(stream, "JPEG", quality=92)
        out.append(stream.getvalue())
    return out


def pipeline_of(folder):
    """Training's pipeline over a folder."""
    config = types.SimpleNamespace(
        source="folder", path=folder, name="", split="all", eval_split="all", image_size=SIZE,
        crop="random", crop_scale=(0.08, 1.0), flip=True, quarter_turns=False, shift=0,
        rotate=0.0, zoom=0.0, color=0.0, max_unreadable=0.0, paired=False,
    )  # fmt: skip
    return make_pipeline(
        config, seed=0, batch_size=BATCH, train=True, process_index=0, process_count=1
    )


def cpu_seconds(call) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def wait_until_idle():
    """The threads of an iterator make some batches ahead after the last one was taken."""
    while cpu_seconds(lambda: time.sleep(0.1)) > 0.01:
        pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds (7)")
    rounds, files = parser.parse_args().rounds, jpegs((500, 375))
    transform = Transform(SIZE, "random", flip=True)
    draws = np.random.RandomState(0).random_sample((BATCHES * threads() * BATCH, NUM_DRAWS))

    def loop():
        for i, draw in enumerate(draws):
            transform.fit(upright(files[i % len(files)], transform.least), draw)

    times = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(8 * BATCH):
            pathlib.Path(folder, f"{i:04}.jpg").write_bytes(files[i % len(files)])
        steps = pipeline_of(folder).iterate()
        next(steps)
        for _ in range(rounds):
            wait_until_idle()  # Between two such moments as many batches are made as are taken.
            begin = time.process_time()
            for _ in range(BATCHES * threads()):
                next(steps)
            wait_until_idle()
            ours = time.process_time() - begin
            times.append((cpu_seconds(loop), ours))
    bare, ours = 1e3 * np.median(times, 0) / len(draws)
    print(f"{bare:.2f} ms of CPU per image in a bare loop, {ours:.2f} in the pipeline")
    print(f"the pipeline reaches {np.median([a / b for a, b in times]):.2f} of the loop's speed")


if __name__ == "__main__":
    main()
