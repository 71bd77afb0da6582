"""split_replicated.py: what dividing a dominant replicated tensor does for a DDP job.

    python benchmarks/split_replicated.py                 # 1 GiB + 100 x 4 MiB in /dev/shm, 2 ranks
    python benchmarks/split_replicated.py --ranks 4 --dir /mnt/nvme

All ranks hold the same tensors, one of them as large as hundreds of the others. The same processes
save them with config.split_replicated "off" and "auto" in turn. most: bytes of the rank that writes
most, beside the mean; on disks and network links of their own, ranks take as long as that one.
wall: from a barrier to the end of the slowest rank, median; ranks of one machine share its memory
and disk, so this shows the copies and checksums that run side by side, not more bandwidth. Every
checkpoint is loaded by stock torch and compared. Exits with 1 if anything differs.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import torch.multiprocessing as mp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dcp_native as dcp

SETTINGS = ("off", "auto")


def build(large_mib: int, small_count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {f"layers.{i}.weight": (1024, 1024) for i in range(small_count)}
    shapes["embedding.weight"] = (large_mib * 256, 1024)
    return {
        name: torch.empty(shape).view(torch.int32).random_(generator=generator).view(torch.float32)
        for name, shape in shapes.items()
    }


def differing(path: str, state: dict[str, torch.Tensor]) -> list[str]:
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch_dcp.load(target, checkpoint_id=path, no_dist=True)
    return [
        n for n, t in state.items() if not t.view(torch.int32).equal(target[n].view(torch.int32))
    ]


def run_rank(rank: int, options: argparse.Namespace, where: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}/rendezvous", rank=rank, world_size=options.ranks
    )
    state = build(options.large_mib, options.small_count)
    path, wrong, rows = f"{where}/checkpoint", [], {}
    for turn in range(options.repeats + 1):  # the first one also makes plans and connections
        for setting in SETTINGS[:: 1 if turn % 2 else -1]:
            if rank == 0:
                shutil.rmtree(path, ignore_errors=True)
            dcp.configure(split_replicated=setting)
            dist.barrier()
            start = time.monotonic()
            dcp.save(state, checkpoint_id=path)
            wall_s = torch.tensor(time.monotonic() - start)
            report = dcp.last_report() or {}
            dist.all_reduce(wall_s, dist.ReduceOp.MAX)
            bytes_of = [None] * options.ranks
            dist.all_gather_object(bytes_of, report["payload_bytes"])
            row = rows.setdefault(setting, {"bytes": bytes_of, "wall_s": []})
            if turn > 0:
                row["wall_s"].append(wall_s.item())
            elif rank == 0:
                wrong += [f"{setting}: {name}" for name in differing(path, state)]
            dist.barrier()
    if rank == 0:
        print(f"{'':8}{'most':>12}{'mean':>12}{'wall':>10}")
        for setting in SETTINGS:
            row = rows[setting]
            most, mean = max(row["bytes"]), sum(row["bytes"]) / options.ranks
            wall_s = statistics.median(row["wall_s"])
            print(f"{setting:8}{most / 2**20:8.1f} MiB{mean / 2**20:8.1f} MiB{wall_s:8.3f} s")
        print(f"{len(wrong)} values differ")
    dist.destroy_process_group()
    if wrong:
        sys.exit("\n".join(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--large-mib", type=int, default=1024)
    parser.add_argument("--small-count", type=int, default=100, help="tensors of 4 MiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", default="/dev/shm", help="each rank needs the state twice beside")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(dir=options.dir) as where:
        try:
            mp.spawn(run_rank, (options, where), options.ranks)
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            sys.exit(f"failed: {error}")


if __name__ == "__main__":
    main()
