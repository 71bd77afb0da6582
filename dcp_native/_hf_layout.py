"""Where every tensor of an export lies: safetensors files as a pure function of names and sizes.

A file is the length of its header (8 bytes), the header (JSON), then the tensors without a gap.
The header is padded with blanks, which the format allows, so that the data begins on a page: then
most of it can be written with direct I/O.  Wider elements come first, so that every tensor is
aligned to its element size for those who map the file; otherwise the given order is kept.
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.distributed.checkpoint._hf_utils import (
    DATA_OFFSETS_KEY,
    DEFAULT_EXTRA_METADATA_KEY,
    DTYPE_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    NUM_BYTES_FOR_HEADER_LEN,
    SHAPE_KEY,
    _gen_file_name,
    _metadata_fn,
)

PREFIX = ".dcp_native-export-"
"""DCP_EXPORT_PREFIX: what begins with it belongs to an export that is not published."""
FULL_PATTERN = "model-#####-of-#####.safetensors"
SHARD_PATTERN = "shard-#####-model-#####-of-#####.safetensors"
"""Names of exports, a ``#`` for each digit: what a new export of the kind replaces."""

GLOBAL_SHAPE_KEY = "global_shape"
"""Beside torch's ``saved_offsets`` of a shard; without it a shard file that is missing at a
tensor's end goes unnoticed."""

PAGE_BYTES = 4096
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors package reads at most."""

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
}
"""What safetensors calls torch's types, one element of torch's to one of the file's."""
ITEM_BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


def row_major(size: Sequence[int]) -> tuple[int, ...]:
    """Strides of a new tensor; as torch has it a dimension without elements counts as 1."""
    strides, step = [], 1
    for count in reversed(size):
        strides.append(step)
        step *= max(count, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Shape:
    """A tensor as the header has it."""

    dtype: str
    size: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for n in self.size:
            count *= n
        return count

    @property
    def strides(self) -> tuple[int, ...]:
        """Bytes, row major."""
        return tuple(n * ITEM_BYTES[self.dtype] for n in row_major(self.size))


@dataclass(frozen=True)
class Place:
    """Where a tensor begins: ``file`` is an index in :attr:`Layout.files`, ``offset`` in bytes."""

    file: int
    offset: int
    shape: Shape

    def offset_of(self, index: Sequence[int]) -> int:
        """Where element ``index`` lies, in bytes from the start of the file."""
        return self.offset + sum(map(int.__mul__, index, self.shape.strides))


@dataclass(frozen=True)
class ExportFile:
    name: str
    length: int
    head: bytes = field(repr=False)


@dataclass(frozen=True)
class Layout:
    """All files of an export, and the place of every tensor in them."""

    files: list[ExportFile]
    places: dict[str, Place]

    def index(self, order: Iterable[str] | None = None) -> bytes:
        """``model.safetensors.index.json`` with the tensors in ``order``."""
        names = self.places if order is None else [n for n in order if n in self.places]
        total = sum(place.shape.nbytes for place in self.places.values())
        weight_map = {name: self.files[self.places[name].file].name for name in names}
        text = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(text, indent=2).encode()


def shape_of(fqn: str, dtype: torch.dtype, size: Iterable[int]) -> Shape:
    """Raises ValueError where safetensors has no name for the type."""
    name = DTYPE_NAMES.get(dtype)
    if name is None:
        raise ValueError(
            f"{fqn}: safetensors has no type for {dtype}; convert the tensor before it is saved "
            f"(types that can be saved: {', '.join(str(d)[6:] for d in DTYPE_NAMES)})"
        )
    return Shape(name, tuple(size))


def _head(tensors: Mapping[str, tuple[Shape, int]], texts: Mapping[str, str], name: str) -> bytes:
    if DEFAULT_EXTRA_METADATA_KEY in tensors:
        raise ValueError(
            f"{name}: safetensors keeps the name {DEFAULT_EXTRA_METADATA_KEY} for itself; rename "
            "the tensor"
        )
    header: dict[str, object] = {DEFAULT_EXTRA_METADATA_KEY: {**texts, FORMAT_KEY: FORMAT_VALUE}}
    for fqn, (shape, begin) in tensors.items():
        header[fqn] = {
            DTYPE_KEY: shape.dtype,
            SHAPE_KEY: shape.size,
            DATA_OFFSETS_KEY: [begin, begin + shape.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    length = -(-(NUM_BYTES_FOR_HEADER_LEN + len(text)) // PAGE_BYTES) * PAGE_BYTES
    length -= NUM_BYTES_FOR_HEADER_LEN
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{name}: {len(tensors)} tensors need a header of {length} bytes, and the safetensors "
            f"package reads at most {MAX_HEADER_BYTES}: spread them over more files by "
            "fqn_to_index_mapping"
        )
    return struct.pack("<Q", length) + text.ljust(length)


def lay_out(
    shapes: Mapping[str, Shape],
    file_of: Mapping[str, str],
    texts: Mapping[str, Mapping[str, str]] | None = None,
) -> Layout:
    """The files that ``file_of`` names for the tensors, in the order of their names.

    Args:
        texts: per file, what its header says besides.
    """
    by_file: dict[str, list[str]] = {}
    for fqn in shapes:
        by_file.setdefault(file_of[fqn], []).append(fqn)
    files, places = [], {}
    for number, name in enumerate(sorted(by_file)):
        fqns = sorted(by_file[name], key=lambda fqn: -ITEM_BYTES[shapes[fqn].dtype])
        begins, at = {}, 0
        for fqn in fqns:
            begins[fqn] = (shapes[fqn], at)
            at += shapes[fqn].nbytes
        head = _head(begins, (texts or {}).get(name, {}), name)
        files.append(ExportFile(name, len(head) + at, head))
        places |= {fqn: Place(number, len(head) + b, shape) for fqn, (shape, b) in begins.items()}
    return Layout(files, {fqn: places[fqn] for fqn in shapes})


def file_names(
    fqns: Iterable[str], mapping: Mapping[str, int] | None, shard: int | None = None
) -> dict[str, str]:
    """The file of each tensor, as torch names them; without a mapping all are in one.

    Args:
        shard: of the files of one rank, its number, from 1.
    """
    highest = 1 if mapping is None else max(mapping.values(), default=1)
    return {
        fqn: _gen_file_name(1 if mapping is None else _index_of(fqn, mapping), highest, shard)
        for fqn in fqns
    }


def _index_of(fqn: str, mapping: Mapping[str, int]) -> int:
    if fqn not in mapping:
        raise KeyError(f"{fqn}: fqn_to_index_mapping does not say which file it belongs to")
    return mapping[fqn]


def new_token() -> str:
    """A name for one export, never used before."""
    return secrets.token_hex(8)


def part_name(token: str, name: str) -> str:
    """What a file of an export is called until it is published: nothing that ends as the files do
    that readers look for."""
    return f"{PREFIX}{token}-{name}.part"


def parts(files: Iterable[ExportFile], token: str) -> list[tuple[str, int, bytes]]:
    """What ``_native.export_create`` makes of the files."""
    return [(part_name(token, file.name), file.length, file.head) for file in files]


def publication(index: bytes, token: str) -> dict[str, object]:
    """Of ``_native.export_publish``: the arguments that are about the index."""
    return {
        "index_name": _metadata_fn,
        "index_tmp_name": part_name(token, _metadata_fn),
        "index": index,
    }
