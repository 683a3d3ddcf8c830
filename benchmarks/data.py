"""Images per second of the data pipeline, beside the bare decoder in a loop.

    taskset -c 0 python -m benchmarks.data
    python -m benchmarks.data --json data.json

JPEGs of ImageNet's usual size (500x375, quality 92, 4:2:0), made from the photographs of
scikit-image and scikit-learn, random resized crop to 256x256 with flip, batches of 64.

The limit is one thread that does nothing but decode and crop, of bytes in memory, times the cores
this process may use. Cores share caches and memory, so that many such loops at the same time, each
in a process of its own, are slower: that is the limit of the machine. The pipeline
(`data.pipeline`, its threads and batches) reads the same images from files in a folder. They run in
turn, round after round; medians, and the median of their ratio within a round; by the clock, and by
the seconds of CPU that were used (which other load changes less). Then the decoders: Pillow against
simplejpeg and OpenCV where they are installed, on the same images and on large photographs, whole
and scaled.
"""

import argparse
import functools
import io
import json
import multiprocessing
import pathlib
import tempfile
import time
import types

import numpy as np
from PIL import Image, ImageOps

from flextok_jax.data.decode import upright, upright_reduced
from flextok_jax.data.pipeline import make_pipeline, threads
from flextok_jax.data.reader import cores
from flextok_jax.data.transforms import NUM_DRAWS, Transform

SIZE, BATCH = 256, 64
ONE, ALL, OURS = "one loop", "a loop on each core", "pipeline"
NAMES = ("astronaut", "chelsea", "coffee", "rocket")  # Of scikit-image.


def jpegs(size, quality=92) -> list[bytes]:
    """Photographs fitted to (width, height)."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    found = [getattr(data, name)() for name in NAMES] + [data.stereo_motorcycle()[0], data.retina()]
    found += [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    out = []
    for photo in found:
        stream = io.BytesIO()
        image = ImageOps.fit(Image.fromarray(photo), size, Image.Resampling.LANCZOS)
        image.save(stream, "JPEG", quality=quality)
        out.append(stream.getvalue())
    return out


def pipeline_of(folder):
    """Training's pipeline over a folder."""
    config = types.SimpleNamespace(
        source="folder", path=folder, name="", split="all", eval_split="all", image_size=SIZE,
        crop="random", crop_scale=(0.08, 1.0), flip=True, quarter_turns=False, shift=0,
        rotate=0.0, zoom=0.0, color=0.0, max_unreadable=0.0,
    )  # fmt: skip
    return make_pipeline(
        config, seed=0, batch_size=BATCH, train=True, process_index=0, process_count=1
    )


def timed(call) -> np.ndarray:
    """Seconds by the clock and of CPU."""
    begin = time.perf_counter(), time.process_time()
    call()
    return np.array([time.perf_counter(), time.process_time()]) - begin


def pipeline_time(pipeline, batches: int) -> np.ndarray:
    """`timed` of so many batches, once the threads are busy.

    On few cores the threads end their batches nearly at once, so both numbers are multiples of
    their number.
    """
    steps = pipeline.iterate()
    for _ in range(threads()):
        next(steps)
    return timed(lambda: [next(steps)["label"] for _ in range(batches)])


def limit_time(files, draws) -> np.ndarray:
    """`timed` of one thread that decodes and crops."""
    transform = Transform(SIZE, "random", flip=True)

    def loop():
        for i, draw in enumerate(draws):
            transform.fit(upright(files[i % len(files)]), draw)

    return timed(loop)


def wait_until_idle():
    """The threads of an iterator make some batches ahead after the last one was taken."""
    while True:
        before = time.process_time()
        time.sleep(0.1)
        if time.process_time() - before < 0.01:
            return


def compare(rounds: int, batches: int) -> dict:
    """Prints and returns the pipeline's speed beside the limits'."""
    by_core = np.array([cores(), 1])  # Seconds by the clock are for all cores.
    files = jpegs((500, 375))
    batches *= threads()
    draws = np.random.RandomState(0).random_sample((batches * BATCH, NUM_DRAWS))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(8 * BATCH):
            pathlib.Path(folder, f"{i:04}.jpg").write_bytes(files[i % len(files)])
        pipeline, times = pipeline_of(folder), {name: [] for name in (ONE, ALL, OURS)}
        context = multiprocessing.get_context("spawn")
        with context.Pool(cores()) as pool:
            loop = functools.partial(limit_time, files, draws)
            every = functools.partial(pool.starmap, loop, [()] * cores(), 1)
            every()  # Once, for the imports.
            for _ in range(rounds):
                times[ONE].append(pool.apply(loop))
                times[ALL].append(np.mean(every(), 0) / by_core)
                times[OURS].append(pipeline_time(pipeline, batches))
                wait_until_idle()
    times = {name: np.array(rows) / len(draws) for name, rows in times.items()}
    limit = times[ONE] / by_core
    found = {"cores": cores(), "rounds": {name: rows.tolist() for name, rows in times.items()}}
    print(f"{cores()} cores{'':<33}{'by the clock':>14}{'of CPU':>10}")
    for words, rows, scale in (
        (f"ms per image: {ONE}", times[ONE], 1e3),
        (f"ms per image: {ALL}", times[ALL], 1e3),
        (f"ms per image: {OURS}", times[OURS], 1e3),
        (f"{ALL}, of {ONE} x cores", limit / times[ALL], 1),
        (f"{OURS}, of {ONE} x cores", limit / times[OURS], 1),
        (f"{OURS}, of {ALL}", times[ALL] / times[OURS], 1),
    ):
        found[words] = (scale * np.median(rows, 0)).tolist()
        print(f"{words:<40}{found[words][0]:>14.2f}{found[words][1]:>10.2f}")
    return found


def decoders() -> dict:
    """{name: (bytes, factor) -> RGB} of the libraries that are installed."""

    def pillow(data, factor):
        return upright_reduced(data, lambda size: factor)[0]

    found = {"Pillow": pillow}
    try:
        import simplejpeg

        def simple(data, factor):
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            least = {"min_height": height // factor, "min_width": width // factor}
            return simplejpeg.decode_jpeg(data, "RGB", **(least if factor > 1 else {}))

        found["simplejpeg"] = simple
    except ModuleNotFoundError:
        pass
    try:
        import cv2

        cv2.setNumThreads(1)
        whole, half, quarter = (
            cv2.IMREAD_COLOR, cv2.IMREAD_REDUCED_COLOR_2, cv2.IMREAD_REDUCED_COLOR_4,
        )  # fmt: skip

        def opencv(data, factor):
            how = {1: whole, 2: half, 4: quarter}[factor]
            return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), how), cv2.COLOR_BGR2RGB)

        found["OpenCV"] = opencv
    except ModuleNotFoundError:
        pass
    return found


def compare_decoders(rounds: int) -> list[dict]:
    """Prints and returns milliseconds of CPU per image of each library, size and factor."""
    transform = Transform(SIZE, "random")
    draws = np.random.RandomState(0).random_sample((8, NUM_DRAWS))
    rows = []
    print(f"\n{'ms of CPU':<14}{'size':>12}{'decode':>9}{'1/2':>9}{'1/4':>9}{'decode + crop':>15}")
    for size in ((500, 375), (2000, 1500)):
        files, calls = jpegs(size), {}
        for name, decode in decoders().items():
            for factor in (1, 2, 4):
                calls[name, factor] = lambda d=decode, f=factor: [d(file, f) for file in files]

            def crops(decode=decode):
                for file, draw in zip(files, draws):
                    transform.fit(upright(decode(file, 1)), draw)

            calls[name, "crop"] = crops
        times = {key: [] for key in calls}
        for _ in range(rounds):
            for key, call in calls.items():
                times[key].append(1e3 * timed(call)[1] / len(files))
        for name in decoders():
            row = {key: float(np.median(times[name, key])) for key in (1, 2, 4, "crop")}
            rows.append({"decoder": name, "size": size, **{str(k): v for k, v in row.items()}})
            numbers = "".join(f"{row[key]:>9.2f}" for key in (1, 2, 4))
            print(f"{name:<14}{size[0]:>7}x{size[1]}{numbers}{row['crop']:>15.2f}")
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds (7)")
    parser.add_argument("--batches", type=int, default=3, help="batches per thread and round (3)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers there")
    args = parser.parse_args()
    found = compare(args.rounds, args.batches)
    found["decoders"] = compare_decoders(args.rounds)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
