"""Locks of the module level, which a forked child must not find locked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

__all__ = ["fork_safe"]


def fork_safe(
    make: Callable[[], AbstractContextManager[bool]] = threading.Lock,
) -> Callable[[], AbstractContextManager[bool]]:
    """Returns what gives the lock: ``with lock(): ...``.

    A forked child gets a new one: whoever holds the parent's may be a thread that the child does
    not have.
    """
    current = make()

    def renew() -> None:
        nonlocal current
        current = make()

    os.register_at_fork(after_in_child=renew)
    return lambda: current
