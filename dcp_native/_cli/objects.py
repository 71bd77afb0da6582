"""Objects of a checkpoint, by safe loading alone: nothing in a file is ever executed.

Plain values (numbers, texts, lists, dicts) are unpickled by a reader that knows no classes, without
torch; the rest by torch's weights_only loader; what that refuses is not shown.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import reprlib
import zipfile
from collections.abc import Iterator
from typing import Any

from .checkpoint import Checkpoint, Chunk, Entry
from .output import CommandError

_MOST_RECORD_BYTES = 1 << 30


class Refused(Exception):
    """An object that can not be loaded safely; why."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name}")


def record_of(checkpoint: Checkpoint, entry: Entry) -> bytes:
    """The bytes of an object's record; of several ranks' the first one's, if all are equal.

    Raises:
        CommandError: they are not there, or ranks saved different ones.
    """
    first, *others = (_read(checkpoint, entry, chunk) for chunk in checkpoint.chunks(entry))
    for other in others:
        if other != first and (contents_of(first) or first) != contents_of(other):
            raise CommandError(
                f"{entry.key}: ranks saved different values: --rank N takes that of one rank", 1
            )
    return first


def _read(checkpoint: Checkpoint, entry: Entry, chunk: Chunk) -> bytes:
    if chunk.file is None:
        raise CommandError(f"{checkpoint.path}: {entry.key} has no record", 1)
    if chunk.transformed:
        raise CommandError(f"{entry.key} is stored transformed (compressed, say): load it instead")
    path = checkpoint.path / chunk.file
    if os.path.isabs(chunk.file) or ".." in path.parts[len(checkpoint.path.parts) :]:
        raise CommandError(f"{entry.key}: its record is outside of the checkpoint ({path})", 1)
    if chunk.length_bytes > _MOST_RECORD_BYTES:
        raise CommandError(f"{entry.key}: {chunk.length_bytes:,} bytes are too many to show")
    try:
        with open(path, "rb") as file:
            file.seek(chunk.offset_bytes)
            record = file.read(chunk.length_bytes)
    except (OSError, OverflowError) as error:
        raise CommandError(f"{entry.key}: {path}: {error}", 1) from None
    if len(record) < chunk.length_bytes:
        raise CommandError(f"{entry.key}: {path} ends inside its record", 1)
    return record


def load_object(record: bytes) -> Any:
    """The value of a record.

    Raises:
        Refused: only unsafe unpickling could load it, or it is damaged.
    """
    try:
        (pickled,) = (part for name, part in _parts(record) if name == "data.pkl")
        return _PlainUnpickler(io.BytesIO(pickled)).load()
    except Exception:  # not plain, or damaged: torch says which
        return _load_by_torch(record)


def _load_by_torch(record: bytes) -> Any:
    import torch

    try:
        return torch.load(io.BytesIO(record), map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()
        raise Refused(first[0] if first else type(error).__name__) from None


def contents_of(record: bytes) -> dict[str, bytes] | None:
    """What the zip of a record holds, by name without the folder; None: it is none.

    Equal contents are equal values; the zip around them depends on who wrote it.
    """
    try:
        return {n: part for n, part in _parts(record) if n == "data.pkl" or n.startswith("data/")}
    except Exception:
        return None


def _parts(record: bytes) -> Iterator[tuple[str, bytes]]:
    """Files of a record's zip, by name without the folder.

    None is compressed: neither torch nor we do that, and what is could be of any size.
    """
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"{info.filename} is compressed")
            yield info.filename.partition("/")[2], archive.read(info)


def describe_object(checkpoint: Checkpoint, entry: Entry) -> str:
    """Its value in a line, or why it is not shown."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    short.maxdict = short.maxlist = short.maxtuple = short.maxset = 12
    try:
        return short.repr(load_object(record_of(checkpoint, entry)))
    except Refused as error:
        return f"not shown: the safe loader refuses it ({error})"
    except CommandError as error:
        return f"not shown: {error}"
