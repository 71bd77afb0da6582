"""What the last save and load of this process did, for people and for tests."""

from __future__ import annotations

import copy
import logging
from typing import Any

from ._fork import fork_safe

__all__ = ["LISTED_NAMES", "last_report", "names_of", "note_path", "role_report", "set_report"]

logger = logging.getLogger("dcp_native")

LISTED_NAMES = 1000
"""Most names in a list of a report (csrc/py/load_report.c)."""

_lock = fork_safe()
_last: dict[str, Any] | None = None


def set_report(report: dict[str, Any]) -> None:
    """Keep ``report`` as the last one."""
    global _last
    with _lock():
        _last = report


def names_of(packed: bytes) -> list[str]:
    """Names that the C side packed: a length in 4 bytes, little endian, and UTF-8, each."""
    names, at = [], 0
    while at < len(packed):
        end = at + 4 + int.from_bytes(packed[at : at + 4], "little")
        names.append(packed[at + 4 : end].decode(errors="replace"))
        at = end
    return names


def _prefixes_of(packed: bytes) -> dict[str, int]:
    """Counted names: a count in 8 bytes before each; the same name may come again."""
    counts: dict[str, int] = {}
    at = 0
    while at < len(packed):
        end = at + 12 + int.from_bytes(packed[at + 8 : at + 12], "little")
        (name,) = names_of(packed[at + 8 : end])
        counts[name] = counts.get(name, 0) + int.from_bytes(packed[at : at + 8], "little")
        at = end
    return counts


def _unpacked(key: str, value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    return _prefixes_of(value) if key == "unexpected_prefixes" else names_of(value)


def last_report() -> dict[str, Any] | None:
    """Facts about this process's last finished save or load, or None before the first.

    A load names what it did in lists.  Each shows at most 1000 names, in the checkpoint's order,
    beside its true ``*_count``; they become Python strings only here.  ``*_bytes`` are bytes,
    ``*_ns`` nanoseconds of the wall clock, ``*_count``, ``*_items`` and ``*_files`` numbers; all of
    this rank alone.

    Both:
        kind: ``"save"``, ``"async_save"`` or ``"load"``.
        path: ``"native"`` or ``"torch"``.  With ``"torch"`` there is little else.
        reason: why not native, or None.
        comm: over what the ranks of a native call agreed: ``"nccl"``, the name of the CPU backend
            (``"gloo"``), or ``"local"`` for a process alone.
        comm_reason: why over that; None for a process alone, and before its group's ranks agreed.
        devices: those whose memory was read or filled without torch, ``["cuda:0"]``.
        device_copied_bytes, device_copies_count: to or from their memory, and in how many copies.
        device_packed_bytes, device_packed_count: of these, what kernels gathered or scattered.
        device_slab_bytes: of their memory, that was taken for that, at most at a time.
        device_wait_ns: the host waited for a device.
        device_by_torch_count, device_by_torch_bytes: tensors on devices that torch copied instead.
        device_reason: the first thing that made a device do less than it could (copies by torch,
            memory that could not be pinned, no kernels), or None.

    Loads, roles (also of a load on torch's path):
        reader, planner: where it ran: ``"native"``; or why in torch's own implementation, with
            ``"torch: "`` before it, or in the program's hooks, with ``"python: "``.  Where only the
            planner is not native (always so for Hugging Face files) the lists below are those of a
            failed load alone.
    Loads, what became of the names:
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
    Loads, bytes:
        wanted_bytes: delivered to targets; of objects their records.
        read_bytes: read by this rank, from storage or the page cache.
        hot_bytes: of these, from files in the page cache.
        shared_bytes: delivered from what other ranks read.
        share_reason: why nothing was shared with other ranks of the host (``read_once``), or "".
        verified_bytes, unverified_bytes: of wanted_bytes; unverified are rows of a block of which
            too little was wanted to read it whole, and payloads saved without checksums.
        straight_bytes: read into their target without a buffer between.
        hole_bytes: of targets, that no saved chunk covers.
        progress_bytes: delivered so far, also by a load that failed.
        verify: the setting: True, False or ``"strict"``.
        requests_count, files_count, objects_count: reads of storage, data files, objects.
        copies_count, whole_copies: targets that torch's own copy fills (devices, odd memory); parts
            of them that went through a temporary of their full size.
        wall_ns: of reading.
        device_targets_count: targets on devices that are filled without torch.
        rank_local: read through ``__{rank}.metadata``.
        foreign: what of the metadata only Python could rebuild, and nobody needed; else None.

    Saves, roles (also of a save on torch's path):
        writer, planner: where it ran: ``"native"``; or why in torch's own implementation, with
            ``"torch: "`` before it, or in the program's hooks, with ``"python: "``.  A native
            writer of Hugging Face files plans by torch's protocol: on torch's path.
        planned_outside: planner hooks in Python planned on all ranks, the core wrote.
    Saves, outcome:
        save_id: 32 hex digits that name the save, also in its files.
        outcome: ``"committed"``, ``"aborted"``, ``"superseded"`` or ``"unknown"``.
        n0: first number of its data files.
        fast: the plan was the one of the save before; no planning but one agreement.
        is_coordinator, call_agrees: this rank wrote ``.metadata``; all ranks gave the same path.
    Saves, what was written:
        kept_items, kept_bytes: of the plan, written by this rank.
        dropped_items, dropped_bytes: replicas that another rank wrote.
        cut_items: replicated tensors of which this rank wrote some rows.
        file_bytes, files_count, direct_files_count: data files; with O_DIRECT.
        payload_bytes, progress_bytes: of tensors and objects; done so far.
        metadata_bytes: size of ``.metadata``.
        queue_writes_count: requests through io_uring.
        swept_files: files of older saves that were removed.
    Saves, unchanged data:
        incremental, base_reason: a base was used; else why not, or None.
        reused_items, reused_bytes, linked_files: taken over from the base.
        compared_items, unchanged_items, unchanged_bytes: against the save before, by checksum.
        trainable_items, trainable_bytes, trainable_unchanged: tensors with gradients among them.
    Saves, time and memory:
        vote_ns, plan_ns, hash_ns, compare_ns, metadata_ns, write_ns, commit_ns: steps, in order.
        stage_ns: of ``async_save``: from the agreed plan to a private copy of every byte.
        stage_begin_ns: of that, before ``async_save`` returns where it goes on in the background.
        settle_ns: from the last durable byte of this rank to the outcome that all ranks agree on.
        staging: how that copy was made: ``"arena"``; ``"streamed"`` (no memory: written before
            ``async_save`` returned); ``"borrowed"`` from the stager of the user's own.
        staged_bytes, arena_bytes: files in staging memory; all of that memory.
        planned_bytes: payload that this rank is to write.
        store_calls, in_touch: calls of this rank to the store, to end the save with the others, and
            whether it answered to the end; in ``future.report``, some time after the result.
        copy_ns, sync_ns, limited_ns: of writing: copying, fdatasync, asleep for
            ``write_limit_bytes_s``.
        ring_bytes: memory of the writer.
        priority_failures: threads whose priority could not be set.
    """
    global _last
    with _lock():
        if _last is None:
            return None
        _last = {key: _unpacked(key, value) for key, value in _last.items()}
        return copy.deepcopy(_last)


def note_path(kind: str, reason: str | None, roles: dict[str, str] | None = None) -> None:
    """Log which implementation runs; ``reason`` says why it is not the native one."""
    told = "".join(f"; {role}: {where}" for role, where in (roles or {}).items())
    if reason is None:
        logger.debug("%s: native path%s", kind, told)
    else:
        logger.debug("%s: torch's path, because %s%s", kind, reason, told)
        set_report({"kind": kind, "path": "torch", "reason": reason, **(roles or {})})


def role_report(
    writer_reason: str | None, planner_reason: str | None, planned_outside: bool = False
) -> dict[str, str]:
    """Where each role of a save runs, and why not in the core.

    Args:
        writer_reason, planner_reason: why it can not run natively, or None.
        planned_outside: a rank of the group has a planner of its own.
    """
    if planner_reason is not None:
        planner = f"python: {planner_reason}"
    elif writer_reason is not None:
        planner = "torch: the writer is not native"
    else:
        planner = "torch: another rank's planner is not native" if planned_outside else "native"
    return {
        "writer": "native" if writer_reason is None else f"torch: {writer_reason}",
        "planner": planner,
    }
