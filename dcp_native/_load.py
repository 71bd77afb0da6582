"""One native load, driven step by step: metadata, plan, read, objects."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.planner_helpers import _init_state_dict

from . import _native
from ._config import DIRECT_IO, READ_ONCE, VERIFY, config
from ._failures import as_record, codes_of, raise_alone, raise_failures
from ._receive import Receiver, settle_devices
from ._report import logger, set_report
from ._save import hash64

_RETRY_CODES = {"NOENT", "STALE"}
"""What a reader meets when a newer save committed and swept while it was reading."""
_TRIES = 10
"""How many checkpoints in a row may be replaced under a reader before it gives up."""


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
        self.may_be_replaced = False  # says the last agreement, to all ranks alike

    def run(self, state_dict: dict[str, Any]) -> None:
        """Collective.  A checkpoint that was replaced under the reader is read anew."""
        seen = None
        for tries_left in reversed(range(_TRIES)):
            native = self._start()
            try:
                self._run(native, state_dict)
                return
            except UnsupportedCheckpoint:
                raise
            except BaseException as error:
                self._leave(native, error)
                if tries_left == 0 or not self.may_be_replaced:
                    raise
                # As the failures, the image that decides now is the same on every rank.
                image = None if native.info()["rank_local"] else native.metadata()
                if image is not None and image == seen:
                    raise
                seen = image
                self.error = native.interrupt()  # the others hear of it when they try again
            logger.info("the checkpoint was replaced while it was read; reading the new one")

    def tell(self, error: BaseException) -> None:
        """Let the other ranks fail by name while this rank raises ``error`` itself."""
        self._leave(self._start(), error)

    def _start(self) -> _native.Load:
        settings = config()
        return _native.Load(
            self.group,
            os.fspath(self.reader.path),
            rank=self.group.rank,
            call_hash=hash64("load", os.fspath(self.reader.path)),
            verify=VERIFY[settings.verify],
            strict_coverage=settings.strict_coverage,
            direct=DIRECT_IO[settings.direct_io],
            read_once=READ_ONCE[settings.read_once],
        )

    def _leave(self, native: _native.Load, error: BaseException) -> None:
        try:
            native.leave(as_record(error))
        except Exception as exchange_error:
            logger.warning("the other ranks could not be told of %r: %s", error, exchange_error)
        self.error = None  # its traceback holds this object

    def _run(self, native: _native.Load, state_dict: dict[str, Any]) -> None:
        settings = config()
        self._agree("plan", native, native.open)
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
        self._agree("plan", native, native.status)
        try:
            self._read(native, state_dict)
        except BaseException as error:
            self.error = error
        self._agree("read", native, native.status)
        if (interrupt := native.interrupt()) is not None:  # it came with the last agreement
            raise interrupt
        set_report({"kind": "load", "path": "native", "reason": None, **native.info()})

    def _agree(self, step: str, native: _native.Load, collective: Any) -> None:
        try:
            failures = collective(as_record(self.error))
        except BaseException as error:
            raise_alone(step, self.group.rank, error, native.interrupt())
        codes = codes_of(failures)
        self.may_be_replaced = step == "read" and bool(codes) and codes <= _RETRY_CODES
        raise_failures(step, failures, self.group.rank, self.error, native.interrupt())

    def _read(self, native: _native.Load, state_dict: dict[str, Any]) -> None:
        objects, tensors = native.results()
        receiver = Receiver(self.reader, native.metadata)
        if native.info()["copies_count"]:
            settle_devices(tensors)
        native.read(receiver)
        for target, fqn, path in objects:
            if path is None:
                state_dict[fqn] = receiver.values[target]
            else:
                set_element(state_dict, path, receiver.values[target])


def _materialise(value: Any) -> Any:
    """Give meta tensors memory, in containers of any kind; tuples that hold some are made anew.

    torch's own walk would also replace every object that it does not know by None.
    """
    if isinstance(value, torch.Tensor):
        return _with_memory(value) if _is_meta(value) else value
    if isinstance(value, (Mapping, list)):
        for key, child in list(value.items() if isinstance(value, Mapping) else enumerate(value)):
            if (made := _materialise(child)) is not child:
                value[key] = made
    elif isinstance(value, tuple):
        made = [_materialise(child) for child in value]
        if any(new is not old for new, old in zip(made, value, strict=True)):
            return tuple(made)
    return value


def _is_meta(tensor: torch.Tensor) -> bool:
    if isinstance(tensor, ShardedTensor):  # its own device attribute wants CUDA
        return any(shard.tensor.is_meta for shard in tensor.local_shards())
    return tensor.device.type == "meta"


def _with_memory(tensor: torch.Tensor) -> torch.Tensor:
    """On the group's device as torch does, on the CPU without a group."""
    if isinstance(tensor, ShardedTensor):
        raise RuntimeError(f"Found unsupported type {type(tensor)} for meta device loading.")
    if not (dist.is_available() and dist.is_initialized()):
        return torch.empty_like(tensor, device="cpu")
    alone = {"": tensor}
    _init_state_dict(alone)
    return alone[""]
