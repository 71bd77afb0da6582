"""FileSystemReader whose metadata is read when looked at; everything else here is torch's.

Mirrors torch/distributed/checkpoint/filesystem.py.
"""

from __future__ import annotations

import os
import pickle
from typing import Any

from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    FileSystem,
    FileSystemBase,
    FileSystemWriter,
    SerializationFormat,
    _StorageInfo,
    _StoragePrefix,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata

from . import _native
from ._config import config
from ._lazy_metadata import lazy_read_metadata
from ._mirror import rest_of_torchs, stands_for
from ._stock import filesystem as _torch

__all__ = [
    "DEFAULT_SUFFIX",
    "FileSystem",
    "FileSystemBase",
    "FileSystemReader",
    "FileSystemWriter",
    "SerializationFormat",
    "_StorageInfo",
    "_StoragePrefix",
    "_write_item",
]


@stands_for(_torch.FileSystemReader)
class FileSystemReader(_torch.FileSystemReader):
    """Torch's reader; ``read_metadata`` gives a Metadata that is unpickled at the first touch.

    Loads natively under the same conditions as an instance of torch's own class, and works as one
    under torch's ``load``.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The checkpoint's Metadata, checked as a whole now and turned into objects when needed.

        Args:
            rank: read this rank's own ``__{rank}.metadata`` instead of ``.metadata``.

        Raises:
            OSError: as torch, when the file is absent or can not be read.
            pickle.UnpicklingError: the file is damaged; what and where.  With
                ``config.allow_unsafe_objects`` off, also at the touch of one that needs arbitrary
                code.
        """
        if not config().native:
            return super().read_metadata(*args, **kwargs)
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as file:
            image = file.read()
        lazy = lazy_read_metadata(image, os.fspath(path), self.load_id)
        try:
            _native.check_metadata(image)
        except _native.NativeError as error:
            if error.dcp_code != "UNSUPPORTED":
                raise pickle.UnpicklingError(f"{path}: {error}") from error
            if config().allow_unsafe_objects:
                vars(lazy)  # only Python can tell whether it is whole
        return lazy


__getattr__, __dir__ = rest_of_torchs(__name__)
