"""async_cases.py: the lives of ranks that async_saving.py looks at; each gives numbers by name.

A life begins with fresh processes, for what a first save costs can be seen once in each. It takes
the machine's limits in these very processes, then saves to one directory that is removed in
between. Every save is checked; the last of a life byte by byte.
"""

import contextlib
import pathlib
import shutil
import statistics
from collections.abc import Iterator

from program import BenchError, say
from ranks import Ranks

NATIVE, TORCH = "dcp_native", "torch.distributed.checkpoint"
MODES = {"thread": "THREAD", "process": "PROCESS"}
MEMCPY_SAMPLES = 3
TENTH = 10
DEADLINE_S = 90
GROWTH_LOOKS = (1, 10)


class Life:
    """Fresh ranks with a state of `size`, and the saves they made."""

    def __init__(self, ranks: Ranks, where: pathlib.Path, built: list[dict]) -> None:
        self.ranks, self.path = ranks, where / "checkpoint"
        self.staged_bytes = max(b["staged_bytes"] for b in built)
        self.total_bytes = sum(b["staged_bytes"] for b in built)
        self.saves: list[dict] = []
        self.wrong: list[str] = []

    def save(self, what: str, module: str, mode: str, last: bool = False, **keywords) -> dict:
        """One save called `what`; of times the slowest rank's, its wait for the vote apart."""
        results = self.ranks.do(
            "save", module=module, mode=mode, path=str(self.path), deadline_s=DEADLINE_S,
            **keywords,
        )  # fmt: skip
        reports = [r["report"] for r in results]
        found = {
            "what": what,
            "call_s": max(r["call_s"] - r["vote_s"] for r in results),
            "with_vote_s": max(r["call_s"] for r in results),
            "upload_s": max(r["upload_s"] for r in results),
            "whole_s": max(r["call_s"] - r["vote_s"] + r["upload_s"] for r in results),
            "cpu_s": sum(r["cpu_s"] for r in results),
            "extra_bytes": max(r["extra_bytes"] for r in results),
            "writers": sum(r["writers"] for r in results),
            "shares": [r["share"] for r in results if "share" in r],
            "reports": reports,
        }
        if all("stage_ns" in r for r in reports):
            found["stage_s"] = max(r["stage_ns"] for r in reports) / 1e9
        self.wrong += [f"{module} {mode} {what}: {w}" for r in results for w in r["wrong"]]
        if last and module == NATIVE:
            self.wrong += self.ranks.do("verify", path=str(self.path))[0]
        shutil.rmtree(self.path)
        self.saves.append(found)
        return found


@contextlib.contextmanager
def life(
    scratch: pathlib.Path, where: pathlib.Path, size: str, count: int | None
) -> Iterator[Life]:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    ranks = Ranks(2, scratch, "async_worker.py", watched=False, timeout_s=2 * DEADLINE_S)
    try:
        ranks.wait_ready()
        yield Life(ranks, where, ranks.do("build", case="mixed", size=size, count=count))
    finally:
        ranks.close()
        shutil.rmtree(where / "checkpoint", ignore_errors=True)


def _slowest(results: list[list[float]]) -> float:
    """Of samples by rank: the slowest rank's, the middle one of these."""
    return statistics.median(map(max, zip(*results, strict=True)))


def _limits(this: Life) -> dict:
    directory = this.path.parent / "limit"
    directory.mkdir()
    try:
        write = this.ranks.measure(
            "limit_write", path=str(directory), total_bytes=this.staged_bytes
        )
    finally:
        shutil.rmtree(directory)
    return {
        "memcpy_s": _slowest(this.ranks.do("memcpy", repeats=MEMCPY_SAMPLES)),
        "write_s": write["wall_s"],
        "write_cpu_s": write["cpu_s"],
    }


def warmed(this: Life, mode: str, free_s: float) -> dict:
    """A first save after warm_up, then warm ones beside each trainer, up to the tenth."""
    found = _limits(this)
    found["warm_up"] = this.ranks.do("warm_up", mode=MODES[mode])[0]
    for what in ("first", "python", "matmul", "idle"):
        trainer = what if what in ("python", "matmul") else None
        this.save(what, NATIVE, MODES[mode], trainer=trainer, free_s=free_s)
    while mode == "process" and len(this.saves) < TENTH - 1:
        this.save("idle", NATIVE, MODES[mode])
    this.save("tenth" if mode == "process" else "idle", NATIVE, MODES[mode], last=True)
    return found


def cold(this: Life, mode: str) -> dict:
    """A first save with nothing done ahead."""
    fresh = this.ranks.do("fresh_memory", shared=mode == "process")
    found = {what: max(f[what] for f in fresh) for what in ("touch_s", "copy_s")}
    this.save("first", NATIVE, MODES[mode], last=True)
    return found


def torchs(this: Life, free_s: float) -> dict:
    """Stock torch's saves: by thread first and warm, then its first by process."""
    for what in ("first", "python", "matmul", "idle"):
        trainer = what if what in ("python", "matmul") else None
        this.save(what, TORCH, "THREAD", trainer=trainer, free_s=free_s)
    found = {"stage_s": _slowest(this.ranks.do("stage_torch", repeats=1))}
    try:
        this.save("process", TORCH, "PROCESS")
    except BenchError as e:
        found["process_failed"] = str(e)
        say(f"  torch's process mode: {e}")
    return found


def growth(
    scratch: pathlib.Path, where: pathlib.Path, size: str, count: int | None, saves: int, mode: str
) -> tuple[dict, list[str]]:
    """Memory of the larger rank, its writer's with it, after some saves and after many."""
    with life(scratch, where, size, count) as this:
        looks = sorted({*GROWTH_LOOKS, saves})
        results = this.ranks.do("growth", mode=MODES[mode], path=str(this.path), looks=looks)
        wrong = this.ranks.do("verify", path=str(this.path))[0]
    memory = {
        kind: [max(r["memory"][str(look)][kind] for r in results) for look in looks]
        for kind in ("rss", "pss")
    }
    return {
        "looks": looks,
        **memory,
        "staged_bytes": this.staged_bytes,
        "writers": sum(r["writers"] for r in results),
        "reports": [r["report"] for r in results],
    }, wrong
