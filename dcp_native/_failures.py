"""Exceptions across ranks: what failed on one rank becomes CheckpointException on all of them."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

from torch.distributed.checkpoint.api import (
    WRAPPED_EXCEPTION,
    CheckpointException,
    _wrap_exception,
)

RECORD_BYTES = 64 << 10
"""Most bytes of one pickled failure (DCP_MAX_FAILURE_BYTES)."""


class LoadException(CheckpointException):
    """A load that failed after it had begun to write into the memory it was given.

    What is in that memory is neither what was there before nor a checkpoint.

    Attributes:
        filled: names of this rank's state dict that hold the checkpoint's values.
        partly: names that may hold some of them.
        untouched: names that are as they were before the load.
    """

    def __init__(
        self,
        msg: str,
        failures: dict[int, WRAPPED_EXCEPTION],
        rank: int = 0,
        filled: tuple[str, ...] = (),
        partly: tuple[str, ...] = (),
        untouched: tuple[str, ...] = (),
    ) -> None:
        super().__init__(msg, failures)
        self.rank = rank
        self.filled = filled
        self.partly = partly
        self.untouched = untouched

    def __str__(self) -> str:
        return (
            f"{super().__str__()}rank {self.rank}: of the state dict's tensors and objects "
            f"{len(self.filled)} were already overwritten, {len(self.partly)} partly, "
            f"{len(self.untouched)} not at all: do not train on them, load again or start over "
            "(last_report() names them)\n"
        )


def as_record(error: BaseException | None) -> bytes | None:
    """Pickle ``error`` with its traceback's summary; one that can not be pickled keeps its text.

    Raises nothing: a rank without a record would leave the others waiting for it.
    """
    if error is None:
        return None
    try:
        record = pickle.dumps(_wrap_exception(error))
        pickle.loads(record)  # an exception may pickle and still not come back
        if len(record) <= RECORD_BYTES:
            return record
    except Exception:
        record = b""
    try:
        text = "".join(traceback.format_exception_only(type(error), error)).strip()[:4096]
    except Exception:
        text = f"a {type(error).__name__} that can not be described"
    return pickle.dumps((RuntimeError(text), traceback.StackSummary()))


def _from_payload(payload: Any) -> tuple[BaseException, traceback.StackSummary]:
    if isinstance(payload, BaseException):
        return payload, traceback.StackSummary()
    try:
        return pickle.loads(payload)
    except Exception as error:  # a class that only the other rank can import
        return RuntimeError(f"a failure that can not be unpickled here: {error}"), (
            traceback.StackSummary()
        )


def from_record(record: bytes) -> BaseException:
    """The exception of another rank, from what ``as_record`` made of it there.

    An interrupt of that rank is an error here.
    """
    error = _from_payload(record)[0]
    return error if isinstance(error, Exception) else RuntimeError(f"another rank: {error!r}")


def forget_frames(error: BaseException) -> BaseException:
    """``error`` without its frames: they hold the save, its memory and the caller's state dict for
    as long as somebody keeps a future.  Where it happened is in ``failures``."""
    link: BaseException | None = error
    seen: set[int] = set()  # a rank's own exception may be the cause of what it is told
    while isinstance(link, Exception | CheckpointException) and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def codes_of(failures: list[tuple[int, Any]] | None) -> set[str | None]:
    """Names of the core's error codes in an exchanged list; None for what has no code."""
    causes = (_from_payload(payload)[0] for _, payload in failures or ())
    return {getattr(cause, "dcp_code", None) for cause in causes}


def raise_failures(
    step: str,
    failures: list[tuple[int, Any]] | None,
    rank: int,
    mine: BaseException | None,
    interrupt: BaseException | None = None,
) -> None:
    """Raise CheckpointException(step, {rank: (exception, stack)}) when any rank failed.

    An interrupt of this rank (Ctrl-C, or what a signal handler raised) is raised as itself.
    """
    if failures is None:
        return
    if interrupt is not None:
        raise interrupt
    if isinstance(mine, (KeyboardInterrupt, SystemExit)):
        raise mine
    wrapped = {peer: _from_payload(payload) for peer, payload in failures}
    # One that broke off because another rank did adds nothing to that rank's reason.
    echo = bool(wrapped) and getattr(mine, "dcp_code", None) == "PEER"
    if mine is not None and not echo:
        wrapped[rank] = _wrap_exception(mine)
    elif not wrapped:
        unknown = RuntimeError("a rank failed that could not say why, for want of memory")
        wrapped[rank] = _wrap_exception(unknown)
    raise CheckpointException(step, wrapped) from mine


def raise_alone(
    step: str, rank: int, error: BaseException, interrupt: BaseException | None = None
) -> None:
    """The exchange itself failed: this rank knows only its own side of it."""
    if interrupt is not None:
        raise interrupt
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    raise CheckpointException(step, {rank: _wrap_exception(error)}) from error
