"""Values of tensors of two checkpoints, compared window by window.

Both are read as boxes of some megabytes, small tensors many at a time, so that memory does not
grow with the checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .checkpoint import Checkpoint, Entry
from .values import Box, Reader, bits, whole, windows

_PART_ELEMENTS = 1 << 17
"""Compared at a time, in temporaries of 8 bytes each that stay in the cache."""
_LONG = (torch.int64, torch.uint64)
"""Neighbours among these may be one float64."""


@dataclasses.dataclass
class Comparison:
    """Of a tensor.

    Attributes:
        differing: elements that differ by more than the thresholds; NaN against a number does.
        max_abs, max_rel: of those without a NaN, the greatest difference, and the greatest one as
            a part of the value in A; infinite where that is 0.
        nans_a, nans_b: NaNs.
    """

    key: str
    elements: int = 0
    differing: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    nans_a: int = 0
    nans_b: int = 0

    def facts(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        del found["key"]
        return found


class Comparer:
    """Compares tensors of equal shapes; types may differ."""

    def __init__(
        self, a: Checkpoint, b: Checkpoint, absolute: float, relative: float, window_bytes: int
    ) -> None:
        self._readers = Reader(a), Reader(b)
        self._absolute = absolute
        self._relative = relative
        self._thresholds = absolute > 0 or relative > 0
        self._window_bytes = window_bytes

    def run(
        self, pairs: Sequence[tuple[Entry, Entry]], update: Callable[[int], None]
    ) -> Iterator[Comparison]:
        """One for each pair, in order; ``update`` gets the bytes of A gone through."""
        done = 0
        for batch in self._batches(pairs):
            values = zip(
                self._readers[0].read([mine for mine, _ in batch]),
                self._readers[1].read([other for _, other in batch]),
                strict=True,
            )
            for (mine, _), (x, y) in zip(batch, values, strict=True):
                key = mine.entry.key
                if self._current is None or self._current.key != key:
                    if self._current is not None:
                        yield self._current
                    self._current = Comparison(key)
                self._add(self._current, x, y)
                done += mine.bytes_count
            update(done)
        if self._current is not None:
            yield self._current
            self._current = None

    _current: Comparison | None = None

    def _batches(self, pairs: Sequence[tuple[Entry, Entry]]) -> Iterator[list[tuple[Box, Box]]]:
        batch: list[tuple[Box, Box]] = []
        size = 0
        for mine, other in pairs:
            most = self._window_bytes * mine.item_bytes // max(mine.item_bytes, other.item_bytes, 1)
            for box in windows(whole(mine), max(most, 1)):
                if size + box.bytes_count > self._window_bytes and batch:
                    yield batch
                    batch, size = [], 0
                batch.append((box, Box(other, box.offsets, box.sizes)))
                size += box.bytes_count
        if batch:
            yield batch

    def _add(self, found: Comparison, x: torch.Tensor, y: torch.Tensor) -> None:
        found.elements += x.numel()
        if x.numel() == 0:
            return
        if x.dtype == y.dtype and torch.equal(bits(x), bits(y)):
            nans = int(torch.isnan(x).sum()) if _has_nans(x.dtype) else 0
            found.nans_a += nans
            found.nans_b += nans
            return
        parts = zip(
            x.reshape(-1).split(_PART_ELEMENTS), y.reshape(-1).split(_PART_ELEMENTS), strict=True
        )
        for mine, other in parts:
            before = found.differing
            self._add_part(found, _numbers(mine), _numbers(other))
            if mine.dtype == other.dtype and mine.dtype in _LONG and not self._thresholds:
                exact = int((mine.view(torch.int64) != other.view(torch.int64)).count_nonzero())
                found.differing = before + exact
                found.max_abs = max(found.max_abs, float(exact > 0))

    def _add_part(self, found: Comparison, x: torch.Tensor, y: torch.Tensor) -> None:
        off = (x - y).abs_()
        if not self._thresholds and bool(off.sum().isfinite()):
            found.differing += int((off.any(1) if off.shape[1] > 1 else off).count_nonzero())
            found.max_abs = max(found.max_abs, float(off.max()))
            ratios = off.div_(x.abs_()).nan_to_num_(nan=0.0, posinf=math.inf)  # 0 / 0 is equal
            found.max_rel = max(found.max_rel, float(ratios.max()))
        else:
            self._add_odd_part(found, x, y)

    def _add_odd_part(self, found: Comparison, x: torch.Tensor, y: torch.Tensor) -> None:
        """With NaNs, infinities or thresholds."""
        nan_x, nan_y = torch.isnan(x), torch.isnan(y)
        found.nans_a += int(nan_x.any(1).sum())
        found.nans_b += int(nan_y.any(1).sum())
        off = (x - y).abs()
        off[(x == y) | (nan_x & nan_y)] = 0.0  # infinities of one sign, too
        size = x.abs()
        near = (off <= self._absolute) | (off <= self._relative * size)
        differs = ~(near & off.isfinite())  # an infinity is near nothing else
        found.differing += int(differs.any(1).sum())
        known = differs & ~(nan_x | nan_y)
        if known.any():
            off, size = off[known], size[known]
            found.max_abs = max(found.max_abs, float(off.max()))
            found.max_rel = max(
                found.max_rel, float(torch.where(size == 0, torch.inf, off / size).max())
            )


def _has_nans(dtype: torch.dtype) -> bool:
    return dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1)


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Elements as rows of float64 (two of complex ones), which holds the values of all types but
    the greatest of 64-bit integers."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128))
    return tensor.to(torch.float64).unsqueeze(1)
