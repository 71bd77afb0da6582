"""plot: a picture of a checkpoint: bytes per rank, and where what lies in its files; of one tensor:
which rank wrote which box; or of a save or load: which rank was in which phase when."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from . import figures
from .checkpoint import NO_FILE, Checkpoint, Entry, rank_of
from .figures import GAP_COLOR, MOST_BARS
from .output import CommandError, Output
from .units import bytes_text, natural_order, shape_text

_MOST_GROUPS = 9
_OTHER = "other"
_GAP = "no record"


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="a picture of a checkpoint's files, of a tensor's shards, or of a save's time",
        description="Draws bytes per rank and a map of the data files, coloured by prefix of the "
        "keys; with KEY the boxes of that tensor, coloured by the rank that wrote them; with "
        "--timeline which rank was in which phase of a save or load when. Needs matplotlib (pip "
        "install 'dcp_native[plot]').",
    )
    parser.add_argument(
        "dir", type=Path, metavar="source",
        help="the checkpoint's directory; with --timeline a directory of traces or of reports in "
        "JSON, or one file of either",
    )  # fmt: skip
    parser.add_argument("key", nargs="?", help="a tensor")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .svg, .pdf"
    )
    parser.add_argument("--timeline", action="store_true", help="a save or load, by rank and phase")
    parser.add_argument(
        "--call", type=int, metavar="N",
        help="with --timeline: which save or load: 1 is the first, -1 the last (that one is drawn)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    if args.timeline:
        return _timeline(args, out)
    if args.call is not None:
        raise CommandError("--call is for --timeline")
    checkpoint = Checkpoint(args.dir)
    entry = None if args.key is None else checkpoint.entry(args.key)
    if entry is not None and not entry.shape:
        raise CommandError(f"{entry.key} has no dimensions to draw")
    pyplot = figures.pyplot()
    figures.check_kind(pyplot, args.output)
    figure = _files(pyplot, checkpoint) if entry is None else _tensor(pyplot, checkpoint, entry)
    figure.savefig(args.output, dpi=120)
    pyplot.close(figure)
    out.line(str(args.output))
    out.json({"file": str(args.output)})
    return 0


def _timeline(args: argparse.Namespace, out: Output) -> int:
    from . import timeline, timeline_figure

    if args.key is not None:
        raise CommandError("--timeline is of all tensors: leave out the key")
    calls = timeline.calls_of(args.dir)
    number = len(calls) if args.call is None else args.call
    number += len(calls) + 1 if number < 0 else 0
    if not 1 <= number <= len(calls):
        raise CommandError(f"there is no call {args.call}: {args.dir} has {len(calls)}")
    call = calls[number - 1]
    pyplot = figures.pyplot()
    figures.check_kind(pyplot, args.output)
    figure = timeline_figure.draw(pyplot, call)
    figure.savefig(args.output, dpi=120)
    pyplot.close(figure)
    out.line(f"{args.output}: {'; '.join(timeline.summary(call))}")
    if len(calls) > 1:
        out.line(f"call {number} of {len(calls)}; --call N draws another")
    out.json({"file": str(args.output), "call": number, "calls": len(calls), **call.facts()})
    return 0


# ---- files ----


def _files(pyplot: Any, checkpoint: Checkpoint) -> Any:
    groups, colors = _groups(pyplot, checkpoint)
    order = sorted(range(len(checkpoint.files)), key=lambda i: natural_order(checkpoint.files[i]))
    spans, ends = _spans(checkpoint, groups)
    by_rank = _by_rank(checkpoint, spans)
    tall = min(max(len(order), len(by_rank)), MOST_BARS)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 1.9 + 0.26 * max(tall, 4)), width_ratios=(2, 5), layout="constrained"
    )
    figures.title(
        figure,
        f"{checkpoint.path}   {bytes_text(sum(checkpoint.length))} in {len(checkpoint.files):,} "
        f"files of {len(by_rank):,} ranks",
    )
    _draw_ranks(left, by_rank, colors)
    _draw_files(right, checkpoint, order, spans, ends, colors)
    used = [name for name in colors if any(name in sizes for sizes in by_rank.values())]
    handles = [
        pyplot.Rectangle((0, 0), 1, 1, color=colors.get(name, GAP_COLOR)) for name in (*used, _GAP)
    ]
    figure.legend(
        handles, [*used, _GAP], loc="outside lower left", ncols=min(len(used) + 1, 6),
        frameon=False,
    )  # fmt: skip
    return figure


def _groups(pyplot: Any, checkpoint: Checkpoint) -> tuple[list[str], dict[str, Any]]:
    """Of each chunk the prefix that it is coloured by, and the colours, the largest first.

    As many parts of keys as it takes to see three groups of a hundredth at least, up to three.
    """
    depth, sizes, seen_most = 1, {}, 0
    for tried in (1, 2, 3):
        found = _sizes(checkpoint, tried)
        seen = sum(100 * size >= sum(found.values()) for size in found.values())
        if seen > seen_most:
            depth, sizes, seen_most = tried, found, seen
        if seen > 2:
            break
    least = sum(sizes.values()) / 2000  # less than that is not to be seen
    largest = sorted((n for n in sizes if sizes[n] >= least), key=lambda name: -sizes[name])
    if len(largest) > _MOST_GROUPS:
        largest = largest[: _MOST_GROUPS - 1]
    groups = [_OTHER] * len(checkpoint.file)
    for entry in checkpoint.entries:
        name = _prefix(entry.key, depth)
        if name in largest:
            for index in entry.chunks:
                groups[index] = name
    shades = pyplot.get_cmap("tab10").colors
    colors = dict(zip(largest, shades, strict=False))
    colors[_OTHER] = "#7f7f7f"
    return groups, colors


def _sizes(checkpoint: Checkpoint, depth: int) -> dict[str, int]:
    """Bytes of the records by prefix."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.entries:
        name = _prefix(entry.key, depth)
        sizes[name] = sizes.get(name, 0) + entry.stored_bytes
    return sizes


def _prefix(key: str, depth: int) -> str:
    return ".".join(key.split(".")[:depth])


_Spans = list[dict[str, list[tuple[int, int]]]]
"""Of each file, by group: where records of it begin, and how long they are."""


def _spans(checkpoint: Checkpoint, groups: list[str]) -> tuple[_Spans, list[int]]:
    """Neighbours of one group become one span; and the length of each file."""
    spans: _Spans = [{} for _ in checkpoint.files]
    ends = [0] * len(checkpoint.files)
    order = sorted(range(len(groups)), key=lambda i: (checkpoint.file[i], checkpoint.offset[i]))
    for index in order:
        file, at, length = (
            checkpoint.file[index],
            checkpoint.offset[index],
            checkpoint.length[index],
        )
        if file == NO_FILE:
            continue
        found = spans[file].setdefault(groups[index], [])
        if found and found[-1][0] + found[-1][1] == at == ends[file]:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((at, length))
        ends[file] = max(ends[file], at + length)
    for i, name in enumerate(checkpoint.files):
        try:
            ends[i] = max(ends[i], os.stat(checkpoint.path / name).st_size)
        except OSError:
            continue
    return spans, ends


def _by_rank(checkpoint: Checkpoint, spans: _Spans) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, groups in sorted(
        zip(checkpoint.files, spans, strict=True), key=lambda item: natural_order(item[0])
    ):
        rank = rank_of(name)
        sizes = found.setdefault("other files" if rank is None else str(rank), {})
        for group, parts in groups.items():
            sizes[group] = sizes.get(group, 0) + sum(length for _, length in parts)
    return found


def _draw_ranks(axes: Any, by_rank: dict[str, dict[str, int]], colors: dict[str, Any]) -> None:
    names = list(by_rank)
    for group, color in colors.items():
        lefts = [
            sum(by_rank[name].get(g, 0) for g in list(colors)[: list(colors).index(group)])
            for name in names
        ]
        widths = [by_rank[name].get(group, 0) for name in names]
        axes.barh(range(len(names)), widths, left=lefts, color=color, height=0.8)
    figures.rows(axes, names, "rank")
    axes.set_title("bytes per rank", loc="left", fontsize=10)
    _bytes_axis(axes)


def _draw_files(
    axes: Any, checkpoint: Checkpoint, order: list[int], spans: _Spans, ends: list[int],
    colors: dict[str, Any],
) -> None:  # fmt: skip
    for row, file in enumerate(order):
        axes.broken_barh([(0, ends[file])], (row - 0.4, 0.8), color=GAP_COLOR, linewidth=0)
        for group, parts in spans[file].items():
            axes.broken_barh(parts, (row - 0.4, 0.8), color=colors[group], linewidth=0)
    figures.rows(axes, [os.path.basename(checkpoint.files[file]) for file in order], "")
    axes.set_title("map of the files", loc="left", fontsize=10)
    _bytes_axis(axes)


def _bytes_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_text(value)))


def _round_text(value: float) -> str:
    number, unit = bytes_text(value).split()
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


# ---- one tensor ----


def _tensor(pyplot: Any, checkpoint: Checkpoint, entry: Entry) -> Any:
    """Boxes over the first two dimensions; those that differ in others alone lie on each other."""
    from matplotlib.ticker import MaxNLocator

    shape = entry.shape or ()
    rows, columns = (shape[0], shape[1]) if len(shape) > 1 else (1, shape[0])
    figure, axes = pyplot.subplots(figsize=(7, 5.5), layout="constrained")
    chunks = list(checkpoint.chunks(entry))
    ranks = sorted({-1 if c.file is None else _rank(c.file) for c in chunks})
    colors = _rank_colors(pyplot, len(ranks))
    for chunk in chunks:
        rank = -1 if chunk.file is None else _rank(chunk.file)
        offsets, sizes = (
            (chunk.offsets, chunk.sizes)
            if len(shape) > 1
            else ((0, *chunk.offsets), (1, *chunk.sizes))
        )
        axes.add_patch(pyplot.Rectangle(
            (offsets[1], offsets[0]), sizes[1], sizes[0], facecolor=colors(ranks.index(rank)),
            edgecolor="white", linewidth=1,
        ))  # fmt: skip
        if len(chunks) <= 64:
            text = "missing" if rank == -1 else f"rank {rank}" if rank >= 0 else "file"
            middle = offsets[1] + sizes[1] / 2, offsets[0] + sizes[0] / 2
            axes.text(*middle, text, ha="center", va="center", color="white", fontsize=8)
    axes.set_xlim(0, max(columns, 1))
    axes.set_ylim(max(rows, 1), 0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("dimension 1" if len(shape) > 1 else "dimension 0")
    axes.set_ylabel("dimension 0" if len(shape) > 1 else "")
    if len(shape) == 1:
        axes.set_yticks([])
    more = f" (dimensions 2 to {len(shape) - 1} not drawn)" if len(shape) > 2 else ""
    axes.set_title(
        f"{entry.key}\n{entry.dtype} {shape_text(shape)}, {len(chunks)} chunks of {len(ranks)} "
        f"ranks{more}",
        loc="left",
        fontsize=10,
    )
    return figure


def _rank_colors(pyplot: Any, count: int) -> Any:
    if count <= 10:
        return pyplot.get_cmap("tab10")
    return pyplot.get_cmap("tab20") if count <= 20 else pyplot.get_cmap("viridis", count)


def _rank(file: str) -> int:
    rank = rank_of(file)
    return -2 if rank is None else rank
