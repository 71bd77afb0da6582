"""verify.py: carries out checkpoint actions on any number of ranks; started by torchrun.

An action is `save MODULE DIR`, `load MODULE DIR`, `train` or `limit DIR`. Every load goes into
spoilt state. What the first one brings is compared, as full tensors, with the digests that the
training job wrote from its memory; later ones are compared with the first, shard by shard. Times
are those of save() and load() alone, from a barrier to the slowest rank; loads are cold.
"""

import argparse
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from app import App, checkpoint_module, path_taken, read_json, start_up, write_json

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))
import limits


def slowest(work: Callable[[], object]) -> float:
    """Runs `work` on all ranks at once; returns the seconds of the slowest."""
    dist.barrier()
    start = time.monotonic()
    work()
    seconds = torch.tensor([time.monotonic() - start], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item()


def _differing(expected: dict[str, str], got: dict[str, str]) -> list[str]:
    return [n for n in expected.keys() | got.keys() if expected.get(n) != got.get(n)]


class Actions:
    """The actions, as methods; each returns its results."""

    def __init__(self, app: App, rank: int, ranks: int, expected: dict[str, str]) -> None:
        self._app, self._rank, self._ranks, self._expected = app, rank, ranks, expected
        self._shards: dict[str, str] = {}  # digests of this rank's shards, once proved right
        self._limits: limits.Limits | None = None

    def save(self, module: str, path: str) -> dict:
        dcp = checkpoint_module(module)
        state = {k: v.state_dict() for k, v in self._app.state(with_random=False).items()}
        if self._rank == 0:
            limits.settle(os.path.dirname(path))
        seconds = slowest(lambda: dcp.save(state, checkpoint_id=path))
        return {"seconds": seconds, "path": path_taken(dcp)}

    def load(self, module: str, path: str) -> dict:
        dcp = checkpoint_module(module)
        self._app.poison()
        parts = self._app.state(with_random=False)
        state = {k: v.state_dict() for k, v in parts.items()}
        if self._rank == 0:
            limits.drop_page_cache(path)
        seconds = slowest(lambda: dcp.load(state, checkpoint_id=path))
        taken = path_taken(dcp)
        for key in sorted(parts):
            parts[key].load_state_dict(state[key])
        return {"seconds": seconds, "path": taken, **self._compare()}

    def _compare(self) -> dict:
        """The first time full tensors; then the shards, with those that made up the full ones."""
        shards = self._app.digests(full=False)
        if self._shards:
            wrong = _differing(self._shards, shards)
        else:
            wrong = _differing(self._expected, self._app.digests())
            self._shards = {} if wrong else shards
        of_all: list[list[str]] = [[] for _ in range(self._ranks)]
        dist.all_gather_object(of_all, wrong)
        return {"compared": len(shards), "wrong": sorted({name for one in of_all for name in one})}

    def train(self) -> dict:
        """One step, to see that the loaded state is fit for work. Leaves the state changed."""
        loss = self._app.step()
        return {"loss": loss, "wrong": [] if math.isfinite(loss) else [f"loss is {loss}"]}

    def limit(self, path: str) -> dict:
        """Writes and reads as many bytes as the checkpoint in `path` has, by direct I/O, one
        process per rank.
        """
        if self._limits is None:
            self._limits = limits.Limits()
        total = limits.directory_bytes(path)
        file = f"{path}/limit-{self._rank}"
        dist.barrier()  # nobody creates a file before all have counted
        share = -(-total // self._ranks)
        write = slowest(lambda: self._limits.write(file, share))
        read = slowest(lambda: self._limits.read(file, share))
        os.unlink(file)
        return {"write": write, "read": read, "bytes": total}


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument(
        "--expected", required=True, help="digests of the state, as train_gpt.py writes them"
    )
    p.add_argument("--results", required=True)
    p.add_argument("actions", nargs="+")
    args = p.parse_args()
    rank, ranks = start_up()
    actions = Actions(App(rank, ranks, seed=7), rank, ranks, read_json(args.expected))
    results = []
    for text in args.actions:
        verb, *words = text.split()
        results.append({"action": text, **getattr(actions, verb)(*words)})
    if rank == 0:
        write_json(args.results, results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
