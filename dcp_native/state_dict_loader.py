"""load: torch's signature and semantics over the native metadata reader, planner and engine.

Mirrors torch/distributed/checkpoint/state_dict_loader.py.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader as _torch
from torch.distributed.checkpoint._storage_utils import _storage_setup
from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.checkpoint.utils import _api_bc_check, _profile
from typing_extensions import deprecated

from . import _async, _roles
from ._groups import group_for
from ._load import NativeLoad, UnsupportedCheckpoint
from ._report import note_path

__all__ = ["_load_state_dict_from_keys", "load", "load_state_dict"]

_NO_DIST_TEXT = (
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to load "
    "in a single process."
)


@deprecated(
    "`load_state_dict` is deprecated and will be removed in future versions. "
    "Please use `load` instead.",
    category=FutureWarning,
)
def load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Deprecated by torch; use :func:`load`."""
    storage_reader.reset()
    with _profile():
        return _load_state_dict(
            state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner
        )


@_dcp_method_logger(log_exceptions=True)
@_api_bc_check
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Fill a state dict from a checkpoint, in place; mirrors ``torch.distributed.checkpoint.load``.

    Tensors are filled where they are (any sharding, any number of ranks, cast to the target's
    dtype); other leaves are replaced; each ``Stateful`` gets ``load_state_dict``.

    Args:
        state_dict: what to load, and where to; the same keys on every rank.
        checkpoint_id: directory of the checkpoint (or what ``storage_reader`` takes).
        storage_reader: default ``FileSystemReader(checkpoint_id)``.
        planner: default ``DefaultLoadPlanner()``.
        process_group: ranks that load together; default: all.
        no_dist: load into this process alone.

    Raises:
        CheckpointException: on every rank when any rank failed; ``failures`` maps group ranks to
            exceptions.
    """
    torch._C._log_api_usage_once("dcp_native.load")
    no_dist = no_dist or (not dist.is_available()) or (not dist.is_initialized())
    if no_dist:
        warnings.warn(_NO_DIST_TEXT, stacklevel=2)
    with _profile():
        reader = cast(StorageReader, _storage_setup(storage_reader, checkpoint_id, reader=True))
        keys = sorted(state_dict.keys())
        try:
            loaded = {
                key: value.state_dict() if isinstance(value, Stateful) else value
                for key, value in ((key, state_dict[key]) for key in keys)
            }
        except BaseException as error:
            _tell(error, reader, planner, process_group, no_dist)
            raise
        _load_state_dict(loaded, reader, process_group, 0, no_dist, planner)
        for key in keys:
            if isinstance(value := state_dict[key], Stateful):
                value.load_state_dict(loaded[key])
            else:
                state_dict[key] = loaded[key]


def _tell(
    error: BaseException,
    reader: StorageReader,
    planner: LoadPlanner | None,
    process_group: dist.ProcessGroup | None,
    no_dist: bool,
) -> None:
    """Let the other ranks of a load fail by name while this one raises ``error``."""
    if _roles.load_reason(reader, planner) is None:
        _async.wait_for_save_in_flight()
        NativeLoad(reader, planner, group_for(process_group, no_dist)).tell(error)


def _load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """As torch's private function of this name: no Stateful calls, no reset."""
    torch._C._log_api_usage_once("dcp_native.load_state_dict")
    _async.wait_for_save_in_flight()
    reason = _roles.load_reason(storage_reader, planner)
    reason = reason or _roles.group_reason(process_group, no_dist)
    if reason is None:
        alone = no_dist or not (dist.is_available() and dist.is_initialized())
        group = group_for(process_group, alone, 0 if alone else coordinator_rank)
        try:
            NativeLoad(storage_reader, planner, group).run(state_dict)
        except UnsupportedCheckpoint as error:  # raised on every rank or on none
            reason = str(error)
    note_path("load", reason)
    if reason is not None:
        _torch._load_state_dict(
            state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner
        )
