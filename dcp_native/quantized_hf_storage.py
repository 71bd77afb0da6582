"""QuantizedHuggingFaceStorageReader: quantised weights become numbers while they are read.

Mirrors torch/distributed/checkpoint/quantized_hf_storage.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ._hf_quant import QuantReads, Scales, why_not
from ._hf_reader import HuggingFaceStorageReader, hooks_of, not_native_reason
from ._hf_reads import HFReads
from ._mirror import rest_of_torchs
from ._stock import quantized_hf_storage as _torch

__all__ = ["QuantizedHuggingFaceStorageReader"]

STOCK_HOOKS = {
    **hooks_of(_torch.QuantizedHuggingFaceStorageReader),
    **{
        name: getattr(_torch.QuantizedHuggingFaceStorageReader, name)
        for name in (
            "_read_quantized_tensor_with_block_alignment",
            "_dequantize_tensor",
            "_dequantize_tensor_mxfp4",
            "_get_slice_to_block_mapping",
            "_is_tensor_quantized",
        )
    },
}


class QuantizedHuggingFaceStorageReader(
    _torch.QuantizedHuggingFaceStorageReader, HuggingFaceStorageReader
):
    """Torch's reader of quantised safetensors checkpoints, read natively.

    Weights with a ``.weight_scale_inv`` are made of square blocks, ``_blocks`` with ``_scales`` of
    pairs of 4-bit numbers (MXFP4); results are torch's to the bit.  Only the wanted ranges of
    weights and scales are read, and values are written once, where they belong, when the target is
    CPU memory of ``target_dtype``.  What is quantised in another way is left to torch.
    """

    _TORCH = _torch.QuantizedHuggingFaceStorageReader

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what ``plan`` names and hand it to ``planner``, as torch's; done when it returns."""
        return HuggingFaceStorageReader.read_data(self, plan, planner)

    def read_metadata(self) -> Metadata:
        """As torch's; but chunks of ``_blocks`` have the size of what they stand for.

        With torch's, which keep the stored size, a planner asks for the first of each row alone.
        """
        metadata = super().read_metadata()
        for fqn, entry in metadata.state_dict_metadata.items():
            if fqn.endswith("_blocks") and fqn in self._weight_scale_mapping:
                start, stored = torch.Size([0] * len(entry.size)), entry.chunks[0].offsets
                if len(entry.chunks) == 1 and stored == (*start, 0):
                    entry.chunks = [ChunkStorageMetadata(offsets=start, sizes=entry.size)]
                    info = metadata.storage_data[MetadataIndex(fqn, stored)]
                    metadata.storage_data[MetadataIndex(fqn, start)] = info
        return metadata

    def _reads_for(self, plan: LoadPlan) -> HFReads | str:
        """What reads a plan natively, or why torch has to."""
        reason = not_native_reason(self, STOCK_HOOKS) or why_not(self.target_dtype)
        if reason is not None:
            return reason
        reads = QuantReads(self, self._scales_of)
        return reads.prepare(plan) or reads

    def _scales_of(self, item: ReadItem, path: str) -> Scales | None:
        """Where the scales of an item lie, by torch's rules; None when it is not quantised."""
        fqn = item.storage_index.fqn
        if not self._is_tensor_quantized(fqn):
            return None
        name = self._weight_scale_mapping[fqn]
        file = self._weight_map.get(name)
        if file is None:
            raise ValueError(f"Scale tensor {name} not found in weight_map")
        if file != self._weight_map.get(fqn):
            path = str(Path(self.path) / file)
        return Scales(path, name)


__getattr__, __dir__ = rest_of_torchs(__name__)
