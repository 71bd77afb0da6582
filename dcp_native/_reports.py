"""Reports of saves and loads: dicts of facts whose keys are fields of a dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["LoadReport", "Report", "SaveReport"]


@dataclasses.dataclass(init=False, repr=False, eq=False)
class Report(dict[str, Any]):
    """What one save or load did, of this rank alone.

    A dict; what it has is an attribute too (``report["write_ns"]``, ``report.write_ns``), and a
    field that does not apply reads as None as an attribute, and is no key.  ``str(report)`` is a
    line for people.

    ``*_bytes`` are bytes, ``*_ns`` nanoseconds of the wall clock, ``*_count``, ``*_items`` and
    ``*_files`` numbers.

    Both:
        kind: ``"save"``, ``"async_save"`` or ``"load"``.
        path: ``"native"`` or ``"torch"``.  With ``"torch"`` there is little else: why, where,
            roles, ranks and ``total_ns`` from when torch's implementation was called.
        reason: why not native, or None.
        directory: of the checkpoint.
        rank, ranks_count: this one of the group, and how many there are.
        total_ns: of the call; of a background save until its outcome was known.
        phases: nanoseconds of each phase that the calling thread went through (of a background save
            also ``write`` and ``settle``), in order.  They do not overlap, and add up to at most
            ``total_ns``; the rest is what lies between them.
        comm: over what the ranks of a native call agreed: ``"nccl"``, the name of the CPU backend
            (``"gloo"``), or ``"local"`` for a process alone.
        comm_reason: why over that; None for a process alone, and before its group's ranks agreed.
        comm_calls_count, comm_bytes, comm_ns: collectives, the size of one rank's part of them, and
            the time in them, mostly waiting for other ranks.
        peak_memory_bytes: most memory that the core of this process had at a time meanwhile,
            buffers and staging memory that it keeps between saves included; tensors are not.
        devices: those whose memory was read or filled without torch, ``["cuda:0"]``.
        device_copied_bytes, device_copies_count: to or from their memory, and in how many copies.
        device_packed_bytes, device_packed_count: of these, what kernels gathered or scattered.
        device_slab_bytes: of their memory, that was taken for that, at most at a time.
        device_wait_ns: the host waited for a device.
        device_by_torch_count, device_by_torch_bytes: tensors on devices that torch copied instead.
        device_reason: the first thing that made a device do less than it could (copies by torch,
            memory that could not be pinned, no kernels), or None.
    """

    kind: str
    path: str
    reason: str | None
    directory: str
    rank: int
    ranks_count: int
    total_ns: int
    phases: dict[str, int]
    comm: str
    comm_reason: str | None
    comm_calls_count: int
    comm_bytes: int
    comm_ns: int
    peak_memory_bytes: int
    devices: list[str]
    device_copied_bytes: int
    device_copies_count: int
    device_packed_bytes: int
    device_packed_count: int
    device_slab_bytes: int
    device_wait_ns: int
    device_by_torch_count: int
    device_by_torch_bytes: int
    device_reason: str | None

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in type(self).__dataclass_fields__:
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        from ._summary import summary_of

        return summary_of(self)

    @property
    def roles(self) -> dict[str, str]:
        """Which path each role took, and why: ``{"writer": "native", "planner": "torch: ..."}``."""
        return {role: self[role] for role in ("writer", "reader", "planner") if role in self}

    def _per_second(self, bytes_key: str, ns_key: str) -> float | None:
        ns = self.get(ns_key)
        return self.get(bytes_key, 0) * 1e9 / ns if ns else None


@dataclasses.dataclass(init=False, repr=False, eq=False)
class SaveReport(Report):
    """What a save did; see :class:`Report` for units and for the fields that loads have too.

    Roles (also of a save on torch's path):
        writer, planner: where it ran: ``"native"``; or why in torch's own implementation, with
            ``"torch: "`` before it, or in the program's hooks, with ``"python: "``.  A native
            writer of Hugging Face files plans by torch's protocol: on torch's path.
        planned_outside: planner hooks in Python planned on all ranks, the core wrote.

    Outcome:
        save_id: 32 hex digits that name the save, also in its files.
        outcome: ``"committed"``, ``"aborted"``, ``"superseded"`` or ``"unknown"``.
        n0: first number of its data files.
        fast: the plan was the one of the save before; no planning but one agreement.
        is_coordinator, call_agrees: this rank wrote ``.metadata``; all ranks gave the same path.

    What was written:
        kept_items, kept_bytes: of the plan, for this rank to write; bytes of their files.
        dropped_items, dropped_bytes: replicas that were not written once more, of all ranks, on
            the one that planned for all; else 0.
        cut_items: replicated tensors of which this rank wrote some rows.
        file_bytes, files_count, direct_files_count: data files; with O_DIRECT.
        files: of each of the first 64 of them ``{"name": "__0_0.distcp", "bytes": 123, "direct":
            True}``; ``direct``: with O_DIRECT, else through the page cache.
        payload_bytes, progress_bytes: of tensors and objects, without what frames them; done so
            far.
        metadata_bytes: size of ``.metadata``.
        queue_writes_count: requests through io_uring.
        swept_files: files of older saves that were removed.

    Unchanged data:
        incremental, base_reason: a base was used; else why not, or None.
        reused_items, reused_bytes, linked_files: taken over from the base.
        compared_items, unchanged_items, unchanged_bytes: against the save before, by checksum.
        trainable_items, trainable_bytes, trainable_unchanged: tensors with gradients among them.

    Time and memory:
        vote_ns, plan_ns, hash_ns, compare_ns, metadata_ns, write_ns, commit_ns: steps, in order.
        stage_ns: of ``async_save``: from the agreed plan to a private copy of every byte.
        stage_begin_ns: of that, before ``async_save`` returns where it goes on in the background.
        settle_ns: from the last durable byte of this rank to the outcome that all ranks agree on.
        staging: how that copy was made: ``"arena"``; ``"streamed"`` (no memory: written before
            ``async_save`` returned); ``"borrowed"`` from the stager of the user's own.
        staged_bytes, arena_bytes: files in staging memory; all of that memory.
        planned_bytes: payload that this rank is to write.
        ranks_bytes: the same of all ranks, on the rank that planned for all; else 0.
        store_calls, in_touch: calls of this rank to the store, to end the save with the others, and
            whether it answered to the end; in ``future.report``, some time after the result.
        copy_ns, sync_ns, limited_ns: of writing: copying, fdatasync, asleep for
            ``write_limit_bytes_s``.
        ring_bytes: memory of the writer.
        priority_failures: threads whose priority could not be set.
    """

    writer: str
    planner: str
    planned_outside: bool
    save_id: str
    outcome: str
    n0: int
    fast: bool
    is_coordinator: bool
    call_agrees: bool
    kept_items: int
    kept_bytes: int
    dropped_items: int
    dropped_bytes: int
    cut_items: int
    file_bytes: int
    files_count: int
    direct_files_count: int
    files: list[dict[str, Any]]
    payload_bytes: int
    progress_bytes: int
    metadata_bytes: int
    queue_writes_count: int
    swept_files: int
    incremental: bool
    base_reason: str | None
    reused_items: int
    reused_bytes: int
    linked_files: int
    compared_items: int
    unchanged_items: int
    unchanged_bytes: int
    trainable_items: int
    trainable_bytes: int
    trainable_unchanged: int
    vote_ns: int
    plan_ns: int
    hash_ns: int
    compare_ns: int
    metadata_ns: int
    write_ns: int
    commit_ns: int
    stage_ns: int
    stage_begin_ns: int
    settle_ns: int
    staging: str
    staged_bytes: int
    arena_bytes: int
    planned_bytes: int
    ranks_bytes: int
    store_calls: int
    in_touch: bool
    copy_ns: int
    sync_ns: int
    limited_ns: int
    ring_bytes: int
    priority_failures: int

    @property
    def write_bytes_s(self) -> float | None:
        """Bytes of data files per second of ``write_ns``."""
        return self._per_second("file_bytes", "write_ns")

    @property
    def stage_bytes_s(self) -> float | None:
        """Bytes per second that were brought into staging memory."""
        return self._per_second("staged_bytes", "stage_ns")

    @property
    def total_bytes_s(self) -> float | None:
        """Bytes of data files per second of the whole save."""
        return self._per_second("file_bytes", "total_ns")


@dataclasses.dataclass(init=False, repr=False, eq=False)
class LoadReport(Report):
    """What a load did; see :class:`Report` for units and for the fields that saves have too.

    It names what it did in lists.  Each shows at most 1000 names, in the checkpoint's order, beside
    its true ``*_count``.  Of a load whose planner alone is not native (always so for Hugging Face
    files) the lists are those of a failed load alone.

    Roles (also of a load on torch's path):
        reader, planner: where it ran: ``"native"``; or why in torch's own implementation, with
            ``"torch: "`` before it, or in the program's hooks, with ``"python: "``.  Where only the
            planner is not native (always so for Hugging Face files) the lists below are those of a
            failed load alone.

    What became of the names:
        failed: whether the load raised.  The lists are then what was known by that time.
        error: type and text of what it raised, else None.
        skipped: leaves that ``keys=`` did not select.
        missing: wanted, not in the checkpoint (with ``allow_partial_load``).
        unexpected: in the checkpoint, not in the state dict.
        unexpected_prefixes: the same counted by top-level key, ``{"optim": 291}``; of the first
            1000 runs of keys.
        cast: the target's dtype is not the saved one.
        resharded: a target is not exactly one saved chunk.
        replaced: tensors in whose place an object was saved.
        transformed: stored through transforms (compression, encryption), undone in Python.
        holes: not wholly covered by saved chunks (with ``strict_coverage`` off).
        filled, partly, untouched: after a failure: values of the checkpoint, some of them, or those
            from before the load.

    Bytes:
        wanted_bytes: delivered to targets; of objects their records.
        read_bytes: read by this rank, from storage or the page cache.
        hot_bytes: of these, from files in the page cache.
        shared_bytes: delivered from what other ranks read.
        share_reason: why nothing was shared with other ranks of the host (``read_once``), or "".
        verified_bytes, unverified_bytes: of wanted_bytes; unverified are rows of a block of which
            too little was wanted to read it whole, and payloads saved without checksums.
        straight_bytes: read into their target without a buffer between.
        device_direct_bytes: of these, read by a device from storage (``gpu_direct``).
        hole_bytes: of targets, that no saved chunk covers.
        progress_bytes: delivered so far, also by a load that failed.
        verify: the setting: True, False or ``"strict"``.
        requests_count, files_count, objects_count: reads of storage, data files, objects.
        direct_files_count, hot_files_count: of those files: read with O_DIRECT; found in the page
            cache.  All others were read through the page cache.
        copies_count, whole_copies: targets that torch's own copy fills (devices, odd memory); parts
            of them that went through a temporary of their full size.
        wall_ns: of reading.
        device_targets_count: targets on devices that are filled without torch.
        rank_local: read through ``__{rank}.metadata``.
        foreign: what of the metadata only Python could rebuild, and nobody needed; else None.
    """

    reader: str
    planner: str
    failed: bool
    error: str | None
    skipped: list[str]
    skipped_count: int
    missing: list[str]
    missing_count: int
    unexpected: list[str]
    unexpected_count: int
    unexpected_prefixes: dict[str, int]
    cast: list[str]
    cast_count: int
    resharded: list[str]
    resharded_count: int
    replaced: list[str]
    replaced_count: int
    transformed: list[str]
    transformed_count: int
    holes: list[str]
    holes_count: int
    filled: list[str]
    filled_count: int
    partly: list[str]
    partly_count: int
    untouched: list[str]
    untouched_count: int
    wanted_bytes: int
    read_bytes: int
    hot_bytes: int
    shared_bytes: int
    share_reason: str
    verified_bytes: int
    unverified_bytes: int
    straight_bytes: int
    device_direct_bytes: int
    hole_bytes: int
    progress_bytes: int
    verify: bool | str
    requests_count: int
    files_count: int
    objects_count: int
    direct_files_count: int
    hot_files_count: int
    copies_count: int
    whole_copies: int
    wall_ns: int
    device_targets_count: int
    rank_local: bool
    foreign: str | None

    @property
    def read_bytes_s(self) -> float | None:
        """Bytes delivered per second of ``wall_ns``."""
        return self._per_second("wanted_bytes", "wall_ns")

    @property
    def total_bytes_s(self) -> float | None:
        """Bytes delivered per second of the whole load."""
        return self._per_second("wanted_bytes", "total_ns")
