"""gpu.py: what saving costs a trainer on a GPU, beside the machine's own limits.

    python benchmarks/gpu.py                                   # one GPU, about two minutes
    python benchmarks/gpu.py --bytes 8e9 --dir /mnt/nvme
    torchrun --nproc-per-node 8 benchmarks/gpu.py              # planning over NCCL as well

Everything is measured in this run: the peak is one cudaMemcpyAsync of the same bytes into pinned
memory.  What was saved is loaded and compared once.  Figures are medians; exits with 1 where a
value differs.  docs/gpu.md has what is aimed at.  Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import dcp_native as dcp

OPTIONS = {
    "use_pinned_memory": True,
    "use_shared_memory": True,
    "use_async_staging": True,
    "use_non_blocking_copy": True,
}


def say(name: str, value: float, unit: str, note: str = "") -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{name:44} {value:12.3f} {unit:6} {note}".rstrip(), flush=True)


def median_s(run: Callable[[], None], rounds: int) -> float:
    """Seconds of one call, the device's work included; the first is not counted."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def pinned_copy_s(total_bytes: int, rounds: int) -> float:
    there = torch.empty(total_bytes, dtype=torch.uint8, device="cuda")
    here = torch.empty(total_bytes, dtype=torch.uint8, pin_memory=True)
    return median_s(lambda: here.copy_(there, non_blocking=True), rounds)


class Saver:
    """Background saves of one state, and how long each of their parts took."""

    def __init__(self, state: dict, path: pathlib.Path) -> None:
        self.state, self.path = state, path
        self.stager = DefaultStager(StagingOptions(**OPTIONS))

    def start(self):
        begin = time.perf_counter()
        response = dcp.async_save(self.state, checkpoint_id=self.path, async_stager=self.stager)
        return response, time.perf_counter() - begin

    def staged(self) -> tuple[float, float]:
        """Seconds until the call returned, and until the bytes were in host memory."""
        torch.cuda.synchronize()
        begin = time.perf_counter()
        response, call_s = self.start()
        response.staging_completion.result()
        staged_s = time.perf_counter() - begin
        response.upload_completion.result()
        return call_s, staged_s

    def medians(self, rounds: int) -> tuple[float, float]:
        times = [self.staged() for _ in range(rounds + 1)][1:]
        return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def staging(total_bytes: int, rounds: int, path: pathlib.Path) -> None:
    count = 64
    state = {
        f"w{i}": torch.randn(int(total_bytes) // count // 4, device="cuda") for i in range(count)
    }
    size_bytes = sum(tensor.nbytes for tensor in state.values())
    peak_s = pinned_copy_s(size_bytes, rounds)
    call_s, staged_s = Saver(state, path).medians(rounds)
    say("one pinned cudaMemcpyAsync", size_bytes / peak_s / 1e9, "GB/s", "the limit")
    say("staging", size_bytes / staged_s / 1e9, "GB/s", f"{peak_s / staged_s:.0%} of the limit")
    say(
        "stall of the trainer (async_save returns)",
        call_s * 1e3,
        "ms",
        f"{call_s / staged_s:.1%} of the staging time",
    )
    check(state, path)


def small_tensors(count: int, rounds: int, path: pathlib.Path) -> None:
    state = {f"t{i:05}": torch.randn(64 + i % 64, 32, device="cuda") for i in range(count)}
    size_bytes = sum(tensor.nbytes for tensor in state.values())
    peak_s = pinned_copy_s(size_bytes, rounds)
    call_s, staged_s = Saver(state, path).medians(rounds)
    say(f"{count} small tensors: one memcpy of their bytes", peak_s * 1e3, "ms", "the limit")
    say(f"{count} small tensors: staged", staged_s * 1e3, "ms", f"{staged_s / peak_s:.2f} times")
    say(f"{count} small tensors: async_save returns", call_s * 1e3, "ms")
    check(state, path)


def steps(total_bytes: int, rounds: int, path: pathlib.Path) -> None:
    """The time of a training step alone, and while a save is copied and written."""
    width = max(256, int((total_bytes / 4 / 3 / 16) ** 0.5) // 64 * 64)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(16))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = torch.randn(2048, width, device="cuda")

    def backward() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()

    def step() -> None:
        backward()
        optimizer.step()

    alone_s = median_s(step, 10 * rounds)
    names = {id(p): name for name, p in model.named_parameters()}
    state = dict(model.state_dict())
    for parameter, slots in optimizer.state.items():
        state |= {f"{names[id(parameter)]}.{slot}": value for slot, value in slots.items()}
    saver, times = Saver(state, path), []
    saver.staged()
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        response, _ = saver.start()
        backward()
        response.staging_completion.result()  # the optimizer is what changes the tensors
        optimizer.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        while not response.upload_completion.done():
            times.append(median_s(step, 1))
        response.upload_completion.result()
    say("a training step alone", alone_s * 1e3, "ms")
    say(
        "a training step with a save in flight",
        statistics.median(times) * 1e3,
        "ms",
        f"{statistics.median(times) / alone_s - 1:+.1%}, the worst {max(times) * 1e3:.1f} ms",
    )


def planning(rounds: int, path: pathlib.Path) -> None:
    """What a save costs when it writes next to nothing: agreeing, over NCCL and over the CPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    whole = torch.zeros(dist.get_world_size() * 8, 8, device="cuda")
    state = {f"w{i}": distribute_tensor(whole, mesh, [Shard(0)]) for i in range(100)}
    for comm in ("nccl", "cpu"):
        group = dist.new_group()
        dist.barrier(group)
        dcp.configure(comm=comm)
        seconds = median_s(
            lambda group=group: dcp.save(state, checkpoint_id=path, process_group=group), rounds
        )
        report = dcp.last_report()
        say(
            f"a save of {dist.get_world_size()} ranks, planned over {report['comm']}",
            seconds * 1e3,
            "ms",
            f"vote {report['vote_ns'] / 1e6:.2f} ms, plan {report['plan_ns'] / 1e6:.2f} ms",
        )
    dcp.configure(comm="auto")


def check(state: dict, path: pathlib.Path) -> None:
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(target, checkpoint_id=path)
    wrong = [name for name, tensor in state.items() if not torch.equal(target[name], tensor)]
    if wrong:
        sys.exit(f"differs from what was saved: {wrong[:5]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=float, default=2e9, help="of the large state")
    parser.add_argument("--small", type=int, default=20000, help="number of small tensors")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where checkpoints go; default: a temporary directory")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: there is nothing to measure here (docs/gpu.md)")
    if "RANK" in os.environ:
        device = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", device))
    with contextlib.ExitStack() as stack:
        shared: list[str | None] = [None]
        if not dist.is_initialized() or dist.get_rank() == 0:
            shared = [tempfile.mkdtemp(dir=args.dir)]
            stack.callback(shutil.rmtree, shared[0], ignore_errors=True)
        if dist.is_initialized():
            dist.broadcast_object_list(shared, device=torch.device("cpu"))
        path = pathlib.Path(shared[0])
        if dist.is_initialized():
            planning(4 * args.rounds, path / "planning")
            dist.barrier()
            dist.destroy_process_group()
            return
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        staging(int(args.bytes), args.rounds, path / "large")
        small_tensors(args.small, args.rounds, path / "small")
        steps(int(args.bytes), args.rounds, path / "steps")


if __name__ == "__main__":
    main()
