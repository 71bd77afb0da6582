"""report.py: turns the samples of a benchmark into medians, tables and ratios."""

import statistics

OPERATIONS = ("save", "load")


def summarize(samples: dict) -> dict:
    """Medians by contender and operation; of the memory the largest, warm-up included."""
    out = {}
    for contender, operations in samples.items():
        for operation, results in operations.items():
            counted = [r for r in results if not r.get("warm_up")]
            walls = [r["wall_s"] for r in counted]
            out.setdefault(contender, {})[operation] = {
                "wall_s": statistics.median(walls),
                "best_s": min(walls),
                "first_s": walls[0],
                "cpu_s": statistics.median(r["cpu_s"] for r in counted),
                "extra_bytes": max(r["extra_bytes"] for r in results),
            }
    return out


def _row(name: str, operations: dict, total_bytes: int) -> str:
    cells = [f"  {name:<33}"]
    for operation in OPERATIONS:
        s = operations.get(operation)
        if s is None:
            cells.append(" " * 34)
            continue
        rate = total_bytes / 1e9 / s["wall_s"]
        extra = s["extra_bytes"] / 1e6
        cells.append(f"{s['wall_s']:8.3f} {rate:7.2f} {s['cpu_s']:7.2f} {extra:9.0f}")
    return " |".join(cells).rstrip(" |")


def quickest(summary: dict, names: list[str], operation: str) -> dict | None:
    """Of the contenders `names` the quickest at `operation`."""
    having = [summary[n][operation] for n in names if operation in summary.get(n, {})]
    return min(having, key=lambda s: s["wall_s"], default=None)


def ratios(summary: dict, stock: list[str], rivals: list[str]) -> list[str]:
    """ours : torch : limit, in units of the limit's wall time; torch at its better setting. Then
    how much faster we are than each of the rivals.
    """
    lines = []
    for operation in OPERATIONS:
        ours, limit = (summary.get(n, {}).get(operation) for n in ("dcp_native", "limit"))
        if ours is None or limit is None:
            continue
        if best := quickest(summary, stock, operation):
            lines.append(
                f"  {operation}: ours : torch : limit = {ours['wall_s'] / limit['wall_s']:.2f}"
                f" : {best['wall_s'] / limit['wall_s']:.2f} : 1"
                f"   ({best['wall_s'] / ours['wall_s']:.1f}x faster than torch,"
                f" CPU 1 : {best['cpu_s'] / max(ours['cpu_s'], 0.001):.1f})"
            )
        others = {n: summary[n][operation] for n in rivals if operation in summary.get(n, {})}
        texts = [f"{n} {s['wall_s'] / ours['wall_s']:.2f}x" for n, s in others.items()]
        if texts:
            lines.append(f"  {operation}, their time over ours: {', '.join(texts)}")
    first, best = summary.get("dcp_native first"), quickest(summary, stock[:1], "save")
    if first is not None and best is not None:
        lines.append(
            f"  save: first {best['wall_s'] / first['save']['wall_s']:.1f}x, steady"
            f" {best['wall_s'] / summary['dcp_native']['save']['wall_s']:.1f}x faster than torch"
        )
    return lines


def _order(name: str) -> tuple:
    return (" reads " in name, name == "memcpy", name == "limit")


def table(title: str, case: dict, stock: list[str], rivals: list[str]) -> str:
    """The table of one case as text."""
    head = f"{'wall s':>8} {'GB/s':>7} {'CPU s':>7} {'extra MB':>9}"
    size = f"{case['bytes'] / 1e9:.3f} GB of tensors, {case['tensors_per_rank']} tensors per rank"
    lines = [
        f"\n{title}: {size}; median of {case['repeats']}",
        f"  {'':<33} |{head} |{head}",
        f"  {'':<33} |{'-- save --':^34} |{'-- load --':^34}".rstrip(),
    ]
    summary = case["summary"]
    lines += [_row(name, summary[name], case["bytes"]) for name in sorted(summary, key=_order)]
    return "\n".join(lines + ratios(summary, stock, rivals))
