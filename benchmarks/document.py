"""document.py: docs/benchmarks.md and its pictures, from recorded results.

    python benchmarks/document.py                    page and pictures from benchmarks/recorded/
    python benchmarks/document.py --add RESULT.json  records results of benchmark programs first
    python benchmarks/document.py --check            says whether docs/benchmarks.md is up to date

A result of a benchmark program (benchmarks/results/, not in the repository) is recorded as its
machine and its rows, a newer one in place of the older one of the same program.  Nothing in the
page is typed by hand but the words about what a program does: every figure was printed by a run.
Pictures need matplotlib; the page and --check do not.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

from pictures import UNITS_S, draw, text_of

HERE = pathlib.Path(__file__).resolve().parent
RECORDED = HERE / "recorded"
DOCS = HERE.parent / "docs"
PAGE = DOCS / "benchmarks.md"
PICTURES = DOCS / "pictures"

DURATION = re.compile(r"([\d.e+-]+) (s|ms|us|ns)(?=[ ,;(]|$)")

PROGRAMS = {
    "bench": (
        "Save and load beside others",
        "`make bench`. torch: stock DCP at its quickest setting, plan caching included. torch.save "
        "and safetensors: a file for each rank, as programs write them by hand; no other number of "
        "ranks can load it. torch_checkpointing: without its resharder, whose save needs a GPU. "
        "What they leave unsynced is synced within their time; only ours checks what it loads.",
    ),
    "saving": (
        "Saving",
        "First and steady saves, planning, the coordinator of large jobs, `.metadata`, memory, "
        "incremental saves.",
    ),
    "loading": (
        "Loading",
        "Cold, hot, cast, resharded and replicated loads, many small tensors, bytes read, "
        "planning, `.metadata`, memory.",
    ),
    "async_saving": (
        "Background saves",
        "The call, first and warm; what is left to a trainer beside the upload; the upload; "
        "memory. The trainer is two processes, each with a Python loop or a matmul, on two cores.",
    ),
    "state_dict": (
        "State dicts",
        "CPU time of getting and setting state; full states over two gloo ranks.",
    ),
    "hugging_face": (
        "Hugging Face files",
        "Exports, consolidation and loads of safetensors, two ranks. Shards of rows lie in a file "
        "as they lie in memory; shards of columns are pieces of a row each.",
    ),
    "format_utils": ("Conversions", "Between checkpoints and torch.save files."),
    "tracing": (
        "Traces",
        "What a trace of every phase, request and wait costs. The limit of a ratio is the noise: "
        "that of two runs without a trace.",
    ),
}

INTRODUCTION = """\
# Benchmarks

Written by `benchmarks/document.py` from the results in `benchmarks/recorded/`: not to be edited.
To measure on another machine, and to have the page written anew:

    make bench                      # save and load beside others: 10 to 20 minutes, 5 GB of disk
    python benchmarks/saving.py     # and loading.py, async_saving.py, ...: 2 to 10 minutes each
    python benchmarks/document.py --add benchmarks/results/RESULT.json

Each program prints its table, `ours : torch : limit`, and names its RESULT.json at the end. Rivals
besides torch take part in `make bench` where they are installed: `pip install safetensors
torch_checkpointing torchsnapshot-nightly`.

## How to read it

Every row was measured in one run: ours, stock torch and the machine's own limit in turn, medians of
5 rounds where no other number is said. Of torch with 1 and with 4 threads the faster one
counts; with plan caching it has rows of its own. Saves are durable (fsync) when the clock stops,
torch's too. Cold loads begin with an empty page cache of the guest; what lies below it (the host's
cache of the virtual disk) is the same for all. What is loaded is compared bit for bit; a wrong
value makes the program fail.

*The limit* is not a competitor but what the same bytes cost without a checkpoint: direct writes or
reads of a ready image with as many processes, `write()` on tmpfs, `memcpy` for copies in memory.
More than 100% of it is noise of the disk, or a limit with less parallelism than ours. A row whose
target is missed says **no**. A row that begins with `-` belongs to the one above.

What these figures do not show: a GPU, NCCL, a network file system, more than one host, more than
two cores. Planning and metadata of large jobs were simulated in one process. The machine is
virtual, its disk too (ext4): the same row varies by some percent from run to run, the disk now and
then by tens.

![Time of ours, torch's and the limit](pictures/measured.svg)"""

SHOWN = [
    ("saving", "save 2.0 GB Llama-shaped, 2 ranks, disk",
     "save 2 GB, 2 ranks, until it is durable"),
    ("saving", "- steady beside torch with enable_plan_caching",
     "save 20,000 tensors of 2 KiB a rank"),
    ("async_saving", "call -> safe to mutate, warm, THREAD",
     "async_save 2 GB, until training goes on"),
    ("async_saving", "upload of 2.18 GB finished after the return, THREAD",
     "... and from there until it is durable"),
    ("saving", "coordinator, 256 x 1000, all steps, plan changed, CPU",
     "plan a save of 256 ranks x 1000 tensors (CPU)"),
    ("loading", "load 2.01 GB Llama-shaped, 2 ranks, cold, verified", "load 2 GB, cold, verified"),
    ("loading", "same, page cache hot", "load 2 GB from the page cache, verified"),
    ("loading", "reshard 2.01 GB, Shard(0) of 2 -> Shard(1) of 2, cold (medians of 5)",
     "load 2 GB, rows resharded to columns, cold"),
    ("loading", "replicated 1.07 GB wanted by 4 ranks, cold (medians of 3)",
     "load 1 GB that 4 ranks want whole, cold"),
    ("loading", "20,000 x 2 KiB dtensor tensors, 2 ranks (medians of 3)",
     "load 20,000 tensors of 2 KiB a rank"),
    ("loading", "- ready to plan, our file", "read .metadata of 236,000 chunks (CPU)"),
    ("state_dict", "get_model_state_dict, 4,400 parameters",
     "get_model_state_dict of 4,400 parameters (CPU)"),
    ("hugging_face", "HF export, rows, 2.1 GB", "export 2 GB of safetensors, 2 ranks"),
    ("format_utils", "dcp_to_torch_save of 2.15 GB, cold", "convert 2 GB to a torch.save file"),
]  # fmt: skip
"""The rows of the first picture, in its order: program, row, what the picture calls it.  The first
rows of a name count: '- steady ...' is that of DTensors."""

LIMIT_OF = {
    "- steady beside torch with enable_plan_caching":
        "20,000 x 2 KiB dtensor tensors, 2 ranks, steady save (medians of 3)",
}  # fmt: skip
"""Rows of the same program that have the limit of another: the same save."""


def duration_s(text: str) -> float | None:
    """The first duration that a cell begins with, or has behind a word ("direct read, 1.2 s")."""
    found = DURATION.match(text) or DURATION.search(text)
    return float(found[1]) * UNITS_S[found[2]] if found else None


def times_of(row: dict) -> tuple[float | None, float | None, float | None, float | None]:
    """Seconds of ours, torch and the limit, and how much faster we are, as the row says it."""
    torch = row["torch"]
    if "PROCESS" in row["what"] and (found := re.search(r"thread, (.*?) process", torch)):
        torch = found[1]  # the row has torch's threads and its process in one cell
    ours, torch_s = duration_s(row["ours"]), duration_s(torch)
    limit = None if row["limit"].startswith("hash") else duration_s(row["limit"])
    said = re.search(r"\(([\d.e+]+)x", torch) or re.search(r"\(([\d.]+)x faster", row["ours"])
    factor = float(said[1]) if said else torch_s / ours if ours and torch_s else None
    return ours, torch_s, limit, factor


# ---- recording ----


STOCK = ("torch1", "torch4", "torch1 cached")
RIVALS = ("torch.save", "safetensors", "torch_checkpointing", "torchsnapshot")


def rows_of_bench(cases: dict) -> list[dict]:
    """bench.py has summaries where the other programs have rows.  Three rows for each operation:
    wall time, CPU time and extra memory, those of torch at its quickest setting.  Where rivals took
    part a row has `rivals`, their cells by name.
    """
    rows = []
    for title, case in cases.items():
        gigabytes = case["bytes"] / 1e9
        medians = f" (medians of {case['repeats']})" if case.get("repeats", 5) != 5 else ""
        for operation in ("save", "load"):
            done = {n: s[operation] for n, s in case["summary"].items() if operation in s}
            ours, limit = done.get("dcp_native"), done.get("limit")
            torch = min((done[n] for n in STOCK if n in done), key=wall_s, default=None)
            if not (ours and limit and torch):
                continue
            rivals = {n: done[n] for n in RIVALS if n in done}
            sides = {"torch": torch, **rivals}
            limit_text = text_of(wall_s(limit))
            share = 100 * wall_s(limit) / wall_s(ours)
            rows += [
                bench_row(
                    f"{operation}, {title}, {gigabytes:.2f} GB{medians}",
                    f"{text_of(wall_s(ours))} ({share:.0f}% of the limit)",
                    {
                        n: f"{text_of(wall_s(s))} ({wall_s(s) / wall_s(ours):.3g}x)"
                        for n, s in sides.items()
                    },
                    limit_text,
                ),
                bench_row(
                    "- CPU of all ranks",
                    f"{ours['cpu_s'] / gigabytes:.2f} s/GB",
                    {n: f"{s['cpu_s'] / gigabytes:.2f} s/GB" for n, s in sides.items()},
                    f"{limit['cpu_s'] / gigabytes:.2f} s/GB",
                ),
                bench_row(
                    "- extra memory of a rank",
                    f"{ours['extra_bytes'] / 2**20:.0f} MiB",
                    {n: f"{s['extra_bytes'] / 2**20:.0f} MiB" for n, s in sides.items()},
                ),
            ]
    return rows


def wall_s(measured: dict) -> float:
    return measured["wall_s"]


def bench_row(what: str, ours: str, sides: dict[str, str], limit: str = "") -> dict:
    row = {"what": what, "ours": ours, "torch": sides.pop("torch"), "limit": limit}
    return {**row, "target": "", "met": None, **({"rivals": sides} if sides else {})}


def record(path: pathlib.Path, program: str | None, torch: str | None) -> pathlib.Path:
    result = json.loads(path.read_text(encoding="utf-8"))
    if re.search("-(quick|small)$", path.stem) or result.get("args", {}).get("size") == "small":
        raise SystemExit(f"{path}: tiny sizes prove the program and give no figure")
    name = program or re.sub(r"^[\dT-]+-|-full$", "", path.stem)
    name = "bench" if "cases" in result else name
    if name not in PROGRAMS:
        raise SystemExit(f"{path}: which program is it? Say --program, one of {list(PROGRAMS)}")
    rows = rows_of_bench(result["cases"]) if "cases" in result else result["rows"]
    torch = torch or result["machine"].get("torch")
    if torch is None:
        raise SystemExit(f"{path} does not say with which torch it was measured: say --torch")
    kept = {"machine": {**result["machine"], "torch": torch}, "rows": rows}
    target = RECORDED / f"{name}.json"
    target.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def recorded() -> dict[str, dict]:
    """Results by program, in the order of PROGRAMS."""
    files = {name: RECORDED / f"{name}.json" for name in PROGRAMS}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }


# ---- the page ----


def machine_line(machine: dict) -> str:
    loads = [machine.get(f"load_average_{when}") for when in ("before", "after")]
    load = " -> ".join(f"{x[0]:.1f}" for x in loads if x)
    return (
        f"{machine['time_utc']} UTC, torch {machine['torch']}, Python {machine['python']}, "
        f"Linux {machine['kernel']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB"
        + "".join(f", {name} {version}" for name, version in machine.get("rivals", {}).items())
        + (f"; load average before -> after: {load}" if load else "")
        + (f"; medians of {machine['repeats']}" if machine.get("repeats", 5) != 5 else "")
    )


def table_of(rows: list[dict]) -> list[str]:
    """The rows as a markdown table: a column for each rival, none for targets that nobody set."""
    rivals = list(dict.fromkeys(name for row in rows for name in row.get("rivals", ())))
    columns = ["what", "ours", "torch", *rivals, "limit"]
    if any(row["target"] for row in rows):
        columns += ["target", "met"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        met = {True: "yes", False: "**no**", None: ""}[row["met"]]
        cells = {**row, **row.get("rivals", {}), "met": met}
        texts = (cells.get(column, "").replace("|", "\\|") or "-" for column in columns)
        lines.append("| " + " | ".join(texts) + " |")
    return lines


def page(results: dict[str, dict]) -> str:
    lines = [INTRODUCTION]
    for name, result in results.items():
        title, what = PROGRAMS[name]
        lines += ["", f"## {title}", "", f"{what} `benchmarks/{name}.py`:", ""]
        lines += [machine_line(result["machine"]) + ".", ""]
        if note := result["machine"].get("note"):
            lines += [note, ""]
        if plotted(result):
            lines += [f"![{title}](pictures/{name}.svg)", ""]
        lines += table_of(result["rows"])
    return "\n".join(lines) + "\n"


# ---- pictures ----


def plotted(result: dict) -> list[tuple]:
    """Rows with durations of ours and of torch: label, then what `times_of` gives."""
    found = []
    for row in result["rows"]:
        label = row["what"].removeprefix("- ")
        times = times_of(row)
        if DURATION.match(row["ours"]) and times[1] is not None and "memory" not in label:
            found.append((label.replace("`", ""), *times))
    return found


def shown(results: dict[str, dict]) -> list[tuple]:
    rows = []
    for program, what, label in SHOWN:
        row = _row(results, program, what)
        if what in LIMIT_OF:
            row = {**row, "limit": _row(results, program, LIMIT_OF[what])["limit"]}
        rows.append((label, *times_of(row)))
    return rows


def _row(results: dict[str, dict], program: str, what: str) -> dict:
    for row in results.get(program, {"rows": []})["rows"]:
        if row["what"] == what:
            return row
    raise SystemExit(f"benchmarks/recorded/{program}.json has no row {what!r}")


def _measured_on(result: dict) -> str:
    machine = result["machine"]
    return f"{machine['cpu']}, {machine['cores']} cores"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--add", type=pathlib.Path, nargs="+", default=[], help="results to record first"
    )
    p.add_argument("--program", help="whose results these are, when their names do not say")
    p.add_argument("--torch", help="the torch that they were measured with, when they do not say")
    p.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    args = p.parse_args()
    for path in args.add:
        print(f"recorded {record(path, args.program, args.torch)}")
    results = recorded()
    text = page(results)
    if args.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        print("up to date" if same else f"{PAGE} is out of date: run benchmarks/document.py")
        return 0 if same else 1
    first_picture = shown(results)
    PAGE.write_text(text, encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    on = " or ".join(dict.fromkeys(_measured_on(results[program]) for program, _, _ in SHOWN))
    draw(first_picture, PICTURES / "measured.svg", "", f"wall time where not CPU, log scale; {on}")
    for name, result in results.items():
        if rows := plotted(result):
            note = f"benchmarks/{name}.py, log scale; {_measured_on(result)}"
            draw(rows, PICTURES / f"{name}.svg", "", note)
    print(f"wrote {PAGE} and {PICTURES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
