"""draw_paths.py: the pictures of docs/architecture.md: the path of a save and of a load.

    python tools/draw_paths.py            docs/pictures/save.svg and load.svg (needs matplotlib)
    python tools/draw_paths.py out.png    both above each other, to look at

A picture has a lane for each who works or is changed, time from left to right.  Boxes say what is
done, arrows what waits for what.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys

PICTURES = pathlib.Path(__file__).resolve().parents[1] / "docs" / "pictures"

WORK, TOGETHER, IO, STATE = "#d7e8ee", "#f6dfc8", "#dfead2", "#ffffff"
LINE = "#444444"
LANE_HEIGHT, BOX_HEIGHT, LABEL_WIDTH = 1.0, 0.62, 1.75


@dataclasses.dataclass(frozen=True)
class Box:
    lane: int
    start: float
    end: float
    text: str
    color: str = WORK


@dataclasses.dataclass(frozen=True)
class Picture:
    lanes: list[str]
    boxes: dict[str, Box]
    arrows: list[tuple[str, str]]
    marks: list[tuple[float, str]]  # a line through all lanes, and what it says
    notes: list[tuple[float, float, str]]  # x, lane (between two of them), text


SAVE = Picture(
    lanes=["calling thread,\neach rank", "all ranks: gloo\nor NCCL", "CUDA devices,\nif any",
           "writer: io_uring\nor a thread", "the directory"],
    boxes={
        "state": Box(0, 0.0, 1.15, "state_dict()\nof Statefuls"),
        "claim": Box(0, 1.3, 2.35, "open, claim"),
        "flatten": Box(0, 2.5, 3.7, "flatten, plan:\n1-2 us an item"),
        "vote": Box(1, 3.85, 5.0, "vote: one\nall-reduce", TOGETHER),
        "slow": Box(1, 5.15, 6.98, "new plan: gather,\ndecide, scatter, install", TOGETHER),
        "copy": Box(0, 7.1, 9.2, "copy + CRC: into the ring,\nor (async) into an image"),
        "device": Box(2, 6.6, 8.5, "copies on our stream,\nto pinned memory", IO),
        "write": Box(3, 8.7, 10.15, "direct writes\nof 8 MiB", IO),
        "sync": Box(3, 10.25, 11.15, "fdatasync,\ndirectory", IO),
        "status": Box(1, 11.25, 12.3, "status: all\ndurable?", TOGETHER),
        "publish": Box(0, 12.45, 13.8, "coordinator:\npublish"),
        "result": Box(1, 13.95, 14.85, "result", TOGETHER),
        "sweep": Box(0, 15.0, 16.0, "sweep"),
        "claimed": Box(4, 1.3, 7.0, "old checkpoint + claim file", STATE),
        "growing": Box(4, 7.2, 12.7, "old checkpoint + claim + new data files", STATE),
        "renamed": Box(4, 12.85, 15.35, "rename: claim -> .metadata", STATE),
        "new": Box(4, 15.5, 16.6, "new alone", STATE),
    },
    arrows=[("state", "claim"), ("claim", "flatten"), ("flatten", "vote"), ("vote", "slow"),
            ("slow", "copy"), ("device", "copy"), ("copy", "write"), ("write", "sync"),
            ("sync", "status"), ("status", "publish"), ("publish", "result"), ("result", "sweep"),
            ("claim", "claimed"), ("write", "growing"), ("publish", "renamed"), ("sweep", "new")],
    marks=[(9.27, "async_save returns here; copies of devices may still run:\n"
                   "the rest goes on without the GIL and without collectives"),
           (12.85, "committed")],
    notes=[(5.05, 1.41, "left out while the last plan holds")],
)  # fmt: skip

LOAD = Picture(
    lanes=["calling thread,\neach rank", "all ranks: gloo\nor NCCL", "other ranks\nof the host",
           "readers: up to\n8 threads", "CUDA devices,\nif any", "memory of\nthe targets"],
    boxes={
        "open": Box(1, 0.0, 1.6, "coordinator reads\n.metadata, broadcast", TOGETHER),
        "parse": Box(0, 1.75, 3.1, "parse: our index,\nelse the pickle"),
        "targets": Box(0, 3.25, 4.5, "walk the targets,\nkeys="),
        "overlaps": Box(0, 4.65, 6.1, "overlaps by a tree\nof boxes; holes"),
        "status": Box(1, 6.25, 7.35, "status: all\nplanned?", TOGETHER),
        "cold": Box(3, 7.5, 10.4, "cold: O_DIRECT, straight or\nthrough 24 MiB of buffers", IO),
        "share": Box(2, 7.5, 10.4, "shared memory: each chunk\nread by one rank", IO),
        "hot": Box(0, 7.5, 10.4, "hot: mapped, one\nfused copy + CRC"),
        "check": Box(0, 10.55, 12.2, "check CRCs, cast,\nput into place"),
        "device": Box(4, 11.5, 13.3, "pinned slots, then\ncopies or a kernel", IO),
        "memory": Box(5, 7.7, 13.5, "filled in place; what was filled is known by name", STATE),
        "end": Box(1, 12.35, 13.5, "status: all\nfilled?", TOGETHER),
        "give": Box(0, 13.65, 15.2, "objects, report,\nload_state_dict()"),
    },
    arrows=[("open", "parse"), ("parse", "targets"), ("targets", "overlaps"),
            ("overlaps", "status"), ("status", "cold"), ("status", "share"), ("status", "hot"),
            ("cold", "check"), ("share", "check"), ("hot", "check"), ("check", "memory"),
            ("check", "device"), ("device", "memory"),
            ("cold", "memory"), ("check", "end"), ("end", "give")],
    marks=[(7.42, "from here on memory changes: a failure is a LoadException")],
    notes=[],
)  # fmt: skip


def draw_box(axes, box: Box) -> None:
    from matplotlib.patches import FancyBboxPatch

    y = -box.lane * LANE_HEIGHT
    axes.add_patch(
        FancyBboxPatch(
            (box.start, y - BOX_HEIGHT / 2), box.end - box.start, BOX_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.07", facecolor=box.color, edgecolor=LINE,
            linewidth=0.9, linestyle="--" if box.color == STATE else "-", zorder=3,
        )
    )  # fmt: skip
    x = (box.start + box.end) / 2
    axes.text(x, y, box.text, ha="center", va="center", fontsize=7.8, zorder=4)


def draw_arrow(axes, start: Box, end: Box) -> None:
    """Straight where it can be; else down and then right, or right and then up."""
    y_start, y_end = -start.lane * LANE_HEIGHT, -end.lane * LANE_HEIGHT
    half, bend = BOX_HEIGHT / 2, "arc3"
    if start.lane == end.lane:
        points = (start.end, y_start), (end.start, y_end)
    elif max(start.start, end.start) <= min(start.end, end.end) - 0.2:
        x = (max(start.start, end.start) + min(start.end, end.end)) / 2
        down = 1 if end.lane > start.lane else -1
        points = (x, y_start - down * half), (x, y_end + down * half)
    elif end.lane > start.lane:
        points, bend = ((start.end - 0.15, y_start - half), (end.start, y_end)), "angle"
        bend += ",angleA=90,angleB=0,rad=3"
    else:
        points, bend = ((start.end, y_start), (end.start + 0.15, y_end - half)), "angle"
        bend += ",angleA=0,angleB=90,rad=3"
    axes.annotate(
        "", points[1], points[0], zorder=2,
        arrowprops={"arrowstyle": "-|>", "color": LINE, "linewidth": 0.9, "shrinkA": 0,
                    "shrinkB": 0, "connectionstyle": bend},
    )  # fmt: skip


def draw(axes, picture: Picture) -> None:
    right = max(box.end for box in picture.boxes.values()) + 0.2
    for number, name in enumerate(picture.lanes):
        y = -number * LANE_HEIGHT
        axes.text(-LABEL_WIDTH, y, name, ha="left", va="center", fontsize=8.5, fontweight="bold")
        if number:
            above = y + LANE_HEIGHT / 2
            axes.plot([-LABEL_WIDTH, right], [above, above], color="#e6e6e6", linewidth=0.8)
    bottom = -(len(picture.lanes) - 0.5) * LANE_HEIGHT
    for x, text in picture.marks:
        axes.plot([x, x], [0.5, bottom], color="#c8553d", linewidth=1.1, linestyle=":", zorder=1)
        axes.text(x, 0.56, text, ha="center", va="bottom", fontsize=7.5, color="#c8553d")
    for x, lane, text in picture.notes:
        axes.text(x, -lane * LANE_HEIGHT, text, fontsize=7.5, color="#777777", va="center")
    for start, end in picture.arrows:
        draw_arrow(axes, picture.boxes[start], picture.boxes[end])
    for box in picture.boxes.values():
        draw_box(axes, box)
    axes.set_xlim(-LABEL_WIDTH - 0.05, right)
    axes.set_ylim(bottom - 0.02, 1.0)
    axes.axis("off")


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "dcp_native", "font.family": "DejaVu Sans"})
    pictures = {"save": SAVE, "load": LOAD}
    if len(sys.argv) > 1:
        figure, axes = plt.subplots(2, 1, figsize=(15.0, 7.6))
        for place, picture in zip(axes, pictures.values(), strict=True):
            draw(place, picture)
        figure.tight_layout()
        figure.savefig(sys.argv[1], dpi=110, facecolor="white")
        return
    for name, picture in pictures.items():
        figure, axes = plt.subplots(figsize=(15.0, 0.72 * len(picture.lanes) + 0.6))
        draw(axes, picture)
        figure.subplots_adjust(left=0.005, right=0.995, top=0.995, bottom=0.005)
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    main()
