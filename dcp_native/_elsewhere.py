"""The part in a native save of a rank whose writer is the program's own.

Such a rank can not know whether the others have one too.  So it takes part in the one agreement in
which they would wait for it, and which tells all ranks to leave the native path together.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from . import _native
from ._failures import as_record, raise_alone, raise_failures
from ._group_comm import take_error
from ._python_planner import set_up_planner
from ._report import logger
from ._stateful import _stateful_to_state_dict

__all__ = ["SaveElsewhere"]


class SaveElsewhere:
    """One save, on this rank."""

    def __init__(self, group: _native.Group, use_collectives: bool = True) -> None:
        self._group = group
        self._use_collectives = use_collectives
        self._native = _native.Save(group, "", use_collectives=use_collectives, elsewhere=True)

    def resolve(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        """The state dict with its Stateful values called, as the others do before they agree."""
        try:
            self._raise_what_waits()
            return _stateful_to_state_dict(state_dict)
        except BaseException as error:
            self.leave(error)
            raise

    def agree(self) -> None:
        """Collective: every rank saves by torch's implementation, or every rank raises."""
        try:
            self._raise_what_waits()
            failures = self._native.agree(None)
        except BaseException as error:
            self.leave(error)  # an interrupt before the call
            raise_alone("plan", self._group.rank, error, self._native.interrupt())
        raise_failures("plan", failures, self._group.rank, None, self._native.interrupt())

    def _raise_what_waits(self) -> None:
        error = take_error(self._group)
        if error is not None:
            raise error

    def leave(self, error: BaseException) -> None:
        """This rank breaks off: let the others fail by name."""
        try:
            self._native.leave(as_record(error))
        except Exception as exchange_error:
            logger.warning("the other ranks could not be told of %r: %s", error, exchange_error)

    def save_alone(
        self, state_dict: STATE_DICT_TYPE, writer: StorageWriter, planner: SavePlanner | None
    ) -> Metadata:
        """``use_collectives=False``: as torch's save, but for the barrier at its end: all ranks,
        native or not, tell each other there whether they failed."""
        mine: BaseException | None = None
        metadata = Metadata({})
        try:
            self._raise_what_waits()
            metadata = self._run_hooks(state_dict, writer, planner or DefaultSavePlanner())
        except BaseException as error:
            mine = error
        try:
            failures = self._native.finish(as_record(mine))
        except BaseException as error:
            if mine is not None:
                raise mine from None
            raise_alone("write", self._group.rank, error, self._native.interrupt())
        if mine is not None:
            raise mine
        raise_failures("write", failures, self._group.rank, None, self._native.interrupt())
        return metadata

    def _run_hooks(
        self, state_dict: STATE_DICT_TYPE, writer: Any, planner: SavePlanner
    ) -> Metadata:
        rank = self._group.rank
        decides = rank == self._group.coordinator_rank
        set_up_planner(planner, state_dict, writer.storage_meta(), decides)
        if "kwargs" in inspect.signature(writer.set_up_storage_writer).parameters:
            writer.set_up_storage_writer(decides, rank=rank, use_collectives=False)
        else:
            writer.set_up_storage_writer(decides)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        plans, metadata = planner.create_global_plan([plan])
        plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
        writes = writer.write_data(plan, planner)
        writes.wait()
        writer.finish(metadata=metadata, results=[writes.value()])
        return metadata
