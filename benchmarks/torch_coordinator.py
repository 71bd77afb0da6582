"""torch_coordinator.py: the steps that stock torch's coordinator makes, in one process, each timed.

The plans are those of save_scaling.c: an FSDP job, one tensor in 16 replicated, one object in 64.
They arrive as gather_object and leave as scatter_object_list and broadcast_object_list would have
them: pickled by c10d's own functions. The transport itself is left out, as it is in ours.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import distributed_c10d as c10d
from torch.distributed.checkpoint import FileSystemWriter, default_planner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

PARTS = (
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "feed_forward.w1.weight",
)
REPLICATED_EVERY, OBJECT_EVERY = 16, 64
CPU = torch.device("cpu")


def _item(rank: int, ranks: int, i: int) -> WriteItem:
    fqn = f"model.layers.{i // 4}.{PARTS[i % 4]}"
    if i % OBJECT_EVERY == 7:
        return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)
    rows = 64 + i % 5 * 16
    whole = i % REPLICATED_EVERY == 3
    offsets = torch.Size((0 if whole else rows * rank, 0))
    chunk = ChunkStorageMetadata(offsets, torch.Size((rows, 1024)))
    size = torch.Size((rows if whole else rows * ranks, 1024))
    properties = TensorProperties(dtype=torch.float32)
    return WriteItem(
        MetadataIndex(fqn, offsets),
        WriteItemType.TENSOR if whole else WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size),
    )


def _local_plan(rank: int, ranks: int, tensors: int) -> SavePlan:
    items = [_item(rank, ranks, i) for i in range(tensors)]
    paths = {item.index.fqn: ("model", item.index.fqn[6:]) for item in items}
    return SavePlan(items, planner_data=paths)


def _pickled(value: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return c10d._object_to_tensor(value, CPU, None)


def _unpickled(pickled: tuple[torch.Tensor, torch.Tensor]) -> Any:
    return c10d._tensor_to_object(*pickled, None)


class TorchCoordinator:
    """The coordinator's work for one save of `ranks` ranks with `tensors` items each."""

    def __init__(self, ranks: int, tensors: int, stored: dict[MetadataIndex, Any]) -> None:
        """`stored`: where each record lies, as the ranks would report it."""
        self._plans = [_pickled(_local_plan(r, ranks, tensors)) for r in range(ranks)]
        self._stored = stored
        self._results: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.steps_s: dict[str, float] = {}

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self.steps_s[step] = self.steps_s.get(step, 0.0) + time.thread_time() - start

    @contextmanager
    def _timed_functions(self, steps: dict[str, str]) -> Iterator[None]:
        """Times functions of torch's planner while its create_global_plan calls them."""
        stock = {name: getattr(default_planner, name) for name in steps}

        def timed(name: str) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self._timed(steps[name]):
                    return stock[name](*args, **kwargs)

            return call

        try:
            for name in steps:
                setattr(default_planner, name, timed(name))
            yield
        finally:
            for name, function in stock.items():
                setattr(default_planner, name, function)

    def _report(self, final: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What a rank sends back after it has written its final plan."""
        return _pickled(
            [
                WriteResult(item.index, self._stored[item.index].length, self._stored[item.index])
                for item in _unpickled(final).items
            ]
        )

    def run(self, directory: str) -> Metadata:
        """All steps once; writes `directory`/.metadata and returns what was written."""
        gc.collect()
        self.steps_s = {}
        planner = default_planner.DefaultSavePlanner()
        writer = FileSystemWriter(directory)
        with self._timed("unpickle plans"):
            plans = [_unpickled(p) for p in self._plans]
        functions = {
            "dedup_save_plans": "dedup",
            "create_default_global_save_plan": "global plan",
            "_validate_global_plan": "validate",
        }
        with self._timed("planner"), self._timed_functions(functions):
            plans, metadata = planner.create_global_plan(plans)
        self.steps_s["merge of paths"] = self.steps_s.pop("planner") - sum(
            self.steps_s[step] for step in functions.values()
        )
        with self._timed("pickle final plans"):
            final = [_pickled(plan) for plan in writer.prepare_global_plan(plans)]
        if not self._results:
            self._results = [self._report(plan) for plan in final]
        with self._timed("unpickle results"):
            results = [_unpickled(r) for r in self._results]
        with self._timed("write .metadata"):
            writer.finish(metadata, results)
        with self._timed("pickle metadata for all"):
            _pickled(metadata)
        return metadata
