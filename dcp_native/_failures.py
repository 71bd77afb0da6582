"""Exceptions across ranks: what failed on one rank becomes CheckpointException on all of them."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

RECORD_BYTES = 64 << 10
"""Most bytes of one pickled failure (DCP_MAX_FAILURE_BYTES)."""


def as_record(error: BaseException | None) -> bytes | None:
    """Pickle ``error`` with its traceback's summary; one that can not be pickled keeps its text."""
    if error is None:
        return None
    wrapped = _wrap_exception(error)
    try:
        record = pickle.dumps(wrapped)
        pickle.loads(record)  # an exception may pickle and still not come back
    except Exception:
        text = "".join(traceback.format_exception_only(type(error), error)).strip()
        record = pickle.dumps((RuntimeError(text[:4096]), wrapped[1]))
    if len(record) > RECORD_BYTES:
        text = "".join(traceback.format_exception_only(type(error), error)).strip()
        record = pickle.dumps((RuntimeError(text[:4096]), traceback.StackSummary()))
    return record


def _from_payload(payload: Any) -> tuple[BaseException, traceback.StackSummary]:
    if isinstance(payload, BaseException):
        return payload, traceback.StackSummary()
    try:
        return pickle.loads(payload)
    except Exception as error:  # a class that only the other rank can import
        return RuntimeError(f"a failure that can not be unpickled here: {error}"), (
            traceback.StackSummary()
        )


def raise_failures(
    step: str,
    failures: list[tuple[int, Any]] | None,
    rank: int,
    mine: BaseException | None,
) -> None:
    """Raise CheckpointException(step, {rank: (exception, stack)}) when any rank failed.

    An interrupt of this rank (Ctrl-C) is raised as itself.
    """
    if failures is None:
        return
    wrapped = {peer: _from_payload(payload) for peer, payload in failures}
    if mine is not None:
        wrapped[rank] = _wrap_exception(mine)
        if isinstance(mine, (KeyboardInterrupt, SystemExit)):
            raise mine
    raise CheckpointException(step, wrapped) from mine


def raise_alone(step: str, rank: int, error: BaseException) -> None:
    """The exchange itself failed: this rank knows only its own side of it."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        raise error
    raise CheckpointException(step, {rank: _wrap_exception(error)}) from error
