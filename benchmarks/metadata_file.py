"""metadata_file.py: the bytes of `.metadata`, and the time to read it, ours and torch's.

    python benchmarks/metadata_file.py                  # 256,000 chunks: about 2 minutes
    python benchmarks/metadata_file.py --files DIR      # what coordinator.py --files DIR left there
    python benchmarks/metadata_file.py --quick          # seconds; the test suite runs this

Both files describe the same checkpoint, which is checked. Ours is a pickle for stock readers and a
trailer with a flat index for our own; stock torch reads past neither. Times are CPU seconds, files
in memory; stock: FileSystemReader.read_metadata(); ours: the reader of a load, into flat arrays.
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
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dcp_native import _native

TARGET_SHARE = 0.5


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
        start = time.thread_time()
        kept = work()
        seconds_ = time.thread_time() - start
        del kept
        return seconds_

    return run


def measure(files: pathlib.Path, repeats: int) -> tuple[dict, list[str]]:
    """Sizes and median times of `files`/ours/.metadata and `files`/torch/.metadata."""
    ours, theirs = files / "ours" / ".metadata", files / "torch" / ".metadata"
    images = {path: path.read_bytes() for path in (ours, theirs)}

    def stock(path: pathlib.Path) -> Callable[[], float]:
        return timed(FileSystemReader(path.parent).read_metadata)

    def native(path: pathlib.Path) -> Callable[[], float]:
        return timed(lambda: _native._debug_targets(images[path], {}, allow_partial_load=True))

    medians = median_of(repeats, stock(ours), stock(theirs), native(ours), native(theirs))
    read = [FileSystemReader(path.parent).read_metadata() for path in (ours, theirs)]
    details = {
        "chunks": chunks_count(read[0]),
        "ours_pickle_bytes": pickle_bytes(ours),
        "ours_file_bytes": ours.stat().st_size,
        "torch_file_bytes": theirs.stat().st_size,
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
    ours, theirs = d["native_reads_ours_cpu_s"], d["native_reads_torch_cpu_s"]
    rows.append(row("- our reader reads it", seconds(ours), f"torch's file: {seconds(theirs)}"))
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
