"""metadata_file.py: the bytes of `.metadata`, the time until a load can plan, and its peak memory.

    python benchmarks/metadata_file.py                  # 256,000 chunks: about 2 minutes
    python benchmarks/metadata_file.py --files DIR      # what coordinator.py --files DIR left there
    python benchmarks/metadata_file.py --quick          # seconds; the test suite runs this

Both files describe the same checkpoint, which is checked. Ours is a pickle for stock readers and a
trailer with a flat index for our own; stock torch reads past neither. Times are CPU seconds, files
in memory. Ready to plan is, for torch, FileSystemReader.read_metadata() and its planner's set-up;
for us a load's open(): the file read, checked, and made flat arrays with a table of names. Peak
memory is all that our core had allocated at a time, the file's image included.
"""

import gc
import pathlib
import pickle
import sys
import tempfile
import time
from collections.abc import Callable

import coordinator
from program import finish, median_of, options, row, seconds, times
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dcp_native import _native

TARGET_SHARE = 0.5
TARGET_RATIO = {"torch": 25, "ours": 60}
TARGET_PEAK = 3.0


def pickle_bytes(path: pathlib.Path) -> int:
    """Where the pickle ends: what comes behind it is a trailer."""
    with open(path, "rb") as f:
        pickle.load(f)
        return f.tell()


def chunks_count(metadata: Metadata) -> int:
    return sum(
        len(entry.chunks) if isinstance(entry, TensorStorageMetadata) else 1
        for entry in metadata.state_dict_metadata.values()
    )


def timed(work: Callable[[], object]) -> Callable[[], float]:
    """`work` as a contender: CPU seconds; what it returns is freed outside."""

    def run() -> float:
        gc.collect()
        start = time.process_time()
        kept = work()
        seconds_ = time.process_time() - start
        del kept
        return seconds_

    return run


def stock_ready(path: pathlib.Path) -> object:
    metadata = FileSystemReader(path.parent).read_metadata()
    planner = DefaultLoadPlanner()
    planner.set_up_planner({}, metadata, True)
    return planner


def native_ready(path: pathlib.Path) -> object:
    load = _native.Load(_native.Group(), str(path.parent))
    if load.open(None) is not None or load.info()["unsupported"] is not None:
        raise RuntimeError(f"{path} does not load natively: {load.info()['unsupported']}")
    return load


def peak_share(path: pathlib.Path) -> float:
    """Peak memory of our reader, in lengths of the file."""
    _native._debug_peak_bytes()
    before = _native.live_bytes()
    load = native_ready(path)
    peak = _native._debug_peak_bytes() - before
    del load
    return peak / path.stat().st_size


def measure(files: pathlib.Path, repeats: int) -> tuple[dict, list[str]]:
    """Sizes and median times of `files`/ours/.metadata and `files`/torch/.metadata."""
    ours, theirs = files / "ours" / ".metadata", files / "torch" / ".metadata"
    medians = median_of(
        repeats,
        timed(lambda: stock_ready(ours)),
        timed(lambda: stock_ready(theirs)),
        timed(lambda: native_ready(ours)),
        timed(lambda: native_ready(theirs)),
    )
    read = [FileSystemReader(path.parent).read_metadata() for path in (ours, theirs)]
    details = {
        "chunks": chunks_count(read[0]),
        "ours_pickle_bytes": pickle_bytes(ours),
        "ours_file_bytes": ours.stat().st_size,
        "torch_file_bytes": theirs.stat().st_size,
        "peak_of_ours": peak_share(ours),
        "peak_of_torch": peak_share(theirs),
    }
    names = ("stock_reads_ours", "stock_reads_torch", "native_reads_ours", "native_reads_torch")
    details |= {f"{name}_cpu_s": s for name, s in zip(names, medians, strict=True)}
    return details, [f"metadata: {w}" for w in coordinator.same_metadata(*read)]


def rows_of(d: dict) -> list[dict]:
    torch_bytes, rows = d["torch_file_bytes"], []
    for what, key in (
        ("whole file", "ours_file_bytes"),
        ("pickle without trailer", "ours_pickle_bytes"),
    ):
        share = d[key] / torch_bytes
        rows.append(
            row(
                f"`.metadata` of {d['chunks']:,} chunks, {what}",
                f"{d[key] / 1e6:.3g} MB ({share:.0%} of torch's)",
                f"{torch_bytes / 1e6:.3g} MB",
                target=f"<= {TARGET_SHARE:.0%}",
                met=share <= TARGET_SHARE,
            )
        )
    ours, theirs = d["stock_reads_ours_cpu_s"], d["stock_reads_torch_cpu_s"]
    rows.append(
        row(
            "- stock torch reads it",
            f"{seconds(ours)} ({times(theirs, ours)} faster)",
            f"its own: {seconds(theirs)}",
            target="faster than its own",
            met=ours < theirs,
        )
    )
    for whose, what in (("torch", "torch's file"), ("ours", "our file")):
        ours, theirs = d[f"native_reads_{whose}_cpu_s"], d[f"stock_reads_{whose}_cpu_s"]
        target = TARGET_RATIO[whose]
        rows.append(
            row(
                f"- ready to plan, {what}",
                f"{seconds(ours)} ({times(theirs, ours)} faster)",
                seconds(theirs),
                target=f"{target}x",
                met=theirs >= target * ours,
            )
        )
        peak = d[f"peak_of_{whose}"]
        rows.append(
            row(
                f"- peak memory, {what}",
                f"{peak:.3g} times the file",
                target=f"<= {TARGET_PEAK:g}",
                met=peak <= TARGET_PEAK,
            )
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    p = options(__doc__, repeats=5)
    p.add_argument("--files", type=pathlib.Path, help="with ours/.metadata and torch/.metadata")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir="/dev/shm") as scratch:
        files, wrong = args.files, []
        if files is None:
            files = pathlib.Path(scratch)
            size = coordinator.QUICK if args.quick else coordinator.FULL
            _, wrong = coordinator.compare(files, **size, repeats=1)
        details, differs = measure(files, args.repeats)
    return finish(args, rows_of(details), details, wrong + differs)


if __name__ == "__main__":
    sys.exit(main())
