"""Hugging Face checkpoints: every rank writes its slices into the final safetensors files at once.

Mirrors torch/distributed/checkpoint/hf_storage.py.

With ``save_distributed`` and ``enable_consolidation`` torch writes one file per rank and copies
them into the final ones on one rank, a whole tensor in memory at a time.  Here the coordinator lays
out the final files while it plans, all ranks write into them, and publishing is renames: one pass,
no ``sharded/`` directory.  Ranks that do not share the directory, which a probe of each finds out,
write torch's shard files, and one rank consolidates them as in torch.

The planning is torch's protocol, so the class works under ``dcp_native.save`` and torch's own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    HF_DCP_VERSION,
    SAVED_OFFSETS_KEY,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from . import _native
from ._config import DIRECT_IO, config, io_priority
from ._consolidate_hf_safetensors import consolidate
from ._hf_layout import (
    FULL_PATTERN,
    GLOBAL_SHAPE_KEY,
    PREFIX,
    SHARD_PATTERN,
    Layout,
    Place,
    file_names,
    lay_out,
    new_token,
    part_name,
    parts,
    publication,
    shape_of,
)
from ._hf_pieces import batches
from ._hf_reader import HuggingFaceStorageReader
from ._mirror import rest_of_torchs
from ._progress import Counted
from ._report import logger
from ._stock import hf_storage as _torch
from .filesystem import place_reason

__all__ = ["HuggingFaceStorageReader", "HuggingFaceStorageWriter"]

_ORDER_KEY = "dcp_native"
_PROBE_KEY = "dcp_native_probe"


@dataclasses.dataclass
class _Order:
    """What the coordinator tells a rank."""

    token: str
    path: str
    shared: bool
    files: list[tuple[str, int]] | None = None
    """Name and length of the final files; None: the rank writes shard files of its own."""
    places: dict[str, Place] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Gone:
    """In place of a rank's results: its files were removed, by a rank that failed or by another
    export.  Only in the second case does the coordinator get to see it."""

    error: _native.NativeError


class HuggingFaceStorageWriter(_torch.HuggingFaceStorageWriter):
    """Writes Hugging Face checkpoints; torch's class with its constructor and attributes.

    With ``enable_consolidation`` (or without ``save_distributed``) the final files are written in
    one pass.  An export replaces the one before it in the directory: ``model-*-of-*`` files of
    another number of files go too.  A failed or killed save leaves the old export as it was, unless
    it ends between the renames at the very end: then there is no index, and what has no final name
    yet is left under a temporary one.  Never does an index, or the set of ``model-*`` files, mix
    two exports.

    Memory: 32 MiB of buffers per rank, whatever the tensors' sizes.
    """

    _order: _Order | None = None  # the coordinator's, between planning and finish
    _layout: Layout | None = None

    # ---- what kind of save this is ----

    @property
    def _is_one_pass(self) -> bool:
        return self.enable_consolidation or not self.save_distributed

    @property
    def _output_path(self) -> str:
        """Where the files that the user wants will be."""
        if self.save_distributed and self.enable_consolidation:
            return str(self.consolidated_output_path)
        return str(self.path)

    def _reason(self) -> str | None:
        """None when the native writer can do it, else why torch's does."""
        if (reason := place_reason(self)) is not None:
            return reason
        if "://" in self._output_path:
            return "the path is a URL"
        return None

    # ---- torch's protocol ----

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        self._order = self._layout = None  # of a save that failed
        reason = self._reason()
        if reason is not None:
            logger.debug("Hugging Face save: torch's own implementation runs, because %s", reason)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if reason is None and not self.use_collectives and several:
            raise ValueError(
                "a Hugging Face checkpoint has one set of files for all ranks: save it with "
                "use_collectives=True, or from one rank with no_dist=True"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Make the directory, and a file in it by which the coordinator knows that it is shared."""
        if self._reason() is not None:
            return super().prepare_local_plan(plan)
        path = Path(self._output_path)
        path.mkdir(parents=True, exist_ok=True)
        name = f"{self._probe_prefix(self.rank or 0)}{new_token()}"
        (path / name).touch(exist_ok=False)
        return dataclasses.replace(plan, storage_data={_PROBE_KEY: name})

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Decide where everything lies, and make the files."""
        if self._reason() is not None:
            return super().prepare_global_plan(plans)
        shared = self._is_shared(plans)
        plans = _whole_plans(plans)
        if not any(plan.items for plan in plans):
            raise ValueError(
                f"there is no tensor to save; what {self._output_path} holds is left as it is"
            )
        order = _Order(new_token(), self._output_path, shared)
        if shared:
            _native.export_sweep(order.path)
        elif self._is_one_pass:
            order.path = str(self.path)  # shard files, in `sharded` when they are consolidated
            if not self.save_distributed and sum(bool(plan.items) for plan in plans) > 1:
                raise ValueError(
                    f"several ranks have tensors to save, but do not share {order.path}: use a "
                    "directory that all see, or save_distributed=True"
                )
        self._order, self._layout = order, None
        if self._is_one_pass and (shared or not self.save_distributed):
            self._layout = self._lay_out(plans)
            order.files = [(file.name, file.length) for file in self._layout.files]
        if self._layout is not None and shared:
            _native.export_create(order.path, parts(self._layout.files, order.token))
        return [
            dataclasses.replace(plan, storage_data={**plan.storage_data, _ORDER_KEY: mine})
            for plan, mine in zip(
                super().prepare_global_plan(plans), map(self._order_for, plans), strict=True
            )
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        order = (plan.storage_data or {}).get(_ORDER_KEY)
        if order is None:
            return super().write_data(plan, planner)
        if not order.shared:
            self._sweep_own(order, plan)
        future: Future[Any] = Future()
        try:
            future.set_result(self._write(order, plan, planner) if plan.items else [])
        except _native.NativeError as error:
            if error.dcp_code != "SUPERSEDED":
                raise
            # No cause of its own: a rank that failed says why, and then nobody looks at this.
            future.set_result([_Gone(error)])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        order, layout = self._order, self._layout
        self._order = self._layout = None
        if order is None:
            return super().finish(metadata, results)
        written = [result for of_rank in results for result in of_rank]
        if gone := next((result for result in written if isinstance(result, _Gone)), None):
            raise gone.error
        names = {result.storage_data.relative_path for result in written}
        if layout is not None:
            index = layout.index(self.fqn_to_index_mapping)
            self._publish(order, [file.name for file in layout.files], index)
        elif order.shared:
            self._publish(order, sorted(names), None)
        elif self.enable_consolidation:
            consolidate(
                str(self.path),
                self._output_path,
                self.fqn_to_index_mapping or dict.fromkeys(metadata.state_dict_metadata, 1),
                only=names,
            )

    # ---- planning ----

    @staticmethod
    def _probe_prefix(rank: int) -> str:
        return f"{PREFIX}probe-{rank}-"

    def _is_shared(self, plans: list[SavePlan]) -> bool:
        """Whether this rank sees the probe of every rank.

        Plans that a planner took out of its cache say nothing about probes; then any probe of that
        rank will do.
        """
        present = set(os.listdir(self._output_path))
        for rank, plan in enumerate(plans):
            said = plan.storage_data if isinstance(plan.storage_data, dict) else {}
            # Taken out: a planner may keep the plan, with this mapping, for the saves to come.
            probe = said.pop(_PROBE_KEY, None)
            prefix = self._probe_prefix(rank)
            if probe is None and any(name.startswith(prefix) for name in present):
                continue
            if probe not in present:
                return False
        return True

    def _lay_out(self, plans: list[SavePlan]) -> Layout:
        shapes = {}
        for item in (item for plan in plans for item in plan.items):
            data = _tensor_data(item)
            shape = shape_of(item.index.fqn, data.properties.dtype, data.size)
            if shapes.setdefault(item.index.fqn, shape) != shape:
                raise ValueError(
                    f"{item.index.fqn}: ranks disagree about the tensor: {shape} and "
                    f"{shapes[item.index.fqn]}"
                )
        return lay_out(shapes, file_names(shapes, self.fqn_to_index_mapping))

    def _order_for(self, plan: SavePlan) -> _Order:
        order, layout = self._order, self._layout
        assert order is not None
        if layout is None:
            return order
        fqns = {item.index.fqn for item in plan.items}
        return dataclasses.replace(order, places={fqn: layout.places[fqn] for fqn in fqns})

    # ---- writing ----

    def _sweep_own(self, order: _Order, plan: SavePlan) -> None:
        """Remove this rank's probes, and what its earlier saves left when they were killed.

        Others' files stay: where not all ranks share a directory, some may, and be at work.
        """
        probe, mine = self._probe_prefix(self.rank or 0), "model-"
        if self.save_distributed:
            mine = f"shard-{plan.storage_data['shard_index']:05d}-"
        names = os.listdir(self._output_path)
        _native.export_discard(self._output_path, [n for n in names if n.startswith(probe)])
        if plan.items and os.path.isdir(order.path):
            began = [n for n in os.listdir(order.path) if n.startswith(PREFIX)]
            left = [n for n in began if n.removeprefix(PREFIX).partition("-")[2].startswith(mine)]
            _native.export_discard(order.path, left)

    def _write(self, order: _Order, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        if order.files is None:
            layout = self._shard_layout(plan)
            order = dataclasses.replace(
                order,
                files=[(file.name, file.length) for file in layout.files],
                places=layout.places,
            )
        elif not order.shared:
            layout = self._lay_out([plan])
        else:
            layout = None
        files = order.files or []
        names = [part_name(order.token, name) for name, _ in files]
        lengths = [(part, length) for part, (_, length) in zip(names, files, strict=True)]
        try:
            if layout is not None:
                _native.export_create(order.path, parts(layout.files, order.token))
            is_shard = layout is not None and self.save_distributed
            with self._progress(plan, order) as progress:
                for pieces in batches(plan.items, planner, order.places, is_shard):
                    _native.export_write(
                        order.path,
                        lengths,
                        pieces,
                        sync=self.sync_files,
                        direct=DIRECT_IO[config().direct_io],
                        nice=config().writer_nice,
                        io_priority=io_priority(config().writer_io_class),
                        limit_bytes_s=config().write_limit_bytes_s,
                        progress=progress.counter,
                    )
        except BaseException:
            # Other ranks go on writing to what has no name any more, and hear of it after.
            _native.export_discard(order.path, names)
            raise
        if is_shard and not order.shared:
            self._publish(order, [name for name, _ in files], None, plan)
        return [self._result(item, order, files, is_shard) for item in plan.items]

    def _progress(self, plan: SavePlan, order: _Order) -> Counted:
        several = dist.is_available() and dist.is_initialized()
        return Counted(
            "save",
            sum(_bytes_of(item, order) for item in plan.items),
            rank=self.rank or 0,
            ranks_count=dist.get_world_size() if several else 1,
            foreground=threading.current_thread() is threading.main_thread(),
        )

    def _shard_layout(self, plan: SavePlan) -> Layout:
        """Files of this rank alone, as torch names them and with what torch's consolidation
        reads."""
        shapes, offsets = {}, {}
        for item in plan.items:
            data, fqn = _tensor_data(item), item.index.fqn
            if fqn in shapes:
                raise ValueError(
                    f"{fqn}: this rank holds two shards of it, and a shard file has one place for "
                    "each name; save with enable_consolidation=True"
                )
            shapes[fqn] = shape_of(fqn, data.properties.dtype, data.chunk.sizes)
            offsets[fqn] = {
                SAVED_OFFSETS_KEY: list(data.chunk.offsets),
                GLOBAL_SHAPE_KEY: list(data.size),
            }
        names = file_names(shapes, self.fqn_to_index_mapping, plan.storage_data["shard_index"])
        texts = {
            name: {
                CUSTOM_METADATA_KEY: json.dumps(
                    {fqn: offsets[fqn] for fqn in shapes if names[fqn] == name}
                ),
                DCP_VERSION_KEY: str(HF_DCP_VERSION),
            }
            for name in set(names.values())
        }
        return lay_out(shapes, names, texts)

    @staticmethod
    def _result(
        item: WriteItem, order: _Order, files: list[tuple[str, int]], is_shard: bool
    ) -> WriteResult:
        place, chunk = order.places[item.index.fqn], _tensor_data(item).chunk
        offset = place.offset if is_shard else place.offset_of(chunk.offsets)
        length = _bytes_of(item, order)
        info = _StorageInfo(files[place.file][0], offset, length)
        return WriteResult(index=item.index, size_in_bytes=length, storage_data=info)

    def _publish(
        self, order: _Order, names: list[str], index: bytes | None, plan: SavePlan | None = None
    ) -> None:
        """``plan``: of the one rank whose shard files these are."""
        pattern = FULL_PATTERN if index is not None else SHARD_PATTERN
        if plan is not None:
            pattern = pattern.replace("#####", f"{plan.storage_data['shard_index']:05d}", 1)
        _native.export_publish(  # removes what it can not publish, while there is another export
            order.path,
            [part_name(order.token, name) for name in names],
            names,
            pattern,
            sync=self.sync_files,
            **({} if index is None else publication(index, order.token)),
        )


def _bytes_of(item: WriteItem, order: _Order) -> int:
    shape = order.places[item.index.fqn].shape
    return dataclasses.replace(shape, size=tuple(_tensor_data(item).chunk.sizes)).nbytes


def _tensor_data(item: WriteItem) -> Any:
    if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
        raise ValueError(
            f"{item.index.fqn} is not a tensor: safetensors files hold nothing else; take it out "
            "of the state dict"
        )
    return item.tensor_data


def _whole_plans(plans: list[SavePlan]) -> list[SavePlan]:
    """A planner that caches sends only plans that changed; the layout needs all of them."""
    if all(plan.usable for plan in plans):
        return plans
    known = [p for p in SavePlanner._cached_global_plan.values() if len(p) == len(plans)]
    if len(known) != 1:
        raise ValueError(
            "plans were left out that a planner keeps in its cache, and it is not known which; use "
            "a planner with enable_plan_caching=False"
        )
    return known[0]


__getattr__, __dir__ = rest_of_torchs(__name__)
