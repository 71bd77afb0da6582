"""Background saves: staged on the calling thread, written without the GIL, agreed over the store.

The background runs no collective: ranks count up a key of the group's store when their bytes are
durable, the coordinator commits when all have, and says so under another key.  One save is in
flight per process; the next waits for it.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
import weakref
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import _stateful_to_state_dict

from ._failures import as_record, raise_failures
from ._report import logger
from ._save import NativeSave

POLL_S = 0.1
"""Longest pause between two looks at the store."""
FAREWELL_S = 30.0
"""How long the host of the store waits for the others to have read the outcome."""

_in_flight: Future[Metadata] | None = None
_stores: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[dist.Store, dist.Store]] = (
    weakref.WeakKeyDictionary()
)


def _forget_after_fork() -> None:
    global _in_flight
    _in_flight = None  # the parent's threads are not here to finish it
    _stores.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def wait_for_save_in_flight() -> None:
    """Block until this process's background save, if any, has ended in whatever way."""
    if _in_flight is not None:
        wait([_in_flight])


def stages_asynchronously(stager: AsyncStager) -> bool:
    """Whether torch would return an AsyncSaveResponse for this stager."""
    options = getattr(stager, "_config", None)
    return bool(getattr(options, "use_async_staging", False))


def start(
    save: NativeSave,
    state_dict: STATE_DICT_TYPE,
    process_group: dist.ProcessGroup | None,
    alone: bool,
) -> Future[Metadata]:
    """Plan and stage now, write and commit in the background.

    Collective up to here.  An exception of a Stateful's ``state_dict()`` and an interrupt are
    raised raw; every other one is on the returned future.
    """
    future: Future[Metadata] = Future()
    future.set_running_or_notify_cancel()
    try:
        state_dict = _stateful_to_state_dict(state_dict)
    except BaseException as error:
        save.leave(error)
        raise
    agreement = None if alone else StoreAgreement(save)
    try:
        if agreement is not None:
            agreement.connect(process_group)
        save.plan(state_dict)
        save.agree()
        save.compare()
    except BaseException as error:  # CheckpointException is no Exception
        interrupt = save.interrupt()
        if agreement is None or not save.agreed():
            save.leave(error)
            if error is interrupt or isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            future.set_exception(error)
            return future
        # The others are past their last collective: they hear of it over the store.
        save.fail(error)
    try:
        save.stage()
    except BaseException as error:  # an interrupt between the steps
        save.fail(error)
    interrupt = save.interrupt()
    _run_in_background(save, agreement, future)
    if interrupt is not None:
        raise interrupt  # nobody may ever look at the future
    return future


def _run_in_background(
    save: NativeSave, agreement: StoreAgreement | None, future: Future[Metadata]
) -> None:
    global _in_flight
    once = threading.Lock()

    def run() -> None:
        if once.acquire(blocking=False):
            _write_and_settle(save, agreement, future)

    # Not a daemon: the interpreter's exit waits for the save.
    thread = threading.Thread(target=run, name="dcp_native-save")
    _in_flight = future
    try:
        thread.start()
    except RuntimeError as error:  # no more threads, or the interpreter is about to end
        logger.warning("no thread for a background save (%s); saving in the foreground", error)
        run()
    except BaseException:  # an interrupt, before or after the thread began
        run()
        raise


def _write_and_settle(
    save: NativeSave, agreement: StoreAgreement | None, future: Future[Metadata]
) -> None:
    try:
        save.write()
        metadata = save.finish() if agreement is None else agreement.settle()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(metadata)
    save.error = None  # its traceback holds the save
    if agreement is not None:
        agreement.take_leave()


def _store_of(process_group: dist.ProcessGroup) -> tuple[dist.Store, dist.Store]:
    """The group's store, and a connection of our own: a blocked call on the trainer's would block
    the trainer."""
    if process_group not in _stores:
        store = process_group.get_group_store()
        _stores[process_group] = (store, store.clone())
    return _stores[process_group]


def _timeout_s(process_group: dist.ProcessGroup) -> float:
    backend = process_group._get_backend(torch.device("cpu"))
    timeout: timedelta = getattr(
        getattr(backend, "options", None),
        "_timeout",
        dist.distributed_c10d.default_pg_timeout,
    )
    return timeout.total_seconds()


class StoreAgreement:
    """How the ranks of one background save end it together, with five keys of the group's store.

    ``n`` counts durable ranks; ``f`` holds the first failure; ``d`` the coordinator's verdict:
    failures and what became of the save; ``a`` counts ranks that read it, after which the
    coordinator deletes all.
    """

    def __init__(self, save: NativeSave) -> None:
        self.save = save
        self.rank = save.group.rank
        self.size = save.group.size
        self.is_coordinator = self.rank == save.group.coordinator_rank
        self.in_touch = True  # the others are there, as far as we know

    def connect(self, process_group: dist.ProcessGroup | None) -> None:
        """Before the ranks agree: what fails here, all ranks hear of."""
        try:
            process_group = process_group or dist.distributed_c10d._get_default_group()
            self.timeout_s = _timeout_s(process_group)
            # The trainer may destroy its group meanwhile: the host's side of the store must live.
            self.trainers_store, self.store = _store_of(process_group)
        except BaseException as error:
            self.save.fail(error)

    def settle(self) -> Metadata:
        """Metadata when the save was committed; CheckpointException on every rank when not."""
        prefix = f"dcp_native/{self.save.info()['save_id']}/"
        self.durable, self.failed, self.verdict, self.read = (prefix + k for k in "nfda")
        self.deadline = time.monotonic() + self.timeout_s
        mine = self.save.error
        try:
            if mine is None:
                self.store.add(self.durable, 1)
            else:
                failure = pickle.dumps([(self.rank, as_record(mine))])
                self.store.compare_set(self.failed, "", failure)
            failures = self._decide() if self.is_coordinator else self._await_verdict()
        except Exception as error:  # the store's host is gone
            self.in_touch = False
            if self.is_coordinator:
                self.save.abandon()  # the others can not know that, and leave their files
            raise CheckpointException("write", {self.rank: _wrap_exception(error)}) from error
        raise_failures("write", failures, self.rank, mine, self.save.interrupt())
        return self.save.result()

    def _decide(self) -> list[tuple[int, Any]] | None:
        failures = self._await_durable()
        if failures is None:
            try:
                self.save.publish()
            except Exception as error:
                failures = [(self.rank, as_record(error))]
        outcome = "committed" if failures is None else self.save.abandon()
        try:
            self.store.set(self.verdict, pickle.dumps((failures, outcome)))
        except Exception as error:  # what became of the save, it became
            logger.warning("the other ranks could not be told that the save %s: %s", outcome, error)
        return failures

    def _await_durable(self) -> list[tuple[int, Any]] | None:
        for _ in self._polls():
            if self.store.check([self.failed]):
                return pickle.loads(self.store.get(self.failed))
            if self.store.add(self.durable, 0) >= self.size:
                return None
        self.in_touch = False
        late = TimeoutError(
            f"only {self.store.add(self.durable, 0)} of {self.size} ranks had written their files "
            "at the process group's deadline; the save was given up"
        )
        return [(self.rank, as_record(late))]

    def _await_verdict(self) -> list[tuple[int, Any]] | None:
        for _ in self._polls():
            if self.store.check([self.verdict]):
                failures, outcome = pickle.loads(self.store.get(self.verdict))
                self.save.conclude(outcome)
                return failures
        self.in_touch = False
        late = TimeoutError(
            "the coordinator gave no verdict before the process group's deadline; whether the "
            "checkpoint was committed, its .metadata tells"
        )
        return [(self.rank, as_record(late))]

    def _polls(self) -> Any:
        pause_s = 0.001
        while time.monotonic() < self.deadline:
            yield
            time.sleep(pause_s)
            pause_s = min(POLL_S, pause_s * 2)

    def take_leave(self) -> None:
        """The coordinator stays until all ranks have read the verdict, then deletes the keys.

        Its process may host the store.  A rank that is still writing for a save that failed
        elsewhere may come later: it finds the keys.  Only the interpreter's exit waits for this.
        """
        if not self.in_touch:
            return
        try:
            self.store.add(self.read, 1)
            if not self.is_coordinator:
                return
            self.deadline = time.monotonic() + FAREWELL_S
            for _ in self._polls():
                if self.store.add(self.read, 0) >= self.size:
                    for key in (self.durable, self.failed, self.verdict, self.read):
                        self.store.delete_key(key)
                    return
        except Exception as error:  # the save has ended, with or without the store
            logger.warning("the store failed after a background save had ended: %s", error)
