"""Which implementation runs a call: the native one only when every role is stock.

A role (writer, reader, planner) is native when its class and every hook looked up on the instance
are torch's own or ours; anything else keeps its Python hooks, through torch's implementation.
Decided at every call, never cached by type: tests and users patch instances.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    SerializationFormat,
)
from torch.distributed.checkpoint.staging import AsyncStager

from . import _hf_reader, _state_dict_stager, filesystem, quantized_hf_storage, staging
from ._config import config
from ._group_comm import has_cpu, has_nccl
from ._stock import _state_dict_stager as _torch_stager
from ._stock import staging as _torch_staging
from .hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from .quantized_hf_storage import QuantizedHuggingFaceStorageReader

_SAVE_PLANNER_HOOKS = (
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "resolve_data",
    "lookup_object",
    "transform_object",
    "_dedup_save_plans",
    "_create_global_plan",
    "_create_global_plan_with_caching",
    "_finish_plan_with_caching",
)
_LOAD_PLANNER_HOOKS = (
    "set_up_planner",
    "create_local_plan",
    "create_global_plan",
    "finish_plan",
    "load_bytes",
    "resolve_tensor",
    "commit_tensor",
    "lookup_tensor",
    "transform_tensor",
)
_WRITER_HOOKS = (
    "set_up_storage_writer",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "_write_data",
    "finish",
    "storage_meta",
)
_READER_HOOKS = (
    "read_metadata",
    "set_up_storage_reader",
    "prepare_local_plan",
    "prepare_global_plan",
    "read_data",
    "_slice_file",
)

_EXPORT_HOOKS = ("_reason", "_write", "_publish")
_STAGER_HOOKS = ("stage", "synchronize_staging", "close")
_COPIER_HOOKS = (
    "stage",
    "deepcopy_with_tensor_offload",
    "_offload_tensor",
    "_stage_untyped_storage",
)

_STOCK_FUNCTIONS = {
    (what, cls): {name: getattr(cls, name) for name in names}
    for what, cls, names in (
        ("planner", DefaultSavePlanner, _SAVE_PLANNER_HOOKS),
        ("planner", DefaultLoadPlanner, _LOAD_PLANNER_HOOKS),
        ("writer", FileSystemWriter, _WRITER_HOOKS),
        ("reader", FileSystemReader, _READER_HOOKS),
        ("reader", filesystem.FileSystemReader, _READER_HOOKS),
        ("reader", HuggingFaceStorageReader, (*_READER_HOOKS, *_hf_reader.STOCK_HOOKS)),
        (
            "reader",
            QuantizedHuggingFaceStorageReader,
            (*_READER_HOOKS, *quantized_hf_storage.STOCK_HOOKS),
        ),
        ("writer", HuggingFaceStorageWriter, (*_WRITER_HOOKS[:-1], *_EXPORT_HOOKS)),
        ("stager", FileSystemWriter, _STAGER_HOOKS),
        ("stager", _torch_staging.BlockingAsyncStager, _STAGER_HOOKS),
        ("stager", staging.BlockingAsyncStager, _STAGER_HOOKS),
        ("stager", _torch_staging.DefaultStager, (*_STAGER_HOOKS, "_stage")),
        ("stager", staging.DefaultStager, (*_STAGER_HOOKS, "_stage")),
        ("copier", _torch_stager.StateDictStager, _COPIER_HOOKS),
        ("copier", _state_dict_stager.StateDictStager, _COPIER_HOOKS),
    )
}
"""Torch's functions and ours as they were at the import of this module: a patch is noticed."""


_HF_READERS = (HuggingFaceStorageReader, QuantizedHuggingFaceStorageReader)

_MUST_SYNCHRONIZE = AsyncStager.should_synchronize_after_execute


def _not_stock(role: Any, what: str, *classes: type) -> str | None:
    if type(role) not in classes:
        return f"the {what} is a {type(role).__module__}.{type(role).__qualname__}"
    for name, function in _STOCK_FUNCTIONS[what, type(role)].items():
        if getattr(getattr(role, name), "__func__", None) is not function:
            return f"the {what}'s {name} is not torch's"
    return None


def writer_reason(writer: Any) -> str | None:
    """None when a save can be written natively, else why not."""
    if not config().native:
        return "config.native is off"
    reason = _not_stock(writer, "writer", FileSystemWriter) or filesystem.place_reason(writer)
    if reason is None and writer.transforms.extensions:
        reason = "the writer has stream extensions"
    if reason is None and writer.serialization_format is not SerializationFormat.TORCH_SAVE:
        reason = f"the serialization format is {writer.serialization_format}"
    return reason


def save_planner_reason(planner: Any) -> str | None:
    """None when the core can plan a save, else why the planner's Python hooks do."""
    return None if planner is None else _not_stock(planner, "planner", DefaultSavePlanner)


def reader_reason(reader: Any) -> str | None:
    """None when a load can read natively, else why not."""
    if not config().native:
        return "config.native is off"
    if type(reader) in _HF_READERS:
        return _not_stock(reader, "reader", *_HF_READERS) or filesystem.place_reason(reader)
    reason = _not_stock(reader, "reader", FileSystemReader, filesystem.FileSystemReader)
    return reason or filesystem.storage_reason(reader)


def files_reason(reader: Any) -> str | None:
    """None when the core can plan a load from what a reader reads, else why torch does."""
    if type(reader) in _HF_READERS:
        return "safetensors files have no metadata that the core plans by"
    return None


def exports_natively(writer: Any) -> bool:
    """Whether a writer of Hugging Face files, which plans by torch's protocol, writes natively."""
    return (
        type(writer) is HuggingFaceStorageWriter
        and _not_stock(writer, "writer", HuggingFaceStorageWriter) is None
        and writer._reason() is None
    )


def load_planner_reason(planner: Any) -> str | None:
    """None when a load can plan natively, else why not."""
    return None if planner is None else _not_stock(planner, "planner", DefaultLoadPlanner)


def group_reason(
    process_group: dist.ProcessGroup | None, no_dist: bool, use_collectives: bool = True
) -> str | None:
    """None when the ranks can talk over the group's CPU backend or its NCCL, else why not.

    The same on all ranks: this is what they can not agree on.
    """
    if not config().native:
        return "config.native is off"
    if no_dist or not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.distributed_c10d._get_default_group()
    if has_cpu(group):
        return None
    if not has_nccl(group):
        return "the process group has no CPU backend"
    return None if use_collectives else "the process group has no CPU backend to be found by"


def stage_reason(stager: AsyncStager | None, writer: Any) -> str | None:
    """None when staging can run natively, else why not.

    As in torch a writer that is a stager is the one, unless another is given.
    """
    if stager is None and isinstance(writer, AsyncStager):
        stager = writer
    if stager is None:
        return None
    classes = [cls for what, cls in _STOCK_FUNCTIONS if what == "stager"]
    reason = _not_stock(stager, "stager", *classes)
    if reason is None and type(stager).should_synchronize_after_execute is not _MUST_SYNCHRONIZE:
        reason = "the stager's should_synchronize_after_execute is not torch's"
    if reason is not None:
        return reason
    if isinstance(stager, _torch_staging.DefaultStager):
        return _copier_reason(stager._state_dict_stager)
    return "the stager checks types" if stager.type_check else None


def _copier_reason(copier: Any) -> str | None:
    classes = [cls for what, cls in _STOCK_FUNCTIONS if what == "copier"]
    reason = _not_stock(copier, "copier", *classes)
    if reason is None and getattr(copier, "_closed", not copier._deepcopy_dispatch):
        reason = "the stager is closed"
    return reason
