"""program.py: what the benchmark programs share: options, C programs, rows of figures, their JSON.

A figure is a row "what | ours | torch | limit | target | met". `met` is True, False, or None where
no target was set; the numbers behind the texts are in the JSON's details. A program that finds its
own output wrong exits with 1; a missed target does not count as wrong.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
COLUMNS = ("what", "ours", "torch", "limit", "target", "met")
C_TIMEOUT_S = 600
WRONG_SHOWN = 20


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


def write_json(path: pathlib.Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def finish(args: argparse.Namespace, rows: list[dict], details: dict, wrong: list[str]) -> int:
    """Prints the table, writes the JSON; returns the exit status."""
    print(markdown(rows))
    for text in wrong[:WRONG_SHOWN]:
        print(f"WRONG {text}")
    if args.json:
        write_json(args.json, {"rows": rows, "details": details, "wrong": wrong})
    return 1 if wrong else 0
