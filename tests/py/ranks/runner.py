"""Runs every ``case_*`` function of a module on all ranks of a torchrun job; one JSON line a case.

    torchrun --nproc-per-node N runner.py MODULE OUT_DIR BACKEND
    python runner.py MODULE OUT_DIR            (one process without process groups)

A case gets a Context and asserts.  A rank that fails writes its traceback; the next case runs all
the same.  Started by jobs.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT_S = 30


@dataclasses.dataclass
class Context:
    """What a case knows: its rank, the world, and a directory that all ranks share."""

    rank: int
    size: int
    dir: Path

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def main() -> None:
    path, out, *backend = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rank, size = 0, 1
    if backend:
        dist.init_process_group(backend[0], timeout=timedelta(seconds=TIMEOUT_S))
        rank, size = dist.get_rank(), dist.get_world_size()
    sys.path[:0] = [str(Path(path).resolve().parent), str(Path(__file__).resolve().parent)]
    module = importlib.import_module(Path(path).stem)
    cases = [(n, f) for n, f in vars(module).items() if n.startswith("case_")]
    with open(Path(out) / f"rank{rank}.jsonl", "w", buffering=1) as log:
        for name, case in cases:
            if size not in getattr(case, "sizes", (size,)):
                continue
            context = Context(rank, size, Path(out) / name)
            if rank == 0:
                context.dir.mkdir()
            context.barrier()
            failure = None
            try:
                case(context)
            except BaseException:
                failure = traceback.format_exc()
            print(json.dumps({"case": name, "failure": failure}), file=log)
            context.barrier()
    if backend:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
