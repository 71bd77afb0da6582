"""What a load reads and only Python can finish: called by the reading thread while it reads."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from ._config import config
from ._lazy_metadata import unpickle

_COPIED_BYTES = 1 << 20
"""Records up to this are copied, which spares a Python call for each of their many small reads."""
_NAMED = (
    RuntimeError,
    NotImplementedError,
    TypeError,
    ValueError,
    AssertionError,
    pickle.UnpicklingError,
    EOFError,
    IndexError,
    KeyError,
)
"""Errors that can be raised anew with the tensor's name before their text."""


class Receiver:
    """Takes what the reader cannot put into place itself, and finishes it before it returns.

    So at most one record, one overlap that has to be copied whole and a slab of 1 MiB exist at a
    time.  Objects are kept and not set: a load that fails leaves the state dict's structure alone.
    """

    def __init__(self, reader: FileSystemReader, metadata: Callable[[], bytes]) -> None:
        self.values: dict[int, Any] = {}  # by target
        self._path = os.fspath(reader.path)
        self._transforms = reader.transforms
        self._metadata = metadata
        self._storage_data: dict[MetadataIndex, Any] | None = None
        self._devices: set[torch.device] = set()

    def piece(
        self,
        fqn: str,
        destination: torch.Tensor,
        slab: torch.Tensor,
        dtype: torch.dtype,
        bytes_count: int,
        lengths: tuple[int, ...],
        strides: tuple[int, ...],
        at: int,
    ) -> None:
        """Copy a box, dense in ``slab``, to where it lies in a plain strided tensor."""
        with self._copying(fqn, destination):
            source = slab[:bytes_count].view(dtype).view(lengths)
            offset = destination.storage_offset() + at
            destination.as_strided(lengths, strides, offset).copy_(source)

    def overlap(
        self,
        fqn: str,
        destination: torch.Tensor,
        source: torch.Tensor,
        offsets: tuple[int, ...],
        lengths: tuple[int, ...],
    ) -> None:
        """Copy the overlap of a chunk with the destination, as torch does: any class of tensor."""
        with self._copying(fqn, destination):
            narrow_tensor_by_index(destination, offsets, lengths).copy_(source)

    def record(
        self,
        fqn: str,
        destination: torch.Tensor,
        data: memoryview,
        transformed: bool,
        chunk: tuple[int, ...],
        chunk_offsets: tuple[int, ...],
        target_offsets: tuple[int, ...],
        lengths: tuple[int, ...],
    ) -> None:
        """Load a tensor that only torch can, and copy the part of it that is wanted."""
        index = MetadataIndex(fqn, torch.Size(chunk))
        with naming(fqn), self._opened(index, LoadItemType.TENSOR, data, transformed) as file:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        source = narrow_tensor_by_index(saved, chunk_offsets, lengths)
        with self._copying(fqn, destination):
            into = narrow_tensor_by_index(destination.detach(), target_offsets, lengths)
            if into.size() != source.size():
                raise AssertionError(f"req {index} mismatch sizes {into.size()} vs {source.size()}")
            into.copy_(source)

    def object(self, fqn: str, target: int, data: memoryview, transformed: bool) -> None:
        """Load an object and keep it for when everything was read."""
        index = MetadataIndex(fqn)
        opened = self._opened(index, LoadItemType.BYTE_IO, data, transformed)
        with opened as file, naming(fqn):
            self.values[target] = load_object(file, fqn)

    def settle(self) -> None:
        """Wait until the reading thread's copies are there: they are on a stream of its own."""
        for device in self._devices:
            torch.accelerator.synchronize(device)

    @contextlib.contextmanager
    def _copying(self, fqn: str, destination: torch.Tensor) -> Iterator[None]:
        """Copy into ``destination``, whose grad mode and inference mode belong to another thread,
        behind what the caller's streams still do to it."""
        device = destination.device
        if device.type != "cpu" and device not in self._devices and _is_accelerator(device):
            torch.accelerator.synchronize(device)
            self._devices.add(device)
        inference = torch.inference_mode() if destination.is_inference() else torch.no_grad()
        with naming(fqn), inference:
            yield

    @contextlib.contextmanager
    def _opened(
        self, index: MetadataIndex, kind: LoadItemType, data: memoryview, transformed: bool
    ) -> Iterator[IO[bytes]]:
        """The record as a seekable file, its transforms undone by the reader's own extensions."""
        with io.BytesIO(data) if len(data) <= _COPIED_BYTES else _Lent(data) as file:
            if not transformed:
                yield file
                return
            descriptors = self._info(index).transform_descriptors or ()
            none = torch.Size([])
            item = ReadItem(kind, index, none, index, none, none)
            with naming(index.fqn):
                stream = self._transforms.transform_load_stream(item, descriptors, file)
            if kind is LoadItemType.BYTE_IO or not stream.seekable():
                stream = io.BytesIO(stream.read(-1))
            yield stream

    def _info(self, index: MetadataIndex) -> Any:
        if self._storage_data is None:
            self._storage_data = unpickle(self._metadata(), self._path).storage_data
        return self._storage_data[index]


class _Lent(io.RawIOBase):
    """A file over memory that is lent for a while, without a copy of it."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), len(self._data) - self._at))
        view[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at


@contextlib.contextmanager
def naming(fqn: str) -> Iterator[None]:
    """What goes wrong names the tensor or object, once."""
    try:
        yield
    except _NAMED as error:
        if type(error) in _NAMED and not str(error).startswith(f"{fqn}: "):
            raise type(error)(f"{fqn}: {error}") from error
        raise


def _is_accelerator(device: torch.device) -> bool:
    current = torch.accelerator.current_accelerator()
    return current is not None and device.type == current.type


def load_object(file: IO[bytes], fqn: str) -> Any:
    """Deserialise a saved object: by the safe loader where it can, else as torch does.

    Raises:
        pickle.UnpicklingError: it needs arbitrary code and ``config.allow_unsafe_objects`` is off.
    """
    try:
        return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        if not config().allow_unsafe_objects:
            raise pickle.UnpicklingError(
                f"{fqn} is an object that only unsafe unpickling can load, and "
                f"config.allow_unsafe_objects is off: {error}"
            ) from error
    file.seek(0)
    return torch.load(file, weights_only=False)
