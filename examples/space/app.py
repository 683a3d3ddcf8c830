"""The page of `flextok demo` as a hosted Space; README.md says what lies beside this file.

The Space's variables MODEL and GENERATOR name other models than the shipped ones.
"""

import os

from flextok_jax import demo
from flextok_jax.commands.demo import run

if __name__ == "__main__":
    models = demo.load(os.environ.get("MODEL"), os.environ.get("GENERATOR"))
    run(models, host="0.0.0.0")
