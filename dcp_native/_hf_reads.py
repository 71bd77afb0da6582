"""What is read of Hugging Face checkpoints: headers of all files at once, ranges of their data."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from . import _native
from ._plan_reads import PlanReads, _Item

_HEADER_THREADS = 8
"""Headers that are read at a time: it is the latency of storage that they wait for."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Types of safetensors files that torch has; 4 and 6 bit ones it has not."""


class HeaderTensor(NamedTuple):
    """A tensor as a header has it; offset and length in bytes, from the file's start."""

    type: str
    shape: tuple[int, ...]
    offset: int
    length: int


class Header(NamedTuple):
    """A header that was checked."""

    path: str
    tensors: dict[str, HeaderTensor]  # by name, ascending
    texts: dict[str, str]  # ``__metadata__``
    identity: tuple[int, ...] | None  # of the file, before its header was read

    def dtype_of(self, name: str) -> torch.dtype:
        """The tensor's dtype.

        Raises:
            ValueError: it is of a type that torch has not.
        """
        text = self.tensors[name].type
        if text not in DTYPES:
            raise ValueError(f"{self.path}: {name} is of type {text}, which torch can not hold")
        return DTYPES[text]


def read_headers(paths: Iterable[str]) -> dict[str, Header]:
    """The headers of safetensors files, by path in the order given; nothing else of them is read.

    Raises:
        NativeError: a file is damaged; what and where.
        OSError: it can not be read.
    """
    paths = list(paths)
    if len(paths) <= 1:
        return {path: _read_header(path) for path in paths}
    with ThreadPoolExecutor(min(_HEADER_THREADS, len(paths)), "dcp_native-headers") as pool:
        return dict(zip(paths, pool.map(_read_header, paths), strict=True))


def _read_header(path: str) -> Header:
    identity = _identity(path)
    tensors, texts, _, _ = _native.read_safetensors_header(path)
    places = {name: HeaderTensor(*rest) for name, *rest in tensors}
    return Header(path, places, texts or {}, identity)


def _identity(path: str) -> tuple[int, ...] | None:
    """What another file under the name, or the same one rewritten, has not; None: there is none."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


class HFReads(PlanReads):
    """Reads plans from safetensors files: of every tensor only the rows that are wanted.

    Headers are read anew: where a tensor lies is a matter of the file as it is now.  They are read
    by name and so are the bytes, again for every window: that it was one file all the time is
    checked after each, before anything of it is committed.
    """

    def __init__(self, reader: FileSystemReader) -> None:
        super().__init__(reader, None, verify=False, raw=True)
        self._path = os.fspath(reader.path)
        self._headers: dict[str, Header] = {}
        self._chunks = self  # type: ignore[assignment]

    def run(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """As PlanReads'."""
        found = super()._info
        self._read_headers(found(item.storage_index).relative_path for item in plan.items)
        super().run(plan, planner)

    def find(self, index: MetadataIndex) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor as its file has it now."""
        header = self._headers[super()._info(index).relative_path]
        return header.dtype_of(index.fqn), header.tensors[index.fqn].shape

    def _read_headers(self, paths: Iterable[str]) -> None:
        self._headers.update(
            read_headers(dict.fromkeys(p for p in paths if p not in self._headers))
        )

    def _read(self, window: list[_Item]) -> None:
        super()._read(window)
        found = super()._info
        self._check_files(found(item.item.storage_index).relative_path for item in window)

    def _check_files(self, paths: Iterable[str]) -> None:
        """What was read now is of the files whose headers were read."""
        for path in dict.fromkeys(paths):
            if _identity(path) != self._headers[path].identity:
                raise RuntimeError(f"{path} was replaced while it was read; load again")

    def _info(self, index: MetadataIndex) -> _StorageInfo:
        storage: Any = super()._info(index)
        return self._place(storage, index.fqn)

    def _place(self, storage: _HFStorageInfo, fqn: str) -> _StorageInfo:
        path = storage.relative_path
        tensor = self._headers[path].tensors.get(fqn)
        if tensor is None:
            raise KeyError(f"{fqn} is not in {path}, which was replaced since its header was read")
        return _StorageInfo(os.path.relpath(path, self._path), tensor.offset, tensor.length)
