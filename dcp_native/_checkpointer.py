"""_Checkpointer: writer, reader, planners and group, put together once.

Mirrors torch/distributed/checkpoint/_checkpointer.py, whose ``save`` raises TypeError in 2.13 and
2.14, and whose other methods drop ``coordinator_rank`` and ``no_dist``.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from . import state_dict_loader, state_dict_saver
from ._mirror import rest_of_torchs
from ._stock import _checkpointer as _torch

__all__: list[str] = []


class _Checkpointer(_torch._Checkpointer):
    """Saves and loads with one set of roles; torch's constructor.

    Args:
        storage_writer: writes every checkpoint, into its own path.
        storage_reader: reads every checkpoint.
        process_group: ranks that save and load together; default: all.
        coordinator_rank: the group rank that plans for all and commits.
        no_dist: save and load this process's state alone.
        load_planner, save_planner: default torch's default planners.
    """

    def __init__(
        self,
        storage_writer: StorageWriter,
        storage_reader: StorageReader,
        *,
        process_group: dist.ProcessGroup | None = None,
        coordinator_rank: int = 0,
        no_dist: bool = False,
        load_planner: LoadPlanner | None = None,
        save_planner: SavePlanner | None = None,
    ) -> None:
        super().__init__(
            storage_writer,
            storage_reader,
            process_group=process_group,
            coordinator_rank=coordinator_rank,
            no_dist=no_dist,
            load_planner=load_planner,
            save_planner=save_planner,
        )

    def save(self, state_dict: STATE_DICT_TYPE) -> Metadata:
        """As :func:`dcp_native.save`."""
        return state_dict_saver._save(
            state_dict,
            self.storage_writer,
            process_group=self.process_group,
            coordinator_rank=self.coordinator_rank,
            no_dist=self._is_alone(),
            planner=self.save_planner,
            use_collectives=True,
            call_stateful=True,
        )

    def async_save(self, state_dict: STATE_DICT_TYPE) -> Future:
        """As :func:`dcp_native.async_save`; the future is of the Metadata."""
        response = state_dict_saver._async_save(
            state_dict,
            storage_writer=self.storage_writer,
            process_group=self.process_group,
            coordinator_rank=self.coordinator_rank,
            planner=self.save_planner,
            no_dist=self.no_dist,
        )
        if not isinstance(response, Future):
            return response.upload_completion
        return response

    def load(self, state_dict: dict[str, Any]) -> None:
        """As :func:`dcp_native.load`."""
        state_dict_loader._load(
            state_dict,
            self.storage_reader,
            process_group=self.process_group,
            coordinator_rank=self.coordinator_rank,
            no_dist=self._is_alone(),
            planner=self.load_planner,
        )

    def _is_alone(self) -> bool:
        return self.no_dist or not (dist.is_available() and dist.is_initialized())


__getattr__, __dir__ = rest_of_torchs(__name__)
