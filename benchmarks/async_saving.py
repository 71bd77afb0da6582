"""async_saving.py: every figure of background saves beside its target, in one run and one table.

    python benchmarks/async_saving.py                 # about 10 minutes on 2 cores, 5 GB of disk
    python benchmarks/async_saving.py --quick         # about a minute; the test suite runs this
    python benchmarks/async_saving.py --only thread,process --tensors 200

2 ranks with 1.09 GB each to stage: sharded tensors of 1 MiB on average, every tenth a plain one. In
each round every contender lives in fresh processes (async_cases.py): dcp_native by THREAD and by
PROCESS, warmed up and not, and stock torch (3 rounds where 5 are asked for). The limits are taken
in the same processes: one memcpy of the staged bytes into touched memory and copying them into
fresh memory, one thread on each rank at the same time, and direct writing of as many bytes.

Times of calls are the slowest rank's, each less its own wait for the vote. A trainer's rate is
counted while its own rank's upload runs, over its free rate right before and right after; the lower
rank's is shown. CPU time is that of the process and its writer while the trainer sleeps. Exits with
1 if any checkpoint was wrong; a missed target is only shown.
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable

import async_cases as cases
from program import main_of_parts, row, say, seconds

PARTS = ("thread", "process", "cold", "torch", "memory")
CALL_RATIO, FIRST_RATIO, COLD_RATIO = 1.2, 1.3, 1.2
PYTHON_SHARE, MATMUL_SHARE = 0.95, 0.93
UPLOAD_SHARE = 0.85
TENTH_S = 0.05
ARENA_RATIO = 1.02
GROWTH_BYTES = 2 << 20
FREE_S = {"full": 0.5, "small": 0.05}

Found = dict[str, list[dict]]  # rounds by contender


def _saves(rounds: list[dict], *whats: str) -> list[dict]:
    """Of all rounds, those of these kinds; warm ones where none is named."""
    return [
        s
        for r in rounds
        for s in r["saves"]
        if s["what"] in whats or (not whats and s["what"] not in ("first", "process"))
    ]


def _median(saves: list[dict], key: str) -> float | None:
    values = [s[key] for s in saves if key in s]
    return statistics.median(values) if values else None


def _share(saves: list[dict]) -> float | None:
    """Of the rank that was left less, the middle one of its samples."""
    return min(
        map(statistics.median, zip(*(s["shares"] for s in saves), strict=True)), default=None
    )


def _shown(value: float | None, show: Callable[[float], str] = seconds) -> str:
    return "" if value is None else show(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _mode(rounds: list[dict], mode: str) -> str:
    """Which mode it was, and whether it was."""
    return _named(mode, any(s["writers"] for r in rounds for s in r["saves"]))


def _named(mode: str, has_writer: bool) -> str:
    return mode.upper() + " (no writer process: as THREAD)" * (mode == "process" and not has_writer)


def _torch_first(found: Found) -> str:
    rounds = found.get("torch", [])
    parts = [
        f"{seconds(value)} {name}"
        for name, what in (("thread", "first"), ("process", "process"))
        if (value := _median(_saves(rounds, what), "with_vote_s")) is not None
    ]
    whole = _median(_saves(rounds, "process"), "whole_s")
    if whole is not None:
        parts.append(f"{seconds(whole)} until the process's is written")
    if failed := sum("process_failed" in r for r in rounds):
        parts.append(f"by process {failed} of {len(rounds)} failed")
    return ", ".join(parts)


def call_rows(found: Found, mode: str) -> list[dict]:
    rounds, torchs = found[mode], found.get("torch", [])
    warm, name = _saves(rounds), _mode(rounds, mode)
    call_s, stage_s = _median(warm, "call_s"), _median(warm, "stage_s")
    memcpy_s = _median(rounds, "memcpy_s")
    theirs = _median(_saves(torchs), "call_s")
    kept = _median(torchs, "stage_s")
    alone = "" if stage_s is None else f"; staging {seconds(stage_s)}, {stage_s / memcpy_s:.2f}x"
    rows = [
        row(
            f"call -> safe to mutate, warm, {name}",
            f"{seconds(call_s)} ({call_s / memcpy_s:.2f}x memcpy{alone})",
            "" if theirs is None else f"{seconds(theirs)}; its stager kept: {_shown(kept)}",
            f"{seconds(memcpy_s)}, memcpy",
            f"<= {CALL_RATIO}x",
            call_s <= CALL_RATIO * memcpy_s,
        )
    ]
    first_s = _median(_saves(rounds, "first"), "call_s")
    what = f"- first save after warm_up, {name}"
    warm_up_s = statistics.median(r["warm_up"]["wall_s"] for r in rounds)
    shown = f"{seconds(first_s)} ({first_s / call_s:.2f}x warm; warm_up took {seconds(warm_up_s)})"
    target = f"<= {FIRST_RATIO}x warm"
    return [
        *rows,
        row(what, shown, _torch_first(found), "", target, first_s <= FIRST_RATIO * call_s),
    ]


def cold_rows(found: Found, mode: str) -> list[dict]:
    rounds = found[f"cold {mode}"]
    first_s = _median(_saves(rounds, "first"), "call_s")
    touch_s, copy_s = _median(rounds, "touch_s"), _median(rounds, "copy_s")
    return [
        row(
            f"first save without warm-up, {_mode(rounds, mode)}",
            f"{seconds(first_s)} ({first_s / copy_s:.2f}x)",
            _torch_first(found),
            f"{seconds(copy_s)}, copying to fresh memory (touching it alone: {seconds(touch_s)})",
            f"<= {COLD_RATIO}x",
            first_s <= COLD_RATIO * copy_s,
        )
    ]


def trainer_rows(found: Found, mode: str) -> list[dict]:
    rows, name = [], _mode(found[mode], mode)
    for trainer, what, target in (
        ("python", "Python loop", PYTHON_SHARE),
        ("matmul", "matmul", MATMUL_SHARE),
    ):
        ours = _share(_saves(found[mode], trainer))
        theirs = _share(_saves(found.get("torch", []), trainer))
        rows.append(
            row(
                f"{what} during the upload, of its free rate, {name}",
                _percent(ours),
                _percent(theirs),
                target=f">= {target:.0%}",
                met=ours >= target,
            )
        )
    return rows


def upload_rows(found: Found, mode: str) -> list[dict]:
    rounds, torchs = found[mode], found.get("torch", [])
    idle, name = _saves(rounds, "idle", "tenth"), _mode(rounds, mode)
    gb = rounds[0]["total_bytes"] / 1e9
    upload_s, limit_s = _median(idle, "upload_s"), _median(rounds, "write_s")
    cpu_s = _median(idle, "cpu_s")
    theirs = _saves(torchs, "idle")
    their_cpu_s = _median(theirs, "cpu_s")
    return [
        row(
            f"upload of {gb:.2f} GB finished after the return, {name}",
            f"{seconds(upload_s)} ({limit_s / upload_s:.0%} of the limit)",
            _shown(_median(theirs, "upload_s")),
            f"{seconds(limit_s)}, direct write",
            f">= {UPLOAD_SHARE:.0%}",
            limit_s / upload_s >= UPLOAD_SHARE,
        ),
        row(
            f"- CPU of the background, {name}",
            f"{cpu_s / gb:.3f} s/GB",
            _shown(their_cpu_s, lambda s: f"{s / gb:.3f} s/GB"),
            f"{_median(rounds, 'write_cpu_s') / gb:.3f} s/GB",
        ),
        row(
            f"- memory beside the arena, {name}",
            f"{max(s['extra_bytes'] for s in idle) / 2**20:.1f} MiB per rank",
        ),
    ]


def tenth_rows(found: Found) -> list[dict]:
    rounds = found["process"]
    more = [
        statistics.median(
            first[key] - tenth[key]
            for first, tenth in zip(_saves(rounds, "first"), _saves(rounds, "tenth"), strict=True)
        )
        for key in ("call_s", "whole_s")
    ]
    return [
        row(
            f"first save over the tenth, {_mode(rounds, 'process')}",
            f"{more[0] * 1e3:+.1f} ms of the call, {more[1] * 1e3:+.1f} ms until written",
            target=f"<= {TENTH_S * 1e3:.0f} ms",
            met=max(more) <= TENTH_S,
        )
    ]


def report_rows(found: Found, mode: str) -> list[dict]:
    """What only the reports of dcp_native know."""
    name = _mode(found[mode], mode)
    reports = [report for s in _saves(found[mode]) for report in s["reports"]]
    rows = []
    if all(r.get("arena_bytes") and r.get("staged_bytes") for r in reports):
        ratio = max(r["arena_bytes"] / r["staged_bytes"] for r in reports)
        target = f"<= {ARENA_RATIO}"
        rows.append(row(f"arena over staged bytes, {name}", f"{ratio:.4f}", "", "", target))
        rows[-1]["met"] = ratio <= ARENA_RATIO
    else:
        rows.append(row(f"arena over staged bytes, {name}", "not in the report"))
    calls = [r["store_calls"] for r in reports if "store_calls" in r]
    shown = f"{statistics.mean(calls):.1f} per save and rank" if calls else "not in the report"
    return [*rows, row(f"calls of the store, {name}", shown)]


def memory_rows(found: dict, mode: str) -> list[dict]:
    grown = found["pss"][-1] - found["pss"][1]
    mib = [f"{pss / 2**20:.1f}" for pss in found["pss"]]
    name = _named(mode, found["writers"] > 0)
    return [
        row(
            f"memory after {', '.join(map(str, found['looks']))} saves of"
            f" {found['staged_bytes'] / 1e6:.0f} MB a rank, {name}",
            f"{', '.join(mib)} MiB, with the writer's",
            target=f"+ {GROWTH_BYTES >> 20} MiB at most after the tenth",
            met=grown <= GROWTH_BYTES,
        )
    ]


class Run:
    """The figures so far: rows, details, and what was wrong."""

    def __init__(self, args: argparse.Namespace, disk: pathlib.Path, scratch: pathlib.Path) -> None:
        self.args, self.disk, self.scratch = args, disk, scratch / "ranks"
        self.size = "small" if args.quick else "full"
        self.few = min(3, args.repeats)
        self.found: Found = {}
        self.rows: list[dict] = []
        self.details: dict[str, object] = {}
        self.wrong: list[str] = []

    def live(self, name: str, do: Callable, *arguments) -> None:
        """One round of the contender `name`."""
        say(f"{name}, round {len(self.found.get(name, [])) + 1} ...")
        with cases.life(self.scratch, self.disk, self.size, self.args.tensors) as this:
            numbers = do(this, *arguments)
        self.wrong += this.wrong
        numbers |= {"saves": this.saves, "total_bytes": this.total_bytes}
        self.found.setdefault(name, []).append(numbers)

    def round(self, turn: int) -> None:
        only, free_s = self.args.only, FREE_S[self.size]
        for mode in cases.MODES:
            if mode in only:
                self.live(mode, cases.warmed, mode, free_s)
            if "cold" in only:
                self.live(f"cold {mode}", cases.cold, mode)
        if "torch" in only and turn < self.few:
            self.live("torch", cases.torchs, free_s)

    def memory(self) -> None:
        size = "small" if self.args.quick else "light"
        for mode in cases.MODES:
            say(f"memory, {mode} ...")
            found, wrong = cases.growth(
                self.scratch, self.disk, size, self.args.tensors, self.args.saves, mode
            )
            self.details[f"memory {mode}"] = found
            self.rows += memory_rows(found, mode)
            self.wrong += wrong

    def all(self) -> None:
        if set(self.args.only) - {"memory"}:
            for turn in range(self.args.repeats):
                self.round(turn)
        self.details |= self.found
        for rows_of, prefix in (
            (call_rows, ""),
            (cold_rows, "cold "),
            (trainer_rows, ""),
            (upload_rows, ""),
            (report_rows, ""),
        ):
            for mode in cases.MODES:
                if prefix + mode in self.found:
                    self.rows += rows_of(self.found, mode)
        if "process" in self.found:
            self.rows += tenth_rows(self.found)
        if "memory" in self.args.only:
            self.memory()


def _options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--tensors", type=int, help="of a rank; 1095, or 12 with --quick")
    p.add_argument("--saves", type=int, default=50, help="of the look at memory; 50")


def main(argv: list[str] | None = None) -> int:
    return main_of_parts(
        "async_saving",
        __doc__,
        PARTS,
        lambda args, disk, _, scratch: Run(args, disk, scratch),
        argv,
        _options,
    )


if __name__ == "__main__":
    sys.exit(main())
