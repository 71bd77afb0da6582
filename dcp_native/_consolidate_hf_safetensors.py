"""Shard files of Hugging Face checkpoints joined into the final ones.

Mirrors torch/distributed/checkpoint/_consolidate_hf_safetensors.py.

The headers of all shard files say where everything lies; the bytes are moved by the core, which
fills each output file front to back, in bounded memory, while it reads ahead of its own writes.
Output files get their names when all are durable, the index last, so that a crash leaves what was
there before.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    _calculate_max_contiguous_elements,
    _FqnData,
    _InputFileData,
    _OutputFileData,
    _write_sub_tensor_to_file_optimized,
)
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY, SUFFIX

from . import _native
from ._config import DIRECT_IO, config
from ._hf_layout import (
    FULL_PATTERN,
    GLOBAL_SHAPE_KEY,
    ITEM_BYTES,
    Layout,
    Shape,
    file_names,
    lay_out,
    new_token,
    part_name,
    parts,
    publication,
)
from ._hf_reads import read_headers
from ._mirror import rest_of_torchs
from ._progress import Counted

logger: logging.Logger = logging.getLogger(__name__)

__all__ = [
    "_FqnData",
    "_InputFileData",
    "_OutputFileData",
    "_calculate_max_contiguous_elements",
    "_write_sub_tensor_to_file_optimized",
    "consolidate_safetensors_files",
    "consolidate_safetensors_files_on_every_rank",
]

Chunk = tuple[int, int, tuple[int, ...]]
"""A shard: number of its file, offset in it in bytes, its box (offsets, then sizes)."""


@dataclass
class _Shards:
    """What all shard files of a directory hold."""

    path: str
    names: list[str] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)

    def shapes(self, fqns: Mapping[str, int]) -> dict[str, Shape]:
        """Of the tensors that there are, in the order of ``fqns``."""
        return {
            fqn: Shape(self.dtypes[fqn], tuple(self.sizes[fqn]))
            for fqn in fqns
            if fqn in self.sizes
        }

    def read(self, wanted: Collection[str], only: Collection[str] | None = None) -> None:
        """Headers of the safetensors files of the directory, checked.

        Args:
            wanted: names of tensors, of which there must be one.
            only: the files to read, in place of all; they must be there.
        """
        names = [name for name in os.listdir(self.path) if name.endswith(SUFFIX)]
        if only is not None and (missing := sorted(set(only).difference(names))):
            raise FileNotFoundError(
                errno.ENOENT,
                f"{len(missing)} files that ranks wrote are not to be seen by the rank that joins "
                "them; save into a directory that all ranks share",
                os.path.join(self.path, missing[0]),
            )
        self.names = sorted(names if only is None else only)
        headers = read_headers(os.path.join(self.path, name) for name in self.names)
        for number, header in enumerate(headers.values()):
            info = _saved_offsets(header.path, header.texts)
            for fqn, tensor in header.tensors.items():
                offsets, ends = _box_of(header.path, fqn, info, tensor.shape)
                self._add(header.path, fqn, tensor.type, ends)
                chunk = (number, tensor.offset, (*offsets, *tensor.shape))
                self.chunks.setdefault(fqn, []).append(chunk)
        if self.sizes.keys().isdisjoint(wanted):
            raise ValueError(
                f"{self.path}: no file has any of the {len(wanted)} tensors that are to be "
                "consolidated; nothing was changed"
            )

    def _add(self, file: str, fqn: str, dtype: str, ends: list[int]) -> None:
        known = self.sizes.setdefault(fqn, ends)
        if dtype not in ITEM_BYTES:
            raise _refuse(file, fqn, f"torch has no type for {dtype}")
        if self.dtypes.setdefault(fqn, dtype) != dtype or len(known) != len(ends):
            raise _refuse(file, fqn, "another shard has another type or number of dimensions")
        self.sizes[fqn] = list(map(max, known, ends))


def _refuse(path: str, fqn: str, what: str) -> ValueError:
    return ValueError(f"{path}: {fqn}: {what}; the file is damaged, or not a shard that DCP wrote")


def _saved_offsets(path: str, texts: dict[str, str]) -> dict[str, Any]:
    """Of each tensor of a file, as its header has it."""
    text = texts.get(CUSTOM_METADATA_KEY)
    if not text:
        raise ValueError(
            "No DCP custom metadata found in safetensors file. The file must be saved with DCP to "
            f"be consolidated. ({path})"
        )
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its {CUSTOM_METADATA_KEY} can not be read: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path}: its {CUSTOM_METADATA_KEY} is not a mapping")
    return info


def _box_of(
    path: str, fqn: str, info: dict[str, Any], shape: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """Where the shard begins, and the least size of the tensor that it says."""
    said = info.get(fqn)
    said = said if isinstance(said, dict) else {}
    offsets = said.get(SAVED_OFFSETS_KEY)
    whole = said.get(GLOBAL_SHAPE_KEY, [0] * len(shape))  # torch does not tell
    for numbers in (offsets, whole):
        if not isinstance(numbers, list) or len(numbers) != len(shape):
            raise _refuse(path, fqn, f"a shard of shape {shape} can not be at {said!r}")
        if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise _refuse(path, fqn, f"a shard can not be at {said!r}")
    ends = [offset + n for offset, n in zip(offsets, shape, strict=True)]
    return offsets, list(map(max, ends, whole))


def _lay_out(shards: _Shards, fqn_to_index_mapping: dict[str, int]) -> Layout:
    shapes = shards.shapes(fqn_to_index_mapping)
    if len(shapes) < len(fqn_to_index_mapping):
        missing = [fqn for fqn in fqn_to_index_mapping if fqn not in shapes]
        logger.warning(
            "fqn_to_index_mapping names %d tensors that no file in %s has (%s, ...); they are left "
            "out",
            len(missing), shards.path, missing[0],
        )  # fmt: skip
    return lay_out(shapes, file_names(shapes, fqn_to_index_mapping))


def _join(
    shards: _Shards,
    layout: Layout,
    output_dir: str,
    token: str,
    wanted: set[str],
    rank: int = 0,
    ranks_count: int = 1,
) -> None:
    """Write the files ``wanted`` of the layout, under their temporary names."""
    numbers = {i: n for n, i in enumerate(
        i for i, file in enumerate(layout.files) if file.name in wanted
    )}  # fmt: skip
    files = parts((layout.files[i] for i in numbers), token)
    tensors = sorted(
        (
            (fqn, numbers[place.file], place.offset, ITEM_BYTES[place.shape.dtype],
             place.shape.size, tuple(shards.chunks[fqn]))
            for fqn, place in layout.places.items()
            if place.file in numbers
        ),
        key=lambda tensor: (tensor[1], tensor[2]),
    )  # fmt: skip
    total = sum(place.shape.nbytes for place in layout.places.values() if place.file in numbers)
    progress = Counted("consolidate", total, rank=rank, ranks_count=ranks_count)
    try:
        with progress:
            _native.export_create(output_dir, files)
            _native.export_join(
                shards.path,
                shards.names,
                output_dir,
                [file[:2] for file in files],
                tensors,
                direct=DIRECT_IO[config().direct_io],
                progress=progress.counter,
            )
    except BaseException:
        _native.export_discard(output_dir, [file[0] for file in files])
        raise


def _publish(layout: Layout, output_dir: str, token: str, order: Mapping[str, int]) -> None:
    names = [file.name for file in layout.files]
    _native.export_publish(  # removes what it can not publish, while there is another export
        output_dir,
        [part_name(token, name) for name in names],
        names,
        FULL_PATTERN,
        **publication(layout.index(order), token),
    )


def consolidate_safetensors_files(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
) -> None:
    """Join the shard files in ``input_dir`` into ``model-*-of-*`` files and an index.

    Mirrors torch's function of this name.

    Args:
        input_dir: directory of the files that the ranks wrote.
        output_dir: made if it is not there.  ``model-*-of-*`` files in it are replaced.
        fqn_to_index_mapping: number of the file, from 1, of each tensor that is wanted.
        num_threads: taken for torch's sake: one thread reads and one writes, which is as fast as
            the device; memory is 48 MiB, whatever the tensors' sizes.

    Raises:
        ValueError: a file was not saved by DCP, or its shards contradict each other, or there is
            nothing to join; ``output_dir`` is left as it is.
        NativeError: a file is damaged, or shards of a tensor are missing (dcp_code HOLE).
    """
    consolidate(input_dir, output_dir, fqn_to_index_mapping)


def consolidate(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    only: Collection[str] | None = None,
) -> None:
    """The same; ``only`` names the files to join, where others may be left of earlier saves."""
    start = time.monotonic()
    output_dir = os.fspath(output_dir)
    shards = _Shards(os.fspath(input_dir))
    shards.read(fqn_to_index_mapping, only)
    layout = _lay_out(shards, fqn_to_index_mapping)
    token = _begin(output_dir)
    _join(shards, layout, output_dir, token, {file.name for file in layout.files})
    _publish(layout, output_dir, token, fqn_to_index_mapping)
    logger.info(
        "Consolidated %d tensors in %.2f s.", len(layout.places), time.monotonic() - start
    )  # fmt: skip


def consolidate_safetensors_files_on_every_rank(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """The same, each rank of ``process_group`` writing some of the output files.

    Mirrors torch's function of this name.  All ranks must see both directories.  When a rank fails
    no file is published, and all ranks raise.
    """
    if not (dist.is_available() and dist.is_initialized()):
        logger.warning("Distributed environment not initialized. Running in single process mode.")
        consolidate_safetensors_files(input_dir, output_dir, fqn_to_index_mapping, num_threads)
        return
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    output_dir = os.fspath(output_dir)
    shards = _Shards(os.fspath(input_dir))
    _agree(partial(shards.read, fqn_to_index_mapping), process_group)
    token = _agree(partial(_begin, output_dir) if rank == 0 else _nothing, process_group)[0]
    layout = _lay_out(shards, fqn_to_index_mapping)
    mine = {
        layout.files[place.file].name
        for fqn, place in layout.places.items()
        if fqn_to_index_mapping[fqn] % size == rank
    }
    try:
        _agree(partial(_join, shards, layout, output_dir, token, mine, rank, size), process_group)
    except BaseException:
        _native.export_discard(output_dir, [part_name(token, name) for name in mine])
        raise
    publish = partial(_publish, layout, output_dir, token, fqn_to_index_mapping)
    _agree(publish if rank == 0 else _nothing, process_group)


def _agree(step: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Run a step; what each rank's gave.  When one failed all ranks raise, that one its own."""
    value, error = None, None
    try:
        value = step()
    except Exception as failed:
        error = failed
    gathered: list[Any] = [None] * dist.get_world_size(group)
    said = None if error is None else f"{type(error).__name__}: {error}"
    dist.all_gather_object(gathered, (value, said), group=group)
    if error is not None:
        raise error
    failures = [f"rank {rank}: {said}" for rank, (_, said) in enumerate(gathered) if said]
    if failures:
        raise RuntimeError("consolidating failed: " + "; ".join(failures))
    return [value for value, _ in gathered]


def _nothing() -> None:
    """The part of a rank that has none in a step."""


def _begin(output_dir: str) -> str:
    """Make the directory and sweep it; what names the files of this export in it."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    _native.export_sweep(output_dir)
    return new_token()


__getattr__, __dir__ = rest_of_torchs(__name__)
