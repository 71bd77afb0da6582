"""One rank of some that save and load over NCCL; the last one dies before another save.  Prints
what the others saw.

python dying_rank.py DIRECTORY          (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set)
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from device_values import assert_same, blank, on, overwrite, raw

import dcp_native as dcp


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(seconds=30), device_id=device)
    values = raw(torch.float32, 10, 6, seed=rank)
    state = {f"x{rank}": on(device, values)}
    dcp.save(state, checkpoint_id=sys.argv[1])
    assert dcp.last_report()["comm"] == "nccl", dcp.last_report()
    future = dcp.async_save(state, checkpoint_id=sys.argv[1] + "-async")
    overwrite(state)
    future.result(timeout=60)
    for suffix in ("", "-async"):
        target = blank(device, {f"x{rank}": values})
        dcp.load(target, checkpoint_id=sys.argv[1] + suffix)
        assert_same(target, {f"x{rank}": values})
    if rank == size - 1:
        os._exit(7)
    try:
        dcp.save(state, checkpoint_id=sys.argv[1])
    except (dcp.CheckpointException, Exception) as error:  # torch's is no Exception
        print("SAW", type(error).__name__, str(error).replace("\n", " "), flush=True)
        os._exit(0)
    os._exit(3)


if __name__ == "__main__":
    main()
