"""The Metadata that save returns: read only when somebody looks at it.

It starts as a LazyMetadata and turns into torch's own class at the first touch, in place: what
holds afterwards for attributes, equality, pickles and ``dataclasses`` is torch's code.  Until then
every way to look at it passes through ``_touch`` first.
"""

from __future__ import annotations

import pickle
import threading
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from . import _native
from ._fork import fork_safe

_lock = fork_safe(threading.RLock)  # a signal handler may look at one while another is read


class LazyMetadata(Metadata):
    """Stands for the Metadata of a committed save, until something of it is asked for.

    A rank that holds the image of ``.metadata`` reads it from memory; another one reads the file,
    and refuses with RuntimeError when the checkpoint was removed or replaced meanwhile.  Touching
    it never communicates.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(*args, **kwargs)  # this class has no instances but those of lazy_metadata

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
    """The Metadata of save `save_id`: of the bytes ``image``, or of what ``path`` then holds."""
    lazy = object.__new__(LazyMetadata)
    object.__setattr__(lazy, "_source", (image, path, save_id))
    return lazy


def _touch(lazy: Metadata) -> None:
    """Turn `lazy` into torch's class, unless another thread was first."""
    with _lock():
        if type(lazy) is not LazyMetadata:
            return
        values = object.__getattribute__(lazy, "__dict__")
        if "_source" in values:  # an interrupt may have come just before the last line
            image, path, save_id = values["_source"]
            metadata = pickle.loads(_read(path, save_id) if image is None else image)
            if "_source" in values:  # else a signal handler looked at it meanwhile
                values.update(vars(metadata))
                del values["_source"]
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
