"""bench.py: times save and load of dcp_native beside stock torch and the machine's own limits.

    python benchmarks/bench.py                   # all: 10 minutes on 2 cores, 20 with rivals
    python benchmarks/bench.py --size small      # seconds; the test suite runs this
    python benchmarks/bench.py --cases llama --dir /mnt/nvme --repeats 9
    python benchmarks/document.py --add benchmarks/results/....json  # into docs/benchmarks.md

All contenders run in one set of processes, in turn: dcp_native, torch with 1 and with 4 threads,
the rivals of rivals.py that are installed, the limits, and again in another order. A figure is the
median of the rounds, of which there are fewer where a round takes minutes. wall: from a barrier
to the end of the slowest rank. CPU: user and system time of all ranks; kernel write-back threads
are not in it, which favours buffered writers. extra: the largest growth of resident memory on a
rank over all rounds, the first included; the page cache does not count. Loads are cold: the page
cache is dropped before. Every load is compared bit for bit with what was saved, and each side reads
the other's checkpoint once. Exits with 1 if anything differs.

Before the rounds of a case dcp_native saves once, measured for its memory alone: in the rounds it
reuses its plan, which is checked. With many small tensors planning is what a save costs, so
there the first save (`first`: plans are gathered anew) and torch's steady state with
enable_plan_caching (`cached`) are rows of their own.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile

import limits
import rivals
from program import WRONG_SHOWN, BenchError, machine, say, write_json
from ranks import Ranks
from report import summarize, table

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
CASES = ("llama", "many_dtensor", "many_plain")
PLACES = ("disk", "tmpfs")
CONTENDERS = {
    "dcp_native": {"module": "dcp_native", "threads": 1, "plan": "kept"},
    "torch1": {"module": "torch.distributed.checkpoint", "threads": 1},
    "torch4": {"module": "torch.distributed.checkpoint", "threads": 4},
    **{name: {"rival": name} for name in rivals.NEEDS},
}
# Of the contender before the blank, only saved: where planning costs more than the bytes.
VARIANTS = {
    "dcp_native first": {"module": "dcp_native", "threads": 1, "plan": "new"},
    "torch1 cached": {"module": "torch.distributed.checkpoint", "threads": 1, "plan": "cached"},
}
TORCH = ["torch1", "torch4", "torch1 cached"]
TRIAL_TIMEOUT_S = 60
# Of many small tensors stock torch takes a minute a round, whatever its threads.
REPEATS = {"llama": 5, "many_dtensor": 3, "many_plain": 3}


def _readers(name: str, names: list[str], last_round: bool, loads: bool) -> list[str]:
    """Who loads what `name` saved: itself, where loads are measured, and once the other module; a
    contender that is not measured so is checked once by the quickest reader.
    """
    if name in rivals.NEEDS:
        return [name] if loads else []
    module = CONTENDERS.get(name, VARIANTS.get(name))["module"]
    others = [n for n in names if CONTENDERS.get(n, {}).get("module", module) != module]
    readers = [name] if loads and name in CONTENDERS else []
    if last_round and name in VARIANTS:
        readers.append("dcp_native" if "dcp_native" in names else names[0])
    elif last_round and CONTENDERS[name]["threads"] == 1:
        readers += others[:1]
    return readers


def run_case(
    ranks: Ranks,
    case: str,
    size: str,
    where: pathlib.Path,
    names: list[str],
    repeats: int,
    loads: bool = True,
) -> dict:
    """Runs all rounds of one case in the directory `where`; returns samples and what was wrong.

    Without `loads` only saves are measured, and checked by one load each at the end.
    """
    built = ranks.do("build", case=case, size=size)
    checkpoint, limit = str(where / "checkpoint"), where / "limit"
    total_bytes = sum(b["own_bytes"] for b in built)
    samples, wrong, on_disk = {}, [], {}

    def measure(label: str, operation: str, command: str, **arguments) -> dict:
        result = ranks.measure(command, **arguments)
        samples.setdefault(label, {}).setdefault(operation, []).append(result)
        wrong.extend(f"{case} in {where}, {label} {operation}: {w}" for w in result["wrong"])
        return result

    def save(name: str, **changes) -> dict:
        contender = {**CONTENDERS, **VARIANTS}[name] | changes
        return measure(name, "save", "save", contender=contender, path=checkpoint)

    for name in names:
        if name == "dcp_native":
            save(name, plan="new")["warm_up"] = True
        elif name == "torch1 cached":
            save(name)["warm_up"] = True
        shutil.rmtree(checkpoint, ignore_errors=True)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:  # no one always goes first
            save(name)
            on_disk[name] = limits.directory_bytes(checkpoint)
            for reader in _readers(name, names, turn == repeats - 1, loads):
                label = name if reader == name else f"{reader} reads {name}"
                measure(label, "load", "load", contender=CONTENDERS[reader], path=checkpoint)
            shutil.rmtree(checkpoint)
        limit.mkdir()
        share = -(-total_bytes // len(built))
        measure("limit", "save", "limit_write", path=str(limit), total_bytes=share)
        if loads:
            measure("limit", "load", "limit_read", path=str(limit), total_bytes=share)
        measure("memcpy", "save", "limit_memcpy", path=str(limit), total_bytes=share)
        shutil.rmtree(limit)
        say(f"  {case}: round {turn + 1} of {repeats} done")
    return {
        "bytes": total_bytes,
        "repeats": repeats,
        "checkpoint_bytes": on_disk,
        "tensors_per_rank": built[0]["tensors"],
        "loads_verified": sum(
            len(ops.get("load", ())) for label, ops in samples.items() if label != "limit"
        ),
        "wrong": wrong,
        "samples": samples,
        "summary": summarize(samples),
    }


def usable(names: list[str], count: int, disk: pathlib.Path, scratch: pathlib.Path) -> list[str]:
    """`names` without the rivals that are not installed, or do not run with this torch; says which.

    They are tried in ranks of their own: what raises leaves its ranks in disorder.
    """
    left = []
    for name in names:
        if name in rivals.NEEDS and rivals.missing(name):
            say(f"{name} is not installed: left out")
            continue
        if name not in rivals.TRIED:
            left.append(name)
            continue
        own = scratch / name
        own.mkdir()
        ranks = Ranks(count, own, timeout_s=TRIAL_TIMEOUT_S)
        try:
            ranks.wait_ready()
            run_case(ranks, "llama", "small", disk, [name], 1)
            left.append(name)
        except BenchError as e:
            say(f"{name} does not run here: left out\n{e}")
        finally:
            ranks.close()
            shutil.rmtree(disk)
            disk.mkdir()
    return left


def contenders_of(case: str, names: list[str]) -> list[str]:
    """Who takes part in `case`. Of many small tensors a save is planning: stock torch's threads
    change nothing, and the variants of planning are of interest. torchsnapshot takes minutes there.
    """
    if case == "llama":
        return names
    names = [n for n in names if n != "torchsnapshot" and not (n == "torch4" and "torch1" in names)]
    return names + [v for v in VARIANTS if v.split()[0] in names]


def run_all(args: argparse.Namespace, places: dict, scratch: pathlib.Path) -> dict:
    """Starts the ranks, runs and prints every case; returns the results by title."""
    results = {}
    names = usable(args.contenders, args.ranks, places["disk"], scratch)
    ranks = Ranks(args.ranks, scratch)
    try:
        ranks.wait_ready()
        # Once on a small state, unmeasured: imports, thread pools and buffers of every contender.
        run_case(ranks, "llama", "small", places["disk"], names, 1)
        for case in args.cases:
            for place in args.where:
                if place == "tmpfs" and case != "llama":
                    continue  # with many small tensors the medium decides nothing
                title = f"{case} on {place}"
                say(f"{title} ...")
                taking_part = contenders_of(case, names)
                repeats = args.repeats or REPEATS[case]
                results[title] = run_case(
                    ranks, case, args.size, places[place], taking_part, repeats
                )
                print(table(title, results[title], TORCH, list(rivals.NEEDS)), flush=True)
    finally:
        ranks.close()
    return results


def parse(argv: list[str] | None) -> argparse.Namespace:
    def some_of(known):
        def convert(text: str) -> list[str]:
            unknown = sorted(set(text.split(",")) - set(known))
            if unknown:
                names = ", ".join(known)
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {names}")
            return text.split(",")

        return convert

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=("full", "small"), default="full")
    rounds = "/".join(map(str, REPEATS.values()))
    p.add_argument("--repeats", type=int, help=f"rounds; {rounds}, with --size small 1")
    p.add_argument("--ranks", type=int, default=2)
    p.add_argument("--cases", type=some_of(CASES), default=list(CASES), metavar="A,B")
    p.add_argument("--where", type=some_of(PLACES), default=list(PLACES), metavar="A,B")
    p.add_argument(
        "--contenders", type=some_of(CONTENDERS), default=list(CONTENDERS), metavar="A,B"
    )
    p.add_argument(
        "--dir", type=pathlib.Path, default=ROOT / "build", help="on the disk to measure"
    )
    p.add_argument("--tmpfs", type=pathlib.Path, default=pathlib.Path("/dev/shm"))
    p.add_argument("--json", type=pathlib.Path, help="the results; default: benchmarks/results/...")
    args = p.parse_args(argv)
    args.dir, args.tmpfs = args.dir.absolute(), args.tmpfs.absolute()  # ranks run elsewhere
    if args.size == "small" and not args.repeats:
        args.repeats = 1
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing stays behind
    about = machine()
    print(f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python", end=" ")
    print(f"{about['python']}; {args.ranks} ranks over gloo", flush=True)
    with contextlib.ExitStack() as stack:
        places = {
            place: pathlib.Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="dcp-bench-", dir=base))
            )
            for place, base in (("disk", args.dir), ("tmpfs", args.tmpfs))
            if place == "disk" or place in args.where
        }
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="dcp-bench-"))
        try:
            results = run_all(args, places, pathlib.Path(scratch))
        except BenchError as e:
            say(f"bench: {e}")
            return 1
    wrong = [w for result in results.values() for w in result["wrong"]]
    loads = sum(result["loads_verified"] for result in results.values())
    print(f"\nverified: {loads} loads compared bit for bit, {len(wrong)} values differ")
    for text in wrong[:WRONG_SHOWN]:
        print(f"  WRONG {text}")
    about["rivals"] = rivals.versions()
    about["load_average_after"] = os.getloadavg()
    path = args.json or HERE / "results" / f"{about['time_utc']}-{args.size}.json"
    report = {
        "machine": about,
        "args": {k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(args).items()},
        "loads_verified": loads,
        "wrong": wrong,
        "cases": results,
    }
    write_json(path, report)
    print(f"results: {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
