"""loading.py: every figure of loading beside its target, in one run and one table.

    python benchmarks/loading.py                     # about 12 minutes on 2 cores, 7 GB of disk
    python benchmarks/loading.py --quick             # under a minute; the test suite runs this
    python benchmarks/loading.py --only llama,reshard

Contenders take turns within every part: dcp_native, stock torch as it is with one thread, and the
machine's own limit. Medians of 5 rounds; of 3 where a round takes long, which is said in the row.
Times of loads are wall seconds from a barrier to the end of the slowest rank, cold unless it says
hot; loading_cases.py says how they are taken, load_planning.py what it measures. Bytes read are
those that the ranks say they asked for, and those that the kernel says it fetched from the disk for
them (/proc/self/io). Exits with 1 if any load was wrong; a missed target is only shown.
"""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator

import loading_cases as cases
from loading_cases import APART, APART_UNVERIFIED, OURS, TORCH, UNVERIFIED, Limit
from program import (
    main_of_parts,
    row,
    run_program,
    say,
    seconds,
    times,
)
from ranks import Ranks

PARTS = ("llama", "hot", "cast", "reshard", "many", "replicated", "planning")
ON_LLAMA = ("llama", "hot", "cast", "reshard")
COLD_SHARE, COLD_RATIO = 0.88, 1.6
HOT_SHARE = 0.85
MANY_RATIO = 80
RESHARD_READ, RESHARD_RATIO = 1.1, 2
REPLICATED_READ, REPLICATED_RATIO = 1.05, 2
REPLICATED_RANKS = 4
VERIFY_SHARE = 0.05
EXTRA_BYTES = 32 << 20


def _per_gb(cpu_s: float, total_bytes: int) -> str:
    return f"{cpu_s / (total_bytes / 1e9):.2f} s/GB"


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _against_torch(found: dict) -> tuple[str, float]:
    ours, theirs = found["dcp_native"]["wall_s"], found["torch"]["wall_s"]
    return f"{seconds(theirs)} ({times(theirs, ours)})", theirs / ours


def cold_rows(found: dict, total_bytes: int) -> list[dict]:
    ours, theirs, limit = (found[name] for name in ("dcp_native", "torch", "limit"))
    share = limit["wall_s"] / ours["wall_s"]
    text, ratio = _against_torch(found)
    at_limit = theirs["wall_s"] <= COLD_RATIO * limit["wall_s"]  # more cannot be had
    bare = found["unverified"]
    cost = ours["wall_s"] / bare["wall_s"] - 1
    return [
        row(
            f"load {_gb(total_bytes)} Llama-shaped, 2 ranks, cold, verified",
            f"{seconds(ours['wall_s'])} ({share:.0%} of the limit)",
            text,
            f"{seconds(limit['wall_s'])}, direct read",
            f">= {COLD_SHARE:.0%}; >= {COLD_RATIO}x or the limit",
            share >= COLD_SHARE and (ratio >= COLD_RATIO or at_limit),
        ),
        row(
            "- CPU",
            _per_gb(ours["cpu_s"], total_bytes),
            f"{_per_gb(theirs['cpu_s'], total_bytes)} ({times(theirs['cpu_s'], ours['cpu_s'])})",
            _per_gb(limit["cpu_s"], total_bytes),
        ),
        row(
            "- verification",
            f"{cost:+.1%} (without: {seconds(bare['wall_s'])},"
            f" {_per_gb(bare['cpu_s'], total_bytes)})",
            target=f"<= {VERIFY_SHARE:.0%}",
            met=cost <= VERIFY_SHARE,
        ),
    ]


def hot_rows(found: dict, total_bytes: int) -> list[dict]:
    ours, limit = found["dcp_native"], found["limit"]
    share = limit["wall_s"] / ours["wall_s"]
    return [
        row(
            "same, page cache hot",
            f"{seconds(ours['wall_s'])} ({share:.0%} of the limit),"
            f" {_per_gb(ours['cpu_s'], total_bytes)}",
            _against_torch(found)[0],
            f"{seconds(limit['wall_s'])}, memcpy",
            f">= {HOT_SHARE:.0%}",
            share >= HOT_SHARE,
        )
    ]


def many_rows(found: dict, case: str, tensors: int) -> list[dict]:
    text, ratio = _against_torch(found)
    ours = found["dcp_native"]
    what = f"{tensors:,} x 2 KiB {case.removeprefix('many_')} tensors, 2 ranks"
    return [
        row(
            f"{what} (medians of {ours['rounds']})",
            f"{seconds(ours['wall_s'])} ({ours['wall_s'] / tensors * 1e6:.2f} us each)",
            text,
            target=f">= {MANY_RATIO}x",
            met=ratio >= MANY_RATIO,
        )
    ]


def _read(numbers: dict, wanted: float) -> str:
    return (
        f"{_gb(numbers['read_bytes'])} ({numbers['read_bytes'] / wanted:.2f} x wanted),"
        f" {_gb(numbers['disk_bytes'])} from disk, {_gb(numbers['shared_bytes'])} shared"
    )


def reshard_rows(found: dict, total_bytes: int) -> list[dict]:
    text, ratio = _against_torch(found)
    ours = found["dcp_native"]
    most = max(ours["read_bytes"], ours["disk_bytes"]) / ours["wanted_bytes"]
    rows = [
        row(
            f"reshard {_gb(total_bytes)}, Shard(0) of 2 -> Shard(1) of 2, cold"
            f" (medians of {ours['rounds']})",
            seconds(ours["wall_s"]),
            text,
            target=f">= {RESHARD_RATIO}x",
            met=ratio >= RESHARD_RATIO,
        ),
        row(
            "- bytes read",
            _read(ours, ours["wanted_bytes"]),
            f"{_gb(found['torch']['disk_bytes'])} from disk",
            _gb(ours["wanted_bytes"]),
            f"<= {RESHARD_READ} x wanted",
            most <= RESHARD_READ,
        ),
    ]
    for loader in (APART, APART_UNVERIFIED):
        if (alone := found.get(loader.name)) is not None:
            shown = f"{_read(alone, alone['wanted_bytes'])}, {seconds(alone['wall_s'])}"
            rows.append(row(f"- {loader.name}", shown))
    return rows


def replicated_rows(found: dict, total_bytes: int) -> list[dict]:
    text, ratio = _against_torch(found)
    ours = found["dcp_native"]
    most = max(ours["read_bytes"], ours["disk_bytes"])
    return [
        row(
            f"replicated {_gb(total_bytes)} wanted by {REPLICATED_RANKS} ranks, cold"
            f" (medians of {ours['rounds']})",
            seconds(ours["wall_s"]),
            text,
            f"{seconds(found['limit']['wall_s'])}, each reads its part",
            f">= {REPLICATED_RATIO}x",
            ratio >= REPLICATED_RATIO,
        ),
        row(
            "- bytes read",
            _read(ours, total_bytes),
            f"{_gb(found['torch']['disk_bytes'])} from disk",
            _gb(total_bytes),
            f"<= {_gb(REPLICATED_READ * total_bytes)}",
            most <= REPLICATED_READ * total_bytes,
        ),
    ]


def memory_row(case: str, found: dict) -> dict:
    extra = max(n["extra_bytes"] for name, n in found.items() if name not in ("torch", "limit"))
    theirs = found["torch"]["extra_bytes"] if "torch" in found else None
    return row(
        f"extra memory of a load, {case}",
        f"{extra / 2**20:.1f} MiB per rank",
        "" if theirs is None else f"{theirs / 2**20:.1f} MiB",
        target=f"<= {EXTRA_BYTES >> 20} MiB",
        met=extra <= EXTRA_BYTES,
    )


class Run:
    """The figures so far: rows, details, and what was wrong."""

    def __init__(self, args: argparse.Namespace, disk: pathlib.Path, scratch: pathlib.Path) -> None:
        self.args, self.disk, self.scratch = args, disk, scratch
        self.size = "small" if args.quick else "full"
        self.few = min(3, args.repeats)
        self.rows: list[dict] = []
        self.memory: list[dict] = []
        self.details: dict[str, object] = {}
        self.wrong: list[str] = []

    def loads(
        self, ranks: Ranks, what: str, rows: Callable[[dict], list[dict]], *arguments, **keywords
    ) -> None:
        say(f"{what} ...")
        found, wrong = cases.loads(ranks, what, self.disk, *arguments, **keywords)
        self.details[what] = found
        self.rows += rows(found)
        self.memory.append(memory_row(what, found))
        self.wrong += wrong

    def on_llama(self, ranks: Ranks, parts: list[str]) -> None:
        """The parts that load one checkpoint."""
        with cases.saved(ranks, "llama", self.size, self.disk) as state:
            total = state["bytes"]
            share = -(-total // 2)
            if "llama" in parts:
                self.loads(
                    ranks,
                    "llama, cold",
                    lambda found: cold_rows(found, total),
                    self.args.repeats,
                    [OURS, TORCH, UNVERIFIED],
                    Limit("limit_read", share),
                )
            if "hot" in parts:
                self.loads(
                    ranks,
                    "llama, hot",
                    lambda found: hot_rows(found, total),
                    self.args.repeats,
                    [OURS, TORCH],
                    Limit("limit_memcpy", share),
                    hot=True,
                )
            if "cast" in parts:
                ranks.do("convert")
                self.loads(ranks, "llama, bf16 -> f32", lambda found: [], 1, [OURS, TORCH])
            if "reshard" in parts:
                ranks.do("build", case="llama", size=self.size)
                ranks.do("reshard")
                self.loads(
                    ranks,
                    "llama, Shard(0) -> Shard(1)",
                    lambda found: reshard_rows(found, total),
                    self.args.repeats,
                    [OURS, TORCH, APART, APART_UNVERIFIED],
                )

    def many(self, ranks: Ranks) -> None:
        for case in ("many_dtensor", "many_plain"):
            with cases.saved(ranks, case, self.size, self.disk) as state:
                self.loads(
                    ranks,
                    case,
                    lambda found, case=case, state=state: many_rows(found, case, state["tensors"]),
                    self.few,
                    [OURS, TORCH],
                )

    def replicated(self) -> None:
        with (
            self.ranks(REPLICATED_RANKS) as ranks,
            cases.saved(ranks, "replicated", self.size, self.disk) as state,
        ):
            total = state["bytes"]
            self.loads(
                ranks,
                "replicated",
                lambda found: replicated_rows(found, total),
                self.few,
                [OURS, TORCH],
                Limit("limit_read", -(-total // REPLICATED_RANKS)),
            )

    def planning(self) -> None:
        files = self.scratch / "metadata"
        for name in ("load_planning", "metadata_file"):
            found = run_program(
                name, self.scratch, self.args.quick, self.few, "--files", str(files)
            )
            self.details[name] = found["details"]
            self.rows += found["rows"]
            self.wrong += found["wrong"]

    @contextlib.contextmanager
    def ranks(self, count: int) -> Iterator[Ranks]:
        scratch = self.scratch / f"ranks-{count}"
        scratch.mkdir()
        ranks = Ranks(count, scratch)
        try:
            ranks.wait_ready()
            # Once on a small state, unmeasured: imports, thread pools and buffers.
            with cases.saved(ranks, "llama", "small", self.disk):
                _, wrong = cases.loads(ranks, "warm-up", self.disk, 1, [OURS, TORCH])
                self.wrong += wrong
            yield ranks
        finally:
            ranks.close()

    def all(self) -> None:
        only = self.args.only
        on_llama = [part for part in ON_LLAMA if part in only]
        if on_llama or "many" in only:
            with self.ranks(2) as ranks:
                if on_llama:
                    self.on_llama(ranks, on_llama)
                if "many" in only:
                    self.many(ranks)
        if "replicated" in only:
            self.replicated()
        if "planning" in only:
            self.planning()
        self.rows += self.memory


def main(argv: list[str] | None = None) -> int:
    return main_of_parts(
        "loading",
        __doc__,
        PARTS,
        lambda args, disk, _, scratch: Run(args, disk, scratch),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
