"""loading_cases.py: the cases of loading.py that need running ranks; each returns numbers by name.

A case saves its state once by each side, then all contenders load in turn, each what its own side
saved. Every load is compared bit for bit; in the last round each side reads the other's checkpoint
too. The first load of dcp_native comes after everything that it keeps was given back: it counts for
memory, not for time.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import statistics
from collections.abc import Iterator

from bench import CONTENDERS
from program import say
from ranks import Ranks

SIDES = {"dcp_native": CONTENDERS["dcp_native"], "torch": CONTENDERS["torch1"]}
STOCK = {"verify": True, "read_once": "host"}


@dataclasses.dataclass(frozen=True)
class Loader:
    """One way to load: by whom, with which settings of dcp_native besides the stock ones."""

    name: str
    side: str
    settings: tuple[tuple[str, object], ...] = ()
    first_rounds: int | None = None  # takes part in these only


OURS, TORCH = Loader("dcp_native", "dcp_native"), Loader("torch", "torch")
UNVERIFIED = Loader("unverified", "dcp_native", (("verify", False),))
APART = Loader("each for itself", "dcp_native", (("read_once", "off"),), 1)
APART_UNVERIFIED = Loader(
    "each for itself, unverified", "dcp_native", (("read_once", "off"), ("verify", False)), 1
)


@dataclasses.dataclass(frozen=True)
class Limit:
    """The machine's own time for the bytes of a rank."""

    command: str
    rank_bytes: int


@contextlib.contextmanager
def saved(ranks: Ranks, case: str, size: str, where: pathlib.Path) -> Iterator[dict]:
    """Builds a state and saves it by both sides under `where`; yields its bytes over all ranks and
    the tensors of a rank.
    """
    built = ranks.do("build", case=case, size=size)
    try:
        for side, contender in SIDES.items():
            changes = {"plan": "new"} if side == "dcp_native" else {}
            ranks.do("save", contender=contender | changes, path=str(where / side))
        yield {"bytes": sum(b["own_bytes"] for b in built), "tensors": built[0]["tensors"]}
    finally:
        for side in SIDES:
            shutil.rmtree(where / side, ignore_errors=True)


def _numbers(samples: list[dict]) -> dict:
    """Medians of one contender; of memory the largest, the first load included."""
    counted = [s for s in samples if not s.get("warm_up")]
    numbers = {
        key: statistics.median(s[key] for s in counted) for key in ("wall_s", "cpu_s", "disk_bytes")
    }
    reports = [s["reports"] for s in counted]
    for key in ("read_bytes", "wanted_bytes", "shared_bytes", "unverified_bytes"):
        numbers[key] = statistics.median(sum(r.get(key, 0) for r in ranks) for ranks in reports)
    return numbers | {
        "rounds": len(counted),
        "walls_s": [s["wall_s"] for s in counted],
        "extra_bytes": max(s["extra_bytes"] for s in samples),
    }


def loads(
    ranks: Ranks,
    what: str,
    where: pathlib.Path,
    repeats: int,
    loaders: list[Loader],
    limit: Limit | None = None,
    hot: bool = False,
) -> tuple[dict, list[str]]:
    """Rounds of loads of what `saved` left; returns numbers by loader, those of the limit under
    "limit", and what was wrong.
    """
    samples: dict[str, list[dict]] = {}
    wrong: list[str] = []

    def load(loader: Loader, saver: str | None = None) -> dict:
        if loader.side == "dcp_native":
            ranks.do("configure", **(STOCK | dict(loader.settings)))
        path = str(where / (saver or loader.side))
        result = ranks.measure("load", contender=SIDES[loader.side], path=path, hot=hot)
        label = loader.name if saver is None else f"{loader.name} reads {saver}"
        wrong.extend(f"{what}, {label}: {w}" for w in result["wrong"])
        if saver is None:
            samples.setdefault(loader.name, []).append(result)
        return result

    directory = where / "limit"
    if limit is not None:
        directory.mkdir()
        if limit.command == "limit_read":
            ranks.do("limit_write", path=str(directory), total_bytes=limit.rank_bytes)
    ranks.do("trim")
    load(OURS)["warm_up"] = True
    for turn in range(repeats):
        taking_part = [x for x in loaders if x.first_rounds is None or turn < x.first_rounds]
        first = turn % len(taking_part)
        for loader in taking_part[first:] + taking_part[:first]:  # no one always goes first
            load(loader)
        if limit is not None:
            result = ranks.measure(limit.command, path=str(directory), total_bytes=limit.rank_bytes)
            samples.setdefault("limit", []).append(result)
        say(f"  {what}: round {turn + 1} of {repeats} done")
    if TORCH in loaders:
        load(OURS, "torch")
        load(TORCH, "dcp_native")
    shutil.rmtree(directory, ignore_errors=True)
    ranks.do("configure", **STOCK)
    return {name: _numbers(found) for name, found in samples.items()}, wrong
