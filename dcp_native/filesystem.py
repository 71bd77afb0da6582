"""FileSystemReader: metadata read when looked at, data by the native reader; the rest is torch's.

Mirrors torch/distributed/checkpoint/filesystem.py.
"""

from __future__ import annotations

import os
import pickle
from typing import Any, Literal

from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystem,
    FileSystemBase,
    FileSystemWriter,
    SerializationFormat,
    _StorageInfo,
    _StoragePrefix,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from . import _native
from ._config import config
from ._lazy_metadata import lazy_read_metadata
from ._mirror import rest_of_torchs, stands_for
from ._plan_reads import PlanReads
from ._stock import filesystem as _torch

__all__ = [
    "DEFAULT_SUFFIX",
    "FileSystem",
    "FileSystemBase",
    "FileSystemReader",
    "FileSystemWriter",
    "SerializationFormat",
    "_StorageInfo",
    "_StoragePrefix",
    "_write_item",
]


_SLICE_FILE = _torch.FileSystemReader._slice_file


def place_reason(storage: Any) -> str | None:
    """None when the files of a reader or writer are plain ones of this machine, else why not."""
    if not config().native:
        return "config.native is off"
    if type(storage.fs) is not FileSystem:
        return f"the file system is a {type(storage.fs).__qualname__}"
    return None


def storage_reason(reader: _torch.FileSystemReader) -> str | None:
    """None when the native reader may read what a reader of files stands for, else why not."""
    if (reason := place_reason(reader)) is not None:
        return reason
    if type(reader.transforms) is not _torch._StorageReaderTransforms:
        return f"the reader's transforms are a {type(reader.transforms).__qualname__}"
    if getattr(reader._slice_file, "__func__", None) is not _SLICE_FILE:
        return "the reader's _slice_file is not torch's"
    return None


@stands_for(_torch.FileSystemReader)
class FileSystemReader(_torch.FileSystemReader):
    """Torch's reader; ``read_metadata`` gives a Metadata that is unpickled at the first touch.

    Loads natively under the same conditions as an instance of torch's own class.  Under torch's
    ``load``, or with a planner of the user's own, ``read_data`` reads natively: sorted, coalesced,
    in ranges, verified as configured.
    """

    _was_read: tuple[Metadata, bytes] | None = None  # what read_metadata gave, and its save ids
    _metadata: Metadata | None = None  # what it was set up with

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's Metadata, checked as a whole now and turned into objects when needed.

        Args:
            rank: read this rank's own ``__{rank}.metadata`` instead of ``.metadata``.

        Raises:
            OSError: as torch, when the file is absent or can not be read.
            pickle.UnpicklingError: the file is damaged; what and where.  With
                ``config.allow_unsafe_objects`` off, also at the touch of one that needs arbitrary
                code.
        """
        if not config().native:
            return super().read_metadata(*args, **kwargs)
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            image = file.read()
        lazy = lazy_read_metadata(image, os.fspath(path), self.load_id)
        self._was_read = (lazy, _native.save_ids(image))
        try:
            _native.check_metadata(image)
        except _native.NativeError as error:
            if error.dcp_code != "UNSUPPORTED":
                raise pickle.UnpicklingError(f"{path}: {error}") from error
            if config().allow_unsafe_objects:
                vars(lazy)  # only Python can tell whether it is whole
        return lazy

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """As torch's; also keeps ``metadata``, which says dtypes and sizes of what is stored."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._metadata = metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what ``plan`` names and hand it to ``planner``, as torch's; done when it returns.

        ``resolve_tensor`` is called for up to 256 MiB of tensors before ``commit_tensor`` is for
        the first of them; all hooks on the calling thread.

        Raises:
            KeyError, AssertionError: as torch, for a plan that does not fit the checkpoint.
            RuntimeError: a file is damaged, absent, or of another save; names the tensor.
        """
        if storage_reason(self) is not None:
            return super().read_data(plan, planner)
        self._plan_reads().run(plan, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _plan_reads(self, verify: bool | Literal["strict"] | None = None) -> PlanReads:
        metadata, saves = self._was_read or (None, b"")
        if metadata is not self._metadata:
            saves = b""
        return PlanReads(self, self._metadata, saves, verify)


__getattr__, __dir__ = rest_of_torchs(__name__)
