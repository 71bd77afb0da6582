"""save, async_save: torch's signatures and semantics over the native planner, engine and commit.

Mirrors torch/distributed/checkpoint/state_dict_saver.py.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import Future
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._storage_utils import _storage_setup
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
)
from torch.distributed.checkpoint.storage import StorageWriter
from torch.distributed.checkpoint.utils import _api_bc_check, _profile
from typing_extensions import deprecated

from . import _async, _roles
from ._by_torch import SaveByTorch
from ._elsewhere import SaveElsewhere
from ._group_comm import take_error
from ._groups import group_for
from ._mirror import rest_of_torchs
from ._report import logger, note_path, role_report
from ._save import NativeSave, SavesElsewhere
from ._stateful import _stateful_to_state_dict
from ._stock import state_dict_saver as _torch
from ._uploads import SaveFuture, wait_for_uploads

__all__ = [
    "AsyncCheckpointerType",
    "AsyncSaveResponse",
    "async_save",
    "save",
    "save_state_dict",
    "warm_up",
]

_NOT_ALL_NATIVE = "the writer of another rank is not native"
_NO_DIST_TEXT = (
    "torch.distributed is disabled, unavailable or uninitialized, assuming the intent is to save "
    "in a single process."
)


@deprecated(
    "`save_state_dict` is deprecated and will be removed in future versions."
    "Please use `save` instead.",
    category=FutureWarning,
)
def save_state_dict(
    state_dict: STATE_DICT_TYPE,
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Deprecated by torch; use :func:`save`."""
    storage_writer.reset()
    with _profile():
        return _save_state_dict(
            state_dict, storage_writer, process_group, coordinator_rank, no_dist, planner
        )


@_dcp_method_logger(log_exceptions=True)
@_api_bc_check
def save(
    state_dict: STATE_DICT_TYPE,
    *,
    checkpoint_id: str | os.PathLike | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    base: str | os.PathLike | None = None,
) -> Metadata:
    """Save a state dict, each rank its own shards; mirrors ``torch.distributed.checkpoint.save``.

    Args:
        state_dict: nested dicts and lists of tensors, DTensors, objects and ``Stateful`` values.
        checkpoint_id: directory of the checkpoint (or what ``storage_writer`` takes).
        storage_writer: default ``FileSystemWriter(checkpoint_id)``.
        planner: default ``DefaultSavePlanner()``.
        process_group: ranks that save together; default: all.
        no_dist: save this process's state alone.
        use_collectives: False lets every rank write its own ``__{rank}.metadata``.
        base: directory of an earlier checkpoint of ours, maybe ``checkpoint_id`` itself (not in
            torch).  Tensors that have not changed since are linked from there instead of written
            (``Config.incremental_links`` says how); the result needs the base no longer, and stock
            torch loads it.  Where nothing can be taken over everything is written, and
            ``last_report()["base_reason"]`` says why.  Give it on all ranks or on none.

    Returns:
        The checkpoint's metadata; it is read from memory or disk when first looked at.

    Raises:
        CheckpointException: on every rank when any rank failed; ``failures`` maps group ranks to
            exceptions.  What was loadable before still is.
    """
    torch._C._log_api_usage_once("dcp_native.save")
    no_dist = no_dist or (not dist.is_available()) or (not dist.is_initialized())
    if no_dist:
        warnings.warn(_NO_DIST_TEXT, stacklevel=2)
    with _profile():
        writer = cast(StorageWriter, _storage_setup(storage_writer, checkpoint_id, reader=False))
        return _save(
            state_dict, writer, process_group, 0, no_dist, planner, use_collectives, True, base
        )


@_dcp_method_logger(log_exceptions=True)
def async_save(
    state_dict: STATE_DICT_TYPE,
    *,
    checkpoint_id: str | os.PathLike | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    base: str | os.PathLike | None = None,
) -> Future | AsyncSaveResponse:
    """Save in the background; mirrors ``torch.distributed.checkpoint.async_save``.

    Plans (a collective call) and copies what this rank keeps before it returns; after that the
    caller may change every tensor.  Writing and committing need no Python and no collectives.
    With ``base`` (see :func:`save`) only what has changed since is copied and written.
    With ``use_collectives=False`` the writers of all ranks have to be torch's own, or of none.

    Returns:
        A future of the Metadata, or AsyncSaveResponse when the stager stages asynchronously.

    Raises:
        AssertionError: the group has no CPU backend (as torch).  Errors of planning, staging and
            writing are on the future.
    """
    return _async_save(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=storage_writer,
        planner=planner,
        process_group=process_group,
        async_checkpointer_type=async_checkpointer_type,
        async_stager=async_stager,
        no_dist=no_dist,
        use_collectives=use_collectives,
        base=base,
    )


def _async_save(
    state_dict: STATE_DICT_TYPE,
    *,
    checkpoint_id: str | os.PathLike | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    base: str | os.PathLike | None = None,
) -> Future | AsyncSaveResponse:
    torch._C._log_api_usage_once("dcp_native.async_save")
    group = _group_of(process_group)
    if group is not None and torch.device("cpu") not in group._device_types:
        raise AssertionError(
            "A CPU backend must be enabled for async save; try initializing process group with "
            "'cpu:gloo,cuda:nccl'"
        )
    if no_dist:
        group = None
    in_process = async_checkpointer_type == AsyncCheckpointerType.PROCESS
    writer = cast(StorageWriter, _storage_setup(storage_writer, checkpoint_id, reader=False))
    reason = _roles.writer_reason(writer)
    roles = _tell_roles("async_save", reason, writer, planner, base)

    def by_torch(state_dict: STATE_DICT_TYPE) -> SaveFuture | AsyncSaveResponse:
        why, where = reason, roles
        if why is None:
            why = _NOT_ALL_NATIVE
            where = _tell_roles("async_save", why, writer, planner, base)
        call = SaveByTorch("async_save", why, where, writer, process_group, no_dist)
        return call.follow(
            lambda: _torch.async_save(
                state_dict,
                checkpoint_id=checkpoint_id,
                storage_writer=storage_writer,
                planner=planner,
                process_group=process_group,
                async_checkpointer_type=async_checkpointer_type,
                async_stager=async_stager,
                no_dist=no_dist,
                use_collectives=use_collectives,
            )
        )

    native = None
    if _roles.group_reason(group, group is None) is None:
        native = group_for(
            group, group is None, coordinator_rank,
            state_dict=state_dict if use_collectives else None, is_save=True,
        )  # fmt: skip
    if reason is not None:
        if native is None or native.size == 1 or not use_collectives:
            if native is not None and (error := take_error(native)) is not None:
                raise error
            return by_torch(state_dict)
        return _async.start_elsewhere(SaveElsewhere(native), state_dict, async_stager, by_torch)
    save_ = NativeSave(
        writer, planner, native, use_collectives=use_collectives, kind="async_save", base=base
    )
    try:
        return _async.start(
            save_, state_dict, group, in_process=in_process, stager=async_stager, by_torch=by_torch
        )
    finally:
        save_.clock.end()


def _group_of(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group that a call means; None where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return process_group or dist.distributed_c10d._get_default_group()


def warm_up(
    state_dict: STATE_DICT_TYPE,
    *,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    no_dist: bool = False,
) -> None:
    """Make ready what the first ``async_save`` of such a state dict would have to make (not in
    torch): staging memory, touched; a connection to the store; the writer process.

    Collective.  Nothing of the state dict is copied or changed, and no file is made.  Without room
    for the memory (see ``Config.arena_cap_bytes``) it says so in a warning.

    Args:
        state_dict: as it will be saved.
        storage_writer: as it will be saved with; default: ``FileSystemWriter``.
        planner, process_group, async_checkpointer_type, no_dist: as of :func:`async_save`.

    Raises:
        CheckpointException: on every rank when any rank failed.
    """
    group = None if no_dist else _group_of(process_group)
    writer = storage_writer if storage_writer is not None else FileSystemWriter(".")
    reason = _roles.writer_reason(writer) or _roles.save_planner_reason(planner)
    if reason is not None and _roles.group_reason(group, group is None) is not None:
        logger.debug("warm_up: nothing to do, because %s", reason)
        return
    native = group_for(group, group is None, state_dict=state_dict, is_save=True)
    try:
        if reason is not None:
            other = SaveElsewhere(native)
            other.resolve(state_dict)
            other.agree()
            raise SavesElsewhere(reason)
        save_ = NativeSave(writer, planner, native, use_collectives=True, kind="warm_up")
        in_process = async_checkpointer_type == AsyncCheckpointerType.PROCESS
        _async.warm_up(save_, state_dict, group, in_process=in_process)
    except SavesElsewhere as error:  # on every rank or on none
        logger.debug("warm_up: nothing to do, because %s", error)


def _tell_roles(
    kind: str,
    reason: str | None,
    writer: StorageWriter,
    planner: SavePlanner | None,
    base: str | os.PathLike | None,
) -> dict[str, str]:
    """Which role runs where, which is logged.

    Where Python plans or torch writes a base is not used, and a full save loses nothing; that it is
    one must not go unnoticed.
    """
    planner_reason = _roles.save_planner_reason(planner)
    roles = role_report(reason, planner_reason)
    if reason is not None and _roles.exports_natively(writer):
        roles["writer"] = "native"
        if planner_reason is None:
            roles["planner"] = "torch: safetensors files are planned by torch's protocol"
    note_path(kind, reason, roles)
    if base is not None and (reason or planner_reason) is not None:
        logger.warning(
            "base=%s is not used and everything is written: %s", os.fspath(base),
            f"torch's own implementation runs, because {reason}" if reason else planner_reason,
        )  # fmt: skip
    return roles


def _save_state_dict(
    state_dict: STATE_DICT_TYPE,
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
    use_collectives: bool = True,
) -> Metadata:
    """As torch's private function of this name: no Stateful calls, no reset."""
    torch._C._log_api_usage_once("dcp_native.save_state_dict")
    return _save(
        state_dict,
        storage_writer,
        process_group,
        coordinator_rank,
        no_dist,
        planner,
        use_collectives,
        False,
    )


def _save(
    state_dict: STATE_DICT_TYPE,
    writer: StorageWriter,
    process_group: dist.ProcessGroup | None,
    coordinator_rank: int,
    no_dist: bool,
    planner: SavePlanner | None,
    use_collectives: bool,
    call_stateful: bool,
    base: str | os.PathLike | None = None,
    mapped: tuple[int, int] = (0, 0),
) -> Metadata:
    """``mapped``: addresses of memory that is a file's, mapped, and that nobody has written to."""
    writer_reason = _roles.writer_reason(writer)
    group_reason = _roles.group_reason(process_group, no_dist, use_collectives)
    reason = writer_reason or group_reason
    roles = _tell_roles("save", reason, writer, planner, base)
    if group_reason is not None:
        state_dict = _stateful_to_state_dict(state_dict) if call_stateful else state_dict
    else:
        group = group_for(
            process_group, no_dist, coordinator_rank,
            state_dict=state_dict if use_collectives else None, is_save=True,
        )  # fmt: skip
        if writer_reason is not None:
            other = SaveElsewhere(group, use_collectives)
            state_dict = other.resolve(state_dict) if call_stateful else state_dict
            if not use_collectives:
                with SaveByTorch("save", reason, roles, writer, process_group, no_dist):
                    return other.save_alone(state_dict, writer, planner)
            other.agree()
        else:
            save_ = NativeSave(
                writer, planner, group, use_collectives=use_collectives, kind="save", base=base,
                mapped=mapped,
            )  # fmt: skip
            try:
                with save_.clock("wait"):
                    wait_for_uploads()
                if call_stateful:
                    with save_.clock("state_dict"):
                        state_dict = _stateful_to_state_dict(state_dict)
                return _run(save_, state_dict)
            except SavesElsewhere:
                reason = _NOT_ALL_NATIVE
                roles = _tell_roles("save", reason, writer, planner, base)
            except BaseException as error:  # of state_dict(), or an interrupt between the steps
                save_.leave(error)
                raise
            finally:
                save_.clock.end()
    with SaveByTorch("save", reason, roles, writer, process_group, no_dist):
        return _torch._save_state_dict(
            state_dict, writer, process_group, coordinator_rank, no_dist, planner, use_collectives
        )


def _run(save: NativeSave, state_dict: STATE_DICT_TYPE) -> Metadata:
    save.plan(state_dict)
    save.agree()
    save.compare()
    save.write()
    return save.finish()


__getattr__, __dir__ = rest_of_torchs(__name__)
