"""pictures.py: the pictures of docs/benchmarks.md: a line for each row of a table.

Needs matplotlib when it draws, and only then.
"""

from __future__ import annotations

import pathlib

UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
OURS, TORCH, LIMIT, GREY = "#1f6f8b", "#c8553d", "#222222", "#8a8a8a"


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
