"""Tensors out of a PyTorch file (`.pth`), without PyTorch, and without unpickling.

`pickletools` decodes the instructions of a pickle; the few that describe dictionaries of tensors
are followed, any other is refused. Nothing is imported or called by a name found in the file.

Both layouts are read: today's zip archive (`*/data.pkl` and one entry per storage) and the sequence
of pickles before version 1.6, as the published weights of VGG16 are.
"""

import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Where the layout before 1.6 begins: its magic number, then the version of the protocol.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_TYPES = {
    "DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "LongStorage": "<i8",
    "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip
# What a damaged file leads to; RuntimeError: an encrypted archive or an unknown compression.
_DAMAGE = (
    KeyError, IndexError, TypeError, AttributeError, OverflowError, struct.error, EOFError,
    MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_MARK = object()
_ARGUMENTS = {  # Instructions that push their argument.
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING",
    "BINFLOAT",
}  # fmt: skip
_PUSHED = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
           "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
           "MARK": lambda: _MARK}  # fmt: skip


def read(path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """The tensors of a file that holds a dictionary of them (a state dict), by name.

    Where that has another dictionary under "model", as files of training runs do, those of it.

    Args:
        path: of the file.
        wanted: name -> whether the tensor is read; of the others no byte is.

    Raises:
        ValueError: the file is damaged, or holds anything else but tensors, numbers and texts.
    """
    try:
        with path.open("rb") as file:
            archive = zipfile.is_zipfile(file)
            file.seek(0)
            tensors, data = (_read_zip if archive else _read_sequence)(file, wanted)
        return {name: _array(tensor, data) for name, tensor in tensors.items()}
    except _DAMAGE as error:
        reason = f"{type(error).__name__} {error}"
        raise ValueError(f"{path} is no whole PyTorch file of tensors: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Global(str):
    """A name in a file, "module name": never looked up."""


class _Tensor(NamedTuple):
    storage: tuple[str, np.dtype]  # the key of its bytes
    offset: int
    shape: tuple
    strides: tuple


def _array(tensor: _Tensor, data: dict[str, bytes]) -> np.ndarray:
    (key, dtype), offset, shape, strides = tensor
    flat = np.frombuffer(data[key], dtype)
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    count = math.prod(shape)  # Beyond the storage's: a small file would fill the memory.
    inside = count <= flat.size and (not count or last < flat.size)
    if not inside or min(offset, 0, *shape, *strides) < 0:
        raise ValueError(
            f"a tensor of shape {shape}, strides {strides}, offset {offset} is not inside of its "
            f"storage of {flat.size} elements"
        )
    steps = [s * flat.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, steps).copy()


def _tensors(found, wanted) -> tuple[dict[str, _Tensor], set[str]]:
    """(the wanted tensors of what a file describes, the keys of their storages)"""
    found = found["model"] if isinstance(found.get("model"), dict) else found
    tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, _Tensor)}
    if not tensors:
        raise ValueError("it holds no tensors")
    tensors = {name: tensor for name, tensor in tensors.items() if wanted(name)}
    return tensors, {tensor.storage[0] for tensor in tensors.values()}


def _read_zip(file, wanted):
    with zipfile.ZipFile(file) as archive:
        name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), "data.pkl")
        tensors, keys = _tensors(_run(archive.read(name), {}), wanted)
        root = name.removesuffix(".pkl")
        return tensors, {key: archive.read(f"{root}/{key}") for key in keys}


def _read_sequence(file, wanted):
    if _run(file, {}) != _MAGIC or _run(file, {}) != _PROTOCOL:
        raise ValueError("no PyTorch file")
    _run(file, {})  # Of the machine that wrote it.
    storages, data = {}, {}
    tensors, keys = _tensors(_run(file, storages), wanted)
    for key in _run(file, {}):  # In the order of the bytes that follow, each after its length.
        (count,) = struct.unpack("<q", file.read(8))
        size = count * storages[key].itemsize
        if key in keys:
            data[key] = file.read(size)
        else:
            file.seek(size, 1)
    return tensors, data


def _run(pickle, storages: dict):
    """The value that one pickle describes; storages are collected by their keys."""
    stack, memo = [], {}

    def since_mark():
        at = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for op, argument, _ in pickletools.genops(pickle):
        name = op.name
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _PUSHED:
            stack.append(_PUSHED[name]())
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            dict.update(stack[-1], zip(items[::2], items[1::2]))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            list.extend(stack[-1], items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_Global(argument))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_make(stack.pop(), arguments))
        elif name == "BUILD":
            stack.pop()  # Attributes of dictionaries and parameters: versions, whether trained.
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"the instruction {name} is not part of a dictionary of tensors")
    raise ValueError("the file ends too early")


def _storage(identity, storages: dict) -> tuple[str, np.dtype]:
    """("storage", type, key, device, number of elements[, view])"""
    kind, dtype, key, _, _, *view = identity
    module, _, short = str(dtype).rpartition(" ")
    if kind != "storage" or module != "torch" or short not in _TYPES or any(view):
        raise ValueError(f"a storage of the kind {identity!r} is not read")
    storages[key] = np.dtype(_TYPES[short])
    return key, storages[key]


def _make(name, arguments):
    """What a call in the file stands for: one of these few, built here."""
    if isinstance(name, _Global):
        if name == "collections OrderedDict":
            return dict(*arguments)
        if name in ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor"):
            return _Tensor(*arguments[:4])
        if name in ("torch._utils _rebuild_parameter", "torch.nn.parameter Parameter"):
            return arguments[0]
    raise ValueError(f"it wants to call {name!r}, which is no part of a dictionary of tensors")
