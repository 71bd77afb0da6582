"""Host memory for staged tensors, used again once nobody holds it.

Memory that was touched before is several times faster than fresh memory, so stagers keep what they
took.  What they gave to a caller is the caller's: a storage is idle only when nothing but the
keeper's list holds it, neither a tensor nor a Python object.

Thread rule: all functions are thread safe.
"""

from __future__ import annotations

import resource
import sys
import threading
import weakref
from collections.abc import Callable

import torch
from torch.storage import UntypedStorage

from ._fork import fork_safe
from ._report import logger

__all__ = ["allocate_shared", "take"]

COPIES_KEPT = 2
"""Per original: enough for a caller who keeps one staged dict until the next one is there."""

_taking = fork_safe(threading.RLock)  # a finalizer may stage, too
_probe = [object()]
_ALONE = sys.getrefcount(_probe[0])
"""What getrefcount says of an element that only its list holds."""
_shared: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()
"""Shared memory of all stagers; each holds a file descriptor open."""


def take(
    copies: list[UntypedStorage], bytes_count: int, allocate: Callable[[int], UntypedStorage]
) -> UntypedStorage:
    """An idle one of ``copies`` with that size, or else new memory, which joins them."""
    with _taking():
        chosen, busy = _first_idle(copies, bytes_count)
        if chosen is not None:  # from here on it is in use, for this frame holds it
            if len(copies) > len(busy) + 1:
                copies[:] = [*busy, chosen]
            return chosen
    chosen = allocate(bytes_count)
    copies[:] = [*busy[1 - COPIES_KEPT :], chosen]
    return chosen


def _first_idle(
    copies: list[UntypedStorage], bytes_count: int
) -> tuple[UntypedStorage | None, list[UntypedStorage]]:
    """The first idle one of this size, and those in use; others of the list are of no more use."""
    chosen, busy = None, []
    for i in range(len(copies)):  # no name is bound to a storage whose references are counted
        if copies[i].nbytes() != bytes_count:  # the original was resized
            continue
        if sys.getrefcount(copies[i]) > _ALONE or torch._C._storage_Use_Count(copies[i]._cdata) > 1:
            busy.append(copies[i])
        elif chosen is None:
            chosen = copies[i]
    return chosen, busy


def allocate_shared(bytes_count: int) -> UntypedStorage | None:
    """Memory that other processes can map, or None when descriptors run out.

    At most half of the descriptors that this process may open are taken; the trainer needs some.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and len(_shared) >= limit // 2:
        return None
    try:
        storage = UntypedStorage._new_shared(bytes_count, device="cpu")
    except RuntimeError as error:
        logger.warning("no shared memory for staging (%s); using private memory", error)
        return None
    _shared.add(storage)
    return storage
