"""Runs every ``case_*`` function of a module on all ranks of a torchrun job; one JSON line a case.

    torchrun --nproc-per-node N runner.py MODULE OUT_DIR

A case gets a Context and asserts.  A rank that fails writes its traceback; the next case runs all
the same.  Loaded by tests/py/test_ranks.py.
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
        dist.barrier()


def main() -> None:
    module_name, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    rank, size = dist.get_rank(), dist.get_world_size()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    module = importlib.import_module(module_name)
    cases = [(n, f) for n, f in vars(module).items() if n.startswith("case_")]
    with open(out / f"rank{rank}.jsonl", "w", buffering=1) as log:
        for name, case in cases:
            if size not in getattr(case, "sizes", (size,)):
                continue
            context = Context(rank, size, out / name)
            if rank == 0:
                context.dir.mkdir()
            dist.barrier()
            failure = None
            try:
                case(context)
            except BaseException:
                failure = traceback.format_exc()
            print(json.dumps({"case": name, "failure": failure}), file=log)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
