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

HERE = pathlib.Path(__file__).resolve().parent
RECORDED = HERE / "recorded"
DOCS = HERE.parent / "docs"
PAGE = DOCS / "benchmarks.md"
PICTURES = DOCS / "pictures"

UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
DURATION = re.compile(r"([\d.e+-]+) (s|ms|us|ns)(?=[ ,;(]|$)")

PROGRAMS = {
    "bench": ("Save and load beside torch", "`make bench`, the whole picture in one program."),
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
    "reading_together": (
        "Loading what several ranks want",
        "The same program for two of its cases, run again after reads for several ranks had been "
        "mended: these rows hold in place of those above.",
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
}

INTRODUCTION = """\
# Benchmarks

Written by `benchmarks/document.py` from the results in `benchmarks/recorded/`: not to be edited.
To measure on another machine, and to have the page written anew:

    make bench                      # save and load beside torch: 25 minutes, 5 GB of disk
    python benchmarks/saving.py     # and loading.py, async_saving.py, ...: 10 minutes each
    python benchmarks/document.py --add benchmarks/results/*.json

## How to read it

Every row was measured in one run: ours, stock torch and the machine's own limit in turn, medians of
5 rounds where a row does not say another number. Of torch with 1 and with 4 threads the faster one
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
virtual: the same row varies by some percent from run to run, the disk now and then by tens.

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
    ("reading_together", "reshard 2.01 GB, Shard(0) of 2 -> Shard(1) of 2, cold (medians of 5)",
     "load 2 GB, rows resharded to columns, cold"),
    ("reading_together", "replicated 1.07 GB wanted by 4 ranks, cold (medians of 3)",
     "load 1 GB that 4 ranks want whole, cold"),
    ("loading", "20,000 x 2 KiB dtensor tensors, 2 ranks (medians of 3)",
     "load 20,000 tensors of 2 KiB a rank"),
    ("loading", "- ready to plan, our file", "read .metadata of 236,000 chunks (CPU)"),
    ("hugging_face", "HF export, rows, 2.1 GB", "export 2 GB of safetensors, 2 ranks"),
    ("format_utils", "dcp_to_torch_save of 2.15 GB, cold", "convert 2 GB to a torch.save file"),
]  # fmt: skip
"""The rows of the first picture, in its order: program, row, what the picture calls it.  The first
rows of a name count: '- steady ...' is that of DTensors."""

LIMITS = {"- steady beside torch with enable_plan_caching": "39.4 ms"}
"""The row above it has it: the same save."""

OURS, TORCH, LIMIT, GREY = "#1f6f8b", "#c8553d", "#222222", "#8a8a8a"


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


def rows_of_bench(cases: dict) -> list[dict]:
    """bench.py has summaries where the other programs have rows."""
    rows = []
    for title, case in cases.items():
        summary = case["summary"]
        for operation in ("save", "load"):
            rivals = [
                s[operation]["wall_s"]
                for n, s in summary.items()
                if n.startswith("torch") and " reads " not in n and operation in s
            ]
            if operation not in summary.get("dcp_native", {}) or not rivals:
                continue
            ours, limit = (summary[n][operation]["wall_s"] for n in ("dcp_native", "limit"))
            torch = min(rivals)
            rows.append(
                {
                    "what": f"{operation}, {title}, {case['bytes'] / 1e9:.2f} GB",
                    "ours": f"{ours:.3g} s ({100 * limit / ours:.0f}% of the limit)",
                    "torch": f"{torch:.3g} s ({torch / ours:.3g}x)",
                    "limit": f"{limit:.3g} s",
                    "target": "",
                    "met": None,
                }
            )
    return rows


def record(path: pathlib.Path, program: str | None, torch: str) -> pathlib.Path:
    result = json.loads(path.read_text(encoding="utf-8"))
    name = program or re.sub(r"^[\dT-]+-|-(quick|full)$", "", path.stem)
    name = "bench" if "cases" in result else name
    if name not in PROGRAMS:
        raise SystemExit(f"{path}: which program is it? Say --program, one of {list(PROGRAMS)}")
    rows = rows_of_bench(result["cases"]) if "cases" in result else result["rows"]
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
        + (f"; load average before -> after: {load}" if load else "")
    )


def page(results: dict[str, dict]) -> str:
    lines = [INTRODUCTION]
    for name, result in results.items():
        title, what = PROGRAMS[name]
        program = "loading" if name == "reading_together" else name
        lines += ["", f"## {title}", "", f"{what} `benchmarks/{program}.py`:", ""]
        lines += [machine_line(result["machine"]) + ".", ""]
        if note := result["machine"].get("note"):
            lines += [note, ""]
        if plotted(result):
            lines += [f"![{title}](pictures/{name}.svg)", ""]
        lines += ["| what | ours | torch | limit | target | met |", "| --- " * 6 + "|"]
        for row in result["rows"]:
            met = {True: "yes", False: "**no**", None: ""}[row["met"]]
            cells = [row["what"], row["ours"], row["torch"], row["limit"], row["target"], met]
            lines.append("| " + " | ".join(c.replace("|", "\\|") or "-" for c in cells) + " |")
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
        row = next(
            (r for r in results.get(program, {"rows": []})["rows"] if r["what"] == what), None
        )
        if row is None:
            raise SystemExit(f"benchmarks/recorded/{program}.json has no row {what!r}")
        rows.append((label, *times_of({**row, "limit": row["limit"] or LIMITS.get(what, "")})))
    return rows


def text_of(seconds: float) -> str:
    for unit, size in UNITS_S.items():
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def put(axes, x: float, y: float, text: str, side: str, color: str) -> None:
    """Beside a dot, on its left or right."""
    axes.annotate(text, (x, y), (-8 if side == "left" else 8, 0), textcoords="offset points",
                  ha="right" if side == "left" else "left", va="center", fontsize=8.5, color=color,
                  zorder=6)  # fmt: skip


def draw(rows: list[tuple], file: pathlib.Path, title: str, note: str) -> None:
    """One line a row: our time, torch's, and a bar where the limit is; a logarithmic axis."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.hashsalt": "dcp_native", "font.family": "DejaVu Sans", "font.size": 10}
    )
    height = 0.36 * len(rows) + 1.25
    label_inches = 0.078 * max(len(row[0]) for row in rows) + 0.15
    width = label_inches + 6.2
    figure, axes = plt.subplots(figsize=(width, height))
    times = [t for row in rows for t in row[1:4] if t]
    low, high = min(times) / 2.2, max(times) * 1.7
    for y, (_label, ours, torch, limit, factor) in enumerate(rows):
        if torch:
            axes.plot(
                [ours, torch],
                [y, y],
                color="#d9d9d9",
                linewidth=5,
                zorder=1,
                solid_capstyle="round",
            )
            axes.plot(torch, y, "o", color=TORCH, markersize=8, zorder=3)
            text = f"{factor:.2g}x" if factor < 10 else f"{factor:.0f}x"
            axes.text(
                1.015,
                y,
                text,
                transform=axes.get_yaxis_transform(),
                va="center",
                fontweight="bold" if factor >= 1.2 else "normal",
                color=OURS if factor >= 1 else TORCH,
            )
        if limit:
            axes.plot([limit, limit], [y - 0.3, y + 0.3], color=LIMIT, linewidth=2, zorder=4)
        axes.plot(ours, y, "o", color=OURS, markersize=9, zorder=5)
        first = ours if torch is None or torch >= ours else torch
        near = limit is not None and first / 3.6 < limit < first
        put(
            axes,
            limit if near else first,
            y,
            text_of(first),
            "left",
            OURS if first == ours else TORCH,
        )
        if torch:
            last = torch if first == ours else ours
            put(axes, last, y, text_of(last), "right", TORCH if last == torch else OURS)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.6, high * 1.6)
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.tick_params(axis="y", length=0)
    ticks = [
        (1e-3, "1 ms"),
        (1e-2, "10 ms"),
        (1e-1, "0.1 s"),
        (1, "1 s"),
        (10, "10 s"),
        (100, "100 s"),
    ]
    ticks = [t for t in ticks if low / 1.6 < t[0] < high * 1.6]
    axes.set_xticks([t[0] for t in ticks], [t[1] for t in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(axis="x", color="#ececec", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles = [
        plt.Line2D(
            [], [], marker="o", color="w", markerfacecolor=OURS, markersize=9, label="dcp_native"
        ),
        plt.Line2D(
            [], [], marker="o", color="w", markerfacecolor=TORCH, markersize=9, label="stock torch"
        ),
        plt.Line2D(
            [],
            [],
            marker="|",
            color="w",
            markeredgecolor=LIMIT,
            markeredgewidth=2,
            markersize=12,
            label="the machine's limit",
        ),
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.005, 1.0),
        ncols=3,
        frameon=False,
        borderaxespad=0.1,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    axes.text(
        1.015,
        -0.85,
        "faster",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=8.5,
        color=GREY,
    )
    figure.text(0.995, 0.012, note, ha="right", fontsize=7.5, color=GREY)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.subplots_adjust(
        left=label_inches / width,
        right=1 - 0.72 / width,
        top=1 - 0.42 / height - (0.3 / height if title else 0),
        bottom=0.6 / height,
    )
    figure.savefig(file, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--add", type=pathlib.Path, nargs="+", default=[], help="results to record first"
    )
    p.add_argument("--program", help="whose results these are, when their names do not say")
    p.add_argument("--torch", default="2.13.0 (CPU)", help="the torch that they were measured with")
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
    PAGE.write_text(text, encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    first = next(iter(results.values()))["machine"]
    note = f"{first['cpu']}, {first['cores']} cores, ext4 on a virtual disk, torch {first['torch']}"
    draw(
        shown(results), PICTURES / "measured.svg", "", f"wall time where not CPU, log scale; {note}"
    )
    for name, result in results.items():
        if rows := plotted(result):
            draw(rows, PICTURES / f"{name}.svg", "", f"benchmarks/{name}.py, log scale; {note}")
    print(f"wrote {PAGE} and {PICTURES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
