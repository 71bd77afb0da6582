"""dcp_native: torch.distributed.checkpoint with planner, engine and commit in C.

``import dcp_native as dcp`` and use ``dcp.save``, ``dcp.async_save`` and ``dcp.load`` as with
``torch.distributed.checkpoint``, whose names, classes and file formats they keep.
"""

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
from ._mirror import rest_of_torchs

if _native.built_for_torch != torch.__version__.split("+")[0]:
    raise ImportError(
        f"dcp_native was built for torch {_native.built_for_torch}, but torch {torch.__version__} "
        "is installed: build it again in this environment (pip install --no-build-isolation "
        "--force-reinstall --no-deps dcp-native, or `make build` in its tree)"
    )

from ._config import Config, config, configure
from ._failures import LoadException
from ._find_latest import find_latest
from ._install import install, install_if_asked, uninstall
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

__version__ = "0.1.0"

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


def trim() -> None:
    """Give the memory that is kept between saves (staging, write buffers) back to the system."""
    _native.trim()


__getattr__, __dir__ = rest_of_torchs(__name__)

install_if_asked()
