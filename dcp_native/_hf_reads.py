"""What is read of Hugging Face checkpoints: headers of all files at once, ranges of their data."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from . import _native
from ._hf_layout import DTYPE_NAMES
from ._plan_reads import PlanReads, _Item

_HEADER_THREADS = 8
"""Headers that are read at a time: it is the latency of storage that they wait for."""

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
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
        self._name_of = functools.cache(lambda path: os.path.relpath(path, self._path))

    def run(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        """As PlanReads'."""
        self._read_headers(self._path_of(item.storage_index) for item in plan.items)
        super().run(plan, planner)

    def find(self, index: MetadataIndex) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of a tensor as its file has it now."""
        header = self._headers[self._path_of(index)]
        return header.dtype_of(index.fqn), header.tensors[index.fqn].shape

    def _read_headers(self, paths: Iterable[str]) -> None:
        self._headers.update(
            read_headers(dict.fromkeys(p for p in paths if p not in self._headers))
        )

    def _read(self, window: list[_Item]) -> None:
        super()._read(window)
        self._check_files(self._path_of(item.item.storage_index) for item in window)

    def _check_files(self, paths: Iterable[str]) -> None:
        """What was read now is of the files whose headers were read."""
        for path in dict.fromkeys(paths):
            if _identity(path) != self._headers[path].identity:
                raise RuntimeError(f"{path} was replaced while it was read; load again")

    def _path_of(self, index: MetadataIndex) -> str:
        """Of the file that a tensor lies in."""
        return super()._info(index).relative_path

    def _info(self, index: MetadataIndex) -> _StorageInfo:
        path = self._path_of(index)
        tensor = self._headers[path].tensors.get(index.fqn)
        if tensor is None:
            raise KeyError(
                f"{index.fqn} is not in {path}, which was replaced since its header was read"
            )
        return _StorageInfo(self._name_of(path), tensor.offset, tensor.length)
