"""rivals.py: other ways to keep the state of the benchmark, where they are installed.

What each can do decides what its figure means:

- `torch.save`, `safetensors`: what programs write by hand: every rank a file of all that it holds,
  replicas included. No other number of ranks can load it. (safetensors holds tensors alone: values
  of Python lie beside it in a file of torch.save.)
- `torch_checkpointing`: a file for each rank and item, renamed together. Without its resharder,
  whose save needs a GPU: what it writes here loads on as many ranks, in the same sharding.
- `torchsnapshot`: DTensors by chunks, as DCP has them (`pip install torchsnapshot-nightly`).

None of them calls fsync or looks at a checksum of the values. A save is measured until it is
durable, so what a rival wrote is synced within its time. Loads fill the tensors that are there, as
those of DCP do. Not thread-safe: one call at a time.
"""

import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from states import leaves, local_tensor

NEEDS = {
    "torch.save": None,
    "safetensors": "safetensors",
    "torch_checkpointing": "torch_checkpointing",
    "torchsnapshot": "torchsnapshot",
}
"""Name: the package that it is, beside torch."""
TRIED = {"torch_checkpointing", "torchsnapshot"}
"""Written for other releases of torch: whether they run is found out."""


def missing(name: str) -> bool:
    """Whether the package of the rival `name` is not installed."""
    return NEEDS[name] is not None and importlib.util.find_spec(NEEDS[name]) is None


def versions() -> dict[str, str]:
    """Of the rivals that are packages of their own, and installed; a nightly build has another
    distribution's name than its package.
    """
    made_by = importlib.metadata.packages_distributions()
    packages = (package for package in NEEDS.values() if package in made_by)
    return {package: importlib.metadata.version(made_by[package][0]) for package in packages}


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _entries(path: str) -> Iterator[str]:
    """Every file and directory below `path`, in an order that is the same on every rank."""
    for directory, inner, files in os.walk(path):
        inner.sort()
        yield from (os.path.join(directory, name) for name in sorted(files))
        yield directory


def _sync_share(path: str) -> None:
    """Syncs this rank's share of what all have written; they have agreed that they did."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for i, entry in enumerate(_entries(path)):
        if i % ranks == rank:
            _sync(entry)


def _parts(state: dict) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The local tensors and the other values of `state`, by name."""
    tensors, values = {}, {}
    for _, _, name, value in leaves(state):
        tensor = local_tensor(value)
        if tensor is None:
            values[name] = value
        else:
            tensors[name] = tensor
    return tensors, values


def _put_values(state: dict, values: dict[str, Any]) -> None:
    for container, key, name, value in leaves(state):
        if local_tensor(value) is None:
            container[key] = values[name]


class _TorchSave:
    def save(self, state: dict, path: str) -> None:
        os.makedirs(path, exist_ok=True)
        with open(self._file(path), "wb") as file:
            torch.save(_parts(state), file)
            file.flush()
            os.fsync(file.fileno())
        _sync(path)

    def load(self, state: dict, path: str) -> None:
        saved, values = torch.load(self._file(path), mmap=True)
        for name, tensor in _parts(state)[0].items():
            tensor.copy_(saved[name])
        _put_values(state, values)

    def _file(self, path: str) -> str:
        return f"{path}/rank-{dist.get_rank()}.pt"


class _Safetensors:
    def save(self, state: dict, path: str) -> None:
        from safetensors.torch import save_file

        os.makedirs(path, exist_ok=True)
        tensors, values = _parts(state)
        save_file(tensors, self._file(path, "safetensors"))
        torch.save(values, self._file(path, "pt"))
        for entry in (self._file(path, "safetensors"), self._file(path, "pt"), path):
            _sync(entry)

    def load(self, state: dict, path: str) -> None:
        from safetensors import safe_open

        with safe_open(self._file(path, "safetensors"), framework="pt") as file:
            for name, tensor in _parts(state)[0].items():
                tensor.copy_(file.get_tensor(name))
        _put_values(state, torch.load(self._file(path, "pt")))

    def _file(self, path: str, ending: str) -> str:
        return f"{path}/rank-{dist.get_rank()}.{ending}"


class _TorchCheckpointing:
    def __init__(self) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        config = CheckpointManager.Config.with_sync_save()
        # Its direct writes are not aligned, which ext4 and XFS refuse.
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = config.build()

    def save(self, state: dict, path: str) -> None:
        self._manager.save(path, state)
        dist.barrier()  # the directory has its name
        _sync_share(path)

    def load(self, state: dict, path: str) -> None:
        state.update(self._manager.load(path, into=state))


class _Torchsnapshot:
    def __init__(self) -> None:
        logging.getLogger("torchsnapshot").setLevel(logging.ERROR)  # else a line for each DTensor

    def save(self, state: dict, path: str) -> None:
        from torchsnapshot import Snapshot

        Snapshot.take(path, self._app(state))
        _sync_share(path)

    def load(self, state: dict, path: str) -> None:
        from torchsnapshot import Snapshot

        app = self._app(state)
        Snapshot(path).restore(app)
        for key, value in app.items():
            state[key] = dict(value) if isinstance(state[key], dict) else value["value"]

    def _app(self, state: dict) -> dict:
        from torchsnapshot import StateDict

        return {
            key: StateDict(**value) if isinstance(value, dict) else StateDict(value=value)
            for key, value in state.items()
        }


_MAKERS = {
    "torch.save": _TorchSave,
    "safetensors": _Safetensors,
    "torch_checkpointing": _TorchCheckpointing,
    "torchsnapshot": _Torchsnapshot,
}
_made: dict[str, Any] = {}


def rival(name: str) -> Any:
    """What has ``save(state, path)`` and ``load(state, path)``; made once in a process."""
    if name not in _made:
        _made[name] = _MAKERS[name]()
    return _made[name]
