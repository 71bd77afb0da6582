"""The picture of a timeline: a lane for each rank, its phases as coloured bars."""

from __future__ import annotations

from typing import Any

from . import figures
from .timeline import Call, summary
from .units import seconds_text

_COLORS = {
    "wait": "#c7c7c7", "state_dict": "#bcbd22", "open": "#9467bd", "flatten": "#c5b0d5",
    "plan": "#e377c2", "agree": "#ff7f0e", "compare": "#17becf", "stage": "#2ca02c",
    "write": "#1f77b4", "read": "#1f77b4", "commit": "#d62728", "publish": "#8c564b",
    "settle": "#f4a582",
}  # fmt: skip
"""The same in every picture, so that two can be compared."""
_MORE_COLORS = ("#98df8a", "#aec7e8", "#dbdb8d", "#9edae5")
_DARK_TEXT = frozenset({"wait", "flatten", "settle", "state_dict"})
_OTHER = "other phases"
_OTHER_COLOR = "#8a8a8a"
_LEAST_SHARE = 0.004
"""Phases shorter than that on every rank are not told apart."""
_GAP = "between phases"
_RETURN_COLOR = "black"
_LANE_HEIGHT = 0.76
_THIN_LANE_HEIGHT = 1.0
_LETTER_SHARE = 0.0095
"""Width of a letter in a bar, as a share of the axis."""


def draw(pyplot: Any, call: Call) -> Any:
    names = [str(lane.rank) for lane in call.lanes]
    height = 1.75 + 0.34 * min(max(len(names), 3), figures.MOST_BARS)
    figure, axes = pyplot.subplots(figsize=(11, height), layout="constrained")
    figures.title(figure, "\n".join(summary(call)))
    colors = _colors(call)
    _draw_bars(axes, call, colors)
    figures.rows(axes, names, "rank")
    axes.set_xlim(0, call.total_s or 1.0)
    axes.set_xlabel(
        "seconds since the first rank began"
        if call.has_times
        else "seconds in each phase (reports do not say when it began)"
    )
    handles, labels = _legend(pyplot, call, colors)
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False)
    return figure


def _colors(call: Call) -> dict[str, str]:
    """Of the phases that are told apart, the longest first."""
    more = iter(_MORE_COLORS)
    found = {}
    for name, (took_s, _) in call.longest().items():
        if took_s < _LEAST_SHARE * call.total_s:
            break
        color = _COLORS.get(name) or next(more, None)
        if color is not None:
            found[name] = color
    return found


def _draw_bars(axes: Any, call: Call, colors: dict[str, str]) -> None:
    from matplotlib.collections import PolyCollection

    is_thin = len(call.lanes) > figures.MOST_BARS
    height = _THIN_LANE_HEIGHT if is_thin else _LANE_HEIGHT
    boxes: dict[str, list[Any]] = {_GAP: []}
    for row, lane in enumerate(call.lanes):
        boxes[_GAP].append(_box(row, height, lane.begin_s, lane.end_s))
        for name, begin_s, end_s in lane.spans:
            shown = name if name in colors else _OTHER
            boxes.setdefault(shown, []).append(_box(row, height, begin_s, end_s))
            letters = len(name) + 1
            if not is_thin and end_s - begin_s > letters * _LETTER_SHARE * call.total_s:
                axes.text(
                    (begin_s + end_s) / 2, row, name, ha="center", va="center_baseline",
                    fontsize=8, color="#222222" if name in _DARK_TEXT else "white",
                )  # fmt: skip
    returns = [(row, lane.returned_s) for row, lane in enumerate(call.lanes)
               if lane.returned_s is not None]  # fmt: skip
    axes.vlines(
        [at_s for _, at_s in returns], [row - 0.5 for row, _ in returns],
        [row + 0.5 for row, _ in returns], color=_RETURN_COLOR, linewidth=1.8, zorder=3,
    )  # fmt: skip
    known = {_GAP: figures.GAP_COLOR, **colors, _OTHER: _OTHER_COLOR}
    for name, polygons in boxes.items():
        axes.add_collection(PolyCollection(polygons, facecolors=known[name], linewidths=0))


def _box(row: int, height: float, begin_s: float, end_s: float) -> list[tuple[float, float]]:
    top, bottom = row - height / 2, row + height / 2
    return [(begin_s, top), (end_s, top), (end_s, bottom), (begin_s, bottom)]


def _legend(pyplot: Any, call: Call, colors: dict[str, str]) -> tuple[list[Any], list[str]]:
    """Each phase with the longest time in it, and on which rank that was."""
    longest = call.longest()
    labels = {
        name: f"{name}: {seconds_text(longest[name][0])}"
        + (f" (rank {longest[name][1]})" if len(call.lanes) > 1 else "")
        for name in colors
    }
    shown = dict(colors)
    if len(longest) > len(colors):
        shown[_OTHER] = _OTHER_COLOR
    shown[_GAP] = figures.GAP_COLOR
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in shown.values()]
    texts = [labels.get(name, name) for name in shown]
    if any(lane.returned_s is not None for lane in call.lanes):
        handles.append(pyplot.Line2D([], [], color=_RETURN_COLOR, linewidth=1.8))
        texts.append(f"{call.kind} returned")
    return handles, texts
