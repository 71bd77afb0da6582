"""The Metadata that save and ``FileSystemReader.read_metadata`` return: read when looked at.

It starts as a LazyMetadata and turns into torch's own class at the first touch, in place: what
holds afterwards for attributes, equality, pickles and ``dataclasses`` is torch's code.  Until then
every way to look at it passes through ``_touch`` first.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from . import _native
from ._config import config
from ._fork import fork_safe

_lock = fork_safe(threading.RLock)  # a signal handler may look at one while another is read


class LazyMetadata(Metadata):
    """Stands for the Metadata of a checkpoint, until something of it is asked for.

    Touching it never communicates.  A touch that fails leaves it as it was.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(*args, **kwargs)  # this class has no instances but those of _lazy

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Metadata
        if name == "__dict__" or not name.startswith("__"):
            _touch(self)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _touch(self)
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        _touch(self)
        delattr(self, name)

    def __eq__(self, other: object) -> bool:
        _touch(self)
        return self == other

    def __repr__(self) -> str:
        _touch(self)
        return repr(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _touch(self)
        return self.__reduce_ex__(protocol)

    def __getstate__(self) -> Any:
        _touch(self)
        return self.__dict__


def lazy_metadata(image: bytes | None, path: str, save_id: str) -> Metadata:
    """The Metadata of save `save_id`: of the bytes ``image``, or of what ``path`` then holds.

    Touching it raises RuntimeError when the checkpoint was removed or replaced meanwhile.
    """
    return _lazy(lambda: unpickle(_read(path, save_id) if image is None else image, path))


def lazy_read_metadata(image: bytes, path: str, load_id: str) -> Metadata:
    """The Metadata that ``path`` held, with torch's mark of who read it."""

    def read() -> Metadata:
        metadata = unpickle(image, path)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = load_id
        return metadata

    return _lazy(read)


def unpickle(image: bytes, path: str) -> Metadata:
    """The Metadata of an image, by Python's unpickler.

    Raises:
        pickle.UnpicklingError: it needs arbitrary code and ``config.allow_unsafe_objects`` is off.
    """
    if not config().allow_unsafe_objects:
        try:
            foreign = _native.check_metadata(image, pickle=True)
        except _native.NativeError as error:
            foreign = str(error)
        if foreign is not None:
            raise refusal(f"{path}: {foreign}")
    return pickle.loads(image)


def refusal(what: str) -> pickle.UnpicklingError:
    """What a `.metadata` meets that only unsafe unpickling can read."""
    return pickle.UnpicklingError(f"{what}; config.allow_unsafe_objects is off")


def _lazy(read: Callable[[], Metadata]) -> Metadata:
    lazy = object.__new__(LazyMetadata)
    object.__setattr__(lazy, "_read", read)
    return lazy


def _touch(lazy: Metadata) -> None:
    """Turn `lazy` into torch's class, unless another thread was first."""
    with _lock():
        if type(lazy) is not LazyMetadata:
            return
        values = object.__getattribute__(lazy, "__dict__")
        if "_read" in values:  # an interrupt may have come just before the last line
            metadata = values["_read"]()
            if "_read" in values:  # else a signal handler looked at it meanwhile
                values.update(vars(metadata))
                del values["_read"]
        object.__setattr__(lazy, "__class__", Metadata)


def _read(path: str, save_id: str) -> bytes:
    try:
        with open(path, "rb") as file:
            image = file.read()
    except FileNotFoundError as error:
        raise RuntimeError(
            f"the metadata of this save can no longer be read: {path} was removed"
        ) from error
    except OSError as error:
        raise RuntimeError(f"the metadata of this save can not be read: {error}") from error
    if _native.peek_save_id(image) != save_id:
        raise RuntimeError(
            f"the metadata of this save can no longer be read: {path} now belongs to another save"
        )
    return image
