"""A checkpoint's metadata as the commands look at it, read by the C reader, without torch.

Chunks stay columns of numbers: there can be a quarter of a million of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import _native
from .output import CommandError
from .units import natural

METADATA = ".metadata"
CLAIM_PREFIX = ".dcp_native-claim-"
"""Of the file by which a save has a directory for itself while it is in flight."""
NO_FILE = 0xFFFFFFFF
_RANK_METADATA = re.compile(r"__([0-9]+)\.metadata")
_DATA_FILE = re.compile(r"__([0-9]+)_[0-9]+\.distcp")


class Entry(NamedTuple):
    """A key of the flattened state dict."""

    key: str
    dtype: str | None
    shape: tuple[int, ...] | None
    """None: an object."""
    item_bytes: int
    """Of one element; 0 where only torch knows the type."""
    size_bytes: int
    """Of a tensor's values; of the records where these can not be known, and of objects."""
    stored_bytes: int
    """Of its records."""
    first: int | list[int]
    """First of its chunks, or their indices."""
    chunks_count: int

    @property
    def is_tensor(self) -> bool:
        return self.shape is not None

    @property
    def chunks(self) -> Sequence[int]:
        """Indices in the checkpoint's columns."""
        if isinstance(self.first, list):
            return self.first
        return range(self.first, self.first + self.chunks_count)


class Chunk(NamedTuple):
    """A box of a tensor, or an object, and the record that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str | None
    """None: the metadata lists no record."""
    offset_bytes: int
    length_bytes: int
    transformed: bool


class Checkpoint:
    """What the metadata of a directory says.

    Args:
        rank: of a checkpoint that its ranks saved apart, only what this one saved.

    Attributes:
        images: the metadata files by name: ``.metadata``, or ``__{rank}.metadata`` of single ranks.
        apart: keys that ranks saved with different types or shapes; behind the first rank's these
            have the rank in their names.
        native: written by dcp_native.
        files: names of data files.
        file, offset, length, transforms: columns of the chunks.
    """

    def __init__(self, path: Path, rank: int | None = None) -> None:
        self.path = path
        self.images = _read_images(path, rank)
        tables = [_table(path / name, image) for name, image in self.images.items()]
        self.native = all(table["native"] for table in tables)
        self.linked_saves = max(table["linked_saves"] for table in tables)
        self.foreign = next((t["foreign"] for t in tables if t["foreign"]), None)
        self.save_id = _native.peek_save_id(self.images[METADATA]) if self.is_whole else None
        self.apart: list[str] = []
        if len(tables) == 1:
            self._take(tables[0])
        else:
            ranks = [_rank_of_metadata(name) for name in self.images]
            self._take(_joined(tables, ranks, self.apart))

    def _take(self, table: dict[str, Any]) -> None:
        self.files: list[str] = table["files"]
        self.file, self.offset, self.length, self.transforms, self._dims_at, self._dims = (
            memoryview(table[name]).cast("Q")
            for name in (
                "chunk_file", "chunk_offset", "chunk_length", "chunk_transforms", "chunk_dims",
                "dims",
            )
        )  # fmt: skip
        self.entries: list[Entry] = list(map(Entry._make, table["entries"]))

    @property
    def is_whole(self) -> bool:
        """One metadata file speaks for all ranks."""
        return METADATA in self.images

    @property
    def metadata_bytes(self) -> int:
        return sum(map(len, self.images.values()))

    def chunk(self, entry: Entry, index: int) -> Chunk:
        ndim = 0 if entry.shape is None else len(entry.shape)
        at = self._dims_at[index]
        dims = tuple(self._dims[at : at + 2 * ndim])
        file = self.file[index]
        return Chunk(
            dims[:ndim], dims[ndim:], None if file == NO_FILE else self.files[file],
            self.offset[index], self.length[index], bool(self.transforms[index]),
        )  # fmt: skip

    def chunks(self, entry: Entry) -> Iterator[Chunk]:
        return (self.chunk(entry, index) for index in entry.chunks)

    def files_count(self, entry: Entry) -> int:
        return len({self.file[index] for index in entry.chunks} - {NO_FILE})

    def bytes_by_file(self) -> list[tuple[int, int]]:
        """Bytes of records, and their number, of each data file."""
        totals, counts = [0] * len(self.files), [0] * len(self.files)
        for file, length in zip(self.file, self.length, strict=True):
            if file != NO_FILE:
                totals[file] += length
                counts[file] += 1
        return list(zip(totals, counts, strict=True))

    def ends_by_file(self) -> list[int]:
        """Where the last record of each data file ends."""
        ends = [0] * len(self.files)
        for file, offset, length in zip(self.file, self.offset, self.length, strict=True):
            if file != NO_FILE and ends[file] < offset + length:
                ends[file] = offset + length
        return ends

    def entry(self, key: str) -> Entry:
        """Raises CommandError, with keys that look alike."""
        for entry in self.entries:
            if entry.key == key:
                return entry
        import difflib

        near = difflib.get_close_matches(key, [e.key for e in self.entries[:20000]], n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise CommandError(f"{self.path}: there is no key {key}{hint}", 1)


def add_rank(parser: Any) -> None:
    """``--rank``, which ``Checkpoint`` takes."""
    parser.add_argument(
        "--rank",
        type=natural,
        metavar="N",
        help="of a checkpoint that its ranks saved apart, only what rank N saved",
    )


def rank_of(file: str) -> int | None:
    """The rank that wrote a data file, by its name."""
    found = _DATA_FILE.fullmatch(os.path.basename(file))
    return int(found[1]) if found else None


def metadata_names(path: str | os.PathLike) -> list[str]:
    """Names of the metadata files that make a directory a checkpoint; none: it is not one.

    Raises:
        OSError: it can not be looked into.
    """
    with os.scandir(path) as found:
        names = [e.name for e in found if e.name == METADATA or _RANK_METADATA.fullmatch(e.name)]
    if METADATA in names:
        return [METADATA]
    return sorted(names, key=_rank_of_metadata)


def _rank_of_metadata(name: str) -> int:
    return int(name[2:].partition(".")[0])


def _read_images(path: Path, rank: int | None) -> dict[str, bytes]:
    try:
        names = metadata_names(path)
        if names and rank is not None:
            names = [_of_rank(path, names, rank)]
        images = {name: (path / name).read_bytes() for name in names}
    except NotADirectoryError:
        raise CommandError(f"{path} is no directory; a checkpoint is one") from None
    except OSError as error:
        raise CommandError(f"{error.filename or path}: {error.strerror or error}") from None
    if images:
        return images
    inside = _checkpoints_inside(path)
    hint = f"; its {inside} has one" if inside else ""
    raise CommandError(f"{path} holds no checkpoint: there is no {METADATA} in it{hint}", 1)


def _of_rank(path: Path, names: list[str], rank: int) -> str:
    if names == [METADATA]:
        raise CommandError(f"{path} was saved by all ranks together: there is no --rank in it")
    name = f"__{rank}.metadata"
    if name not in names:
        raise CommandError(f"{path}: rank {rank} saved nothing; there is no {name}", 1)
    return name


def _checkpoints_inside(path: Path) -> str | None:
    try:
        names = sorted(e.name for e in os.scandir(path) if e.is_dir())
        return next((name for name in names if metadata_names(path / name)), None)
    except OSError:
        return None


def _table(path: Path, image: bytes) -> dict[str, Any]:
    try:
        return _native.metadata_table(image)
    except _native.NativeError as error:
        text = str(error)
        raise CommandError(text if str(path) in text else f"{path}: {text}", 1) from None


def _joined(tables: list[dict[str, Any]], ranks: list[int], apart: list[str]) -> dict[str, Any]:
    """One table of the metadata of single ranks; a key that several have gets the chunks of all.

    Appends to ``apart`` the keys that can not be joined.
    """
    columns = ("chunk_file", "chunk_offset", "chunk_length", "chunk_transforms", "chunk_dims")
    entries: dict[str, Entry] = {}
    files: list[str] = []
    joined: dict[str, list[int]] = {name: [] for name in (*columns, "dims")}
    for rank, table in zip(ranks, tables, strict=True):
        shift = {"chunk_file": len(files), "chunk_dims": len(joined["dims"])}
        before = len(joined["chunk_file"])
        for name, values in joined.items():
            column, by = memoryview(table[name]).cast("Q"), shift.get(name, 0)
            kept = NO_FILE if name == "chunk_file" else None
            values.extend(v if v == kept else v + by for v in column)
        files.extend(table["files"])
        for entry in map(Entry._make, table["entries"]):
            mine = [before + index for index in entry.chunks]
            known = entries.get(entry.key)
            if known is not None and (known.dtype, known.shape) != (entry.dtype, entry.shape):
                apart.append(f"{entry.key} (rank {rank})")
                entry, known = entry._replace(key=apart[-1]), None
            stored = entry.stored_bytes
            if known is not None:
                mine, stored = [*known.chunks, *mine], stored + known.stored_bytes
            size = entry.size_bytes if entry.is_tensor and entry.item_bytes else stored
            entries[entry.key] = entry._replace(
                size_bytes=size, stored_bytes=stored, first=mine, chunks_count=len(mine)
            )
    packed = {name: _packed(values) for name, values in joined.items()}
    return {**packed, "files": files, "entries": list(entries.values())}


def _packed(values: list[int]) -> bytes:
    from array import array

    return array("Q", values).tobytes()
