"""One native load, driven step by step: metadata, plan, read, objects."""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.planner_helpers import _init_state_dict, _iterate_state_dict

from . import _native
from ._config import DIRECT_IO, config
from ._failures import as_record, raise_alone, raise_failures
from ._report import logger, set_report
from ._save import hash64

_RETRY_CODES = ("NOENT", "STALE")
"""What a reader meets when a newer save committed and swept while it was reading."""


class UnsupportedCheckpoint(Exception):
    """Metadata that only torch's own unpickler understands; every rank of the load raises it."""


class NativeLoad:
    """A load by stock roles.  Each step that fails here still takes part in the next agreement."""

    def __init__(
        self, reader: FileSystemReader, planner: LoadPlanner | None, group: _native.Group
    ) -> None:
        self.reader = reader
        self.group = group
        self.flatten = getattr(planner, "flatten_state_dict", True)
        self.flatten_sharded = getattr(planner, "flatten_sharded_tensors", True)
        self.allow_partial = getattr(planner, "allow_partial_load", False)
        self.error: BaseException | None = None

    def run(self, state_dict: dict[str, Any]) -> None:
        """Collective.  A checkpoint that was replaced under the reader is read once more."""
        try:
            self._run(state_dict)
        except CheckpointException as error:
            codes = [getattr(exc, "dcp_code", None) for exc, _ in error.failures.values()]
            if error.args[0] != "read" or not all(code in _RETRY_CODES for code in codes):
                raise
            logger.info("the checkpoint was replaced while it was read; reading the new one")
            self.error = None
            self._run(state_dict)

    def _run(self, state_dict: dict[str, Any]) -> None:
        settings = config()
        native = _native.Load(
            self.group,
            os.fspath(self.reader.path),
            rank=self.group.rank,
            call_hash=hash64("load", os.fspath(self.reader.path)),
            verify=settings.verify,
            strict_coverage=settings.strict_coverage,
            direct=DIRECT_IO[settings.direct_io],
        )
        self._agree("plan", native.open)
        info = native.info()
        if info["unsupported"] is not None and not info["rank_local"]:
            if not settings.allow_unsafe_objects:
                raise CheckpointException(
                    "plan",
                    {
                        self.group.rank: (
                            pickle.UnpicklingError(
                                f"{info['unsupported']}; config.allow_unsafe_objects is off"
                            ),
                            None,
                        )
                    },
                )
            raise UnsupportedCheckpoint(info["unsupported"])
        try:
            if native.has_meta(state_dict):
                _materialise(state_dict)
            native.targets(
                state_dict,
                flatten_state_dict=self.flatten,
                flatten_sharded_tensors=self.flatten_sharded,
                allow_partial_load=self.allow_partial,
            )
        except BaseException as error:
            self.error = error
        self._agree("plan", native.status)
        try:
            native.read()
            self._finish_in_python(native, state_dict)
        except BaseException as error:
            self.error = error
        self._agree("read", native.status)
        set_report({"kind": "load", "path": "native", "reason": None, **native.info()})

    def _agree(self, step: str, collective: Any) -> None:
        try:
            failures = collective(as_record(self.error))
        except BaseException as error:
            raise_alone(step, self.group.rank, error)
        raise_failures(step, failures, self.group.rank, self.error)

    def _finish_in_python(self, native: _native.Load, state_dict: dict[str, Any]) -> None:
        objects, records, tensors, copies = native.results()
        wanted = {target: (fqn, path) for target, fqn, path in objects}
        for target, chunk_offsets, target_offsets, lengths, data in records:
            if target in wanted:
                fqn, path = wanted[target]
                value = load_object(data, fqn)
                if path is None:
                    state_dict[fqn] = value
                else:
                    set_element(state_dict, path, value)
            else:
                saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                source = narrow_tensor_by_index(saved, chunk_offsets, lengths)
                into = narrow_tensor_by_index(tensors[target], target_offsets, lengths)
                into.detach().copy_(source)
        with torch.no_grad():
            for temporary, destination in copies:
                destination.detach().copy_(temporary)


def _materialise(state_dict: dict[str, Any]) -> None:
    """Give meta tensors memory: on the group's device as torch does, on the CPU without a group."""
    if dist.is_available() and dist.is_initialized():
        _init_state_dict(state_dict)
        return

    def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor

    _iterate_state_dict(state_dict, on_cpu, on_cpu, on_cpu)


def load_object(data: bytes, fqn: str) -> Any:
    """Deserialise a saved object: by the safe loader where it can, else as torch does.

    Raises:
        pickle.UnpicklingError: it needs arbitrary code and ``config.allow_unsafe_objects`` is off.
    """
    try:
        return torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        if not config().allow_unsafe_objects:
            raise pickle.UnpicklingError(
                f"{fqn} is an object that only unsafe unpickling can load, and "
                f"config.allow_unsafe_objects is off: {error}"
            ) from error
    return torch.load(io.BytesIO(data), weights_only=False)
