"""The names of the package ``dcp_native``, which gives them out when they are first asked for."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    CheckpointException,
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
    TensorStorageMetadata,
    WriteItem,
)
from torch.distributed.checkpoint.stateful import Stateful

from . import _native
from ._config import Config, config, configure
from ._failures import LoadException
from ._find_latest import find_latest
from ._install import install, install_if_asked, uninstall
from ._mirror import rest_of_torchs
from ._native import NativeError
from ._report import last_report
from ._verify import VerifyProblem, VerifyResult, verify
from .filesystem import FileSystemReader
from .hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from .optimizer import load_sharded_optimizer_state_dict
from .quantized_hf_storage import QuantizedHuggingFaceStorageReader
from .state_dict_loader import load, load_state_dict
from .state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
    save,
    save_state_dict,
    warm_up,
)

__all__ = [
    "AsyncCheckpointerType",
    "AsyncSaveResponse",
    "BytesStorageMetadata",
    "CheckpointException",
    "ChunkStorageMetadata",
    "Config",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "FileSystemReader",
    "FileSystemWriter",
    "HuggingFaceStorageReader",
    "HuggingFaceStorageWriter",
    "LoadException",
    "LoadPlan",
    "LoadPlanner",
    "Metadata",
    "NativeError",
    "QuantizedHuggingFaceStorageReader",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "Stateful",
    "StorageReader",
    "StorageWriter",
    "TensorStorageMetadata",
    "VerifyProblem",
    "VerifyResult",
    "WriteItem",
    "async_save",
    "config",
    "configure",
    "find_latest",
    "install",
    "last_report",
    "load",
    "load_sharded_optimizer_state_dict",
    "load_state_dict",
    "save",
    "save_state_dict",
    "trim",
    "uninstall",
    "verify",
    "warm_up",
]
__all__ += [  # what a newer torch has besides
    name
    for name, value in vars(torch.distributed.checkpoint).items()
    if callable(value) and name not in __all__ and not name.startswith("_")
]


def trim() -> None:
    """Give the memory that is kept between saves (staging, write buffers) back to the system."""
    _native.trim()


rest, names_of_rest = rest_of_torchs("dcp_native")

install_if_asked()
