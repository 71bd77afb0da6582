"""gpu.py: what saving and loading cost a trainer on a GPU, beside torch and the machine's limits.

    python benchmarks/gpu.py                                   # one GPU, some minutes
    python benchmarks/gpu.py --bytes 8e9 --dir /mnt/nvme
    torchrun --nproc-per-node 8 benchmarks/gpu.py              # planning over NCCL

A line is a figure: ours : torch : limit, what is aimed at, and whether that is met.  All three were
measured in turns in this run, after rounds that are not counted, and are medians; torch is stock
torch.distributed.checkpoint, its stager with pinned memory that it keeps.  Tensors change before
every round, as a step would change them.  What was saved is loaded and compared; exits with 1 where
a value differs, not where an aim is missed.  docs/gpu.md has the aims.  Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import resource
import shutil
import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from gpu_measure import Machine, WrongValueError
from gpu_planning import planning
from gpu_saving import blocking, staging
from gpu_steps import steps


def small_tensors(count: int) -> dict[str, torch.Tensor]:
    """8 to 16 KiB each: a kernel packs them."""
    return {f"t{i:05}": torch.randn(64 + i % 64, 32, device="cuda") for i in range(count)}


def medium_tensors(count: int) -> dict[str, torch.Tensor]:
    """2 to 4 MiB each: a copy each, and more of them than a stream takes before it blocks."""
    return {f"t{i:05}": torch.randn(512 + i % 512, 1024, device="cuda") for i in range(count)}


def large_tensors(total_bytes: int, count: int = 64) -> dict[str, torch.Tensor]:
    return {f"w{i}": torch.randn(total_bytes // count // 4, device="cuda") for i in range(count)}


def of_one_device(args: argparse.Namespace, path: pathlib.Path) -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {args.rounds}")
    machine = Machine(path)
    state = large_tensors(int(args.bytes))
    staging(machine, "large", state, args.rounds, rate=True)
    blocking(machine, "large", state, args.rounds)
    state = small_tensors(args.small)
    staging(machine, f"{args.small} small", state, args.rounds, most_times=1.2)
    blocking(machine, f"{args.small} small", state, args.rounds)
    del state
    staging(machine, f"{args.medium} medium", medium_tensors(args.medium), args.rounds)
    steps(machine, int(args.bytes), args.batch, args.rounds)


def allow_open_files(count: int) -> None:
    """Torch's stager keeps a descriptor of shared memory open for each tensor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(count, hard)), hard))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=float, default=2e9, help="of the large state")
    parser.add_argument("--small", type=int, default=20000, help="number of small tensors")
    parser.add_argument("--medium", type=int, default=2000, help="number of 2 to 4 MiB each")
    parser.add_argument("--batch", type=int, default=8192, help="rows of a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where checkpoints go; default: a temporary directory")
    return parser.parse_args()


def main() -> None:
    args = options()
    warnings.filterwarnings("ignore")
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: there is nothing to measure here (docs/gpu.md)")
    allow_open_files(2 * max(args.small, args.medium))
    with contextlib.ExitStack() as stack:
        if "RANK" in os.environ:
            device = int(os.environ["LOCAL_RANK"])
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", device))
            stack.callback(dist.destroy_process_group)
        shared: list[str | None] = [None]
        if not dist.is_initialized() or dist.get_rank() == 0:
            shared = [tempfile.mkdtemp(dir=args.dir)]
            stack.callback(shutil.rmtree, shared[0], ignore_errors=True)
        try:
            if dist.is_initialized():
                dist.broadcast_object_list(shared, device=torch.device("cpu"))
                planning(4 * args.rounds, pathlib.Path(shared[0]))
                dist.barrier()
            else:
                of_one_device(args, pathlib.Path(shared[0]))
        except WrongValueError as error:
            sys.exit(f"WRONG: {error}")


if __name__ == "__main__":
    main()
