"""async_save: vote, plan and stage on the calling thread, then hand the save to the background.

The background (_uploads.py, csrc/core/upload.c) runs no collective: ranks count up a key of the
group's store when their bytes are durable, the coordinator commits when all have, and says so under
another key.
"""

from __future__ import annotations

import os
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncSaveResponse,
    _stateful_to_state_dict,
)

from . import _roles
from ._config import config
from ._failures import forget_frames
from ._report import logger
from ._save import NativeSave, hash64
from ._staging import choose_stager, run_stager
from ._uploads import SaveFuture, Upload, begin, in_flight, wait_for_uploads

ALONE_TIMEOUT_S = 24 * 3600.0
"""Deadline of a save that no other rank waits for."""

_independent_saves = 0
"""Saves with use_collectives=False so far: no vote gives them a common id, their number does."""


class SaveSkippedError(RuntimeError):
    """The reason of a save that ``config.async_overlap="skip"`` left out."""


def start(
    save: NativeSave,
    state_dict: STATE_DICT_TYPE,
    process_group: dist.ProcessGroup | None,
    alone: bool,
    *,
    in_process: bool,
    stager: AsyncStager | None,
) -> SaveFuture | AsyncSaveResponse:
    """Plan and stage now, write and commit in the background.

    Collective up to here.  An exception of a Stateful's ``state_dict()`` and an interrupt are
    raised raw; every other one is on the returned future.

    Args:
        in_process: the writer process writes.
        stager: None, one that stages as we do, or one of the user's own.
    """
    upload = Upload(save, SaveFuture(save))
    borrow = _roles.stage_reason(stager, save.writer) is not None
    staged = _stages_asynchronously(stager)
    try:
        _make_room(save)
        state_dict = _stateful_to_state_dict(state_dict)
        if borrow and save.error is None:
            stager, _ = choose_stager(stager, save.writer)
            copy, future = run_stager(stager, state_dict)
            # Planning needs the copy, and is collective: it is waited for.
            state_dict = copy if future is None else future.result()
            staged = future is not None
    except BaseException as error:
        save.leave(error)
        raise
    if save.error is None:
        _borrow(upload, process_group, alone, in_process and not borrow)
    try:
        save.plan(state_dict)
        save.agree()
        save.meet()
        save.compare()
    except BaseException as error:  # CheckpointException is no Exception
        interrupt = save.interrupt()
        if not save.agreed():
            upload.give_back()
            save.leave(error)
            if error is interrupt or isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            return _response(_failed(upload.future, error), staged)
        # The others are past their last collective: they hear of it over the store.
        save.fail(error)
    try:
        survive = in_process and config().survive_trainer
        upload.facts["staging"] = (
            "borrowed" if borrow else save.stage(shared=in_process, survive=survive)
        )
    except BaseException as error:  # an interrupt between the steps
        save.fail(error)
    interrupt = save.interrupt()
    _begin(upload, process_group, alone)
    if interrupt is not None:
        raise interrupt  # nobody may ever look at the future
    return _response(upload.future, staged)


def _stages_asynchronously(stager: AsyncStager | None) -> bool:
    """Whether torch would return an AsyncSaveResponse for this stager."""
    options = getattr(stager, "_config", None)
    return bool(getattr(options, "use_async_staging", False))


def _response(future: SaveFuture, staged: bool) -> SaveFuture | AsyncSaveResponse:
    if not staged:
        return future
    staging: Future[None] = Future()
    staging.set_result(None)
    return AsyncSaveResponse(staging_completion=staging, upload_completion=future)


def warm_up(
    save: NativeSave,
    state_dict: STATE_DICT_TYPE,
    process_group: dist.ProcessGroup | None,
    alone: bool,
    *,
    in_process: bool,
) -> None:
    """Memory, connection and process of the first save, ahead of it."""
    upload = Upload(save, SaveFuture(save))
    try:
        state_dict = _stateful_to_state_dict(state_dict)
        _borrow(upload, process_group, alone, in_process)
        reason = save.warm_up(state_dict, shared=in_process)
    except BaseException as error:
        save.leave(error)
        raise
    finally:
        upload.give_back()
    if reason is not None:
        logger.warning("staging memory can not be made ready: %s", reason)


def _failed(future: SaveFuture, error: BaseException) -> SaveFuture:
    failures = getattr(error, "failures", {})
    if isinstance(error, CheckpointException) and all(
        isinstance(cause, SaveSkippedError) for cause, _ in failures.values()
    ):
        logger.warning("%s", next(iter(failures.values()))[0])
        future._end({"skipped": True})
        future.set_result(None)
    else:
        future._end({})
        future.set_exception(forget_frames(error))
    return future


def _make_room(save: NativeSave) -> None:
    """One save more must fit: wait for an older one, or let the ranks agree to leave this one out.

    Two saves of one directory are never in flight together: the newer one would fence the older.
    """
    directory = os.path.realpath(save.writer.path)
    while True:
        busy = in_flight()
        same = [u for u in busy if os.path.realpath(u.save.writer.path) == directory]
        if not same and len(busy) < config().arenas:
            return
        policy = config().async_overlap if save.use_collectives else "wait"
        if policy != "wait":
            text = (
                f"rank {save.group.rank}: {len(busy)} background save(s) are still in flight "
                f"(arenas={config().arenas}); this save of {save.writer.path} is left out"
            )
            save.fail(SaveSkippedError(text) if policy == "skip" else RuntimeError(text))
            return
        wait_for_uploads((same or busy)[:1])


def _borrow(
    upload: Upload, process_group: dist.ProcessGroup | None, alone: bool, in_process: bool
) -> None:
    """What the background needs; what fails here, all ranks hear of before they plan."""
    try:
        if not alone and upload.save.group.size > 1:
            upload.borrow_store(process_group or dist.distributed_c10d._get_default_group())
        if in_process:
            upload.borrow_process()
    except BaseException as error:
        upload.save.fail(error)


def _begin(upload: Upload, process_group: dist.ProcessGroup | None, alone: bool) -> None:
    save = upload.save
    upload.future._report = {**save.info(), **upload.facts}
    begin(
        upload,
        lambda watch: save.upload(
            watch,
            store=upload.store,
            process=upload.process,
            prefix=_prefix(save),
            timeout_s=_timeout_s(process_group, alone),
            written=upload.facts.get("staging") == "streamed",
            survive=upload.process is not None and config().survive_trainer,
        ),
    )


def _prefix(save: NativeSave) -> str:
    """Of this save's keys in the store, the same on all ranks."""
    global _independent_saves
    if save.use_collectives:
        return f"dcp_native/{save.info()['save_id']}/"
    _independent_saves += 1
    return f"dcp_native/{_independent_saves}-{hash64(os.fspath(save.writer.path)):016x}/"


def _timeout_s(process_group: dist.ProcessGroup | None, alone: bool) -> float:
    if config().async_timeout_s > 0:
        return config().async_timeout_s
    if alone:
        return ALONE_TIMEOUT_S
    group = process_group or dist.distributed_c10d._get_default_group()
    backend = group._get_backend(torch.device("cpu"))
    timeout: timedelta = getattr(
        getattr(backend, "options", None),
        "_timeout",
        dist.distributed_c10d.default_pg_timeout,
    )
    return timeout.total_seconds()
