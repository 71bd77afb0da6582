"""Values of tensors of two checkpoints, compared window by window.

Both are read as boxes of some megabytes, small tensors many at a time, so that memory does not
grow with the checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .checkpoint import Checkpoint, Entry
from .values import Box, Reader, whole, windows


@dataclasses.dataclass
class Comparison:
    """Of a tensor.

    Attributes:
        differing: elements that differ by more than the thresholds, NaN against a number included.
        max_abs, max_rel: greatest difference, and greatest difference over the value in A, of
            those; infinite where a number stands against NaN or infinity, or against 0.
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
        if x.dtype == y.dtype and torch.equal(
            x.view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8),
            y.view(torch.uint8) if y.dim() else y.reshape(1).view(torch.uint8),
        ):
            if x.is_floating_point() or x.is_complex():
                nans = int(torch.isnan(x.float() if x.itemsize < 2 else x).sum())
                found.nans_a += nans
                found.nans_b += nans
            return
        self._add_different(found, _numbers(x), _numbers(y))

    def _add_different(self, found: Comparison, x: torch.Tensor, y: torch.Tensor) -> None:
        nan_x, nan_y = torch.isnan(x), torch.isnan(y)
        found.nans_a += int(nan_x.sum())
        found.nans_b += int(nan_y.sum())
        off = (x - y).abs()
        off[x == y] = 0.0  # infinities of one sign
        off[nan_x & nan_y] = 0.0
        off[nan_x ^ nan_y] = torch.inf
        size = x.abs().nan_to_num(nan=0.0)
        differs = (off > self._absolute) & (off > self._relative * size)
        found.differing += int(differs.sum())
        if not differs.any():
            return
        off, size = off[differs], size[differs]
        found.max_abs = max(found.max_abs, float(off.max()))
        found.max_rel = max(found.max_rel, float((off / size).nan_to_num(nan=torch.inf).max()))


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """As float64, flat, which holds the values of all types but the greatest of 64-bit integers."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex128))
    return tensor.to(torch.float64).reshape(-1)
