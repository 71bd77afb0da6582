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
from ._config import DIRECT_IO, READ_ONCE, VERIFY, config
from ._failures import as_record, codes_of, raise_alone, raise_failures
from ._lazy_metadata import refusal
from ._report import logger, set_report
from ._save import hash64

_RETRY_CODES = {"NOENT", "STALE"}
"""What a reader meets when a newer save committed and swept while it was reading."""
_TRIES = 10
"""How many checkpoints in a row may be replaced under a reader before it gives up."""


class UnsupportedCheckpoint(Exception):
    """Metadata that only torch's own unpickler understands.

    A rank that meets such a file tells the others, and all of them raise this from ``run``.
    """


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
                # As the failures, the image that decides now is of the same file on every rank.
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
        self._agree("plan", native, native.open)
        try:
            self._check_policy(native.info())
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
        try:
            self._agree("plan", native, native.status)
        except CheckpointException as error:
            reasons = [failure for failure, _ in error.failures.values()]
            if all(isinstance(reason, UnsupportedCheckpoint) for reason in reasons):
                raise reasons[0] from None
            raise
        try:
            native.read()
            self._finish_in_python(native, state_dict)
        except BaseException as error:
            self.error = error
        self._agree("read", native, native.status)
        if (interrupt := native.interrupt()) is not None:  # it came with the last agreement
            raise interrupt
        set_report({"kind": "load", "path": "native", "reason": None, **native.info()})

    def _check_policy(self, info: dict[str, Any]) -> None:
        """Of metadata that only Python could rebuild as a whole: is that needed, and allowed?"""
        if config().allow_unsafe_objects:
            if info["unsupported"] is not None:
                raise UnsupportedCheckpoint(info["unsupported"])
        elif info["unsupported"] is not None:  # which names the file
            raise refusal(info["unsupported"])
        elif info["foreign"] is not None:
            raise refusal(f"the metadata of {self.reader.path}: {info['foreign']}")

    def _agree(self, step: str, native: _native.Load, collective: Any) -> None:
        try:
            failures = collective(as_record(self.error))
        except BaseException as error:
            raise_alone(step, self.group.rank, error, native.interrupt())
        codes = codes_of(failures)
        self.may_be_replaced = step == "read" and bool(codes) and codes <= _RETRY_CODES
        raise_failures(step, failures, self.group.rank, self.error, native.interrupt())

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
