"""The text encoder: memory of Flan-T5-XL on a TPU chip, and prompts per second of Flan-T5-small.

    python -m benchmarks.text

Memory is what the TPU compiler says for one chip of a v5e (16 GiB), bfloat16, 256 prompts of 128
tokens; no TPU is needed. The time is of this machine, float32, random weights, 8 prompts of 16
tokens: the median of five calls.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.compile import GIB, topology
from flextok_jax.nn import t5
from flextok_jax.nn.config import Compute
from flextok_jax.nn.layout import unbox

SMALL = t5.T5Config(width=512, depth=8, num_heads=6, mlp_hidden=1024)


def tpu_memory(cfg: t5.T5Config, batch: int, length: int) -> dict[str, float]:
    """GiB on one v5e chip of `t5.encode` in bfloat16, by the compiler."""
    _, devices = topology("v5e:2x2")
    sharding = jax.sharding.SingleDeviceSharding(devices[0])

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = jax.tree.map(lambda x: array(x.shape, jnp.bfloat16), unbox(t5.shapes(cfg)))
    texts = array((batch, length), jnp.int32), array((batch, length), jnp.bool_)
    encode = jax.jit(t5.encode, static_argnums=(1, 2))
    program = encode.lower(params, cfg, Compute("bfloat16"), *texts).compile()
    found = program.memory_analysis()
    parts = {
        "parameters and prompts": found.argument_size_in_bytes,
        "result": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }
    return {name: size / GIB for name, size in parts.items()}


def prompts_per_second(cfg: t5.T5Config, batch: int, length: int) -> float:
    """Of `t5.encode` in float32 on the default device."""
    params = jax.jit(lambda key: unbox(t5.init(cfg, key)))(jax.random.key(0))
    ids, mask = np.ones((batch, length), np.int32), np.ones((batch, length), bool)
    encode = jax.jit(t5.encode, static_argnums=(1, 2))
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(encode(params, cfg, Compute(), ids, mask))
        seconds.append(time.perf_counter() - begin)
    return batch / float(np.median(seconds[1:]))  # The first one compiles.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    memory = tpu_memory(t5.T5Config(), 256, 128)
    words = ", ".join(f"{name} {size:.2f}" for name, size in memory.items())
    print(f"Flan-T5-XL on one v5e chip, 256 prompts of 128 tokens, GiB: {words}")
    print(f"Flan-T5-small on {jax.devices()[0].device_kind}, 8 prompts of 16 tokens: ", end="")
    print(f"{prompts_per_second(SMALL, 8, 16):.1f} prompts/s")


if __name__ == "__main__":
    main()
