"""Mirrors torch/distributed/_state_dict_utils.py: what makes state dicts full and cuts full ones.

torch walks the state dict and runs a collective for every tensor it meets.  Here a walk only
collects; then bytes move in buckets (_full_gather.py, _full_broadcast.py), and a second walk
builds what is returned.  Names, signatures and results are torch's; what torch has beside them
is torch's own object.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ._full_broadcast import (
    _broadcast_state_dict,
    _broadcast_tensors,
    _distribute_state_dict,
    _distribute_tensors,
)
from ._full_gather import PLAIN, Gathering

__all__ = [
    "_broadcast_state_dict",
    "_broadcast_tensors",
    "_distribute_state_dict",
    "_distribute_tensors",
    "_gather_state_dict",
    "_offload_state_dict_to_cpu",
]

CPU = torch.device("cpu")
LEAVES = (int, float, str, bytes, io.BytesIO, type(None))


def _gather_state_dict(
    state_dict: dict[str, Any],
    *,
    pg: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
    cpu_offload: bool = False,
    ranks_only: tuple[int, ...] = (),
    type_check: bool = True,
) -> dict[str, Any]:
    """The state dict with every ShardedTensor and DTensor made whole; collective.

    pg: gathers ShardedTensors, and numbers `ranks_only`; DTensors go by the groups of their mesh.
    device: of the collectives for ShardedTensors.  cpu_offload: results are on the CPU.
    ranks_only: ranks that get the result, the others get {}; empty: all.  type_check: refuse values
    that torch refuses, else copy them deeply.
    Mirrors torch.distributed._state_dict_utils._gather_state_dict.

    Raises:
        ValueError: for a value of another type, as torch.
        RuntimeError: another rank failed, or holds other tensors: then nobody has communicated.
    """
    destinations, wanted = _destinations(pg, ranks_only)
    gathering = Gathering(pg, device, destinations, to_cpu=cpu_offload)
    failure: Exception | None = None

    def collect(tensor: torch.Tensor) -> None:
        nonlocal failure
        try:
            gathering.add(tensor)
        except Exception as error:  # told to all ranks before anyone waits for this one
            failure = failure or error

    def check(value: Any) -> None:
        nonlocal failure
        if type_check:
            failure = failure or _unexpected(value)

    _mapped(state_dict, collect, check)
    results = gathering.run(failure)
    if not wanted:
        return _dropped(state_dict)
    in_order = iter(results)
    offload = _to_cpu if cpu_offload else _itself
    return _mapped(state_dict, lambda _: offload(next(in_order)), copy.deepcopy)


def _offload_state_dict_to_cpu(
    state_dict: dict[str, Any],
    *,
    ranks_only: tuple[int, ...] = (),
    type_check: bool = True,
) -> dict[str, Any]:
    """The state dict with every tensor on the CPU; those that are there already are not copied.

    ranks_only, type_check: as for `_gather_state_dict`.
    Mirrors torch.distributed._state_dict_utils._offload_state_dict_to_cpu.
    """

    def refuse(value: Any) -> None:
        raise _unexpected(value)

    _, wanted = _destinations(None, ranks_only)
    offloaded = _mapped(
        state_dict, _to_cpu if wanted else _itself, refuse if type_check else copy.deepcopy
    )
    return offloaded if wanted else _dropped(state_dict)


def _mapped(value: Any, tensor: Callable[[torch.Tensor], Any], other: Callable[[Any], Any]) -> Any:
    """A new structure of dicts, lists and tuples, with `tensor` and `other` of what is in it."""
    if isinstance(value, torch.Tensor):
        return tensor(value)
    if isinstance(value, LEAVES):
        return value
    if isinstance(value, dict):
        return {key: _mapped(item, tensor, other) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_mapped(item, tensor, other) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return other(value)


def _destinations(
    pg: dist.ProcessGroup | None, ranks_only: tuple[int, ...]
) -> tuple[frozenset[int] | None, bool]:
    """(global ranks that get the result or None for all, whether this one does)."""
    if not ranks_only:
        return None, True
    if pg is None:
        return frozenset(ranks_only), dist.get_rank() in ranks_only
    ranks = dist.get_process_group_ranks(pg)
    chosen = frozenset(ranks[r] for r in ranks_only if 0 <= r < len(ranks))
    return chosen, dist.get_rank(pg) in ranks_only


def _dropped(state_dict: Any) -> Any:
    return {} if isinstance(state_dict, dict) else None


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) in PLAIN and tensor.device.type == "cpu":
        return tensor
    return tensor.to(CPU)


def _unexpected(value: Any) -> ValueError:
    return ValueError(f"Unexpected value type {type(value)}")
