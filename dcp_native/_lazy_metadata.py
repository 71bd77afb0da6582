"""The Metadata that save returns: read only when somebody looks at it."""

from __future__ import annotations

import copy
import copyreg
import os
import pickle
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from . import _native

_FIELDS = ("state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version")


def _plain(source: LazyMetadata) -> Metadata:
    """torch's own class, with what ``source`` stands for."""
    plain = Metadata.__new__(Metadata)
    plain.__dict__.update(source._values())
    return plain


class LazyMetadata(Metadata):
    """A Metadata that unpickles ``.metadata`` at the first touch.

    The coordinator holds the image it wrote; other ranks know the file and the save id, and refuse
    with RuntimeError when the checkpoint was replaced or removed meanwhile.  Touching it never
    communicates.  Pickle, copy and deepcopy give torch's plain class.
    """

    def __init__(self, image: bytes | None, path: str | os.PathLike, save_id: str) -> None:
        object.__setattr__(self, "_lazy", (image, os.fspath(path), save_id))

    def _values(self) -> dict[str, Any]:
        own = object.__getattribute__(self, "__dict__")
        lazy = own.get("_lazy")
        if lazy is not None:
            image, path, save_id = lazy
            metadata = pickle.loads(_read(path, save_id) if image is None else image)
            set_before = {name: own[name] for name in _FIELDS if name in own}
            own.update(metadata.__dict__)
            own.update(set_before)
            own.pop("_lazy", None)
        return own

    def __getattribute__(self, name: str) -> Any:
        if name in _FIELDS or name == "__dict__":
            return (
                object.__getattribute__(self, "_values")()[name]
                if name in _FIELDS
                else (object.__getattribute__(self, "_values")())
            )
        return object.__getattribute__(self, name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Metadata):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in _FIELDS)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(_plain(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copyreg._reconstructor, (Metadata, object, None), dict(self._values())

    def __copy__(self) -> Metadata:
        return copy.copy(_plain(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Metadata:
        return copy.deepcopy(_plain(self), memo)


def _read(path: str, save_id: str) -> bytes:
    try:
        with open(path, "rb") as file:
            image = file.read()
    except FileNotFoundError as error:
        raise RuntimeError(
            f"the metadata of this save can no longer be read: {path} was removed"
        ) from error
    if _native.peek_save_id(image) != save_id:
        raise RuntimeError(
            f"the metadata of this save can no longer be read: {path} now belongs to another save"
        )
    return image
