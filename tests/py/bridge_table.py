"""The table of dcp_bridge.h by ctypes: what `_bridge` gives to `_native`, called without it.

The structures repeat csrc/include/dcp_{bridge,comm,store,error}.h; test_bridge.py compares their
size with what the table says of itself.  Lists of numbers are read from the headers.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import re
from pathlib import Path
from typing import Any

import torch

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
CAPSULE = b"dcp_native._bridge.table"
NOT_A_TENSOR, PLAIN, SUBCLASS = range(3)

DTYPES = {
    getattr(torch, name): int(number)
    for number, name in re.findall(r'X\(\w+, (\d+), "(\w+)"', (INCLUDE / "dcp_dtype.h").read_text())
    if hasattr(torch, name)
}
"""enum dcp_dtype, as far as this torch has its types."""

Code = enum.IntEnum(
    "Code",
    [
        (name, int(value))
        for name, value in re.findall(r"X\((\w+), (-\d+),", (INCLUDE / "dcp_error.h").read_text())
    ],
)
"""enum dcp_code"""


class Flag(enum.IntFlag):
    """enum dcp_tensor_flags"""

    STRIDED = enum.auto()
    CONTIGUOUS = enum.auto()
    REQUIRES_GRAD = enum.auto()
    CONJ = enum.auto()
    NEG = enum.auto()
    HAS_MEMORY = enum.auto()
    CPU = enum.auto()
    CUDA = enum.auto()
    META = enum.auto()
    OVERLAPS = enum.auto()
    HAS_TYPE = enum.auto()


class Error(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_int32),
        ("sys_errno", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("offset_bytes", ctypes.c_uint64),
        ("path", ctypes.c_char * 512),
        ("message", ctypes.c_char * 1536),
    )


class TensorView(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("storage", ctypes.c_void_p),
        ("storage_bytes", ctypes.c_uint64),
        ("ndim", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("dtype", ctypes.c_uint16),
        ("device_index", ctypes.c_int16),
        ("item_bytes", ctypes.c_uint32),
    )


def collective(*arguments: Any) -> Any:
    """A function of struct dcp_comm or dcp_store: ctypes lets go of the GIL, as `_native` does."""
    return ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *arguments, ctypes.POINTER(Error))


class CommTable(ctypes.Structure):
    _fields_ = (
        ("ctx", ctypes.c_void_p),
        ("kind", ctypes.c_char_p),
        ("rank", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("all_reduce_min", collective(ctypes.POINTER(ctypes.c_int64), ctypes.c_size_t)),
        (
            "gather",
            collective(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
        ),
        ("all_gather", collective(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)),
        (
            "scatter",
            collective(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
        ),
        ("broadcast", collective(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)),
        ("destroy", ctypes.PYFUNCTYPE(None, ctypes.c_void_p)),
        ("acquire", ctypes.c_void_p),
        ("follow", ctypes.c_void_p),
        ("device_index", ctypes.c_int32),
    )


class StoreTable(ctypes.Structure):
    _fields_ = (
        ("ctx", ctypes.c_void_p),
        ("kind", ctypes.c_char_p),
        ("set", collective(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)),
        ("set_once", collective(ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)),
        (
            "get",
            collective(
                ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)
            ),
        ),
        ("add", collective(ctypes.c_char_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64))),
        ("check", collective(ctypes.c_char_p, ctypes.POINTER(ctypes.c_bool))),
        ("remove", collective(ctypes.c_char_p)),
        ("destroy", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


class NcclComm(ctypes.Structure):
    _fields_ = (
        ("raw", ctypes.c_void_p),
        ("rank", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("timeout_ns", ctypes.c_uint64),
    )


class BridgeTable(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("table_bytes", ctypes.c_uint32),
        ("torch_version", ctypes.c_char_p),
        (
            "tensor_view",
            ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(TensorView)),
        ),
        ("tensor_mutable_data", ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)),
        (
            "comm_from_group",
            ctypes.PYFUNCTYPE(
                ctypes.c_int,
                ctypes.py_object,
                ctypes.POINTER(CommTable),
                ctypes.POINTER(Error),
            ),
        ),
        (
            "store_from_group",
            ctypes.PYFUNCTYPE(
                ctypes.c_int,
                ctypes.py_object,
                ctypes.POINTER(StoreTable),
                ctypes.POINTER(Error),
            ),
        ),
        (
            "nccl_comm_of_group",
            ctypes.PYFUNCTYPE(
                ctypes.c_int,
                ctypes.py_object,
                ctypes.POINTER(NcclComm),
                ctypes.POINTER(Error),
            ),
        ),
    )


def table_of(module: Any) -> BridgeTable:
    """The table in the capsule of a `_bridge` module, which must stay alive."""
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return BridgeTable.from_address(get_pointer(module.table, CAPSULE))


@dataclasses.dataclass
class View:
    """A TensorView as Python values; None for a pointer that is NULL."""

    tensor_class: int
    data: int | None
    sizes: list[int] | None
    strides: list[int] | None
    storage: int | None
    storage_bytes: int
    flags: Flag
    dtype: int
    item_bytes: int


def view_of(table: BridgeTable, thing: Any) -> View:
    raw = TensorView()
    tensor_class = table.tensor_view(thing, raw)
    return View(
        tensor_class,
        raw.data,
        raw.sizes[: raw.ndim] if raw.sizes else None,
        raw.strides[: raw.ndim] if raw.strides else None,
        raw.storage,
        raw.storage_bytes,
        Flag(raw.flags),
        raw.dtype,
        raw.item_bytes,
    )


class CommError(Exception):
    """A call of the comm or store table failed."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message.decode())
        self.code = Code(error.code)
        self.rank = error.rank


class Comm:
    """A comm table as methods on uint8 tensors; raises CommError.  Collective but for close()."""

    def __init__(self, table: BridgeTable, process_group: Any) -> None:
        self.raw = CommTable()
        error = Error()
        if table.comm_from_group(process_group, self.raw, error) != 0:
            raise CommError(error)
        self.rank, self.size, self.kind = self.raw.rank, self.raw.size, self.raw.kind.decode()

    def close(self) -> None:
        self.raw.destroy(self.raw.ctx)
        self.raw.ctx = None

    def all_reduce_min(self, lanes: list[int]) -> list[int]:
        array = (ctypes.c_int64 * len(lanes))(*lanes)
        self._call("all_reduce_min", array, len(lanes))
        return list(array)

    def gather(self, root: int, send: torch.Tensor) -> torch.Tensor | None:
        here = self.rank == root
        recv = filler(self.size * send.numel()) if here else None
        self._call("gather", root, send.data_ptr(), recv.data_ptr() if here else None, send.numel())
        return recv

    def all_gather(self, send: torch.Tensor) -> torch.Tensor:
        recv = filler(self.size * send.numel())
        self._call("all_gather", send.data_ptr(), recv.data_ptr(), send.numel())
        return recv

    def scatter(self, root: int, send: torch.Tensor | None, length: int) -> torch.Tensor:
        recv = filler(length)
        address = None if send is None else send.data_ptr()
        self._call("scatter", root, address, recv.data_ptr(), length)
        return recv

    def broadcast(self, root: int, data: torch.Tensor) -> torch.Tensor:
        self._call("broadcast", root, data.data_ptr(), data.numel())
        return data

    def _call(self, name: str, *arguments: Any) -> None:
        error = Error()
        rc = getattr(self.raw, name)(self.raw.ctx, *arguments, error)
        if rc != 0:
            assert rc == error.code
            raise CommError(error)


class Store:
    """A store table as methods; raises CommError."""

    def __init__(self, table: BridgeTable, process_group: Any) -> None:
        self.raw = StoreTable()
        error = Error()
        if table.store_from_group(process_group, self.raw, error) != 0:
            raise CommError(error)

    def close(self) -> None:
        self.raw.destroy(self.raw.ctx)
        self.raw.ctx = None

    def set(self, key: str, value: bytes) -> None:
        self._call("set", key, value, len(value))

    def set_once(self, key: str, value: bytes) -> None:
        self._call("set_once", key, value, len(value))

    def get(self, key: str, most_bytes: int = 4096) -> bytes:
        buffer, length = ctypes.create_string_buffer(most_bytes), ctypes.c_size_t()
        self._call("get", key, buffer, most_bytes, length)
        return buffer.raw[: length.value]

    def add(self, key: str, delta: int) -> int:
        value = ctypes.c_int64()
        self._call("add", key, delta, value)
        return value.value

    def check(self, key: str) -> bool:
        there = ctypes.c_bool()
        self._call("check", key, there)
        return there.value

    def remove(self, key: str) -> None:
        self._call("remove", key)

    def _call(self, name: str, key: str, *arguments: Any) -> None:
        error = Error()
        rc = getattr(self.raw, name)(self.raw.ctx, key.encode(), *arguments, error)
        if rc != 0:
            assert rc == error.code
            raise CommError(error)


def filler(length: int) -> torch.Tensor:
    """Memory that holds none of the bytes that `pattern` makes."""
    return torch.full((length,), 255, dtype=torch.uint8)


def pattern(rank: int, length: int, salt: int) -> torch.Tensor:
    """The bytes that a rank sends."""
    period = ((torch.arange(251) * 7 + rank * 31 + salt * 11) % 251).to(torch.uint8)
    return period.repeat(length // 251 + 1)[:length].contiguous()
