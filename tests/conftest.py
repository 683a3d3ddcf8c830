"""Strict settings for every test, and shared data.

CPU, float32 matmuls, no implicit rank promotion, one compilation cache.
"""

import functools
import importlib.util
import io
import mmap
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def known(flag: str) -> bool:
    """Whether this jaxlib has a flag: an unknown one would end the process."""
    for path in pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent.glob("*.so"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if text.find(flag.encode()) >= 0:
                return True
    return False


# Tests compile much and run little: less optimised code is there sooner.
FLAGS = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    "xla_cpu_use_fusion_emitters": "false",
}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{k}={FLAGS[k]}" for k in FLAGS if known(k)))

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental import pallas  # noqa: E402

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"

jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed():
    """After each file: they hold memory maps, of which Linux gives a process 65,530."""
    yield
    jax.clear_caches()


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernels, run by XLA on a CPU."""
    call = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(pallas, "pallas_call", call)


@pytest.fixture(scope="session")
def golden():
    """The folder with the reference numbers."""
    return pathlib.Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def tiny_tfds(tmp_path_factory):
    """A data_dir with a real array_record data set of 30 + 10 digits, written by TFDS itself.

    Like the test split of ImageNet, its "test" has no labels: they are -1.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    from examples.digits import arrays

    def png(image):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "PNG")
        return stream.getvalue()

    class TinyDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny_digits"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "file_name": tfds.features.Text(),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            parts = {"train": (0, 30), "test": (30, 40)}
            return {name: self._generate_examples(*part) for name, part in parts.items()}

        def _generate_examples(self, start, stop):
            images, labels = arrays("train")
            for i in range(start, stop):
                label = int(labels[i]) if i < 30 else -1
                yield i, {"image": png(images[i]), "label": label, "file_name": f"{i}.png"}

    path = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TinyDigits(data_dir=path, file_format="array_record").download_and_prepare()
    return path
