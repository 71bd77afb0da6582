"""saving.py: every figure of saving beside its target, in one run and one table.

    python benchmarks/saving.py                     # about 12 minutes on 2 cores, 7 GB of disk
    python benchmarks/saving.py --quick             # under a minute; the test suite runs this
    python benchmarks/saving.py --only llama,memory

Contenders take turns within every part. Medians of 5 rounds; of 3 where stock torch needs 20 s or
more a round (20,000 tensors, 256,000 plans), which is said in the row. Times of saves are wall
seconds from a barrier to the end of the slowest rank; bench.py says how they are taken, and what
the other programs measure stands at their heads. Exits with 1 if any output was wrong; a missed
target is only shown.
"""

import argparse
import pathlib
import sys

import saving_cases as cases
from bench import run_case
from program import (
    main_of_parts,
    row,
    run_program,
    say,
    seconds,
    times,
)
from ranks import Ranks

PARTS = ("llama", "many", "steady", "memory", "incremental", "local_plan", "coordinator")
LLAMA = ["dcp_native", "torch1", "torch4"]
SHARE_OF_LIMIT = {"disk": (0.92, "92%"), "tmpfs": (0.90, "90%")}
CPU_S_PER_GB, CPU_OF_TORCH = 0.2, 3
FIRST_RATIO, STEADY_RATIO = 60, 100
FLATTEN_S = {"many_dtensor": 2e-6, "many_plain": 0.3e-6}
HASH_S, REST_S = 0.2e-6, 1e-3
EXTRA_BYTES = 64 << 20
INCREMENTAL_SHARE = 0.1


def _best_torch(summary: dict) -> dict:
    return min((summary[n]["save"] for n in LLAMA[1:] if n in summary), key=lambda s: s["wall_s"])


def llama_rows(result: dict, place: str) -> list[dict]:
    ours, limit = result["summary"]["dcp_native"]["save"], result["summary"]["limit"]["save"]
    theirs, gb = _best_torch(result["summary"]), result["bytes"] / 1e9
    share, (wanted, text) = limit["wall_s"] / ours["wall_s"], SHARE_OF_LIMIT[place]
    per_gb, ratio = ours["cpu_s"] / gb, theirs["cpu_s"] / ours["cpu_s"]
    rows = [
        row(
            f"save {gb:.1f} GB Llama-shaped, 2 ranks, {place}",
            f"{seconds(ours['wall_s'])} ({share:.0%} of the limit)",
            f"{seconds(theirs['wall_s'])} ({times(theirs['wall_s'], ours['wall_s'])})",
            seconds(limit["wall_s"]),
            f">= {text}",
            share >= wanted,
        )
    ]
    if place == "disk":
        rows.append(
            row(
                "- CPU",
                f"{per_gb:.2f} s/GB",
                f"{theirs['cpu_s'] / gb:.2f} s/GB ({ratio:.1f}x)",
                target=f"<= {CPU_S_PER_GB} s/GB, <= 1/{CPU_OF_TORCH} of torch's",
                met=per_gb <= CPU_S_PER_GB and ratio >= CPU_OF_TORCH,
            )
        )
    return rows


def many_rows(result: dict, case: str, repeats: int) -> list[dict]:
    wall = {name: s["save"]["wall_s"] for name, s in result["summary"].items() if "save" in s}
    what = f"{result['tensors_per_rank']:,} x 2 KiB {case.removeprefix('many_')} tensors, 2 ranks"
    rows = []
    for when, name, wanted in (
        ("first", "dcp_native first", FIRST_RATIO),
        ("steady", "dcp_native", STEADY_RATIO),
    ):
        ratio = wall["torch1"] / wall[name]
        rows.append(
            row(
                f"{what}, {when} save (medians of {repeats})",
                seconds(wall[name]),
                f"{seconds(wall['torch1'])} ({times(wall['torch1'], wall[name])})",
                seconds(wall["limit"]),
                f">= {wanted}x",
                ratio >= wanted,
            )
        )
    cached = wall["torch1 cached"]
    rows.append(
        row(
            "- steady beside torch with enable_plan_caching",
            seconds(wall["dcp_native"]),
            f"{seconds(cached)} ({times(cached, wall['dcp_native'])})",
        )
    )
    return rows


def steady_rows(found: list[dict]) -> list[dict]:
    rows = []
    for f in found:
        count, parts = f["count"], f["parts_s"]
        budget = count * (FLATTEN_S[f["case"]] + HASH_S) + REST_S + f["all_reduce_s"]
        shown = ("flatten", "hash", "vote", "claim", "metadata", "rest")
        detail = ", ".join(f"{name} {seconds(parts[name])}" for name in shown)
        rows.append(
            row(
                f"steady state before the first byte, {count:,} {f['case'].removeprefix('many_')}",
                f"{seconds(parts['before the first byte'])} ({detail})",
                limit=f"all-reduce {seconds(f['all_reduce_s'])}",
                target=f"<= {seconds(budget)}",
                met=parts["before the first byte"] <= budget,
            )
        )
    return rows


def memory_rows(found: list[dict]) -> list[dict]:
    rows = []
    for f in found:
        extra = max(f["first"], f["second"])
        objects_bytes = f["objects_bytes"]
        apart = f", {objects_bytes / 2**20:.1f} MiB of serialised objects" if objects_bytes else ""
        rows.append(
            row(
                f"extra memory of a save, {f['case']}{apart}",
                f"{extra / 2**20:.1f} MiB per rank (second save {f['second'] / 2**20:.1f})",
                target=f"<= {EXTRA_BYTES >> 20} MiB, objects apart",
                met=extra - objects_bytes <= EXTRA_BYTES,
            )
        )
    return rows


def incremental_rows(found: dict | None) -> list[dict]:
    if found is None:
        return [row("incremental save", "not in this build (no `base=`)")]
    budget = INCREMENTAL_SHARE * found["full_s"] + found["pass_s"]
    speed = found["bytes"] / max(found["pass_s"], 1e-9) / 1e9
    return [
        row(
            f"incremental save of {found['bytes'] / 1e9:.1f} GB, disk,"
            f" {found['changed_bytes'] / found['bytes']:.1%} changed",
            f"{seconds(found['incremental_s'])} (full: {seconds(found['full_s'])})",
            limit=f"hash pass: {seconds(found['pass_s'])}, {speed:.1f} GB/s",
            target=f"<= {seconds(budget)}: 10% of full + pass",
            met=found["incremental_s"] <= budget,
        )
    ]


class Run:
    """The figures so far: rows, details, and what was wrong."""

    def __init__(self, args: argparse.Namespace, places: dict, scratch: pathlib.Path) -> None:
        self.args, self.places, self.scratch = args, places, scratch
        self.size = "small" if args.quick else "full"
        self.few = min(3, args.repeats)
        self.rows: list[dict] = []
        self.details: dict[str, object] = {}
        self.wrong: list[str] = []

    def take(self, name: str, details: object, rows: list[dict], wrong: list[str]) -> None:
        self.details[name] = details
        self.rows += rows
        self.wrong += wrong

    def llama(self, ranks: Ranks) -> None:
        for place, where in self.places.items():
            say(f"llama on {place} ...")
            result = run_case(ranks, "llama", self.size, where, LLAMA, self.args.repeats, False)
            self.take(f"llama on {place}", result, llama_rows(result, place), result["wrong"])

    def many(self, ranks: Ranks) -> None:
        for case in ("many_dtensor", "many_plain"):
            say(f"{case} ...")
            result = cases.many(ranks, case, self.size, self.places["disk"], self.few)
            self.take(case, result, many_rows(result, case, self.few), result["wrong"])

    def steady(self, ranks: Ranks) -> None:
        counts = (20, 50) if self.args.quick else cases.STEP_SIZES
        for case in ("many_dtensor", "many_plain"):
            where = self.places["disk"]
            found, wrong = cases.steady(ranks, case, counts, where, self.args.repeats)
            self.take(f"steady {case}", found, steady_rows(found), wrong)

    def memory(self, ranks: Ranks) -> None:
        for case in ("llama", "many_dtensor", "objects"):
            found, wrong = cases.memory(ranks, case, self.size, self.places["disk"])
            self.take(f"memory {case}", found, memory_rows([found]), wrong)

    def incremental(self, ranks: Ranks) -> None:
        where = self.places["disk"]
        found, wrong = cases.incremental(ranks, self.size, where, self.args.repeats)
        self.take("incremental", found, incremental_rows(found), wrong)

    def local_plan(self) -> None:
        self._program("local_plan", self.few)

    def coordinator(self) -> None:
        files = self.scratch / "metadata"
        self._program("coordinator", self.few, "--files", str(files))
        self._program("metadata_file", self.args.repeats, "--files", str(files))

    def _program(self, name: str, repeats: int, *arguments: str) -> None:
        found = run_program(name, self.scratch, self.args.quick, repeats, *arguments)
        self.take(name, found["details"], found["rows"], found["wrong"])

    def all(self) -> None:
        wanted = [getattr(self, part) for part in self.args.only]
        alone = [w for w in wanted if w in (self.local_plan, self.coordinator)]
        with_ranks = [w for w in wanted if w not in alone]
        if with_ranks:
            ranks = Ranks(2, self.scratch)
            try:
                ranks.wait_ready()
                # Once on a small state, unmeasured: imports, thread pools and buffers.
                run_case(ranks, "llama", "small", self.places["disk"], LLAMA, 1, False)
                for part in with_ranks:
                    part(ranks)
            finally:
                ranks.close()
        for part in alone:
            part()


def main(argv: list[str] | None = None) -> int:
    return main_of_parts(
        "saving",
        __doc__,
        PARTS,
        lambda args, disk, tmpfs, scratch: Run(args, {"disk": disk, "tmpfs": tmpfs}, scratch),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
