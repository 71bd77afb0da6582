"""Planners and writers of a program's own that tell which of their hooks were called, and how.

Each is a row of a table: the tests of save roles take every pair of rows at least once.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import pickle
import threading
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

PLANNER_HOOKS = (
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "resolve_data",
)
DEFAULT_HOOKS = (
    *PLANNER_HOOKS,
    "_create_global_plan",
    "_dedup_save_plans",
    "lookup_object",
    "transform_object",
)
WRITER_HOOKS = (
    "reset",
    "storage_meta",
    "set_up_storage_writer",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "finish",
)


def describe(value: Any) -> Any:
    """What two runs of one program can be compared by: no tensors, no paths, no ids."""
    if isinstance(value, WriteItem):
        return value.index.fqn, value.index.offset, value.index.index, value.type.name
    if isinstance(value, SavePlan):
        prefix = getattr(value.storage_data, "prefix", None)
        return [describe(i) for i in value.items], prefix, value.usable, value.planner_data
    if isinstance(value, Metadata):
        return value.state_dict_metadata
    if isinstance(value, dict):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    if isinstance(value, (bool, int, str, type(None))):
        return value
    return type(value).__name__


@dataclasses.dataclass
class Calls:
    """Which hooks were called, in order, with what; and on which threads."""

    made: list[tuple[str, Any, Any]] = dataclasses.field(default_factory=list)
    threads: set[int] = dataclasses.field(default_factory=set)

    def sorted(self) -> list[tuple[str, Any, Any]]:
        """For writers with several threads, whose order is nobody's promise."""
        return sorted(self.made, key=repr)


def recording(cls: type, hooks: Iterable[str]) -> type:
    """A subclass of `cls` that notes the calls of its hooks in ``self.calls``."""

    def hook(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            entry = [name, describe(args), sorted(kwargs.items(), key=lambda kv: kv[0])]
            entry[2] = [(k, describe(v)) for k, v in entry[2]]
            self.calls.made.append(tuple(entry))
            self.calls.threads.add(threading.get_ident())
            return getattr(super(made, self), name)(*args, **kwargs)

        return call

    made = type(f"Recording{cls.__name__}", (cls,), {})
    for name in hooks:
        function = hook(name)
        if name == "set_up_planner":  # torch looks at its parameters
            function = _with_signature_of_set_up(function)
        elif name == "set_up_storage_writer":
            function = _with_kwargs(function)
        setattr(made, name, function)
    return made


def _with_signature_of_set_up(function: Any) -> Any:
    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        function(
            self, state_dict=state_dict, storage_meta=storage_meta, is_coordinator=is_coordinator
        )

    return set_up_planner


def _with_kwargs(function: Any) -> Any:
    def set_up_storage_writer(self, is_coordinator, *args, **kwargs):
        function(self, is_coordinator, *args, **kwargs)

    return set_up_storage_writer


# ---- planners ----

Recording = recording(DefaultSavePlanner, DEFAULT_HOOKS)


class Casting(DefaultSavePlanner):
    """Saves floats as bfloat16 and says nothing of it in the metadata."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        object = super().transform_object(write_item, object)
        if isinstance(object, torch.Tensor) and object.is_floating_point():
            return object.to(torch.bfloat16)
        return object


class Scratch(DefaultSavePlanner):
    """Gives all its tensors in one buffer (of a thread: torch's writer asks from several)."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        super().set_up_planner(*args, **kwargs)
        self.buffers = threading.local()

    def resolve_data(self, write_item: WriteItem) -> Any:
        data = super().resolve_data(write_item)
        if isinstance(data, torch.Tensor) and data.dtype == torch.float32:
            if not hasattr(self.buffers, "own"):
                self.buffers.own = torch.empty(1 << 16)
            scratch = self.buffers.own[: data.numel()].view(data.shape)
            return scratch.copy_(data.detach())
        return data


class NoDedup(DefaultSavePlanner):
    """Every rank writes all that it has."""

    def _dedup_save_plans(self, all_plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, items=list(plan.items)) for plan in all_plans]

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The first rank describes what all write."""
        seen: set[Any] = set()
        described = []
        for plan in all_plans:
            new = {i.index for i in plan.items} - seen
            items = [i for i in plan.items if i.index in new]
            seen |= new
            described.append(dataclasses.replace(plan, items=items))
        _, metadata = super().create_global_plan(described)
        return all_plans, metadata


class Extra(DefaultSavePlanner):
    """Its metadata says more than torch's."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        metadata.extra = {"ranks": len(all_plans)}  # type: ignore[attr-defined]
        return plans, metadata


class OldSignature(DefaultSavePlanner):
    def set_up_planner(self, state_dict: Any, is_coordinator: bool = False) -> None:  # type: ignore[override]
        super().set_up_planner(state_dict, None, is_coordinator)


class Dropping(DefaultSavePlanner):
    """Leaves objects out of what it writes, in the last of its hooks."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        kept = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        return dataclasses.replace(plan, items=kept)


class Bare(SavePlanner):
    """Made from nothing but the protocol.  Objects are pickled its own way; some have no bytes."""

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        self.state = {f"bare/{k}": v for k, v in state_dict.items() if not isinstance(v, dict)}
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        return create_default_local_save_plan(self.state, self.is_coordinator)

    def create_global_plan(self, all_plans):
        first: set[Any] = set()
        kept = []
        for plan in all_plans:
            items = [i for i in plan.items if i.index not in first]
            first |= {i.index for i in items}
            kept.append(dataclasses.replace(plan, items=items))
        return create_default_global_save_plan(kept)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        value = self.state[write_item.index.fqn]
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(b"" if value is None else pickle.dumps(value))
        return value.to_local() if hasattr(value, "to_local") else value


def patched() -> DefaultSavePlanner:
    """A stock planner, one hook of which was replaced on the instance."""
    planner = DefaultSavePlanner()
    stock = planner.transform_object

    def transform_object(write_item: WriteItem, object: Any) -> Any:
        data = stock(write_item, object)
        return data + 1 if isinstance(data, torch.Tensor) and data.is_floating_point() else data

    planner.transform_object = transform_object  # type: ignore[method-assign]
    return planner


def with_calls(made: Any) -> Any:
    made.calls = Calls()
    return made


PLANNERS: dict[str, Any] = {
    "none": lambda: None,
    "stock": DefaultSavePlanner,
    "recording": lambda: with_calls(Recording()),
    "caching": lambda: with_calls(Recording(enable_plan_caching=True)),
    "lowest": lambda: with_calls(Recording(dedup_save_to_lowest_rank=True)),
    "unflattened": lambda: with_calls(Recording(False, False)),
    "sharded": lambda: with_calls(Recording(flatten_sharded_tensors=False)),
    "bare": lambda: with_calls(recording(Bare, PLANNER_HOOKS)()),
    "casting": Casting,
    "scratch": Scratch,
    "no_dedup": NoDedup,
    "extra": Extra,
    "old": OldSignature,
    "dropping": Dropping,
    "patched": patched,
}
NATIVE_PLANNERS = ("none", "stock")


# ---- writers ----


class Deflate(StreamTransformExtension):
    @staticmethod
    def registry_name() -> str:
        return "test.deflate"

    @staticmethod
    def from_descriptor(version: str) -> Deflate:
        return Deflate()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output: Any) -> Any:
        class Stream(io.RawIOBase):
            def __init__(self) -> None:
                self.deflate = zlib.compressobj()

            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                output.write(self.deflate.compress(bytes(data)))
                return len(data)

            def close(self) -> None:
                if not self.closed:
                    output.write(self.deflate.flush())
                    super().close()
                    output.close()

        return Stream()

    def transform_from(self, input: Any) -> Any:
        return io.BytesIO(zlib.decompress(input.read(-1)))


class OwnFileSystem(FileSystem):
    """Torch's, by another name."""


class WithoutKwargs(FileSystemWriter):
    """As writers were before torch 2.6."""

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        super().reset(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool) -> None:  # type: ignore[override]
        super().set_up_storage_writer(is_coordinator)


def on_own_file_system(path: Any) -> FileSystemWriter:
    writer = FileSystemWriter(path)
    writer.fs = OwnFileSystem()
    return writer


RecordingWriter = recording(FileSystemWriter, WRITER_HOOKS)


def recording_writer(path: Any) -> Any:
    made = RecordingWriter.__new__(RecordingWriter)
    made.calls = Calls()
    made.__init__(path)
    return made


WRITERS: dict[str, Any] = {
    "stock": FileSystemWriter,
    "threads": lambda path: FileSystemWriter(path, thread_count=3),
    "per_item": lambda path: FileSystemWriter(path, single_file_per_rank=False),
    "recording": recording_writer,
    "without_kwargs": WithoutKwargs,
    "deflate": lambda path: FileSystemWriter(path, _extensions=[Deflate()]),
    "own_files": on_own_file_system,
}
NATIVE_WRITERS = ("stock", "threads", "per_item")


# ---- pairs ----


def all_pairs(*columns: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """Rows in which every two values of two columns stand together at least once; greedy, and the
    same every time."""
    values = [list(column) for column in columns]
    at = [(i, j) for i in range(len(values)) for j in range(i)]
    open_ = {(i, a, j, b) for i, j in at for a in values[i] for b in values[j]}
    rows = list(itertools.product(*values))

    def new(row: tuple[str, ...]) -> set[Any]:
        return {(i, row[i], j, row[j]) for i, j in at} & open_

    while open_:
        best = max(rows, key=lambda row: len(new(row)))
        open_ -= new(best)
        yield best
