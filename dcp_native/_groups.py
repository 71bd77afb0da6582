"""One native Group per ProcessGroup and coordinator: the plan its ranks installed.

A group that may talk over NCCL as well as over its CPU backend has one of each until its ranks have
agreed (_group_comm.py); the plan is kept with the one that they use.  Coordinators share what they
talk over.
"""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch.distributed as dist

from . import _native
from ._fork import fork_safe
from ._group_comm import GroupComm

_lock = fork_safe()
_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupComm] = weakref.WeakKeyDictionary()
# Made here, so that what the extension borrows from torch is there, or found missing, before any
# rank waits for this one.
_alone = _native.Group()
_alone_pid = os.getpid()  # a forked child makes its own


def group_for(
    process_group: dist.ProcessGroup | None,
    no_dist: bool,
    coordinator_rank: int = 0,
    *,
    state_dict: Any = None,
    is_save: bool = False,
) -> _native.Group:
    """The native group of ``process_group`` (default: the default group), or this process alone:
    where that is asked for, or nothing is distributed.

    ``coordinator_rank`` is a rank of the group.  The same object is returned while the ProcessGroup
    lives, so that a plan installed by one save serves the next; another one only once, where the
    ranks change to NCCL.

    Args:
        state_dict: of a call that all ranks make, which is collective then if they have not agreed
            yet over what to talk; its tensors and the kind of call have a part in that.
    """
    global _alone, _alone_pid
    with _lock():
        if no_dist or not (dist.is_available() and dist.is_initialized()):
            if _alone_pid != os.getpid():
                _alone, _alone_pid = _native.Group(), os.getpid()
            return _alone
        if process_group is None:
            process_group = dist.distributed_c10d._get_default_group()
        comm = _groups.get(process_group)
        if comm is None:
            comm = _groups[process_group] = GroupComm(process_group)
    return comm.group(process_group, coordinator_rank, state_dict, is_save=is_save)
