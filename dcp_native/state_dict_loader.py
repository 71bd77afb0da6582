"""load: torch's signature and semantics over the native metadata reader, planner and engine.

Mirrors torch/distributed/checkpoint/state_dict_loader.py.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._storage_utils import _storage_setup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.checkpoint.utils import _api_bc_check, _profile
from typing_extensions import deprecated

from . import _roles
from ._by_torch import clock_of
from ._config import VERIFY, config
from ._filter import KeyFilter, Keys
from ._groups import group_for
from ._load import LoadsElsewhere, NativeLoad, UnsupportedCheckpoint
from ._mirror import rest_of_torchs
from ._mixed_load import MixedLoad
from ._report import LISTED_NAMES, logger, note_path, set_report, tell
from ._stateful import is_stateful
from ._stock import state_dict_loader as _torch
from ._uploads import wait_for_uploads

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
    keys: Keys | None = None,
    verify: bool | Literal["strict"] | None = None,
) -> None:
    """Fill a state dict from a checkpoint, in place; mirrors ``torch.distributed.checkpoint.load``.

    Tensors are filled where they are (any sharding, any number of ranks, cast to the target's
    dtype); other leaves are replaced; each ``Stateful`` gets ``load_state_dict``.  Afterwards
    :func:`dcp_native.last_report` tells what became of which name.

    Args:
        state_dict: what to load, and where to; the same keys on every rank.
        checkpoint_id: directory of the checkpoint (or what ``storage_reader`` takes).
        storage_reader: default ``FileSystemReader(checkpoint_id)``.
        planner: default ``DefaultLoadPlanner()``.
        process_group: ranks that load together; default: all.
        no_dist: load into this process alone.
        keys: load only these leaves; all others keep their value and need not be in the checkpoint.
            A string, or an iterable of them, names keys of the flattened state dict
            (``"model.layers.0.weight"``), or what they start with up to a dot (``"model"``,
            ``"model.layers.0"``); ``*``, ``?`` and ``[...]`` match as in a shell, dots included.
            A callable gets each flattened key and answers whether to load it.  A ``Stateful`` of
            which nothing is selected gets no ``load_state_dict``.  Ranks may differ.
        verify: ``config.verify`` for this call; None: as configured.

    Raises:
        CheckpointException: on every rank when any rank failed; ``failures`` maps group ranks to
            exceptions.  A :class:`LoadException`, which names the tensors, once memory has been
            written to.  ValueError is the cause when a string of ``keys`` selects nothing, or when
            ``verify`` asks for what a reader that is not torch's own does not do.
    """
    torch._C._log_api_usage_once("dcp_native.load")
    no_dist = no_dist or (not dist.is_available()) or (not dist.is_initialized())
    if no_dist:
        warnings.warn(_NO_DIST_TEXT, stacklevel=2)
    with _profile():
        reader = cast(StorageReader, _storage_setup(storage_reader, checkpoint_id, reader=True))
        _load(state_dict, reader, process_group, 0, no_dist, planner, keys, verify)


def _load(
    state_dict: dict[str, Any],
    reader: StorageReader,
    process_group: dist.ProcessGroup | None,
    coordinator_rank: int,
    no_dist: bool,
    planner: LoadPlanner | None,
    keys: Keys | None = None,
    verify: bool | Literal["strict"] | None = None,
) -> None:
    """``load`` with its roles made; ``coordinator_rank`` is a rank of the group."""
    tops = sorted(state_dict.keys())
    try:
        selection = None if keys is None else KeyFilter(keys)
        if verify is not None and verify not in VERIFY:
            raise ValueError(f"verify must be None or one of {list(VERIFY)}, not {verify!r}")
        loaded = {
            key: value.state_dict() if is_stateful(value) else value
            for key, value in ((key, state_dict[key]) for key in tops)
        }
    except BaseException as error:
        _tell(error, reader, planner, process_group, coordinator_rank, no_dist)
        raise
    _load_state_dict(
        loaded, reader, process_group, coordinator_rank, no_dist, planner,
        keys=selection, verify=verify, top_is_copy=True,
    )  # fmt: skip
    for key in tops:
        if selection is not None and str(key) not in selection.touched:
            continue
        if is_stateful(value := state_dict[key]):
            value.load_state_dict(loaded[key])
        else:
            state_dict[key] = loaded[key]


def _tell(
    error: BaseException,
    reader: StorageReader,
    planner: LoadPlanner | None,
    process_group: dist.ProcessGroup | None,
    coordinator_rank: int,
    no_dist: bool,
) -> None:
    """Let the other ranks of a load fail by name while this one raises ``error``."""
    read_reason = _roles.reader_reason(reader)
    plan_reason = _roles.load_planner_reason(planner) or _roles.files_reason(reader)
    group_reason = _roles.group_reason(process_group, no_dist)
    elsewhere = bool(read_reason or plan_reason)
    if group_reason is None:
        group = group_for(process_group, no_dist, coordinator_rank, state_dict=())
        NativeLoad(None if elsewhere else cast(Any, reader), planner, group).tell(error)
    elif isinstance(error, Exception):
        with contextlib.suppress(CheckpointException):
            _refuse(error, process_group, coordinator_rank, no_dist)
    if elsewhere or group_reason:
        set_report(_failed(_report(read_reason, planner, plan_reason or group_reason), error))


def _load_state_dict(
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
    *,
    keys: KeyFilter | None = None,
    verify: bool | Literal["strict"] | None = None,
    top_is_copy: bool = False,
) -> None:
    """As torch's private function of this name: no Stateful calls, no reset."""
    torch._C._log_api_usage_once("dcp_native.load_state_dict")
    try:
        wait_for_uploads()
    except BaseException as error:  # an interrupt
        _tell(error, storage_reader, planner, process_group, coordinator_rank, no_dist)
        raise
    read_reason = _roles.reader_reason(storage_reader)
    plan_reason = _roles.load_planner_reason(planner) or _roles.files_reason(storage_reader)
    group_reason = _roles.group_reason(process_group, no_dist)
    if group_reason is None:
        group = group_for(process_group, no_dist, coordinator_rank, state_dict=state_dict)
        reader = None if read_reason or plan_reason else cast(Any, storage_reader)
        try:
            NativeLoad(reader, planner, group, keys, verify, top_is_copy).run(state_dict)
            note_path("load", None)
            return
        except (UnsupportedCheckpoint, LoadsElsewhere) as error:  # on every rank or on none
            plan_reason = plan_reason or (None if read_reason else str(error))
        except BaseException as error:
            if reader is None:
                set_report(_failed(_report(read_reason, planner, plan_reason), error))
            raise
    report = _report(read_reason, planner, plan_reason or group_reason)
    logger.debug("load: %(path)s path; planner: %(planner)s; reader: %(reader)s", report)
    set_report(report)
    clock = clock_of("load", storage_reader, process_group, no_dist)
    report |= clock.facts()
    load = None
    if read_reason is None:
        load = MixedLoad(
            cast(FileSystemReader, storage_reader), planner, process_group, coordinator_rank,
            no_dist, verify, top_is_copy,
        )  # fmt: skip
    try:
        _load_by_steps(
            load, state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner,
            keys, verify, report,
        )  # fmt: skip
    except BaseException as error:
        report |= {"total_ns": clock.total_ns}
        set_report(_failed(report | (load.facts(state_dict, True) if load else {}), error))
        raise
    finally:
        clock.end()
    report |= load.facts(state_dict, False) if load else {}
    report |= {"failed": False, "error": None, "total_ns": clock.total_ns}
    set_report(report)
    tell(report)


def _load_state_dict_from_keys(
    keys: set[str] | str | None = None,
    *,
    checkpoint_id: str | os.PathLike | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """A new state dict of the saved keys, or of those that are or lie under ``keys``; private.

    Not distributed: every rank gets all of it, on the CPU.
    """
    torch._C._log_api_usage_once("dcp_native._load_state_dict_from_keys")
    no_dist = not (dist.is_available() and dist.is_initialized())
    if no_dist:
        warnings.warn(_NO_DIST_TEXT, stacklevel=2)
    reader = cast(StorageReader, _storage_setup(storage_reader, checkpoint_id, reader=True))
    planner = _EmptyStateDictLoadPlanner(keys={keys} if isinstance(keys, str) else keys)
    state_dict: dict[str, Any] = {}
    _load_state_dict(
        state_dict, reader, process_group=process_group, no_dist=no_dist, planner=planner
    )
    return state_dict


def _report(
    read_reason: str | None, planner: LoadPlanner | None, plan_reason: str | None
) -> dict[str, Any]:
    """Of a load that torch's implementation drives: where its roles ran, and why there."""
    where = f"torch: {plan_reason or 'the reader is not native'}"
    if (planner_reason := _roles.load_planner_reason(planner)) is not None:
        where = f"python: {planner_reason}"
    return {
        "kind": "load",
        "path": "torch" if read_reason else "native",
        "reason": read_reason,
        "planner": where,
        "reader": f"torch: {read_reason}" if read_reason else "native",
    }


def _failed(report: dict[str, Any], error: BaseException) -> dict[str, Any]:
    return {**report, "failed": True, "error": f"{type(error).__name__}: {error}"}


class _Refuses(DefaultLoadPlanner):
    """Raises where torch's load turns an exception of one rank into one on every rank.

    It is its own reader, of a checkpoint without anything: no file is opened.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def read_metadata(self) -> Metadata:
        return Metadata({})

    def set_up_planner(self, *unused: Any, **unused_too: Any) -> None:
        raise self.error


def _refuse(
    error: BaseException,
    process_group: dist.ProcessGroup | None,
    coordinator_rank: int,
    no_dist: bool,
) -> None:
    """Take part in torch's load with nothing but ``error``, which every rank then raises."""
    role = cast(Any, _Refuses(error))
    _torch._load_state_dict({}, role, process_group, coordinator_rank, no_dist, role)


def _load_by_steps(
    load: MixedLoad | None,
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None,
    coordinator_rank: int,
    no_dist: bool,
    planner: LoadPlanner | None,
    keys: KeyFilter | None,
    verify: bool | Literal["strict"] | None,
    report: dict[str, Any],
) -> None:
    """Torch's implementation, given a state dict of nothing but the selected leaves.

    ``load`` is None where the reader is not stock: nothing is native then.
    """
    pruned = None
    try:
        if load is None:
            _check_torch_can(verify, report["reason"])
        else:
            load.check()
        if keys is not None:
            pruned = keys.prune(state_dict, getattr(planner, "flatten_state_dict", True))
            report["skipped"] = pruned.skipped[:LISTED_NAMES]
            report["skipped_count"] = len(pruned.skipped)
    except BaseException as error:
        _refuse(error, process_group, coordinator_rank, no_dist)
        raise
    target = state_dict if pruned is None else pruned.state_dict
    if load is not None:
        load.run(target)
    else:
        _torch._load_state_dict(
            target, storage_reader, process_group, coordinator_rank, no_dist, planner
        )
    if pruned is not None:
        pruned.put_back()


def _check_torch_can(verify: bool | Literal["strict"] | None, reason: str) -> None:
    """Refuse what a reader that is not stock would not do."""
    if not config().allow_unsafe_objects:
        raise pickle.UnpicklingError(
            "config.allow_unsafe_objects is off, and this load runs through torch's own "
            f"implementation, which unpickles whatever it finds, because {reason}"
        )
    if verify:
        raise ValueError(
            f"verify={verify!r} cannot be had: this load runs through torch's own "
            f"implementation, which verifies nothing, because {reason}"
        )


__getattr__, __dir__ = rest_of_torchs(__name__)
