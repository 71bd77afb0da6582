"""What all pictures share: matplotlib as it is set up for them, and rows with names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .output import CommandError

MOST_BARS = 40
"""Rows that have the height of a name; of more they become thin, and only some are named."""
GAP_COLOR = "#e8e8e8"


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise CommandError("plot needs matplotlib: pip install 'dcp_native[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    found.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
         "text.parse_math": False}  # names may have dollars
    )  # fmt: skip
    return found


def check_kind(pyplot: Any, path: Path) -> None:
    """Whether matplotlib can write such a file, before anything is drawn."""
    known = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close("all")
    if path.suffix.lstrip(".") not in known:
        raise CommandError(f"{path}: no kind of picture; name a .png, .svg or .pdf")


def title(figure: Any, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11)


def rows(axes: Any, names: list[str], label: str) -> None:
    """Names beside the rows; of many only every second, fourth, eighth."""
    step = 1
    while len(names) > step * MOST_BARS:
        step *= 2
    axes.set_yticks(range(0, len(names), step), names[::step])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_ylabel(label)
    axes.tick_params(axis="y", length=0)
