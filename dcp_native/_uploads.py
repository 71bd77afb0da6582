"""Background saves in flight: their futures, the thread that ends them, what they borrow.

The work is done by threads of the core (csrc/core/upload.c).  One Python thread per process sleeps
in C without the GIL, wakes when an upload has a result or has ended, sets its future and runs the
callbacks.  Stores and writer processes are used by one upload at a time and kept for the next.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import AsyncStager

from . import _native
from ._failures import forget_frames, raise_failures
from ._fork import fork_safe
from ._progress import Progress
from ._report import SaveReport, logger
from ._save import NativeSave

__all__ = ["SaveFuture", "Upload", "begin", "in_flight", "store_for", "wait_for_uploads"]

LEAVE_S = 35.0
"""How long the interpreter's exit waits for saves that have ended to take leave of other ranks."""
CALLBACK_POLL_S = 0.01
INTERRUPT_S = 10.0
"""How long it waits after a Ctrl-C."""
WRITER = Path(__file__).parent / "_writer"
"""The executable of the writer process (csrc/writer)."""

_lock = fork_safe(threading.RLock)
_uploads: list[Upload] = []
_watch = _native.Watch()
_watcher: threading.Thread | None = None
_closing = False
_stores: weakref.WeakKeyDictionary[dist.ProcessGroup, list[_native.Store]] = (
    weakref.WeakKeyDictionary()
)
_processes: list[_native.WriterProcess] = []


def _start_anew_after_fork() -> None:
    """The parent's threads, connections and processes are not the child's."""
    global _uploads, _watch, _watcher, _closing, _stores, _processes
    _inherited.extend((_uploads, _watch, _stores, _processes))  # freeing them would end them
    _uploads, _watch, _watcher, _closing = [], _native.Watch(), None, False
    _stores, _processes = weakref.WeakKeyDictionary(), []


_inherited: list[Any] = []
os.register_at_fork(after_in_child=_start_anew_after_fork)


class SaveFuture(Future):
    """What ``async_save`` returns: the checkpoint's ``Metadata``, or why it was not saved.

    A ``concurrent.futures.Future``.  A failure on any rank is a ``CheckpointException`` on every
    rank's.
    """

    def __init__(self, save: NativeSave | None) -> None:
        super().__init__()
        self._save = save
        self._report: dict[str, Any] = {}
        self._done_bytes = 0
        self.set_running_or_notify_cancel()

    @property
    def report(self) -> SaveReport:
        """Facts about this save: all of them once it is done, before that those of planning and
        staging."""
        return SaveReport(self._report)

    def progress(self) -> tuple[int, int]:
        """``(done, total)``: payload bytes of this rank that were handed to the disk, of how many.

        The save is committed later than its last byte is written, when all ranks have.
        """
        save = self._save
        if save is not None and save.in_background:
            self._done_bytes = save.progress_bytes()
        return self._done_bytes, self._report.get("planned_bytes", 0)

    def cancel(self) -> bool:
        """Stop writing.  True: the save will fail on every rank, with this rank's cancellation as
        the reason, and what was loadable before still is.  False: it is too late for that.

        Unlike ``Future.cancel`` it does not resolve the future itself: the ranks agree first.
        """
        save = self._save
        return save is not None and save.cancel()

    def _end(self, report: dict[str, Any]) -> None:
        if self._save is not None and self._save.in_background:
            self._done_bytes = self._save.progress_bytes()
        self._report = report
        self._save = None


class Upload:
    """One save between the end of staging and the end of its threads."""

    def __init__(
        self, save: NativeSave, future: SaveFuture, process_group: dist.ProcessGroup | None
    ) -> None:
        self.save = save
        self.directory = os.path.realpath(save.writer.path)
        """As it is now: the writer may be reset while the save is in flight."""
        self.future = future
        self.process_group = process_group
        """None: this process alone."""
        self.facts: dict[str, Any] = {}
        self.progress: Progress | None = None
        self.timeout_s = 0.0
        self.staging: Future[None] | None = None
        """Done when tensors on devices may change, if that is later than the call's return."""
        self.stager: AsyncStager | None = None
        """The user's own, whose memory is read until the bytes are written."""
        self.store: _native.Store | None = None
        self.process: _native.WriterProcess | None = None
        self._kept: Any = None

    def borrow_store(self) -> None:
        """A connection to the group's store, before the ranks agree: all hear of a failure."""
        # The trainer may destroy its group meanwhile: the host's side of the store must live.
        self._kept = self.process_group.get_group_store()
        self.store = store_for(self.process_group)

    def borrow_process(self) -> None:
        """A writer process that lives, started if there is none."""
        with _lock():
            while _processes:
                process = _processes.pop()
                if process.usable():
                    self.process = process
                    return
                process.stop()
        self.process = _native.WriterProcess(os.fspath(WRITER))

    def give_back_process(self) -> None:
        """Keep it for the next save, which may begin before this one has taken leave."""
        with _lock():
            if self.process is not None:
                _processes.append(self.process)
        self.process = None

    def give_back(self, *, in_touch: bool = True) -> None:
        """Keep what was borrowed for the next save.

        ``in_touch``: the store answered to the end.  A client that lost its connection never makes
        another one.
        """
        self.give_back_process()
        with _lock():
            if self.store is not None and in_touch:
                _stores.setdefault(self.process_group, []).append(self.store)
        self.store = self.stager = self._kept = None

    def look(self) -> bool:
        """Set the future when there is a result.  True when nothing of the upload runs any more."""
        state = self.save.upload_state()
        expired = state == "running" and self.save.upload_left_s() <= 0
        if expired:
            self.save.expire()
            state = self.save.upload_state()
        self._look_at_staging(expired)
        if state != "running" and not self.future.done() and self._progress_is_over():
            self._settle()
        if state != "ended" or not self.future.done():
            return False
        _, stats = self._stats()
        self.future._report.update(stats)
        self.give_back(in_touch=stats["in_touch"])
        return True

    def _progress_is_over(self) -> bool:
        """A callback hears of the last byte before the future has its result; one that does not
        return has a second for that, in which the watcher sees to other saves."""
        if self.progress is None:
            return True
        self.progress.end()
        return self.progress.is_over()

    def next_look_s(self) -> float:
        """Seconds until it is to be looked at again, though nothing is heard of it."""
        is_settled = self.save.upload_state() != "running"
        return CALLBACK_POLL_S if is_settled else self.save.upload_left_s()

    def _look_at_staging(self, expired: bool) -> None:
        """Tell the trainer when its tensors are its own again.

        That is so, too, when the save failed elsewhere before they were copied: why, is on the
        save's future.  A device that does not answer is waited for until the deadline.
        """
        staging = self.staging
        if staging is None or staging.done():
            return
        try:
            if self.save.upload_staged():
                staging.set_result(None)
            elif expired:
                raise TimeoutError(
                    "tensors were still being copied from their device when the save reached its "
                    "deadline; what was copied is not used"
                )
        except BaseException as error:
            staging.set_exception(forget_frames(error))

    def _stats(self) -> tuple[bool, dict[str, Any]]:
        """Whether no thread is at work on bytes or outcome, and facts for the report."""
        stats = self.save.upload_stats()
        return not stats.pop("writing"), stats

    def _settle(self) -> None:
        save, future = self.save, self.future
        error: BaseException | None = None
        metadata: Metadata | None = None
        at_rest, stats = self._stats()
        self.facts.update(stats, progress_bytes=save.progress_bytes())
        try:
            metadata = self._result()
        except BaseException as raised:
            error = raised
        # Threads that were given up still count: what they know is not looked at.
        info = future._report
        if at_rest:
            info = {**save.facts(stats.get("settle_ns", 0)), **save.info()}
        future._end({**info, "kind": save.kind, "path": "native", **self.facts})
        save.clock.end(background=True)
        save.error = None  # its traceback holds the save
        if at_rest:
            self.give_back_process()
        if error is None:
            future.set_result(metadata)
        else:
            future.set_exception(forget_frames(error))

    def _result(self) -> Metadata:
        save = self.save
        rank = save.group.rank
        try:
            failures = save.upload_result()
        except Exception as alone:
            raise CheckpointException("write", {rank: _wrap_exception(alone)}) from alone
        try:
            raise_failures("write", failures, rank, save.error, save.interrupt())
        except CheckpointException as together:
            mine = together.failures.get(rank)
            if not save.use_collectives and mine is not None:
                raise mine[0] from None
            raise
        return save.result(**self.facts)


def store_for(process_group: dist.ProcessGroup) -> _native.Store:
    """A connection of our own: a blocked call on the trainer's would block the trainer."""
    with _lock():
        idle = _stores.get(process_group)
        if idle:
            return idle.pop()
    return _native.Store(process_group)


def in_flight() -> list[Upload]:
    """Saves whose outcome is not known yet, oldest first."""
    with _lock():
        return [upload for upload in _uploads if not upload.future.done()]


def wait_for_uploads(uploads: Iterable[Upload] | None = None) -> None:
    """Block until these saves (default: all of this process) have ended in whatever way."""
    uploads = list(in_flight() if uploads is None else uploads)
    if threading.current_thread() is not _watcher:
        wait([upload.future for upload in uploads])
        return
    # A callback of a future that saves or loads: nobody else would end them.
    while not all(upload.future.done() for upload in uploads):
        for upload in uploads:
            _look_at(upload)
        time.sleep(CALLBACK_POLL_S)


def begin(upload: Upload, start: Callable[[_native.Watch], None]) -> None:
    """Start it and see to its end.  Where this raises and ``save.in_background`` is true, an
    interrupt came with the start, which is seen to all the same."""
    with _lock():
        start_watcher()
        upload.progress = Progress(upload.save.kind, upload.future.progress, foreground=False)
        _uploads.append(upload)
        try:
            start(_watch)
            upload.progress.__enter__()
        finally:
            if not upload.save.in_background:
                _uploads.remove(upload)
            _watch.notify()


def start_watcher() -> None:
    """The thread that ends uploads, if there is none."""
    global _watcher
    with _lock():
        if _watcher is not None and _watcher.is_alive():
            return
        _watcher = threading.Thread(target=_run, name="dcp_native-saves", daemon=True)
        _watcher.start()
    try:
        threading._register_atexit(_end_of_interpreter)  # as concurrent.futures does
    except (AttributeError, RuntimeError):  # the end has begun: the save is waited for below
        logger.debug("a background save began while the interpreter was about to end")


def _run() -> None:
    global _watcher
    seen = 0
    while True:
        with _lock():
            uploads = list(_uploads)
        ended = [upload for upload in uploads if _look_at(upload)]
        with _lock():
            for upload in ended:
                _uploads.remove(upload)
            if _closing and not _uploads:
                _watcher = None  # who begins another one now starts another thread
                return
            waits_s = [upload.next_look_s() for upload in _uploads if not upload.future.done()]
        uploads = ended = upload = None  # the last save's memory is not ours to keep
        seen = _watch.wait(seen, min(waits_s, default=3600.0))


def _look_at(upload: Upload) -> bool:
    try:
        return upload.look()
    except BaseException:
        logger.exception("a background save could not be ended")
        return False


def _end_of_interpreter() -> None:
    """Wait for saves up to their deadlines, then for their leave of the other ranks."""
    global _closing
    _closing = True
    try:
        wait_for_uploads()
        _join_watcher(LEAVE_S)
    except KeyboardInterrupt:
        for upload in in_flight():
            upload.future.cancel()
        _join_watcher(INTERRUPT_S)
        raise


def _join_watcher(timeout_s: float) -> None:
    _watch.notify()
    watcher = _watcher
    if watcher is not None:
        watcher.join(timeout_s)


def wait_until_ended(timeout_s: float) -> bool:
    """Wait until no thread of any save runs any more: tests count what is left behind."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with _lock():
            if not _uploads:
                return True
        time.sleep(0.01)
    return False
