"""A load that torch's implementation drives, planner's hooks and all, and whose bytes are native.

For planners that are not torch's own, for Hugging Face files, and where torch's collectives or its
unpickler are needed.
Torch's function gets the caller's reader in another class: same state, native ``read_data``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader as _TorchReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from ._failures import LoadException
from ._hf_reader import HuggingFaceStorageReader
from ._hf_reads import HFReads
from ._plan_reads import PlanReads
from ._report import LISTED_NAMES
from ._stock import state_dict_loader as _torch
from .filesystem import FileSystemReader
from .quantized_hf_storage import QuantizedHuggingFaceStorageReader


class _CallReader:
    """A stock reader for one call.  It shares the state of the caller's; its own is in slots."""

    __slots__ = ("damage", "reads", "torch_reason", "verify")

    damage: Exception | None
    reads: PlanReads | None
    torch_reason: str | None  # why torch had to read after all
    verify: bool | Literal["strict"] | None

    @classmethod
    def of(cls, reader: _TorchReader, verify: bool | Literal["strict"] | None) -> Any:
        view = object.__new__(cls)
        view.__dict__ = reader.__dict__
        view.damage = view.reads = view.torch_reason = None
        view.verify = verify
        return view


class _FileSystemCall(_CallReader, FileSystemReader):
    __slots__ = ()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As ours; only where ``.metadata`` is absent may a rank's own file stand for it."""
        if self.damage is not None:
            raise self.damage
        try:
            return super().read_metadata(*args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            self.damage = error
            raise

    def _plan_reads(self, verify: bool | Literal["strict"] | None = None) -> PlanReads:
        """As ours, verified as the call wants; what became of which name is kept."""
        self.reads = super()._plan_reads(self.verify)
        return self.reads


class _HFCall(_CallReader, HuggingFaceStorageReader):
    __slots__ = ()

    def _reads_for(self, plan: LoadPlan) -> HFReads | str:
        found = super()._reads_for(plan)
        if isinstance(found, str):
            self.torch_reason = found
        else:
            self.reads = found
        return found


class _QuantizedCall(_HFCall, QuantizedHuggingFaceStorageReader):
    __slots__ = ()


_CALLS = {
    HuggingFaceStorageReader: _HFCall,
    QuantizedHuggingFaceStorageReader: _QuantizedCall,
}


class MixedLoad:
    """One load.

    Args:
        reader: for which ``_roles.reader_reason`` is None.
        top_is_copy: the caller has another top-level dict than ``run`` gets.
    """

    def __init__(
        self,
        reader: _TorchReader,
        planner: LoadPlanner | None,
        process_group: dist.ProcessGroup | None,
        coordinator_rank: int,
        no_dist: bool,
        verify: bool | Literal["strict"] | None = None,
        top_is_copy: bool = False,
    ) -> None:
        self.reader = _CALLS.get(type(reader), _FileSystemCall).of(reader, verify)
        self.planner = planner
        self.group = (process_group, coordinator_rank, no_dist)
        self.top_is_copy = top_is_copy

    def check(self) -> None:
        """Raise ValueError where checksums are asked for that the files do not have."""
        verify = self.reader.verify
        if verify and isinstance(self.reader, _HFCall):
            raise ValueError(
                f"verify={verify!r} cannot be had: safetensors files carry no checksums"
            )

    def run(self, state_dict: dict[str, Any]) -> None:
        """Collective; torch's exceptions, as LoadException once memory was written to."""
        try:
            _torch._load_state_dict(state_dict, self.reader, *self.group, self.planner)
        except CheckpointException as error:
            group, _, no_dist = self.group
            rank = 0 if no_dist else dist.get_rank(group)
            mine = error.failures.get(rank, (None,))[0]
            if isinstance(mine, KeyboardInterrupt | SystemExit):
                raise mine from error
            outcome = self._outcome(state_dict)
            if not (outcome[0] or outcome[1]):
                raise
            raise LoadException(*error.args, rank, *outcome) from mine

    def facts(self, state_dict: dict[str, Any], failed: bool) -> dict[str, Any]:
        """What the report has of it."""
        facts: dict[str, Any] = {"rank_local": not self.reader.use_collectives}
        if (reason := self.reader.torch_reason) is not None:
            facts |= {"path": "torch", "reason": reason, "reader": f"torch: {reason}"}
        if self.reader.reads is not None:
            facts |= {"verify": self.reader.reads.verify, **self.reader.reads.stats}
            facts["objects_count"] = len(self.reader.reads.objects)
        if failed:
            outcome = self._outcome(state_dict)
            for key, names in zip(("filled", "partly", "untouched"), outcome, strict=True):
                facts[key] = list(names[:LISTED_NAMES])
                facts[f"{key}_count"] = len(names)
        return facts

    def _outcome(self, state_dict: dict[str, Any]) -> tuple[tuple[str, ...], ...]:
        reads = self.reader.reads
        if reads is None:
            return (), (), ()
        filled, partly, untouched = reads.outcome()
        if self.top_is_copy:  # objects that were set in the copy
            lost = {name for name in reads.objects if name in state_dict}
            filled, partly = (tuple(n for n in ns if n not in lost) for ns in (filled, partly))
            untouched += tuple(lost)
        return filled, partly, untouched
