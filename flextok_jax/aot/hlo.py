"""What a compiled TPU program does, read from its text: cycles, collectives, kernels.

Every fusion carries the compiler's estimate of its cycles. The body of a loop is printed once, so
each instruction is counted as often as the loops around it run. Waiting for other chips is not in
the estimates, nor are Pallas kernels: both are listed apart.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_CALLED = re.compile(r"(?:body|to_apply|calls|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))"
)


class Instruction(NamedTuple):
    """One line of the program.

    Attributes:
        text: the line.
        times: how often it runs in one call.
        open_loop: whether it is a loop whose rounds depend on data; its body is counted once.
        source: where it comes from, "decoder/blocks/mlp/fc1/dot_general"; "" if it is not said.
    """

    text: str
    times: int
    open_loop: bool
    source: str

    @property
    def cycles(self) -> int:
        """The compiler's estimate for all its runs, 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) * self.times if found else 0


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction that runs, inside loops and branches too."""
    computations, entry = _computations(text)

    def visit(name, times):
        for line in computations[name]:
            open_loop = False
            if " while(" in line:
                rounds = _rounds(computations, line)
                open_loop = rounds is None
                yield from visit(re.search(r"body=%?([\w.\-]+)", line)[1], times * (rounds or 1))
            elif " conditional(" in line:
                for several, one in _BRANCHES.findall(line):
                    for branch in (several or one).split(","):
                        yield from visit(branch.strip().lstrip("%"), times)
            elif re.search(r" (call|async-start)\(", line):
                called = _CALLED.search(line)
                if called and called[1] in computations:
                    yield from visit(called[1], times)
            elif " fusion(" in line:  # A collective may lie in one, together with its slicing.
                inside = computations.get(_CALLED.search(line)[1], ())
                for inner in filter(_COLLECTIVE.search, inside):
                    yield Instruction(inner, times, False, "")
            source = re.search(r'op_name="([^"]*)"', line)
            yield Instruction(line, times, open_loop, source[1] if source else "")

    return visit(entry, 1)


def _computations(text):
    """{name: lines}, and the name of the entry."""
    found, current, entry = {}, [], None
    for line in text.splitlines():
        # A line of a kernel's own text may look like anything but this.
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if header:
            current = found[header[2]] = []
            entry = header[2] if header[1] else entry
        else:
            current.append(line)
    return found, entry


def _rounds(computations, line):
    """How often a loop runs, None where data decides it."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
    bounds = re.findall(r" constant\((\d+)\)", "\n".join(computations[condition]))
    return max(map(int, bounds), default=None)


def open_loops(found: list[Instruction]) -> int:
    """How many loops were counted once because data decides how often they run."""
    return sum(instruction.open_loop for instruction in found)


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The results of an instruction: [("bf16", (8, 512)), ...]."""
    result = re.split(r" [a-z][\w\-]*\(", text.partition(" = ")[2], maxsplit=1)[0]
    return [
        (kind, tuple(int(n) for n in sizes.split(",") if n))
        for kind, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result)
        if kind in _BYTES
    ]


def size(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array."""
    return _BYTES[kind] * math.prod(shape)


def collectives(found: list[Instruction]) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of one call, bytes of the largest array of each on one device."""
    channels = {}
    for instruction in found:
        if _COLLECTIVE.search(instruction.text):
            # One that overlaps with computation is printed once for every piece of it.
            channel = re.search(r"channel_id=(\d+)", instruction.text)
            channels[channel[1] if channel else len(channels)] = instruction
    out = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for instruction in channels.values():
        row = out[_COLLECTIVE.search(instruction.text)[1]]
        largest = max((size(*shape) for shape in shapes(instruction.text)), default=0)
        row["count"] += instruction.times
        row["bytes"] += instruction.times * largest
    return dict(out)


class Kernel(NamedTuple):
    """A Pallas call.

    Attributes:
        flops: of one run.
        bytes: what one run reads and writes at least.
        head_dim: what its products sum over or make; None if it has none.
        times: how often it runs in one call.
    """

    flops: int
    bytes: int
    head_dim: int | None
    times: int


def kernels(found: list[Instruction]) -> list[Kernel]:
    """The Pallas calls.

    Raises:
        ValueError: one that is not known.
    """
    out = []
    for instruction in found:
        if 'custom_call_target="tpu_custom_call"' in instruction.text:
            name, times = instruction.text.split(" = ")[0], instruction.times
            cost = re.search(r'"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', instruction.text)
            own = re.search(r"(?:attention(?:_gradient)?_(\d+)|normalize|add_gated)", name)
            if not cost or not own:
                raise ValueError(f"a kernel that is not known: {instruction.text[:200]}")
            head_dim = own[1] and int(own[1])
            out.append(Kernel(int(cost[1]), int(cost[2]), head_dim, times))
    return out
