"""One native Group per ProcessGroup: its comm table and the plan its ranks installed."""

from __future__ import annotations

import os
import threading
import weakref

import torch.distributed as dist

from . import _native

_lock = threading.Lock()
_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, _native.Group]] = (
    weakref.WeakKeyDictionary()
)
_alone: _native.Group | None = None
_alone_pid = 0  # a forked child makes its own


def _unlock_after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # its holder may be a thread of the parent


os.register_at_fork(after_in_child=_unlock_after_fork)


def group_for(
    process_group: dist.ProcessGroup | None, no_dist: bool, coordinator_rank: int = 0
) -> _native.Group:
    """The native group of ``process_group`` (default: the default group), or this process alone.

    ``coordinator_rank`` is a rank of the group.  The same object is returned while the ProcessGroup
    lives, so that a plan installed by one save serves the next.
    """
    global _alone, _alone_pid
    with _lock:
        if no_dist:
            if _alone is None or _alone_pid != os.getpid():
                _alone, _alone_pid = _native.Group(), os.getpid()
            return _alone
        if process_group is None:
            process_group = dist.distributed_c10d._get_default_group()
        by_coordinator = _groups.setdefault(process_group, {})
        if coordinator_rank not in by_coordinator:
            by_coordinator[coordinator_rank] = _native.Group(process_group, coordinator_rank)
        return by_coordinator[coordinator_rank]
