"""local_plan.py: flattening a state dict and making one rank's plan of it: ours beside torch's.

    python benchmarks/local_plan.py            # 20,000 tensors: about a minute
    python benchmarks/local_plan.py --quick    # seconds; the test suite runs this

The rank is one of 64 of a fake process group: no communication happens in this step. The plans must
hold the same items. Times are CPU seconds of the calling thread; ours goes from the state dict to a
plan ready for the vote, torch's from set_up_planner to the end of create_local_plan.
"""

import gc
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from program import finish, median_of, options, row, seconds, times
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_native import _native

RANKS, RANK = 64, 5
TARGET_S = 0.05
KINDS = {WriteItemType.TENSOR: "tensor", WriteItemType.SHARD: "shard"}


def states(count: int) -> dict[str, dict]:
    """State dicts of `count` tensors each: sharded, sharded and replicated, plain."""
    flat = init_device_mesh("cpu", (RANKS,))
    hybrid = init_device_mesh("cpu", (8, RANKS // 8))

    def sharded() -> DTensor:
        return DTensor.from_local(torch.empty(64, 8), flat, [Shard(0)], run_check=False)

    def hsdp() -> DTensor:
        placements = [Replicate(), Shard(0)]
        return DTensor.from_local(torch.empty(64, 8), hybrid, placements, run_check=False)

    makers = {
        "DTensors": sharded,
        "HSDP DTensors": hsdp,
        "plain tensors": lambda: torch.empty(64, 8),
    }
    return {
        what: {"model": {f"block.{i}.weight": make() for i in range(count)}}
        for what, make in makers.items()
    }


def ours(state: dict) -> Callable[[], float]:
    def run() -> float:
        gc.collect()
        start = time.thread_time()
        _native._debug_plan(state, rank=RANK, show=False)
        return time.thread_time() - start

    return run


def _torch_plan(state: dict) -> SavePlan:
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=False)
    return planner.create_local_plan()


def theirs(state: dict) -> Callable[[], float]:
    def run() -> float:
        gc.collect()
        start = time.thread_time()
        _torch_plan(state)
        return time.thread_time() - start

    return run


def differences(state: dict) -> list[str]:
    """Items of our plan that torch's lacks or has otherwise."""
    got = [
        (name, kind, size, offsets, sizes)
        for name, kind, _, size, offsets, sizes, *_ in _native._debug_plan(state, rank=RANK)[
            "items"
        ]
    ]
    expected = [
        (
            item.index.fqn,
            KINDS[item.type],
            tuple(item.tensor_data.size),
            tuple(item.tensor_data.chunk.offsets),
            tuple(item.tensor_data.chunk.sizes),
        )
        for item in _torch_plan(state).items
    ]
    if len(got) != len(expected):
        return [f"{len(got)} items, torch has {len(expected)}"]
    return [f"{g} is {e} in torch" for g, e in zip(got, expected, strict=True) if g != e]


def main(argv: list[str] | None = None) -> int:
    args = options(__doc__, repeats=5).parse_args(argv)
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=RANK, world_size=RANKS, store=FakeStore())
    count = 200 if args.quick else 20_000
    rows, details, wrong = [], {}, []
    for what, state in states(count).items():
        wrong += [f"local plan of {what}: {w}" for w in differences(state)]
        our_s, torch_s = median_of(args.repeats, ours(state), theirs(state))
        details[what] = {"ours_s": our_s, "torch_s": torch_s, "count": count}
        rows.append(
            row(
                f"flatten + local plan, {count:,} {what}",
                f"{seconds(our_s)} ({our_s / count * 1e6:.2f} us each)",
                f"{seconds(torch_s)} ({times(torch_s, our_s)})",
                target=f"<= {TARGET_S} s",
                met=our_s <= TARGET_S,
            )
        )
    dist.destroy_process_group()
    return finish(args, rows, details, wrong)


if __name__ == "__main__":
    sys.exit(main())
