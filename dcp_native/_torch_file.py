"""torch.save files: written without the tensors in memory, read by mappings.

A file is made of a pickle that names storages by keys, and of the storages.  ``describe`` makes the
pickle and the list of storages from a state dict in which ``DeferredTensor`` stands for tensors
that are still in a checkpoint; the extension writes the file from that list.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import io
import os
import pickle
import secrets
import stat
import sys
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import torch

from ._config import config
from ._hf_layout import row_major

_PICKLE_PROTOCOL = 2
"""torch.save's default: of files that older releases read too."""
_FORMAT_VERSION = b"1"
"""Storages lie in the order of their keys, so that torch.load may calculate where."""
_FILE_VERSION = b"3\n"
"""torch::caffe2's version of the zip's contents."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of the zip, its bytes in memory (``data``) or of the checkpoint's tensor ``fqn``."""

    name: str
    bytes_count: int
    data: Any = None
    fqn: str | None = None


class _DeferredStorage:
    """What a pickler names by a key; the storage of one DeferredTensor."""

    def __init__(self, fqn: str, kind: type, count: int, bytes_count: int) -> None:
        self.fqn = fqn
        self.kind = kind
        self.count = count  # of what `kind` counts in
        self.bytes_count = bytes_count


class DeferredTensor:
    """Pickles as the plain tensor that torch would have made of a checkpoint's tensor ``fqn``."""

    def __init__(self, fqn: str, size: torch.Size, dtype: torch.dtype) -> None:
        self.fqn = fqn
        self.size = size
        self.dtype = dtype

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        rebuild, kind, rest = _how_to_rebuild(self.dtype)
        count = self.size.numel()
        bytes_count = count * self.dtype.itemsize
        storage = _DeferredStorage(
            self.fqn, kind, bytes_count if kind is torch.UntypedStorage else count, bytes_count
        )
        size = tuple(self.size)
        hooks: dict[Any, Any] = collections.OrderedDict()
        return rebuild, (storage, 0, size, row_major(size), False, hooks, *rest)


@functools.cache
def _how_to_rebuild(dtype: torch.dtype) -> tuple[Any, type, tuple[Any, ...]]:
    """Function, class of the storage and last arguments of a pickled tensor of ``dtype``.

    Taken from a tensor that torch pickles: which dtypes have storages of their own differs between
    releases.
    """
    rebuild, arguments = torch.empty(0, dtype=dtype).__reduce_ex__(_PICKLE_PROTOCOL)
    storage, _, _, _, _, _, *rest = arguments
    if isinstance(storage, torch.UntypedStorage):
        return rebuild, torch.UntypedStorage, tuple(rest)
    return rebuild, getattr(torch, storage._pickle_storage_type()), tuple(rest)


class _Pickler(pickle.Pickler):
    """Leaves storages out and numbers them in the order in which it meets them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=_PICKLE_PROTOCOL)
        self.storages: list[_DeferredStorage | torch.UntypedStorage] = []
        self._keys: dict[int, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if isinstance(obj, _DeferredStorage):
            return ("storage", obj.kind, self._key(id(obj), obj), "cpu", obj.count)
        if isinstance(obj, torch.storage.TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype
            kind, count = getattr(torch, obj._pickle_storage_type()), obj._size()
        elif torch.is_storage(obj):
            storage, dtype = obj, torch.uint8
            kind, count = type(obj), obj.nbytes()
        else:
            return None
        key = self._key(storage._cdata, storage)
        if self._dtypes.setdefault(key, dtype) != dtype and storage.nbytes() > 0:
            raise RuntimeError(
                f"an object holds tensors of {self._dtypes[key]} and {dtype} that share their "
                "memory: torch.save files have one element type for each storage"
            )
        return ("storage", kind, key, torch.serialization.location_tag(storage), count)

    def _key(self, identity: int, storage: _DeferredStorage | torch.UntypedStorage) -> str:
        key = self._keys.get(identity)
        if key is None:
            key = self._keys[identity] = str(len(self.storages))
            self.storages.append(storage)  # which keeps it, and with that its identity, alive
        return key


def alignment() -> int:
    """Bytes that torch.save aligns storages to."""
    return torch.serialization._get_storage_alignment()


def describe(state: Any) -> tuple[Entry, ...]:
    """What the file of ``torch.save(state)`` holds, in its order."""
    pickled = io.BytesIO()
    pickler = _Pickler(pickled)
    pickler.dump(state)
    small = (
        ("data.pkl", pickled.getbuffer()),
        (".format_version", _FORMAT_VERSION),
        (".storage_alignment", str(alignment()).encode()),
        ("byteorder", sys.byteorder.encode()),
    )
    return (
        *(Entry(name, len(data), data) for name, data in small),
        *(_entry_of(f"data/{key}", storage) for key, storage in enumerate(pickler.storages)),
        Entry("version", len(_FILE_VERSION), _FILE_VERSION),
    )


def _entry_of(name: str, storage: _DeferredStorage | torch.UntypedStorage) -> Entry:
    if isinstance(storage, _DeferredStorage):
        return Entry(name, storage.bytes_count, fqn=storage.fqn)
    return Entry(name, storage.nbytes(), bytes_of(storage.cpu()))


def bytes_of(storage: torch.UntypedStorage) -> memoryview:
    """The memory of a storage of the CPU."""
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def folder_of(path: str) -> str:
    """The folder inside the zip, as torch names it: after the file."""
    stem = os.path.basename(path).rpartition(".")[0] or os.path.basename(path)
    return stem if stem.isascii() else "archive"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """A new file in place of ``path``, which stays what it is until the new one is whole.

    Yields:
        The directory, and a name in it under which the caller makes the file, synced.

    Raises:
        OSError: the file, or its directory, can not be written to.
    """
    target = os.path.realpath(path)
    directory = os.path.dirname(target)
    mode = _mode_of(target)
    name = f".dcp_native-{secrets.token_hex(8)}.tmp"
    made = os.path.join(directory, name)
    try:
        yield directory, name
        if mode is not None:
            os.chmod(made, mode)
        os.replace(made, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(made)
        raise
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode_of(target: str) -> int | None:
    """Permissions of a file that is to be replaced; None where there is none."""
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return None
    for code, refused in (
        (errno.EISDIR, stat.S_ISDIR(found.st_mode)),
        (errno.EACCES, not os.access(target, os.W_OK)),
    ):
        if refused:
            raise OSError(code, f"writing {target} failed: {os.strerror(code)}", target)
    return stat.S_IMODE(found.st_mode)


def is_file_to_write(path: Any) -> bool:
    """Whether ``path`` names a file that can be replaced: no stream, pipe or device."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    return not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path)


def load_mapped(path: str | os.PathLike | IO[bytes]) -> tuple[Any, tuple[int, int]]:
    """``torch.load`` of a file by the safe loader where it can, its tensors mapped from the file.

    A file that is open, or a stream in memory, is loaded whole.

    Objects that only unsafe unpickling can load are loaded by it, as torch's own functions do,
    unless ``config.allow_unsafe_objects`` is off.

    Returns:
        What was saved, and from where to where the file is mapped, if nobody can have written to
        that memory; else (0, 0).

    Raises:
        pickle.UnpicklingError: it needs arbitrary code and ``config.allow_unsafe_objects`` is off.
    """
    stream = None if isinstance(path, (str, os.PathLike)) else path
    begin = None if stream is None else stream.tell()
    mapped = stream is None and _can_be_mapped(path)
    before = _mappings_of(path) if mapped else set()
    try:
        loaded = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except pickle.UnpicklingError as error:
        if not config().allow_unsafe_objects:
            raise pickle.UnpicklingError(
                f"{path} holds objects that only unsafe unpickling can load, and "
                f"config.allow_unsafe_objects is off: {error}"
            ) from error
    else:
        made = _mappings_of(path) - before if mapped else set()
        return loaded, made.pop() if len(made) == 1 else (0, 0)
    if stream is not None:
        stream.seek(begin)
    return torch.load(path, map_location="cpu", mmap=mapped, weights_only=False), (0, 0)


def _mappings_of(path: str | os.PathLike) -> set[tuple[int, int]]:
    """Where this process has a file mapped."""
    found = set()
    try:
        inode = str(os.stat(path).st_ino)
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                addresses, _, _, _, of, *_ = line.split(maxsplit=5)
                if of == inode:
                    first, _, last = addresses.partition("-")
                    found.add((int(first, 16), int(last, 16)))
    except OSError:
        found.clear()
    return found


def _can_be_mapped(path: str | os.PathLike) -> bool:
    """False for what torch.load maps not at all (files of old, TorchScript) or wrongly (compressed
    by other programs), and for what it would have to change in memory."""
    try:
        with zipfile.ZipFile(path) as file:
            names = {info.filename.partition("/")[2]: info for info in file.infolist()}
            plain = all(info.compress_type == zipfile.ZIP_STORED for info in names.values())
            order = names.get("byteorder")
            native = order is None or file.read(order).decode() == sys.byteorder
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):
        return False
    return plain and native and "data.pkl" in names and "constants.pkl" not in names
