"""One rank of two that save over NCCL; rank 1 dies before the second save.  Prints what rank 0 saw.

python dying_rank.py DIRECTORY          (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from device_values import on, raw

import dcp_native as dcp


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=5), device_id=torch.device("cuda", rank)
    )
    state = {f"x{rank}": on(f"cuda:{rank}", raw(torch.float32, 10, 6, seed=rank))}
    dcp.save(state, checkpoint_id=sys.argv[1])
    assert dcp.last_report()["comm"] == "nccl", dcp.last_report()
    if rank == 1:
        os._exit(7)
    try:
        dcp.save(state, checkpoint_id=sys.argv[1])
    except (dcp.CheckpointException, Exception) as error:  # torch's is no Exception
        print("SAW", type(error).__name__, str(error).replace("\n", " "), flush=True)
        os._exit(0)
    os._exit(3)


if __name__ == "__main__":
    main()
