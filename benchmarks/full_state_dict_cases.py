"""full_state_dict_cases.py: state dicts made full and cut again over two ranks, for state_dict.py.

Two processes over gloo. small: many DTensors of 2 KiB; large: four of 50 MiB. Wall seconds from a
barrier to the end of the slower rank; extra memory is the growth of the resident peak of the rank
that needed more, results included. The limit is gloo itself: the bytes of the large tensors (as
much as the gathered result) broadcast in place, in messages of 16 MiB, each half by one rank. What
both sides return must be the same, bit for bit.
"""

import json
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._state_dict_utils as theirs
import torch.multiprocessing as mp
from limits import release_free_memory, restart_peak, status_bytes
from program import row, say, seconds, times
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dcp_native import _full_state_dict as ours

RANKS = 2
CPU = torch.device("cpu")
SMALL_RATIO = 5
MESSAGE_BYTES = 16 << 20
EXTRA_BYTES = 64 << 20


def build(quick: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Sharded state dicts by kind."""
    generator = torch.Generator().manual_seed(7)
    mesh = init_device_mesh("cpu", (RANKS,))
    kinds = {
        "small": (60, (32, 16)) if quick else (2000, (32, 16)),
        "large": (2, (64, 64)) if quick else (4, (2560, 5120)),
    }
    return {
        kind: {
            f"{kind}.{i}": distribute_tensor(
                torch.randn(shape, generator=generator), mesh, [Shard(0)], src_data_rank=None
            )
            for i in range(count)
        }
        for kind, (count, shape) in kinds.items()
    }


def gather(module: Any, state: dict, _: dict) -> dict:
    return module._gather_state_dict(state)


def gather_to_rank_0(module: Any, state: dict, _: dict) -> dict:
    return module._gather_state_dict(state, cpu_offload=True, ranks_only=(0,))


def broadcast(module: Any, state: dict, full: dict) -> dict:
    local = dict(state)
    module._broadcast_state_dict(full if dist.get_rank() == 0 else {}, local, CPU)
    return local


def distribute(module: Any, state: dict, full: dict) -> dict:
    local = dict(state)
    module._distribute_state_dict(full, local, CPU)
    return local


CASES: tuple[Callable, ...] = (gather, gather_to_rank_0, broadcast, distribute)


def differing(got: dict, want: dict) -> list[str]:
    if list(got) != list(want):
        return ["other keys"]
    local = [(k, *(getattr(d[k], "_local_tensor", d[k]) for d in (got, want))) for k in got]
    return [k for k, a, b in local if not torch.equal(a, b)]


def measured(run: Callable[[], Any]) -> tuple[float, int, Any]:
    """(wall seconds, extra bytes, result), of the rank that had more of either."""
    release_free_memory()
    restart_peak()
    before = status_bytes("VmRSS")
    dist.barrier()
    start = time.monotonic()
    result = run()
    wall_s = time.monotonic() - start
    worst = torch.tensor([wall_s, float(status_bytes("VmHWM") - before)], dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst[0].item(), int(worst[1].item()), result


def limit(total_bytes: int) -> Callable[[], None]:
    memory = torch.zeros(max(MESSAGE_BYTES, 16), dtype=torch.uint8)

    def run() -> None:
        for start in range(0, total_bytes, MESSAGE_BYTES * RANKS):
            size = min(MESSAGE_BYTES * RANKS, total_bytes - start) // RANKS
            works = [dist.broadcast(memory[:size], r, async_op=True) for r in range(RANKS)]
            for work in works:
                work.wait()

    return run


@torch.no_grad()
def run_rank(rank: int, quick: bool, repeats: int, where: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}/rendezvous", rank=rank, world_size=RANKS
    )
    found: dict[str, Any] = {"cases": {}, "wrong": [], "limit_s": []}
    for kind, state in build(quick).items():
        full = theirs._gather_state_dict(state)
        total_bytes = sum(t.nbytes for t in full.values())
        for case in CASES:
            samples: dict[str, list] = {"ours": [], "torch": []}
            for turn in range(repeats + 1):  # the first one makes connections and is not counted
                results = {}
                for name, module in [("ours", ours), ("torch", theirs)][:: 1 if turn % 2 else -1]:
                    *figures, results[name] = measured(lambda: case(module, state, full))  # noqa: B023
                    if turn > 0:
                        samples[name].append(figures)
                    if turn > 0:
                        results[name] = None
                if turn == 0:
                    wrong = differing(results["ours"], results["torch"])
                    found["wrong"] += [f"{case.__name__}, {kind}, rank {rank}: {w}" for w in wrong]
            found["cases"][f"{case.__name__} {kind}"] = samples
        if kind == "large":
            found["limit_s"] = [measured(limit(total_bytes))[0] for _ in range(repeats + 1)][1:]
            found["large_bytes"] = total_bytes
    pathlib.Path(where, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def rows_of(found: dict, count: int) -> list[dict]:
    middle = len(found["limit_s"]) // 2
    limit_s = sorted(found["limit_s"])[middle]
    rows = []
    for name, samples in found["cases"].items():
        case, kind = name.rsplit(" ", 1)
        wall = {who: sorted(s[0] for s in figures)[middle] for who, figures in samples.items()}
        extra = {who: max(s[1] for s in figures) for who, figures in samples.items()}
        result = found["large_bytes"] if case == "gather" and kind == "large" else 0
        gathers = case.startswith("gather")
        what = f"{count:,} x 2 KiB" if kind == "small" else f"{found['large_bytes'] >> 20} MiB"
        what = f"{case.replace('_', ' ')}, {what}"
        target, met = "", None
        if kind == "small" and case != "distribute":
            target = f">= {SMALL_RATIO}x"
            met = wall["torch"] / wall["ours"] >= SMALL_RATIO
        elif case == "gather":
            target = f"extra <= result + {EXTRA_BYTES >> 20} MiB"
            met = extra["ours"] <= result + EXTRA_BYTES
        rows.append(
            row(
                what,
                f"{seconds(wall['ours'])}, {extra['ours'] / 2**20:.0f} MiB extra",
                f"{seconds(wall['torch'])} ({times(wall['torch'], wall['ours'])}),"
                f" {extra['torch'] / 2**20:.0f} MiB extra",
                f"gloo {seconds(limit_s)}" if kind == "large" and gathers else "",
                target,
                met,
            )
        )
    return rows


def run(quick: bool, repeats: int) -> tuple[list[dict], dict, list[str]]:
    """(rows, the first rank's figures, what differs from torch)."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as where:
        say("two ranks gather, broadcast and distribute ...")
        mp.spawn(run_rank, (quick, repeats, where), RANKS)
        found = [
            json.loads(pathlib.Path(where, f"{rank}.json").read_text(encoding="utf-8"))
            for rank in range(RANKS)
        ]
    wrong = [w for f in found for w in f["wrong"]]
    return rows_of(found[0], 60 if quick else 2000), found[0], wrong
