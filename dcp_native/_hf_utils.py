"""Names and keys of the Hugging Face layout: torch's own.

Mirrors torch/distributed/checkpoint/_hf_utils.py.
"""

from __future__ import annotations

from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DATA_KEY,
    DATA_OFFSETS_KEY,
    DCP_SHARDING_INFO_KEY,
    DCP_VERSION_KEY,
    DEFAULT_EXTRA_METADATA_KEY,
    DTYPE_KEY,
    DTYPE_MAP,
    FILE_NAME,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
    NUM_BYTES_FOR_HEADER_LEN,
    SAVED_OFFSETS_KEY,
    SHAPE_KEY,
    SHARDED_DIR_NAME,
    SHARDED_FILE_NAME,
    SUFFIX,
    _gen_file_name,
    _get_dcp_custom_metadata,
    _get_dtype,
    _get_safetensors_file_metadata,
    _HFStorageInfo,
    _metadata_fn,
)

__all__ = [
    "CUSTOM_METADATA_KEY",
    "DATA_KEY",
    "DATA_OFFSETS_KEY",
    "DCP_SHARDING_INFO_KEY",
    "DCP_VERSION_KEY",
    "DEFAULT_EXTRA_METADATA_KEY",
    "DTYPE_KEY",
    "DTYPE_MAP",
    "FILE_NAME",
    "FORMAT_KEY",
    "FORMAT_VALUE",
    "HF_DCP_VERSION",
    "NUM_BYTES_FOR_HEADER_LEN",
    "SAVED_OFFSETS_KEY",
    "SHAPE_KEY",
    "SHARDED_DIR_NAME",
    "SHARDED_FILE_NAME",
    "SUFFIX",
    "_HFStorageInfo",
    "_gen_file_name",
    "_get_dcp_custom_metadata",
    "_get_dtype",
    "_get_safetensors_file_metadata",
    "_metadata_fn",
]
