"""Hugging Face directories: written window by window, read as mappings of their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY

from .. import _native
from .._config import DIRECT_IO, config
from .._hf_layout import (
    FULL_PATTERN,
    Layout,
    Shape,
    file_names,
    lay_out,
    new_token,
    part_name,
    parts,
    publication,
    row_major,
    shape_of,
)
from .._hf_reads import Header, read_headers
from .checkpoint import Checkpoint
from .output import CommandError, Output
from .values import Reader, dtype_of, whole, windows

_FILE_BYTES = 5_000_000_000
"""What Hugging Face's own tools put into a file."""
_WINDOW_BYTES = 16 << 20

Part = tuple[tuple[int, ...], torch.Tensor]
"""Where in its tensor a part begins, and its values."""


class Tensors(Protocol):
    """What is exported.

    Attributes:
        shapes: of the tensors, by key.
        objects: keys of what is none.
    """

    shapes: dict[str, Shape]
    objects: list[str]

    def parts(self, key: str) -> Iterator[Part]: ...


class CheckpointTensors:
    """Tensors of a checkpoint, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.apart:
            raise CommandError(
                f"ranks saved different things by one name ({checkpoint.apart[0]}, say): --rank N "
                "takes those of one rank",
                1,
            )
        entries = [entry for entry in checkpoint.entries if entry.shape is not None]
        self.shapes = {e.key: shape_of(e.key, dtype_of(e), e.shape or ()) for e in entries}
        self.objects = [entry.key for entry in checkpoint.entries if not entry.is_tensor]
        self._entries = {entry.key: entry for entry in entries}
        self._reader = Reader(checkpoint)

    def parts(self, key: str) -> Iterator[Part]:
        for box in windows(whole(self._entries[key]), _WINDOW_BYTES):
            yield box.offsets, self._reader.read([box])[0]


class MappedTensors:
    """Tensors of a nested state dict, by the keys that a save would give them."""

    def __init__(self, state_dict: Any) -> None:
        from torch.distributed.checkpoint._nested_dict import flatten_state_dict

        if not isinstance(state_dict, dict):
            raise CommandError(f"the file holds a {type(state_dict).__name__}, and no dict", 1)
        flat, _ = flatten_state_dict(state_dict)
        self._tensors = {k: v.detach() for k, v in flat.items() if isinstance(v, torch.Tensor)}
        self.shapes = {k: shape_of(k, v.dtype, v.shape) for k, v in self._tensors.items()}
        self.objects = [key for key in flat if key not in self._tensors]

    def parts(self, key: str) -> Iterator[Part]:
        tensor = self._tensors[key]
        yield (0,) * tensor.dim(), tensor.resolve_conj().resolve_neg()


def export(
    tensors: Tensors, target: Path, files: int | None, skip_objects: bool, out: Output
) -> None:
    """Write safetensors files and their index; they appear when they are whole."""
    if tensors.objects and not skip_objects:
        raise CommandError(
            f"{len(tensors.objects)} of the keys are no tensors, which safetensors files can not "
            f"hold ({', '.join(tensors.objects[:3])}); --skip-objects leaves them out"
        )
    if not tensors.shapes:
        raise CommandError("there is no tensor to write", 1)
    layout = lay_out(tensors.shapes, file_names(tensors.shapes, _spread(tensors.shapes, files)))
    token, path = new_token(), str(target)
    names = [part_name(token, file.name) for file in layout.files]
    _native.export_sweep(path) if target.is_dir() else None
    _native.export_create(path, parts(layout.files, token))
    try:
        total = sum(shape.nbytes for shape in tensors.shapes.values())
        with out.progress("writing", total) as update:
            _write(tensors, layout, path, names, update)
        _native.export_publish(
            path, names, [file.name for file in layout.files], FULL_PATTERN,
            **publication(layout.index(), token),
        )  # fmt: skip
    except BaseException:
        _native.export_discard(path, names)
        raise


def _spread(shapes: Mapping[str, Shape], files: int | None) -> dict[str, int]:
    """The number of the file of each tensor, from 1, in their order; files of like sizes."""
    total = sum(shape.nbytes for shape in shapes.values())
    count = min(files or max(1, -(-total // _FILE_BYTES)), len(shapes))
    found, before = {}, 0
    for position, (key, shape) in enumerate(shapes.items()):
        middle = before + shape.nbytes // 2
        number = min(count - 1, middle * count // max(total, 1))
        number = min(number, position)  # and none stays empty
        found[key] = max(number, count - (len(shapes) - position)) + 1
        before += shape.nbytes
    used = {number: i + 1 for i, number in enumerate(sorted(set(found.values())))}
    return {key: used[number] for key, number in found.items()}


def _write(
    tensors: Tensors, layout: Layout, path: str, names: list[str], update: Callable[[int], None]
) -> None:
    lengths = [(part, file.length) for part, file in zip(names, layout.files, strict=True)]
    done, batch, size = 0, [], 0

    def flush() -> None:
        _native.export_write(path, lengths, batch, sync=True, direct=DIRECT_IO[config().direct_io])
        update(done)

    for key, place in layout.places.items():
        for offsets, tensor in tensors.parts(key):
            at = place.offset_of(offsets)
            batch.append((place.file, at, tensor, place.shape.strides))
            size += tensor.nbytes
            done += tensor.nbytes
            if size >= _WINDOW_BYTES:
                flush()
                batch, size = [], 0
    flush()


def mapped_tensors(source: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of those in a directory, mapped from them.

    Raises:
        CommandError: they are shard files of a distributed save, or a key is in two files.
    """
    paths = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for path, header in read_headers(map(str, paths)).items():
        if CUSTOM_METADATA_KEY in header.texts:
            raise CommandError(
                f"{path} is a shard file of a distributed save: join the shard files first, by "
                "consolidate_safetensors_files of dcp_native._consolidate_hf_safetensors"
            )
        for key, tensor in _mapped(path, header):
            if key in found:
                raise CommandError(f"{key} is in two files of {source}", 1)
            found[key] = tensor
    return found


def _mapped(path: str, header: Header) -> Iterator[tuple[str, torch.Tensor]]:
    size = Path(path).stat().st_size
    storage = torch.UntypedStorage.from_file(path, shared=False, nbytes=size)
    for key, place in header.tensors.items():
        dtype = header.dtype_of(key)
        if place.offset % dtype.itemsize == 0:
            tensor = torch.empty(0, dtype=dtype).set_(
                storage, place.offset // dtype.itemsize, place.shape, row_major(place.shape)
            )
        else:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage)
            part = raw[place.offset : place.offset + place.length].clone()
            tensor = part.view(dtype).reshape(place.shape)
        yield key, tensor
