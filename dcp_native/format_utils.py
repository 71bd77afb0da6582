"""Checkpoints to torch.save files and back, streamed: no more than one tensor is in memory.

Mirrors torch/distributed/checkpoint/format_utils.py.

    python -m dcp_native.format_utils dcp_to_torch DIRECTORY FILE
    python -m dcp_native.format_utils torch_to_dcp FILE DIRECTORY
"""

from __future__ import annotations

import argparse
import bisect
import enum
import os
from typing import IO, Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import DynamicMetaLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from . import _native, _torch_file
from ._broadcast import BroadcastingTorchSaveReader
from ._config import DIRECT_IO, IO_URING, config
from ._failures import raise_alone
from ._find_latest import _METADATA
from ._groups import group_for
from ._lazy_metadata import unpickle
from ._mirror import rest_of_torchs
from ._progress import Counted, unwatched
from ._report import logger
from ._stock import format_utils as _torch
from .state_dict_loader import _load_state_dict
from .state_dict_saver import _save

__all__ = [
    "BroadcastingTorchSaveReader",
    "DynamicMetaLoadPlanner",
    "FormatMode",
    "_EmptyStateDictLoadPlanner",
    "dcp_to_torch_save",
    "torch_save_to_dcp",
]

_torch_dcp_to_torch_save = _torch.dcp_to_torch_save
_RETRY_CODES = ("NOENT", "STALE")
"""What a reader meets when a newer save committed and swept while it was reading."""
_TRIES = 10
"""How many checkpoints in a row may be replaced under us."""
_FETCH_BYTES = 8 << 20
"""Small tensors that have to be assembled are loaded together up to this much."""


class FormatMode(enum.Enum):
    """The command line's two directions."""

    TORCH_TO_DCP = "torch_to_dcp"
    DCP_TO_TORCH = "dcp_to_torch"


def dcp_to_torch_save(
    dcp_checkpoint_dir: str | os.PathLike,
    torch_save_path: str | os.PathLike,
) -> None:
    """Write a checkpoint as one file for ``torch.load``; mirrors torch's function of this name.

    Call it on one rank.  Tensors are streamed and verified on the way (``config.verify``); those
    whose chunks are not whole rows are put together one at a time.  What ``torch_save_path`` held
    stays until the new file is whole.

    Args:
        dcp_checkpoint_dir: the checkpoint.
        torch_save_path: the file to make, or to replace.

    Raises:
        CheckpointException: the checkpoint can not be read; as torch's load of it.
        OSError: the file can not be written.
    """
    if not config().native or not _torch_file.is_file_to_write(torch_save_path):
        _torch_dcp_to_torch_save(dcp_checkpoint_dir, torch_save_path)
        return
    source = os.fspath(dcp_checkpoint_dir)
    for tries_left in reversed(range(_TRIES)):
        image, path = _read_metadata(source)
        try:
            _Conversion(source, image, path).write(torch_save_path)
            return
        except Exception as error:
            code = getattr(error, "dcp_code", None)
            if code == "UNSUPPORTED":
                logger.info("torch's own dcp_to_torch_save runs: %s", error)
                _torch_dcp_to_torch_save(dcp_checkpoint_dir, torch_save_path)
                return
            replaced = isinstance(error, _Replaced) or code in _RETRY_CODES
            if tries_left == 0 or not replaced or _read_metadata(source)[0] == image:
                raise
        logger.info("%s was replaced while it was read; reading the new checkpoint", source)


class _Replaced(RuntimeError):
    """A newer save committed while parts of the checkpoint were read."""


def _read_metadata(source: str) -> tuple[bytes, str]:
    """The metadata file, as a load by rank 0 alone would find it, and its path."""
    error: OSError | None = None
    for name in _METADATA:
        path = os.path.join(source, name)
        try:
            with open(path, "rb") as file:
                return file.read(), path
        except OSError as caught:
            error = error or caught
    raise_alone("read metadata", 0, error)


class _Conversion:
    """One checkpoint, as it was when its metadata was read."""

    def __init__(self, source: str, image: bytes, path: str) -> None:
        self.source = source
        self.image = image
        self.path = path
        self.metadata: Metadata = unpickle(image, path)
        self.entries: tuple[_torch_file.Entry, ...] = ()
        self.apart: list[int] = []  # entries that have to be put together, in order
        self.fetched: dict[int, torch.Tensor] = {}
        self.loaded_apart = False

    def write(self, path: str | os.PathLike) -> None:
        self.entries = _torch_file.describe(self._state_dict())
        tensors = self.metadata.state_dict_metadata
        self.apart = [
            i
            for i, entry in enumerate(self.entries)
            if entry.fqn is not None and entry.bytes_count > 0 and not _is_rows(tensors[entry.fqn])
        ]
        settings = config()
        total = sum(entry.bytes_count for entry in self.entries)
        with (
            _torch_file.replacing(path) as (directory, name),
            Counted("dcp_to_torch_save", total) as progress,
        ):
            done = _native.write_archive(
                self.source,
                self.image,
                directory,
                name.encode(),
                _torch_file.folder_of(os.fspath(path)).encode(),
                tuple((e.name.encode(), e.bytes_count, e.data, e.fqn) for e in self.entries),
                self.fetch,
                align=_torch_file.alignment(),
                verify=bool(settings.verify),
                direct=DIRECT_IO[settings.direct_io],
                io_uring=IO_URING[settings.io_uring],
                progress=progress.counter,
            )
            if self.loaded_apart and _read_metadata(self.source)[0] != self.image:
                raise _Replaced(f"{self.source} was replaced while it was read")
        logger.debug("dcp_to_torch_save of %s: %s", self.source, done)

    def _state_dict(self) -> dict[str, Any]:
        """What torch's load into an empty state dict gives, tensors still to come."""
        values: dict[str, Any] = {}
        objects: dict[str, Any] = {}
        for fqn, what in self.metadata.state_dict_metadata.items():
            if isinstance(what, TensorStorageMetadata):
                values[fqn] = _torch_file.DeferredTensor(fqn, what.size, what.properties.dtype)
            else:
                values[fqn] = objects[fqn] = None
        self._load(objects)
        values.update(objects)
        paths = self.metadata.planner_data or {}
        nested: dict[str, Any] = {}
        for fqn, value in values.items():
            if fqn in paths:
                set_element(nested, paths[fqn], value)
            else:
                nested[fqn] = value
        return nested

    def _load(self, values: dict[str, Any]) -> None:
        """Fill flat ``values`` from the checkpoint."""
        if values:
            self.loaded_apart = True
            with unwatched():
                _load_state_dict(
                    values,
                    FileSystemReader(self.source),
                    no_dist=True,
                    planner=DefaultLoadPlanner(flatten_state_dict=False),
                )

    def fetch(self, entry: int) -> memoryview:
        """The bytes of a tensor that is put together in memory, with small ones that follow."""
        if entry not in self.fetched:
            self.fetched = {}
            batch, total = [entry], self.entries[entry].bytes_count
            for i in self.apart[bisect.bisect_right(self.apart, entry) :]:
                total += self.entries[i].bytes_count
                if total > _FETCH_BYTES:
                    break
                batch.append(i)
            tensors = {i: self._empty(i) for i in batch}
            self._load({self._fqn(i): tensor for i, tensor in tensors.items()})
            self.fetched = tensors
        return _torch_file.bytes_of(self.fetched.pop(entry).untyped_storage())

    def _fqn(self, entry: int) -> str:
        fqn = self.entries[entry].fqn
        assert fqn is not None  # nothing else is fetched
        return fqn

    def _empty(self, entry: int) -> torch.Tensor:
        what = self.metadata.state_dict_metadata[self._fqn(entry)]
        return torch.empty(what.size, dtype=what.properties.dtype)


def _is_rows(what: TensorStorageMetadata) -> bool:
    """Whether every chunk has all of every dimension but the first."""
    rest = what.size[1:]
    return all(chunk.sizes[1:] == rest for chunk in what.chunks)


def torch_save_to_dcp(
    torch_save_path: str | os.PathLike | IO[bytes],
    dcp_checkpoint_dir: str | os.PathLike,
) -> None:
    """Save what a torch.save file holds as a checkpoint; mirrors torch's function of this name.

    Call it on one rank.  The file is mapped, and its pages are given back as they are saved; files
    that can not be mapped (not a zip, compressed) are loaded whole.  Tensors of any device become
    the checkpoint's, which knows none: no accelerator is needed.

    Args:
        torch_save_path: the file, or a stream that can be read and sought in.
        dcp_checkpoint_dir: the checkpoint's directory; one that is there is replaced.

    Raises:
        pickle.UnpicklingError: the file is damaged, or needs arbitrary code and
            ``config.allow_unsafe_objects`` is off.
        CheckpointException: the checkpoint can not be written.
    """
    state_dict, mapped = _torch_file.load_mapped(torch_save_path)
    group_for(None, no_dist=True).forget_plan()  # no step of a training that went before
    _save(
        state_dict,
        FileSystemWriter(dcp_checkpoint_dir),
        None,
        0,
        no_dist=True,
        planner=None,
        use_collectives=True,
        call_stateful=False,
        mapped=mapped,
    )


def _main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dcp_native.format_utils")
    parser.add_argument(
        "mode",
        choices=[mode.value for mode in FormatMode],
        help="torch_to_dcp: a torch.save file to a checkpoint; dcp_to_torch: the other way",
    )
    parser.add_argument("src", help="what to convert")
    parser.add_argument("dst", help="what to make of it")
    args = parser.parse_args(argv)
    mode = FormatMode(args.mode)
    print(f"{mode.value}: {args.src} -> {args.dst}")
    is_there = os.path.isfile if mode is FormatMode.TORCH_TO_DCP else os.path.isdir
    if not is_there(args.src):
        print(f"there is no checkpoint at {args.src}: nothing to convert")
    elif mode is FormatMode.TORCH_TO_DCP:
        torch_save_to_dcp(args.src, args.dst)
    else:
        dcp_to_torch_save(args.src, args.dst)


__getattr__, __dir__ = rest_of_torchs(__name__)


if __name__ == "__main__":
    _main()
