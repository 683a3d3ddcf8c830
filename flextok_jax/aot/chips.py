"""The TPUs that programs are compiled for.

Memory and rates: cloud.google.com/tpu/docs (system architecture of each version). The FLOPs of a
cycle are those of a chip's matrix units, and the clock is the peak over them. For v6e the number of
units is inferred: with it the compiler's estimates reach the same share of the memory's rate as on
the others (elementwise float32: 71 to 81 %). A product of matrices of side 8192 is estimated at
88 % (v5e), 90 % (v4, v5p) and 70 % (v6e) of the peak.
"""

import os
from typing import NamedTuple


class Chip(NamedTuple):
    """One kind of TPU.

    Attributes:
        memory: bytes of HBM per chip.
        peak: bfloat16 FLOP/s per chip.
        bandwidth: bytes/s of the HBM per chip.
        interconnect: bytes/s to other chips of the slice, all links together.
        mxu: side of a matrix unit.
        flops_per_cycle: of one chip.
    """

    memory: int
    peak: float
    bandwidth: float
    interconnect: float
    mxu: int
    flops_per_cycle: int

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak / self.flops_per_cycle


GIB = 2**30
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, 128, 262_144),
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, 128, 131_072),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, 128, 262_144),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9, 256, 524_288),
}


class Topology(NamedTuple):
    """A number of chips in a certain arrangement.

    Attributes:
        name: such as "v5e:4x4", or "2*v5e:4x4" for two slices.
        chip: their kind.
        devices: what a mesh is made of; they can compile but not run.
    """

    name: str
    chip: Chip
    devices: list

    @property
    def num_chips(self) -> int:
        """How many chips there are."""
        return len(self.devices)


def topology(name: str) -> Topology:
    """The devices of "KIND:AxB", "KIND:AxBxC" or, of several slices, "N*KIND:AxB".

    Raises:
        ValueError: an unknown kind or arrangement, or libtpu is missing.
    """
    from jax.experimental import topologies

    slices, _, shape = name.rpartition("*")
    kind = shape.partition(":")[0]
    if kind not in CHIPS or ":" not in shape or (slices and not slices.isdigit()):
        raise ValueError(
            f"topology {name!r}: KIND:AxB or N*KIND:AxB, such as v5e:4x4, v5p:2x2x4 or 2*v6e:4x4; "
            f"the kinds are {', '.join(CHIPS)}"
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # There is no TPU here to ask.
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # Nothing is locked by compiling.
    options = {"num_slices": int(slices)} if slices else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # As JAX sees a v4: its two cores are one device.
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    except Exception as error:  # The plugin raises whatever it likes.
        raise ValueError(
            f"topology {name!r}: {str(error).splitlines()[0]}\n(the TPU compiler comes with "
            "`pip install libtpu`; arrangements: cloud.google.com/tpu/docs)"
        ) from error
    return Topology(name, CHIPS[kind], list(found.devices))
