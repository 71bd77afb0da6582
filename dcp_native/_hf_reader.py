"""HuggingFaceStorageReader: safetensors files read natively, in ranges, by torch's own rules.

Mirrors the reader of torch/distributed/checkpoint/hf_storage.py.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    SAVED_OFFSETS_KEY,
    SUFFIX,
    _HFStorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from ._hf_reads import Header, HFReads, read_headers
from ._mirror import stands_for
from ._report import logger
from ._stock import hf_storage as _torch
from .filesystem import place_reason

__all__ = ["HuggingFaceStorageReader"]

_HOOKS = ("_process_read_request", "_read_files_from_queue")


def hooks_of(cls: type) -> dict[str, Any]:
    """Functions of a reader's class by which somebody else may read single items."""
    return {name: getattr(cls, name) for name in _HOOKS}


STOCK_HOOKS = hooks_of(_torch.HuggingFaceStorageReader)


def not_native_reason(reader: Any, stock_hooks: dict[str, Any]) -> str | None:
    """None when a reader's files can be read natively, else why not."""
    if (reason := place_reason(reader)) is not None:
        return reason
    for name, function in stock_hooks.items():
        if getattr(getattr(reader, name), "__func__", None) is not function:
            return f"the reader's {name} is not torch's"
    return None


@stands_for(_torch.HuggingFaceStorageReader)
class HuggingFaceStorageReader(_torch.HuggingFaceStorageReader):
    """Torch's reader of safetensors files, read natively.

    Files of the Hugging Face layout and the shard files that a distributed save leaves.  Headers of
    all files are read at once, and nothing else of them; of each tensor only the rows that this
    rank wants, sorted, in large requests, past the page cache where that pays.  ``thread_count``
    is taken as in torch and not needed.  Other file systems, and readers whose
    ``_process_read_request`` is their own, are read by torch's implementation.
    """

    _TORCH: type[_torch.HuggingFaceStorageReader] = _torch.HuggingFaceStorageReader

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        """What the files hold, by their headers.

        Raises:
            NativeError: a header is damaged, or does not fit its file; what and where.
            ValueError: a tensor is of a type that torch has not.
        """
        if place_reason(self) is not None:
            return super().read_metadata()
        paths = [str(path) for path in self.fs.ls(self.path) if str(path).endswith(SUFFIX)]
        entries: dict[str, TensorStorageMetadata] = {}
        storage_data: dict[MetadataIndex, _HFStorageInfo] = {}
        for header in read_headers(paths).values():
            _add_file(header, entries, storage_data)
        metadata = Metadata(dict(entries), storage_data=storage_data)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what ``plan`` names and hand it to ``planner``, as torch's; done when it returns."""
        reads = self._reads_for(plan)
        if isinstance(reads, str):
            logger.debug("safetensors files are read by torch's implementation, because %s", reads)
            return self._TORCH.read_data(self, plan, planner)
        reads.run(plan, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _reads_for(self, plan: LoadPlan) -> HFReads | str:
        """What reads a plan natively, or why torch has to."""
        return not_native_reason(self, STOCK_HOOKS) or HFReads(self)


def _add_file(
    header: Header,
    entries: dict[str, TensorStorageMetadata],
    storage_data: dict[MetadataIndex, _HFStorageInfo],
) -> None:
    """Add the tensors of a file: whole ones, or shards where it says where they lie."""
    text = header.texts.get(CUSTOM_METADATA_KEY)
    sharding = json.loads(text) if text else None
    for name, tensor in header.tensors.items():
        dtype, shape = header.dtype_of(name), torch.Size(tensor.shape)
        offset = [0] * len(shape) if sharding is None else sharding[name][SAVED_OFFSETS_KEY]
        chunk = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=shape)
        ends = [start + size for start, size in zip(offset, shape, strict=True)]
        entry = entries.get(name)
        if entry is None:
            entries[name] = TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype), size=torch.Size(ends), chunks=[chunk]
            )
        else:
            entry.chunks.append(chunk)
            entry.size = torch.Size(map(max, entry.size, ends))
        storage_data[MetadataIndex(name, chunk.offsets)] = _HFStorageInfo(
            relative_path=header.path, shape=shape, dtype=dtype
        )
