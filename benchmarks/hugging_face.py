"""hugging_face.py: exports to Hugging Face files by two ranks, all in: write, consolidate, index.

    python benchmarks/hugging_face.py                # 2 GB over 2 ranks
    python benchmarks/hugging_face.py --quick        # tiny: proves the program

Both sides save the same sharded state through their own `save` and HuggingFaceStorageWriter with
save_distributed and enable_consolidation, into one file (the layout of a file per 5 GB). "rows":
all weights sharded along dim 0; "columns": along dim 1, so that every rank writes short rows
between the other's. wall: from a barrier to the end of the slowest rank, everything on the disk;
torch does not sync what it consolidates, so it gets a sync of the file system. extra: most memory
of a rank beyond what it held before. limit: direct writes of as many bytes, by both ranks at once.
Every export is read back with the safetensors package and compared.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial

import limits
import program
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import torch.multiprocessing as mp
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter as TorchWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dcp_native as dcp
from dcp_native.hf_storage import HuggingFaceStorageWriter

RANKS = 2
TARGET_TIMES = 8
TARGET_EXTRA_BYTES = 64 << 20
CASES = {"rows": 0, "columns": 1}


def build(case: str, quick: bool) -> dict[str, torch.Tensor]:
    """A model of bfloat16 blocks, norms among them; 2 GB."""
    width, blocks = (256, 2) if quick else (4096, 7)
    mesh = init_device_mesh("cpu", (RANKS,))
    shapes = {}
    for i in range(blocks):
        for name in ("q", "k", "v", "o"):
            shapes[f"layers.{i}.{name}.weight"] = (width, width)
        shapes[f"layers.{i}.up.weight"] = (2 * width, width)
        shapes[f"layers.{i}.down.weight"] = (width, 2 * width)
        shapes[f"layers.{i}.norm.weight"] = (width,)
    shapes["embed.weight"] = (8 * width, width)
    state = {}
    for number, (name, shape) in enumerate(shapes.items()):
        dim = min(CASES[case], len(shape) - 1)
        local = list(shape)
        local[dim] //= RANKS
        generator = torch.Generator().manual_seed(number * RANKS + dist.get_rank())
        values = torch.empty(local, dtype=torch.bfloat16)
        values.view(torch.int16).random_(-(1 << 14), 1 << 14, generator=generator)
        state[name] = DTensor.from_local(values, mesh, [Shard(dim)], run_check=False)
    return state


def differing(path: str, state: dict[str, DTensor]) -> list[str]:
    """Tensors of which this rank's part is not what the files have."""
    with open(f"{path}/model.safetensors.index.json", encoding="utf-8") as f:
        weight_map = json.load(f)["weight_map"]
    wrong = [name for name in state if name not in weight_map]
    for file in set(weight_map.values()):
        with safe_open(f"{path}/{file}", "pt") as f:
            for name in (n for n in state if weight_map.get(n) == file):
                local, dim = state[name].to_local(), state[name].placements[0].dim
                saved = f.get_tensor(name).chunk(RANKS, dim)[dist.get_rank()]
                if not torch.equal(saved.view(torch.int16), local.view(torch.int16)):
                    wrong.append(name)
    return wrong


def export(side: str, path: str, state: dict[str, DTensor]) -> None:
    cls, save = {
        "ours": (HuggingFaceStorageWriter, dcp.save),
        "torch": (TorchWriter, torch_dcp.save),
    }[side]
    writer = cls(path, save_distributed=True, enable_consolidation=True)
    save(state, storage_writer=writer)
    if side == "torch":
        limits.settle(path)


def timed(what) -> tuple[float, int]:
    """Seconds of the slowest rank; most extra bytes of a rank."""
    limits.release_free_memory()
    limits.restart_peak()
    before = limits.status_bytes("VmRSS")
    dist.barrier()
    start = time.monotonic()
    what()
    numbers = torch.tensor(
        [time.monotonic() - start, limits.status_bytes("VmHWM") - before], dtype=torch.float64
    )
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers[0].item(), int(numbers[1].item())


def measure(case: str, args: argparse.Namespace, where: str) -> dict:
    state = build(case, args.quick)
    own = sum(t.to_local().nbytes for t in state.values())
    limit = limits.Limits(own)
    samples = {"ours": [], "torch": [], "limit": []}
    wrong = []
    for turn in range(args.repeats):
        for side in list(samples)[:: 1 if turn % 2 else -1]:
            path = f"{where}/{side}"
            if side == "limit":
                file = f"{path}{dist.get_rank()}"
                samples[side].append(timed(partial(limit.write, file, own)))
                os.unlink(file)
            else:
                samples[side].append(timed(partial(export, side, path, state)))
                wrong += [f"{case}, {side}: {name}" for name in differing(path, state)]
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.rmtree(path)
            limits.settle(where)
            dist.barrier()
    bad = [None] * RANKS
    dist.all_gather_object(bad, wrong)
    found = {"bytes": own * RANKS, "wrong": [text for texts in bad for text in texts]}
    for side, pairs in samples.items():
        found[side] = {
            "wall_s": statistics.median(s for s, _ in pairs),
            "walls_s": [s for s, _ in pairs],
            "extra_bytes": max(b for _, b in pairs),
        }
    return found


def run_rank(rank: int, args: argparse.Namespace, where: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}/rendezvous", rank=rank, world_size=RANKS
    )
    results = {case: measure(case, args, where) for case in CASES}
    if rank == 0:
        pathlib.Path(where, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def rows_of(results: dict) -> list[dict]:
    rows = []
    for case, found in results.items():
        ours, torch_, limit = (found[side] for side in ("ours", "torch", "limit"))
        what = f"HF export of {found['bytes'] / 1e9:.2f} GB, 2 ranks, {case}"
        rows.append(
            program.row(
                f"{what}: wall",
                program.seconds(ours["wall_s"]),
                program.seconds(torch_["wall_s"]),
                program.seconds(limit["wall_s"]),
                f"{TARGET_TIMES}x",
                torch_["wall_s"] >= TARGET_TIMES * ours["wall_s"],
            )
        )
        rows.append(
            program.row(
                f"{what}: extra memory of a rank",
                f"{ours['extra_bytes'] / 2**20:.1f} MiB",
                f"{torch_['extra_bytes'] / 2**20:.1f} MiB",
                "",
                "64 MiB",
                ours["extra_bytes"] <= TARGET_EXTRA_BYTES,
            )
        )
    return rows


def main() -> int:
    parser = program.options(__doc__, 3)
    parser.add_argument("--dir", type=pathlib.Path, default=program.ROOT / "build")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir=args.dir) as where:
        mp.spawn(run_rank, (args, where), RANKS)
        results = json.loads(pathlib.Path(where, "results.json").read_text(encoding="utf-8"))
    wrong = [text for found in results.values() for text in found["wrong"]]
    return program.finish(args, rows_of(results), results, wrong)


if __name__ == "__main__":
    sys.exit(main())
