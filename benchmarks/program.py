"""program.py: what the benchmark programs share: options, C programs, rows of figures, their JSON.

A figure is a row "what | ours | torch | limit | target | met". `met` is True, False, or None where
no target was set; the numbers behind the texts are in the JSON's details. A program that finds its
own output wrong exits with 1; a missed target does not count as wrong.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
COLUMNS = ("what", "ours", "torch", "limit", "target", "met")
C_TIMEOUT_S = 600
PROGRAM_TIMEOUT_S = 900
WRONG_SHOWN = 20


class BenchError(RuntimeError):
    """A process of the benchmark failed, died or did not answer."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def row(
    what: str,
    ours: str,
    torch: str = "",
    limit: str = "",
    target: str = "",
    met: bool | None = None,
) -> dict:
    """One figure of the table."""
    return dict(zip(COLUMNS, (what, ours, torch, limit, target, met), strict=True))


def markdown(rows: list[dict]) -> str:
    """The rows as a markdown table."""
    verdicts = {True: "yes", False: "NO", None: "-"}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for r in rows:
        cells = [r[c] or "-" for c in COLUMNS[:-1]] + [verdicts[r["met"]]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seconds(value_s: float) -> str:
    """A time as text with three digits that count."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value_s * scale >= 1:
            return f"{value_s * scale:.3g} {unit}"
    return f"{value_s * 1e9:.3g} ns"


def times(slow_s: float, fast_s: float) -> str:
    """How many times faster."""
    return f"{slow_s / fast_s:.3g}x"


def median_of(count: int, *contenders: Callable[[], float]) -> list[float]:
    """Runs all contenders in turn, `count` times, each time another first; returns medians."""
    samples: list[list[float]] = [[] for _ in contenders]
    for turn in range(count):
        for i in range(len(contenders)):
            at = (turn + i) % len(contenders)
            samples[at].append(contenders[at]())
    return [statistics.median(s) for s in samples]


def c_program(name: str, *arguments: object, parse: bool = True) -> list[dict] | str:
    """Builds benchmarks/`name`.c where needed, runs it; returns the JSON of its lines or its text.

    Raises:
        RuntimeError: it failed, which is what it does when its own output is wrong.
    """
    program = pathlib.Path("build", "bench", name)
    for argv in (
        ["make", "--silent", str(program)],
        [str(program), *(["--json"] if parse else []), *map(str, arguments)],
    ):
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=C_TIMEOUT_S)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stderr}")
    if not parse:
        return done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


def run_program(
    name: str, scratch: pathlib.Path, quick: bool, repeats: int, *arguments: str
) -> dict:
    """Runs the program of figures `name`.py; returns its JSON.

    A process of its own must not inherit a heap, nor does it leave one behind.
    """
    path = scratch / f"{name}.json"
    argv = [sys.executable, str(HERE / f"{name}.py"), "--repeats", str(repeats)]
    argv += ["--json", str(path), *(["--quick"] if quick else []), *arguments]
    say(f"{name} ...")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    done = subprocess.run(
        argv, stdout=subprocess.DEVNULL, stderr=sys.stderr, env=env, timeout=PROGRAM_TIMEOUT_S
    )
    if not path.exists():
        raise BenchError(f"{name} failed with exit status {done.returncode}")
    return json.loads(path.read_text(encoding="utf-8"))


def machine() -> dict:
    """What the figures were taken on; the load average tells whether it was quiet."""
    model = "unknown processor"
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        for line in f:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "load_average_before": os.getloadavg(),
        "time_utc": time.strftime("%Y-%m-%dT%H%M%S", time.gmtime()),
    }


def options(doc: str, repeats: int) -> argparse.ArgumentParser:
    """The options that every program of figures has."""
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="tiny sizes: proves the program, no figure")
    p.add_argument("--repeats", type=int, default=repeats, help=f"rounds; {repeats}")
    p.add_argument("--json", type=pathlib.Path, help="where the results go")
    return p


def options_of_parts(doc: str, repeats: int, names: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options of a program of many parts, each of which runs alone with --only."""

    def parts(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(names):
            raise argparse.ArgumentTypeError(f"{unknown}: not of {', '.join(names)}")
        return text.split(",")

    p = options(doc, repeats)
    p.add_argument("--only", type=parts, default=list(names), metavar="A,B")
    p.add_argument(
        "--dir", type=pathlib.Path, default=ROOT / "build", help="on the disk to measure"
    )
    p.add_argument("--tmpfs", type=pathlib.Path, default=pathlib.Path("/dev/shm"))
    return p


def main_of_parts(
    name: str,
    doc: str,
    parts: tuple[str, ...],
    make: Callable[[argparse.Namespace, pathlib.Path, pathlib.Path, pathlib.Path], Any],
    argv: list[str] | None = None,
    more_options: Callable[[argparse.ArgumentParser], object] = lambda _: None,
) -> int:
    """Runs the program `name`: ``make(args, disk, tmpfs, scratch)``, directories that are removed
    afterwards, gives what has ``all()``, ``rows``, ``details`` and ``wrong``.
    """
    parser = options_of_parts(doc, 5, parts)
    more_options(parser)
    args = parser.parse_args(argv)
    args.dir, args.tmpfs = args.dir.absolute(), args.tmpfs.absolute()  # ranks run elsewhere
    args.dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing stays behind
    about = machine()
    with contextlib.ExitStack() as stack:
        directories = (
            pathlib.Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="dcp-bench-", dir=base))
            )
            for base in (args.dir, args.tmpfs, args.tmpfs)
        )
        run = make(args, *directories)
        try:
            run.all()
        except BenchError as e:
            say(f"{name}: {e}")
            return 1
    return publish(name, args, about, run.rows, run.details, run.wrong)


def write_json(path: pathlib.Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def publish(
    name: str, args: argparse.Namespace, about: dict, rows: list[dict], details: dict, wrong: list
) -> int:
    """Prints the table of the program `name` and writes its results, by default to a file of their
    own; returns the exit status.
    """
    print(f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}, Python", end=" ")
    print(f"{about['python']}; over gloo; medians of {args.repeats} where a row does not say\n")
    print(markdown(rows))
    print(f"\n{len(wrong)} outputs were wrong")
    for text in wrong[:WRONG_SHOWN]:
        print(f"  WRONG {text}")
    about["load_average_after"] = os.getloadavg()
    file = f"{about['time_utc']}-{name}{'-quick' if args.quick else ''}.json"
    path = args.json or HERE / "results" / file
    about["repeats"] = args.repeats
    write_json(path, {"machine": about, "rows": rows, "wrong": wrong, "details": details})
    print(f"results: {path}")
    return 1 if wrong else 0


def finish(args: argparse.Namespace, rows: list[dict], details: dict, wrong: list[str]) -> int:
    """Prints the table, writes the JSON; returns the exit status."""
    print(markdown(rows))
    for text in wrong[:WRONG_SHOWN]:
        print(f"WRONG {text}")
    if args.json:
        write_json(args.json, {"rows": rows, "details": details, "wrong": wrong})
    return 1 if wrong else 0
