"""async_save: vote, plan and stage on the calling thread, then hand the save to the background.

With a stager of torch's that stages asynchronously, the copies of tensors on devices are only put
on their way; the background waits for their end, and the trainer's next step runs beside them.

The background (_uploads.py, csrc/core/upload.c) runs no collective: ranks count up a key of the
group's store when their bytes are durable, the coordinator commits when all have, and says so under
another key.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from . import _roles
from ._config import config
from ._elsewhere import SaveElsewhere
from ._failures import forget_frames
from ._report import logger
from ._save import NativeSave, SavesElsewhere
from ._staging import choose_stager, completion_of, run_stager
from ._stateful import _stateful_to_state_dict
from ._uploads import (
    SaveFuture,
    Upload,
    begin,
    in_flight,
    start_watcher,
    wait_for_uploads,
)

ALONE_TIMEOUT_S = 24 * 3600.0
"""Deadline of a save that no other rank waits for."""

MOST_TIMEOUT_S = 999_999_999.0

_independent_saves: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()
"""Saves with use_collectives=False so far: no vote gives them a common id, their number does."""


class SaveSkippedError(RuntimeError):
    """The reason of a save that ``config.async_overlap="skip"`` left out."""


def start(
    save: NativeSave,
    state_dict: STATE_DICT_TYPE,
    process_group: dist.ProcessGroup | None,
    *,
    in_process: bool,
    stager: AsyncStager | None,
    by_torch: Callable[[STATE_DICT_TYPE], Future | AsyncSaveResponse],
) -> Future | AsyncSaveResponse:
    """Plan and stage now, write and commit in the background.

    Collective up to here.  An exception of a Stateful's ``state_dict()`` and an interrupt are
    raised raw; every other one is on the returned future.

    Args:
        process_group: None: this process saves alone.
        in_process: the writer process writes.
        stager: None, one that stages as we do, or one of the user's own.
        by_torch: what is called and returned, with the state dict of which no ``state_dict()`` is
            left to call, where another rank's writer is the program's own.
    """
    upload = Upload(save, SaveFuture(save), process_group)
    own = None
    if _roles.stage_reason(stager, save.writer) is not None:
        own = choose_stager(stager, save.writer)
    staging = _done() if _stages_asynchronously(stager) else None
    try:
        upload.stager = own
        with save.clock("wait"):
            _make_room(upload)
        _borrow(upload, in_process and own is None)
        with save.clock("state_dict"):
            given = state_dict = _stateful_to_state_dict(state_dict)
        if own is not None and save.error is None:
            state_dict, staging = _stage_by(own, save, state_dict)
    except BaseException as error:
        _break_off(upload, error)
        raise
    try:
        save.plan(state_dict)
        save.agree()
        save.meet()
        save.compare()
    except SavesElsewhere:
        upload.give_back()
        return by_torch(given)
    except BaseException as error:  # CheckpointException is no Exception
        interrupt = save.interrupt()
        save.meet_late()
        if not save.agreed():
            _break_off(upload, error)
            if error is interrupt or isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            return _response(_failed(upload.future, error), staging)
        # The others are past their last collective: they hear of it over the store.
        save.fail(error)
    try:
        upload.facts["staging"] = "borrowed"
        if own is None:
            survive = in_process and config().survive_trainer
            upload.facts["staging"] = save.stage(
                shared=in_process, survive=survive, background=staging is not None
            )
    except BaseException as error:  # an interrupt between the steps
        save.fail(error)
    interrupt = save.interrupt()
    try:
        if save.is_staging():
            staging = upload.staging = _running()
            if hasattr(stager, "_staging_future"):  # for its synchronize_staging()
                stager._staging_future = staging
        _begin(upload)
    except BaseException as error:
        if not save.in_background:
            _give_up(upload, error)
        if not isinstance(error, Exception):
            raise
    if interrupt is not None:
        raise interrupt  # nobody may ever look at the future
    return _response(upload.future, staging)


def start_elsewhere(
    save: SaveElsewhere,
    state_dict: STATE_DICT_TYPE,
    stager: AsyncStager | None,
    by_torch: Callable[[STATE_DICT_TYPE], Future | AsyncSaveResponse],
) -> Future | AsyncSaveResponse:
    """``start`` on a rank whose writer is the program's own."""
    state_dict = save.resolve(state_dict)
    try:
        save.agree()
    except CheckpointException as error:
        staging = _done() if _stages_asynchronously(stager) else None
        return _response(_failed(SaveFuture(None), error), staging)
    return by_torch(state_dict)


def _break_off(upload: Upload, error: BaseException) -> None:
    """This rank goes no further: the others hear of it where they wait for it."""
    save = upload.save
    if save.use_collectives or upload.process_group is None:
        upload.give_back()
        save.leave(error)
    else:  # no collective is there to hear of it in
        save.fail(error)
        if upload.store is None:
            _borrow(upload, False)
        _begin(upload)


def _give_up(upload: Upload, error: BaseException) -> None:
    """Nothing runs that could tell of the save's end, to those who wait for it here either.  Other
    ranks hear of it at their deadline: it was the telling that could not be begun."""
    rank = upload.save.group.rank
    _failed(upload.future, CheckpointException("write", {rank: _wrap_exception(error)}))
    if upload.staging is not None:
        upload.staging.set_exception(forget_frames(error))
    upload.give_back()


def _stage_by(
    stager: AsyncStager, save: NativeSave, state_dict: STATE_DICT_TYPE
) -> tuple[STATE_DICT_TYPE, Future[None] | None]:
    """A private copy by the user's own stager, which the save holds until it is written; and when
    it was there, if the stager gave a future of it.  That is waited for: planning needs the copy,
    and is collective."""
    future = None
    try:
        copy, future = run_stager(stager, state_dict)
        state_dict = copy if future is None else future.result()
    except Exception as error:
        save.fail(error)
    return state_dict, None if future is None else completion_of(future)


def _stages_asynchronously(stager: AsyncStager | None) -> bool:
    """Whether torch would return an AsyncSaveResponse for this stager."""
    options = getattr(stager, "_config", None)
    return bool(getattr(options, "use_async_staging", False))


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _running() -> Future[None]:
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


def _response(future: SaveFuture, staging: Future[None] | None) -> SaveFuture | AsyncSaveResponse:
    if staging is None:
        return future
    return AsyncSaveResponse(staging_completion=staging, upload_completion=future)


def warm_up(
    save: NativeSave,
    state_dict: STATE_DICT_TYPE,
    process_group: dist.ProcessGroup | None,
    *,
    in_process: bool,
) -> None:
    """Memory, connection and process of the first save, ahead of it."""
    upload = Upload(save, SaveFuture(save), process_group)
    try:
        state_dict = _stateful_to_state_dict(state_dict)
        _borrow(upload, in_process)
        # A save that survives its trainer has a mapping of its own.
        process = None if config().survive_trainer else upload.process
        reason = save.warm_up(state_dict, shared=in_process, process=process)
    except BaseException as error:
        save.meet_late()
        if not save.agreed():  # else there is nothing left in which the others wait
            save.leave(error)
        raise
    finally:
        upload.give_back()
    if reason is not None:
        logger.warning("the first background save will not be as fast as later ones: %s", reason)


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


def _make_room(upload: Upload) -> None:
    """One save more must fit: wait for an older one, or let the ranks agree to leave this one out.

    Two saves of one directory are never in flight together: the newer one would fence the older.
    Nor are two of one stager of the user's, which may use its memory again.
    """
    save = upload.save
    while True:
        busy = in_flight()
        same = [
            u
            for u in busy
            if u.directory == upload.directory
            or (upload.stager is not None and u.stager is upload.stager)
        ]
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


def _borrow(upload: Upload, in_process: bool) -> None:
    """What the background needs; what fails here, all ranks hear of before they plan."""
    if upload.save.error is not None and upload.save.use_collectives:
        return
    try:
        start_watcher()
        upload.timeout_s = _timeout_s(upload.process_group)
        if upload.process_group is not None and upload.save.group.size > 1:
            upload.borrow_store()
        if in_process:
            upload.borrow_process()
    except BaseException as error:
        upload.save.fail(error)


def _begin(upload: Upload) -> None:
    save = upload.save
    upload.future._report = {**save.info(), **upload.facts}
    begin(
        upload,
        lambda watch: save.upload(
            watch,
            store=upload.store,
            process=upload.process,
            prefix=_prefix(upload),
            timeout_s=upload.timeout_s,
            written=upload.facts.get("staging") == "streamed",
            survive=upload.process is not None and config().survive_trainer,
        ),
    )


def _prefix(upload: Upload) -> str:
    """Of this save's keys in the store, the same on all ranks."""
    save, group = upload.save, upload.process_group
    if save.use_collectives or group is None:
        return f"dcp_native/{save.info()['save_id']}/"
    number = _independent_saves[group] = _independent_saves.get(group, 0) + 1
    return f"dcp_native/independent-{number}/"


def _timeout_s(process_group: dist.ProcessGroup | None) -> float:
    if config().async_timeout_s > 0:
        return config().async_timeout_s
    if process_group is None:
        return ALONE_TIMEOUT_S
    backend = process_group._get_backend(torch.device("cpu"))
    timeout: timedelta = getattr(
        getattr(backend, "options", None),
        "_timeout",
        dist.distributed_c10d.default_pg_timeout,
    )
    return min(timeout.total_seconds(), MOST_TIMEOUT_S)
