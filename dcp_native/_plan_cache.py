"""DefaultSavePlanner's ``enable_plan_caching``, as seen in the class caches of torch's planner.

Torch keeps plans in ``SavePlanner._cached_*``, under ``planner._cached_plans_key``.  Our plan is in
the core and proves itself anew at every save, with caching on or off.  So the caches decide nothing
here but one thing: a program that clears them wants the next save to plan again.  After a native
save with caching on they hold stand-ins, on the ranks and under the key that torch would use; their
disappearance is what is noticed.

An entry that torch's own planner made is never replaced: its five caches fit each other only
together.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from ._fork import fork_safe

_OF_EVERY_RANK = ("_cached_save_plan", "_cached_final_save_plan")
_OF_THE_COORDINATOR = ("_cached_all_plans", "_cached_global_plan", "_cached_metadata")

_numbers = itertools.count(1)
_lock = fork_safe()


_known: dict[str, tuple[int, list[Any]]] = {}
"""Key -> the number of its plan, and what lay in the caches when that plan was installed."""


class PlanInTheCore(SavePlan):
    """Stands in torch's caches for a plan that the core holds.

    Not usable, so that torch's planner finds every plan of its own different from it; without
    items, so that nobody can write by it.
    """

    usable = False

    def __init__(self) -> None:
        pass

    @property
    def items(self) -> list[Any]:  # type: ignore[override]
        raise RuntimeError("this plan was made by dcp_native: its items are not Python objects")

    def __repr__(self) -> str:
        return "<plan in the core of dcp_native>"


def _entries(key: str) -> list[Any]:
    names = _OF_EVERY_RANK + _OF_THE_COORDINATOR
    return [getattr(SavePlanner, name).get(key) for name in names]


def plan_number(planner: SavePlanner | None) -> int:
    """Goes into the plan's fingerprint: another number, another plan.

    The number of the last native save while torch's caches are as it left them, else a new one;
    without plan caching always 0.
    """
    if not getattr(planner, "_enable_plan_caching", False):
        return 0
    key = planner._cached_plans_key
    with _lock():
        number, seen = _known.get(key, (0, []))
        if seen and all(a is b for a, b in zip(seen, _entries(key), strict=True)):
            return number
        return next(_numbers)


def plan_installed(planner: SavePlanner | None, number: int, ranks: int, decides: bool) -> None:
    """The plan with `number` is in force on this rank, which ``decides`` for all `ranks`."""
    if number == 0:
        return
    key = planner._cached_plans_key
    with _lock():
        for name in _OF_EVERY_RANK:
            getattr(SavePlanner, name).setdefault(key, PlanInTheCore())
        if decides:
            for name in _OF_THE_COORDINATOR[:2]:
                getattr(SavePlanner, name).setdefault(key, [PlanInTheCore()] * ranks)
            SavePlanner._cached_metadata.setdefault(key, Metadata({}))
        _known[key] = number, _entries(key)
