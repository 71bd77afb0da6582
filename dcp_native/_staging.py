"""How a save runs the hooks of a stager that is not stock, in torch's order.

The save borrows what ``stage()`` gives, or what its future will give, and holds it until every
byte of it is written: a stager that reuses memory must find it in use until then.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, cast

from torch.distributed.checkpoint.logger import _dcp_method_logger
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.checkpoint.staging import AsyncStager

__all__ = ["choose_stager", "completion_of", "run_stager"]


def choose_stager(stager: AsyncStager | None, writer: Any) -> AsyncStager:
    """Who stages, as in torch: the caller's stager, else a writer that is one."""
    return writer if stager is None else stager


def run_stager(
    stager: AsyncStager, state_dict: STATE_DICT_TYPE
) -> tuple[STATE_DICT_TYPE | None, Future[STATE_DICT_TYPE] | None]:
    """Call the stager's hooks on this thread: (staged, None), or (None, future of it).

    A stager without a future is asked to synchronise, where it wants to be, before its dict is
    looked at; torch asks it while the upload already reads.
    """

    # torch's logger has these names as events.
    @_dcp_method_logger(log_exceptions=True)
    def stage_state_dict() -> Future[STATE_DICT_TYPE] | STATE_DICT_TYPE:
        return stager.stage(state_dict)

    @_dcp_method_logger(log_exceptions=True)
    def maybe_synchronize_staging() -> None:
        if stager.should_synchronize_after_execute:
            stager.synchronize_staging()

    staged = stage_state_dict()
    if isinstance(staged, Future):
        return None, cast(Future, staged)
    maybe_synchronize_staging()
    return staged, None


def completion_of(staging: Future[Any]) -> Future[None]:
    """The ``staging_completion`` of torch's AsyncSaveResponse: done, or failed, when staging is."""
    completion: Future[None] = Future()
    completion.set_running_or_notify_cancel()

    def settle(staging: Future[Any]) -> None:
        try:
            staging.result()
        except BaseException as error:  # a CancelledError, too
            completion.set_exception(error)
        else:
            completion.set_result(None)

    staging.add_done_callback(settle)
    return completion
