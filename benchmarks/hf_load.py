"""hf_load.py: loads of Hugging Face checkpoints beside torch and the machine's limit, in one run.

    python benchmarks/hf_load.py                 # 2 GB over 2 ranks, 2 GB of disk, about 2 minutes
    python benchmarks/hf_load.py --quick         # seconds

Rows of tensors are divided over the ranks, as FSDP divides them.  Cold: the page cache of the files
is dropped before every load; hot: it is warm.  The limit of a cold load is what plain direct reads
of the same files take, by one process; of a hot one, a memcpy of each rank's bytes.  The last rows
are fp8 weights that become bfloat16, hot, by one process.  Every load is compared with what was
written.  Contenders take turns; medians of the rounds.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from limits import Limits, drop_page_cache, settle, warm_page_cache
from program import markdown, row, seconds, times

COLD_SHARE = 0.85
FILES = 4
COLUMNS = 4096
BLOCK = 128


def _readers(quantised: bool) -> dict[str, Any]:
    from torch.distributed.checkpoint import hf_storage, quantized_hf_storage

    from dcp_native._hf_reader import HuggingFaceStorageReader
    from dcp_native.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    if quantised:
        return {
            "ours": QuantizedHuggingFaceStorageReader,
            "torch": quantized_hf_storage.QuantizedHuggingFaceStorageReader,
        }
    return {"ours": HuggingFaceStorageReader, "torch": hf_storage.HuggingFaceStorageReader}


def _names(files: int, per_file: int) -> list[list[str]]:
    return [[f"layers.{f}.{i}.weight" for i in range(per_file)] for f in range(files)]


def write_plain(where: pathlib.Path, total_bytes: int) -> dict[str, tuple[int, int]]:
    """bfloat16 matrices in a few files; their shapes by name."""
    from safetensors.torch import save_file

    per_file = 8
    rows = total_bytes // (FILES * per_file * COLUMNS * 2)
    shapes = {}
    for f, names in enumerate(_names(FILES, per_file)):
        made = torch.arange(rows * COLUMNS).remainder_(251).to(torch.bfloat16).view(rows, COLUMNS)
        tensors = {name: made + i for i, name in enumerate(names)}
        save_file(tensors, where / f"model-{f + 1:05}-of-{FILES:05}.safetensors")
        shapes.update(dict.fromkeys(names, (rows, COLUMNS)))
    return shapes


def write_quantised(where: pathlib.Path, total_bytes: int) -> dict[str, tuple[int, int]]:
    """fp8 matrices with the scales of their blocks, in one file."""
    from safetensors.torch import save_file

    names = _names(1, 8)[0]
    rows = max(total_bytes // (len(names) * COLUMNS) // BLOCK, 1) * BLOCK
    tensors: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names):
        made = torch.arange(rows * COLUMNS).add_(i).remainder_(120).to(torch.uint8)
        tensors[name] = made.view(rows, COLUMNS).view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(rows // BLOCK, COLUMNS // BLOCK)
    save_file(tensors, where / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (where / "model.safetensors.index.json").write_text(json.dumps(index))
    return dict.fromkeys(names, (rows, COLUMNS))


def _target(shapes: dict[str, tuple[int, int]], ranks: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    if ranks == 1:
        return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    mesh = init_device_mesh("cpu", (ranks,))
    return {
        name: DTensor.from_local(
            torch.zeros(shape[0] // ranks, shape[1], dtype=torch.bfloat16), mesh, [Shard(0)]
        )
        for name, shape in shapes.items()
    }


def _is_right(target: dict[str, Any], ranks: int, rank: int) -> bool:
    for index, tensor in enumerate(target.values()):
        local = tensor.to_local() if ranks > 1 else tensor
        first = rank * local.numel()
        want = torch.arange(first, first + local.numel()).remainder_(251).to(torch.bfloat16)
        if not torch.equal(local.flatten(), want + index % 8):
            return False
    return True


def _rank_main(rank: int, ranks: int, port: int, where: str, shapes: Any, runs: Any, out: Any):
    """Loads as told, each between two barriers; rank 0 tells the times."""
    import torch.distributed.checkpoint as torch_dcp

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    for who, cold in runs:
        target = _target(shapes, ranks)
        for tensor in target.values():
            tensor.to_local().fill_(1)
        if rank == 0:
            drop_page_cache(where) if cold else warm_page_cache(where)
        dist.barrier()
        start = time.perf_counter()
        torch_dcp.load(target, storage_reader=_readers(False)[who](where, thread_count=1))
        dist.barrier()
        took = time.perf_counter() - start
        out.put((rank, who, cold, took, _is_right(target, ranks, rank)))
    dist.destroy_process_group()


def sharded(where: pathlib.Path, ranks: int, total_bytes: int, rounds: int) -> tuple[list, bool]:
    """Rows of the cold and the hot load over `ranks` ranks."""
    shapes = write_plain(where, total_bytes)
    settle(str(where))
    runs = [
        (who, cold) for r in range(rounds) for cold in (True, False)
        for who in (("ours", "torch") if r % 2 == 0 else ("torch", "ours"))
    ]  # fmt: skip
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    port = 29400 + int(time.time()) % 500
    jobs = [
        context.Process(
            target=_rank_main, args=(rank, ranks, port, str(where), shapes, runs, out)
        )
        for rank in range(ranks)
    ]  # fmt: skip
    for job in jobs:
        job.start()
    found = [out.get(timeout=600) for _ in range(ranks * len(runs))]
    for job in jobs:
        job.join()
    files = sorted(where.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    limits = Limits()
    reads = []
    for _ in range(rounds):
        drop_page_cache(str(where))
        reads.append(sum(limits.read(str(file), file.stat().st_size & ~4095) for file in files))
    limit = {True: statistics.median(reads), False: limits.memcpy(total // ranks)}
    rows = []
    for cold in (True, False):
        mine = [(who, took) for rank, who, c, took, _ in found if rank == 0 and c == cold]
        ours, theirs = (
            statistics.median(took for who, took in mine if who == wanted)
            for wanted in ("ours", "torch")
        )
        share = limit[cold] / ours
        what = f"HF load of {total / 1e9:.2g} GB over {ranks} ranks, {'cold' if cold else 'hot'}"
        rows.append(row(
            what, f"{seconds(ours)} ({share:.0%} of the limit)",
            f"{seconds(theirs)} ({times(theirs, ours)})", seconds(limit[cold]),
            f"{COLD_SHARE:.0%} of the limit" if cold else "", share >= COLD_SHARE if cold else None,
        ))  # fmt: skip
    return rows, all(right for *_, right in found)


def quantised(where: pathlib.Path, total_bytes: int, rounds: int) -> tuple[list, bool]:
    """The row of fp8 weights that become bfloat16."""
    import torch.distributed.checkpoint as torch_dcp

    shapes = write_quantised(where, total_bytes)
    warm_page_cache(str(where))
    took: dict[str, list[float]] = {"ours": [], "torch": []}
    last: dict[str, Any] = {}
    for _ in range(rounds):
        for who, cls in _readers(True).items():
            target = _target(shapes, 1)
            for tensor in target.values():
                tensor.fill_(1)
            reader = cls(str(where), target_dtype=torch.bfloat16, block_size=BLOCK)
            start = time.perf_counter()
            torch_dcp.load(target, storage_reader=reader, no_dist=True)
            took[who].append(time.perf_counter() - start)
            last[who] = target
    right = all(torch.equal(last["ours"][name], last["torch"][name]) for name in shapes)
    ours, theirs = (statistics.median(took[who]) for who in ("ours", "torch"))
    total = sum(rows * columns for rows, columns in shapes.values())
    what = f"fp8 blocks to bfloat16, {total / 1e9:.2g}e9 values, hot"
    return [row(what, seconds(ours), f"{seconds(theirs)} ({times(theirs, ours)})")], right


def main() -> int:
    """Prints the table; 1 if a load was wrong."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mib", type=int, default=2048, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default=None, help="where the checkpoints are written")
    options = parser.parse_args()
    size = (32 if options.quick else options.mib) << 20
    rounds = 1 if options.quick else options.rounds
    rows, right = [], True
    for measure in (
        lambda where: sharded(where, 2, size, rounds),
        lambda where: quantised(where, size // 4, rounds),
    ):
        with tempfile.TemporaryDirectory(dir=options.dir) as where:
            more, fine = measure(pathlib.Path(where))
        rows += more
        right = right and fine
    print(markdown(rows))
    if not right:
        print("a load was wrong", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
