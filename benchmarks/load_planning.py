"""load_planning.py: what a load pays before its first byte: metadata and read plans, beside torch.

    python benchmarks/load_planning.py            # 256 ranks x 1000 tensors: about 3 minutes
    python benchmarks/load_planning.py --quick    # seconds; the test suite runs this

Metadata: from a `.metadata` file in the page cache to what planning starts from, FileSystemReader's
read_metadata() beside the opening of a load of ours, both on the file that stock torch wrote of a
job and on ours of the same job (coordinator.py makes them). Peak memory: growth of the peak of
resident memory in a process of its own, file included.

Planning: from that metadata and a state dict to read items, set_up_planner() and
create_local_plan() beside ours; the items must be the same. read_plan_scaling.c splits our part.
Times are CPU seconds of the process.
"""

import concurrent.futures
import gc
import multiprocessing
import pathlib
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import coordinator
import torch
import torch.distributed as dist
from limits import release_free_memory, restart_peak, status_bytes
from metadata_file import chunks_count
from program import c_program, finish, median_of, options, row, seconds, times
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_native import _native

RANKS, RANK = 8, 5
CHUNKS = {"full": 4096, "quick": 64}
CHUNK_SHAPE = (4, 8)
PLAN_RATIO = 100
READ_RATIO = {"torch": 25, "ours": 60}
PEAK_OF_FILE = 3
LEAST_S = 0.02  # of CPU time, for a figure


def opened(directory: pathlib.Path) -> _native.Load:
    """A load of ours whose metadata is read: ready to plan."""
    load = _native.Load(_native.Group(), str(directory))
    if failures := load.open(None):
        raise RuntimeError(f"opening {directory}: {failures}")
    return load


def read_by_torch(directory: pathlib.Path) -> Metadata:
    return FileSystemReader(directory).read_metadata()


READERS = {"ours": opened, "torch": read_by_torch}


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """`work` as a contender: CPU seconds of all threads, short work run many times; what it returns
    is freed outside.
    """

    def run() -> float:
        gc.collect()
        runs, spent = 0, 0.0
        while runs == 0 or spent < LEAST_S:
            start = time.process_time()
            kept = work()
            spent += time.process_time() - start
            runs += 1
            del kept
        return spent / runs

    return run


# ---- metadata ----


def _peak(reader: str, directory: str, warm_up: str) -> int:
    """In a process of its own: by how much reading a file raises the peak of resident memory."""
    read = READERS[reader]
    read(pathlib.Path(warm_up))
    gc.collect()
    release_free_memory()
    restart_peak()
    before = status_bytes("VmRSS")
    kept = read(pathlib.Path(directory))
    grown = status_bytes("VmHWM") - before
    del kept
    return grown


def peak_bytes(reader: str, directory: pathlib.Path, warm_up: pathlib.Path) -> int:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_peak, reader, str(directory), str(warm_up)).result()


def metadata_rows(files: pathlib.Path, small: pathlib.Path, repeats: int) -> tuple[list, dict]:
    rows, details = [], {}
    for whose, title in (("torch", "stock"), ("ours", "our own")):
        path = files / whose
        file_bytes = (path / ".metadata").stat().st_size
        ours_s, torch_s = median_of(
            repeats, timed(lambda p=path: opened(p)), timed(lambda p=path: read_by_torch(p))
        )
        peaks = {reader: peak_bytes(reader, path, small) for reader in READERS}
        chunks = chunks_count(read_by_torch(path))
        details[f"metadata, {title}"] = {
            "chunks": chunks,
            "file_bytes": file_bytes,
            "ours_cpu_s": ours_s,
            "torch_cpu_s": torch_s,
            "ours_peak_bytes": peaks["ours"],
            "torch_peak_bytes": peaks["torch"],
        }
        rows.append(
            row(
                f"`.metadata` of {chunks:,} chunks, {title} file -> ready to plan, CPU",
                seconds(ours_s),
                f"{seconds(torch_s)} ({times(torch_s, ours_s)})",
                target=f">= {READ_RATIO[whose]}x",
                met=torch_s / ours_s >= READ_RATIO[whose],
            )
        )
        rows.append(
            row(
                f"- peak memory, file of {file_bytes / 1e6:.3g} MB",
                f"{peaks['ours'] / 1e6:.3g} MB ({peaks['ours'] / file_bytes:.1f}x the file)",
                f"{peaks['torch'] / 1e6:.3g} MB ({peaks['torch'] / file_bytes:.1f}x)",
                target=f"<= {PEAK_OF_FILE}x the file",
                met=peaks["ours"] <= PEAK_OF_FILE * file_bytes,
            )
        )
    return rows, details


# ---- planning ----


def write_one_tensor(directory: pathlib.Path, chunks_count: int) -> None:
    """`.metadata` of one tensor that `chunks_count` ranks saved by rows."""
    rows, columns = CHUNK_SHAPE
    chunks = [
        ChunkStorageMetadata(torch.Size((rows * i, 0)), torch.Size(CHUNK_SHAPE))
        for i in range(chunks_count)
    ]
    size = torch.Size((rows * chunks_count, columns))
    entry = TensorStorageMetadata(TensorProperties(torch.float32), size, chunks)
    stored = {
        MetadataIndex("weight", chunk.offsets, i): _StorageInfo(f"__{i}_0.distcp", 0, 512)
        for i, chunk in enumerate(chunks)
    }
    directory.mkdir()
    (directory / ".metadata").write_bytes(
        pickle.dumps(Metadata({"weight": entry}, {"weight": ("weight",)}, stored))
    )


def sharded_target(metadata: Metadata) -> dict:
    """The tensor of `write_one_tensor` as one of RANKS ranks wants it."""
    rows, columns = metadata.state_dict_metadata["weight"].size
    mesh = init_device_mesh("cpu", (RANKS,))
    local = torch.empty(rows // RANKS, columns)
    return {"weight": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}


def whole_target(metadata: Metadata) -> dict:
    """Everything whole.  Planning looks at no element, so all tensors share memory."""
    entries = metadata.state_dict_metadata
    sizes = {k: e.size for k, e in entries.items() if isinstance(e, TensorStorageMetadata)}
    base = torch.empty(max(size.numel() for size in sizes.values()))
    return {k: base[: sizes[k].numel()].view(sizes[k]) if k in sizes else 0 for k in entries}


def torch_plan(metadata: Metadata, target: dict) -> list:
    planner = DefaultLoadPlanner()
    planner.set_up_planner(target, metadata, is_coordinator=False)
    return planner.create_local_plan().items


def plan_differences(image: bytes, items: list, target: dict) -> list[str]:
    """What our plan reads that torch's does not, and the other way round."""
    ours = _native._debug_targets(image, target, items=True)
    got = set()
    for index, *item in ours["items"]:
        got.add((ours["targets"][index][0], *item))
    expected = {
        (item.storage_index.fqn, 0, (), (), ())
        if item.type is LoadItemType.BYTE_IO
        else (
            item.storage_index.fqn,
            item.storage_index.index,
            tuple(item.storage_offsets),
            tuple(item.dest_offsets),
            tuple(item.lengths),
        )
        for item in items
    }
    return [f"{len(got ^ expected)} items differ from torch's"] if got != expected else []


def planning_row(
    what: str, directory: pathlib.Path, make: Callable[[Metadata], dict], repeats: int
) -> tuple[dict, dict, list[str]]:
    metadata, load = read_by_torch(directory), opened(directory)
    target = make(metadata)
    items = torch_plan(metadata, target)
    wrong = plan_differences((directory / ".metadata").read_bytes(), items, target)
    ours_s, torch_s = median_of(
        repeats,
        timed(lambda: load.targets(target)),
        timed(lambda: torch_plan(metadata, target)),
    )
    details = {"items": len(items), "ours_cpu_s": ours_s, "torch_cpu_s": torch_s}
    shown = row(
        f"planning, {what} ({len(items):,} reads), CPU",
        f"{seconds(ours_s)} ({ours_s / len(items) * 1e9:.0f} ns each)",
        f"{seconds(torch_s)} ({times(torch_s, ours_s)})",
        target=f">= {PLAN_RATIO}x",
        met=torch_s / ours_s >= PLAN_RATIO,
    )
    return shown, details, [f"{what}: {w}" for w in wrong]


def grid_rows(quick: bool) -> tuple[list[dict], list[dict]]:
    found = c_program("read_plan_scaling", *(["--quick"] if quick else []))
    rows = [
        row(
            f"- overlaps alone, {f['name']}",
            f"{seconds(f['build_ns'] / 1e9)}, {f['build_ns'] / f['overlaps']:.0f} ns each",
        )
        for f in found
        if "grid" in f["name"]
    ]
    return rows, found


def main(argv: list[str] | None = None) -> int:
    args = options(__doc__, repeats=3).parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=RANK, world_size=RANKS, store=FakeStore())
    rows, details, wrong = [], {}, []
    size = coordinator.QUICK if args.quick else coordinator.FULL
    chunks = CHUNKS["quick" if args.quick else "full"]
    with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir="/dev/shm") as scratch:
        files = pathlib.Path(scratch)
        write_one_tensor(files / "one", chunks)
        _, wrong = coordinator.compare(files, **size, repeats=1)
        shapes = (
            (f"{chunks:,} chunks of a tensor -> 1 of {RANKS} shards", "one", sharded_target),
            (f"{size['tensors']:,} tensors x {size['ranks']} -> 1 rank", "torch", whole_target),
        )
        for what, name, make in shapes:
            shown, details[what], differs = planning_row(what, files / name, make, args.repeats)
            rows.append(shown)
            wrong += differs
        grids, details["overlaps"] = grid_rows(args.quick)
        read, found = metadata_rows(files, files / "one", args.repeats)
    dist.destroy_process_group()
    return finish(args, rows + grids + read, details | found, wrong)


if __name__ == "__main__":
    sys.exit(main())
