"""One native load, driven step by step: metadata, plan, read, objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.planner_helpers import _init_state_dict

from . import _native
from ._clock import Clock
from ._config import DIRECT_IO, GPU_DIRECT, READ_ONCE, VERIFY, config
from ._failures import LoadException, as_record, codes_of, raise_alone, raise_failures
from ._filter import KeyFilter
from ._group_comm import take_error
from ._lazy_metadata import refusal
from ._progress import Progress
from ._receive import Receiver
from ._report import LISTED_NAMES, logger, names_of, set_report, tell
from ._save import hash64

try:
    from torch.distributed.checkpoint import protocol as _protocol
except ImportError:  # before torch 2.14
    _protocol = None  # type: ignore[assignment]

_RETRY_CODES = {"NOENT", "STALE"}
"""What a reader meets when a newer save committed and swept while it was reading."""
_TRIES = 10
"""How many checkpoints in a row may be replaced under a reader before it gives up."""
_UNTOUCHED, _PARTLY, _FILLED = 0, 1, 2
"""Values of enum dcp_target_state (csrc/include/dcp_engine.h)."""


class UnsupportedCheckpoint(Exception):
    """Metadata that only torch's own unpickler understands.

    A rank that meets such a file tells the others, and all of them raise this from ``run``.
    """


class LoadsElsewhere(Exception):
    """A rank has a planner or reader of the program's own: every rank raises this from ``run``."""


class NativeLoad:
    """A load by stock roles.  Each step that fails here still takes part in the next agreement.

    Args:
        reader: None on a rank whose roles are not all stock: it takes part in the first agreement,
            which tells the others to leave the native path with it.
        top_is_copy: the caller has another top-level dict than ``run`` gets.
    """

    def __init__(
        self,
        reader: FileSystemReader | None,
        planner: LoadPlanner | None,
        group: _native.Group,
        keys: KeyFilter | None = None,
        verify: bool | Literal["strict"] | None = None,
        top_is_copy: bool = False,
    ) -> None:
        self.reader = reader
        self.path = "" if reader is None else os.fspath(reader.path)
        self.group = group
        self.clock = Clock("load", self.path, group.rank, group.size)
        self._comm_before = group.comm_stats()
        _native.peak_bytes(True)
        self.top_is_copy = top_is_copy
        self.keys = keys
        self.verify = config().verify if verify is None else verify
        self.flatten = getattr(planner, "flatten_state_dict", True)
        self.flatten_sharded = getattr(planner, "flatten_sharded_tensors", True)
        self.allow_partial = getattr(planner, "allow_partial_load", False)
        self.error = take_error(group)
        self.may_be_replaced = False  # says the last agreement, to all ranks alike
        self.by_python = _UNTOUCHED  # objects
        self.touched_before: set[str] = set()  # by reads of checkpoints that were replaced

    def run(self, state_dict: dict[str, Any]) -> None:
        """Collective.  A checkpoint that was replaced under the reader is read anew."""
        try:
            self._run_until_it_stays(state_dict)
        finally:
            self.clock.end()

    def _run_until_it_stays(self, state_dict: dict[str, Any]) -> None:
        seen = None
        for tries_left in reversed(range(_TRIES)):
            native = self._start()
            try:
                self._run(native, state_dict)
                return
            except (UnsupportedCheckpoint, LoadsElsewhere):
                raise
            except BaseException as error:
                self._leave(native, error)
                if tries_left == 0 or not self.may_be_replaced:
                    self._fail(native, error)
                # As the failures, the image that decides now is of the same file on every rank.
                image = None if native.info()["rank_local"] else native.metadata()
                if image is not None and image == seen:
                    self._fail(native, error)
                seen = image
                filled, partly, _ = self._outcome(native)
                self.touched_before.update(filled, partly)
                self.error = native.interrupt()  # the others hear of it when they try again
            logger.info("the checkpoint was replaced while it was read; reading the new one")

    def tell(self, error: BaseException) -> None:
        """Let the other ranks fail by name while this rank raises ``error`` itself."""
        native = self._start()
        self._leave(native, error)
        self._report_failure(native, error)

    def _start(self) -> _native.Load:
        settings = config()
        set_report({**self._report(None), "failed": True, "error": "it did not start"})
        return _native.Load(
            self.group,
            self.path,
            rank=self.group.rank,
            call_hash=hash64("load", self.path),
            verify=VERIFY[self.verify],
            strict_coverage=settings.strict_coverage,
            direct=DIRECT_IO[settings.direct_io],
            read_once=READ_ONCE[settings.read_once],
            elsewhere=self.reader is None,
            gpu_direct=GPU_DIRECT[settings.gpu_direct],
        )

    def _leave(self, native: _native.Load, error: BaseException) -> None:
        try:
            native.leave(as_record(error))
        except Exception as exchange_error:
            logger.warning("the other ranks could not be told of %r: %s", error, exchange_error)
        self.error = None  # its traceback holds this object

    def _outcome(self, native: _native.Load) -> tuple[tuple[str, ...], ...]:
        """Names whose memory is filled, partly filled and untouched, over all tries."""
        outcome = native.outcome(self.by_python)
        filled, partly, untouched = (
            names_of(outcome.get(key, b"")) for key in ("filled", "partly", "untouched")
        )
        if self.top_is_copy and self.by_python != _UNTOUCHED:
            objects = native.results()[0]
            top = {fqn for _, fqn, path in objects if path is None or len(path) == 1}
            filled, partly = ([n for n in names if n not in top] for names in (filled, partly))
            untouched += sorted(top.difference(untouched))
        if self.touched_before:
            known = {*filled, *partly}
            partly += sorted(self.touched_before - known)
            untouched = [n for n in untouched if n not in self.touched_before]
        return tuple(filled), tuple(partly), tuple(untouched)

    def _report_failure(
        self, native: _native.Load, error: BaseException
    ) -> tuple[tuple[str, ...], ...]:
        outcome = self._outcome(native)
        lists: dict[str, Any] = {}
        for key, names in zip(("filled", "partly", "untouched"), outcome, strict=True):
            lists[key] = list(names[:LISTED_NAMES])
            lists[f"{key}_count"] = len(names)
        set_report(
            {
                **self._report(native),
                **lists,
                "failed": True,
                "error": _text_of(error),
            }
        )
        return outcome

    def _report(self, native: _native.Load | None) -> dict[str, Any]:
        facts = {} if native is None else {**native.info(), **native.report()}
        return {
            **self.clock.facts(),
            "path": "native",
            "reason": None,
            "comm": self.group.kind,
            "comm_reason": self.group.reason,
            "planner": "native",
            "reader": "native",
            "failed": False,
            "error": None,
            "verify": self.verify,
            "total_ns": self.clock.total_ns,
            "phases": dict(self.clock.phases_ns),
            **self._comm(),
            "peak_memory_bytes": _native.peak_bytes(),
            **{
                key: value
                for key, value in facts.items()
                if key not in ("unsupported", "elsewhere")
            },
        }

    def _comm(self) -> dict[str, int]:
        names = ("comm_calls_count", "comm_bytes", "comm_ns")
        counts = zip(names, self.group.comm_stats(), self._comm_before, strict=True)
        return {name: now - before for name, now, before in counts}

    def _fail(self, native: _native.Load, error: BaseException) -> NoReturn:
        """Raise ``error``, which says what became of the memory if that was written to."""
        filled: tuple[str, ...] = ()
        partly, untouched = filled, filled
        try:
            filled, partly, untouched = self._report_failure(native, error)
        except Exception as report_error:
            logger.warning("no full report of the failed load: %s", report_error)
            set_report({**self._report(None), "failed": True, "error": _text_of(error)})
        if isinstance(error, CheckpointException) and (filled or partly):
            raise LoadException(
                *error.args, self.group.rank, filled, partly, untouched
            ) from error.__cause__
        raise error

    def _run(self, native: _native.Load, state_dict: dict[str, Any]) -> None:
        self.by_python = _UNTOUCHED
        self.may_be_replaced = False  # until the last agreement says so
        with self.clock("open"):
            self._agree("plan", native, native.open)
        if native.info()["elsewhere"]:
            raise LoadsElsewhere("the planner or the reader of another rank is not native")
        try:
            with self.clock("plan"):
                self._check_policy(native.info())
                self._plan(native, state_dict)
        except BaseException as error:
            self.error = error
        try:
            with self.clock("agree"):
                self._agree("plan", native, native.status)
        except CheckpointException as error:
            reasons = [failure for failure, _ in error.failures.values()]
            if all(isinstance(reason, UnsupportedCheckpoint) for reason in reasons):
                raise reasons[0] from None
            raise
        try:
            with self.clock("read"):
                self._read(native, state_dict)
        except BaseException as error:
            self.error = error
        with self.clock("agree"):
            self._agree("read", native, native.status)
        if (interrupt := native.interrupt()) is not None:  # it came with the last agreement
            raise interrupt
        report = self._report(native)
        set_report(report)
        tell(report)

    def _plan(self, native: _native.Load, state_dict: dict[str, Any]) -> None:
        keys = self.keys
        if native.has_meta(state_dict):
            if keys is None:
                _materialise(state_dict)
            else:
                pruned = keys.prune(state_dict, self.flatten)
                _materialise(pruned.state_dict)
                pruned.put_back()
        selected = native.targets(
            state_dict,
            flatten_state_dict=self.flatten,
            flatten_sharded_tensors=self.flatten_sharded,
            allow_partial_load=self.allow_partial,
            names=None if keys is None else keys.names,
            predicate=None if keys is None else keys.predicate,
        )
        if keys is not None:
            keys.settle(*selected, map(str, state_dict))

    def _check_policy(self, info: dict[str, Any]) -> None:
        """Of metadata that only Python could rebuild as a whole: is that needed, and allowed?"""
        if config().allow_unsafe_objects:
            if info["unsupported"] is not None:
                raise UnsupportedCheckpoint(info["unsupported"])
        elif info["unsupported"] is not None:  # which names the file
            raise refusal(info["unsupported"])
        elif info["foreign"] is not None:
            raise refusal(f"the metadata of {self.path}: {info['foreign']}")

    def _agree(self, step: str, native: _native.Load, collective: Any) -> None:
        try:
            failures = collective(as_record(self.error))
        except BaseException as error:
            raise_alone(step, self.group.rank, error, native.interrupt())
        codes = codes_of(failures)
        self.may_be_replaced = step == "read" and bool(codes) and codes <= _RETRY_CODES
        raise_failures(step, failures, self.group.rank, self.error, native.interrupt())

    def _read(self, native: _native.Load, state_dict: dict[str, Any]) -> None:
        objects, _ = native.results()
        receiver = Receiver(self.reader, native.metadata)
        progress = Progress(
            "load",
            native.progress,
            rank=self.group.rank,
            ranks_count=self.group.size,
            begin_ns=self.clock.begin_ns,
        )
        with progress:
            native.read(receiver)
        receiver.settle()
        self.by_python = _PARTLY
        for target, fqn, path in objects:
            if path is None:
                state_dict[fqn] = receiver.values[target]
            else:
                set_element(state_dict, path, receiver.values[target])
        self.by_python = _FILLED


def _text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


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
        made = torch.empty_like(tensor, device="cpu")
        if _protocol is not None and _protocol._is_checkpointable_tensor(tensor):
            _protocol._copy_checkpointable_tensor_metadata(tensor, made)
        return made
    alone = {"": tensor}
    _init_state_dict(alone)
    return alone[""]
