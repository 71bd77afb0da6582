"""A save that torch's implementation makes: its report, its line in the log, its span in the trace.

What only our own implementation knows (bytes, phases, files) is not in the report.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from ._clock import Clock
from ._report import set_report, tell
from ._uploads import SaveFuture

__all__ = ["SaveByTorch", "clock_of"]


def clock_of(
    kind: str,
    role: StorageWriter | StorageReader,
    process_group: dist.ProcessGroup | None,
    no_dist: bool,
) -> Clock:
    """Of a call by torch's implementation: it begins now."""
    where = getattr(role, "path", getattr(role, "checkpoint_id", None))
    alone = no_dist or not (dist.is_available() and dist.is_initialized())
    return Clock(
        kind,
        "" if where is None else str(where),
        0 if alone else dist.get_rank(process_group),
        1 if alone else dist.get_world_size(process_group),
    )


class SaveByTorch:
    """One save, from when this is made: by ``with``, or in the background by :meth:`follow`."""

    def __init__(
        self,
        kind: str,
        reason: str | None,
        roles: dict[str, str],
        writer: StorageWriter,
        process_group: dist.ProcessGroup | None,
        no_dist: bool,
    ) -> None:
        self.clock = clock_of(kind, writer, process_group, no_dist)
        self._facts = {"path": "torch", "reason": reason, **roles, **self.clock.facts()}

    def __enter__(self) -> None:
        pass

    def __exit__(self, error_type: type[BaseException] | None, *unused: object) -> None:
        if error_type is None:
            self._tell(self._report("committed"))
        self.clock.end()

    def follow(
        self, start: Callable[[], Future | AsyncSaveResponse]
    ) -> SaveFuture | AsyncSaveResponse:
        """What ``start`` returns, with a future that has a report."""
        try:
            response = start()
        finally:
            self.clock.end()
        theirs = response
        if isinstance(response, AsyncSaveResponse):
            theirs = response.upload_completion
        future = SaveFuture(None)
        future._report = self._facts
        theirs.add_done_callback(functools.partial(self._settle, future))
        if isinstance(response, AsyncSaveResponse):
            return AsyncSaveResponse(
                staging_completion=response.staging_completion, upload_completion=future
            )
        return future

    def _settle(self, future: SaveFuture, theirs: Future) -> None:
        try:
            metadata = theirs.result()
        except BaseException as error:
            future._end(self._report(None))
            self.clock.end(background=True)
            future.set_exception(error)
            return
        report = self._report("committed")
        future._end(report)
        try:
            self._tell(report)
            self.clock.end(background=True)
        finally:  # whatever sinks of logs raise: the checkpoint is there
            future.set_result(metadata)

    def _report(self, outcome: str | None) -> dict[str, Any]:
        known = {} if outcome is None else {"outcome": outcome}
        return {**self._facts, **known, "total_ns": self.clock.total_ns}

    def _tell(self, report: dict[str, Any]) -> None:
        set_report(report)
        tell(report)
