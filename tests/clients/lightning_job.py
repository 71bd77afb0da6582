"""Lightning Fabric: ModelParallelStrategy (FSDP2), its sharded checkpoint."""

from __future__ import annotations

import torch
from client import asked, batches, digest, model, say
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard


def parallelize(net, device_mesh):
    return fully_shard(net, mesh=device_mesh["data_parallel"])


def main() -> None:
    what, path = asked()
    strategy = ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(1 if what == "save" else 2)
    net = fabric.setup_module(model())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(net.parameters(), lr=1e-2))
    for batch in batches(3):
        loss = net(batch).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    state = {"model": net, "optimizer": optimizer, "step": 3 if what == "save" else 0}
    if what == "save":
        fabric.save(path, state)
    else:
        fabric.load(path, state)
    say(
        model=digest(get_model_state_dict(net.module)),
        optimizer=digest(get_optimizer_state_dict(net.module, optimizer.optimizer)),
        step=state["step"],
    )


main()
