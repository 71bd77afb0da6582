"""Quantised weights of Hugging Face checkpoints: which bytes and scales make which values.

The arithmetic is torch's own: tables of what each stored byte stands for are made with torch's
operations, and C looks values up in them while it reads (csrc/core/dequantise.c).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from . import _native
from ._config import DIRECT_IO, config
from ._hf_reads import HFReads
from ._plan_reads import _check_size, _inside, _Item

_Numbers = tuple[int, ...]

_TARGET_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALE_DTYPES = _TARGET_DTYPES
_FP4_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""Of the OCP Microscaling specification's E2M1, without their sign."""
_EXPONENT_BIAS = 127
_BLOCKS, _FP4 = 1, 2
"""enum dcp_quant_kind (csrc/include/dcp_dequantise.h)."""


class Scales(NamedTuple):
    """Where the scales of a tensor lie."""

    path: str
    fqn: str


class _Quant(NamedTuple):
    """How one item's values are made."""

    kind: int
    scales: Scales
    box: tuple[_Numbers, _Numbers]  # of the stored weight: offsets, lengths
    scales_box: tuple[_Numbers, _Numbers]
    scales_dtype: torch.dtype  # as they are read
    rest: _Numbers  # numbers that C wants: read_quant.c


def why_not(target_dtype: torch.dtype) -> str | None:
    """None when values of this dtype can be made natively, else why not."""
    if target_dtype not in _TARGET_DTYPES:
        return f"the target dtype is {target_dtype}"
    if target_dtype.itemsize < 8 and torch.get_default_dtype() is not torch.float32:
        return f"the default dtype is {torch.get_default_dtype()}"
    return None


@functools.cache
def _values(dtype: torch.dtype) -> torch.Tensor:
    """float32 of every byte of a type of one byte."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)


@functools.cache
def _fp4_table(dtype: torch.dtype, default_dtype: torch.dtype) -> torch.Tensor:
    """Values by exponent byte and number, as torch computes them with this default dtype."""
    numbers = _FP4_VALUES + [-value for value in _FP4_VALUES]
    exponents = torch.arange(256, dtype=torch.int32).sub_(_EXPONENT_BIAS).unsqueeze(1)
    table = torch.tensor(numbers, dtype=dtype).repeat(256, 1)
    return torch.ldexp(table, exponents, out=table)


class QuantReads(HFReads):
    """Reads plans from safetensors files of which some tensors are quantised.

    Args:
        reader: the quantised reader, set up.
        scales_of: where the scales of an item lie whose file is given; None: it is not quantised.
    """

    def __init__(self, reader: Any, scales_of: Callable[[ReadItem, str], Scales | None]) -> None:
        super().__init__(reader)
        self._target_dtype: torch.dtype = reader.target_dtype
        self._block: int = reader.block_size
        self._full_shapes: dict[str, torch.Size] = reader._tensor_full_shapes
        self._scales_of = scales_of
        self._quants: dict[int, _Quant] = {}  # by id of the plan's items

    def prepare(self, plan: LoadPlan) -> str | None:
        """Look at what is quantised; None, or why torch has to read this plan."""
        found = []
        for item in plan.items:
            path = self._path_of(item.storage_index)
            scales = self._scales_of(item, path)
            if scales is not None:
                found.append((item, path, scales))
        self._read_headers({path for _, *where in found for path in (where[0], where[1].path)})
        for item, path, scales in found:
            quant = self._quant_of(item, path, scales)
            if quant is None:
                return f"{item.storage_index.fqn} is not quantised in a way that is known"
            self._quants[id(item)] = quant
        return None

    def _quant_of(self, item: ReadItem, path: str, scales: Scales) -> _Quant | None:
        weight = self._headers[path].tensors.get(item.storage_index.fqn)
        scale = self._headers[scales.path].tensors.get(scales.fqn)
        full = self._full_shapes.get(item.storage_index.fqn)
        if weight is None or scale is None or full is None:
            return None
        dtype = self._headers[path].dtype_of(item.storage_index.fqn)
        scale_dtype = self._headers[scales.path].dtype_of(scales.fqn)
        if item.storage_index.fqn.endswith("_blocks"):
            if len(full) == 2 or dtype is not torch.uint8 or scale_dtype is not torch.uint8:
                return None
            return _fp4_quant(item, weight.shape, scale.shape, scales)
        if len(full) != 2 or dtype.itemsize != 1 or scale_dtype not in _SCALE_DTYPES:
            return None
        return _blocks_quant(item, weight.shape, scale.shape, scales, self._block)

    def _box(self, item: _Item) -> tuple[_Numbers, _Numbers]:
        quant = self._quants.get(id(item.item))
        return super()._box(item) if quant is None else quant.box

    def _resolve(self, item: _Item, planner: LoadPlanner) -> None:
        if id(item.item) not in self._quants:
            super()._resolve(item, planner)
            return
        target = planner.resolve_tensor(item.item).detach()
        _check_size(item.item, target, torch.Size(item.item.lengths))
        item.target = target
        if target.numel() == 0:
            return
        memory = None
        if target.dtype is self._target_dtype:
            memory = _native.tensor_memory(target, target.dtype)
        if memory is None or _rows_of(target) is None:
            item.source = torch.empty(target.shape, dtype=self._target_dtype, device="cpu")
        elif not self._memory.add(*memory, target):
            self._flush(planner)
            self._memory.add(*memory, target)

    def _read(self, window: list[_Item]) -> None:
        quantised = [
            (item, self._quants[id(item.item)])
            for item in window
            if item.dtype is not None
            and id(item.item) in self._quants
            and math.prod(item.lengths) > 0
        ]
        for (item, quant), scales in zip(quantised, self._read_scales(quantised), strict=True):
            table = (
                _values(item.dtype)
                if quant.kind == _BLOCKS
                else _fp4_table(self._target_dtype, torch.get_default_dtype())
            )
            item.more = ((quant.kind, table, scales, *quant.rest),)
        super()._read(window)

    def _into(self, item: _Item) -> torch.Tensor | None:
        into = super()._into(item)
        return into if into is None or id(item.item) not in self._quants else _rows_of(into)

    def _read_scales(self, quantised: list[tuple[_Item, _Quant]]) -> list[torch.Tensor]:
        """Of each item the scales of its own blocks or groups."""
        made: dict[tuple[Scales, _Numbers, _Numbers], torch.Tensor] = {}
        files: dict[str, int] = {}
        reads, wanted = [], []
        for _, quant in quantised:
            key = (quant.scales, *quant.scales_box)
            if key not in made:
                made[key] = torch.empty(quant.scales_box[1], dtype=quant.scales_dtype)
                header = self._headers[quant.scales.path]
                tensor = header.tensors[quant.scales.fqn]
                name = self._name_of(quant.scales.path)
                reads.append((
                    quant.scales.fqn, files.setdefault(name, len(files)), tensor.offset,
                    tensor.length, False, header.dtype_of(quant.scales.fqn), tensor.shape,
                    *quant.scales_box, made[key],
                ))  # fmt: skip
            wanted.append(made[key])
        if reads:
            direct = DIRECT_IO[config().direct_io]
            stats = _native.read_records(
                self._path, tuple(files), tuple(reads), None, verify=0, direct=direct, raw=True
            )
            self.stats.update(stats)
            self._check_files(quant.scales.path for _, quant in quantised)
        return wanted


def _rows_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor as rows of its last dim, or None when its memory is not that."""
    if tensor.dim() == 0 or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        return None
    try:
        return tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        return None


def _blocks_quant(
    item: ReadItem, shape: _Numbers, scale_shape: _Numbers, scales: Scales, block: int
) -> _Quant | None:
    """Square blocks of a matrix, each with a scale that its elements are multiplied with."""
    offsets, lengths = tuple(item.storage_offsets), tuple(item.lengths)
    if len(shape) != 2 or not _inside(offsets, lengths, shape) or block <= 0:
        return None
    first = tuple(offset // block for offset in offsets)
    count = tuple(
        max(offset + length - 1, offset) // block + 1 - start
        for offset, length, start in zip(offsets, lengths, first, strict=True)
    )
    if math.prod(lengths) > 0 and not _inside(first, count, scale_shape):
        return None
    rest = (block, offsets[0] % block, offsets[1] % block)
    return _Quant(_BLOCKS, scales, (offsets, lengths), (first, count), torch.float32, rest)


def _fp4_quant(
    item: ReadItem, shape: _Numbers, scale_shape: _Numbers, scales: Scales
) -> _Quant | None:
    """Groups of pairs of 4-bit numbers, [a, b, groups, bytes], each with an exponent; asked for as
    what they stand for: [a, b, groups * bytes * 2]."""
    offsets, lengths = tuple(item.storage_offsets), tuple(item.lengths)
    if len(shape) != 4 or tuple(scale_shape) != tuple(shape[:3]) or shape[3] == 0:
        return None
    if not _inside(offsets, lengths, (*shape[:2], shape[2] * shape[3] * 2)):
        return None
    per_group = 2 * shape[3]
    first = offsets[2] // per_group
    groups = -(-(offsets[2] + lengths[2]) // per_group) - first
    start, count = (*offsets[:2], first), (*lengths[:2], groups)
    box = ((*start, 0), (*count, shape[3]))
    rest = (shape[3], offsets[2] - first * per_group)
    return _Quant(_FP4, scales, box, (start, count), torch.uint8, rest)
