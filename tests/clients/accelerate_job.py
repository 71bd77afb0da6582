"""accelerate: FSDP2 with sharded state, save_state / load_state and the merge of weights.

accelerate turns FSDP on for GPUs alone; here it is told after the fact that this is an FSDP run,
and everything that follows is its own code.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, merge_fsdp_weights
from client import asked, batches, digest, model, say
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict


def main() -> None:
    what, path = asked()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", auto_wrap_policy="no_wrap"
    )
    accelerator = Accelerator(cpu=True)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    torch.manual_seed(1 if what == "save" else 2)
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    net, optimizer = accelerator.prepare(net, optimizer)
    for batch in batches(3):
        loss = net(batch).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if what == "save":
        accelerator.save_state(path)
        accelerator.wait_for_everyone()
        merge_fsdp_weights(os.path.join(path, "pytorch_model_fsdp_0"), path, True)
    else:
        accelerator.load_state(path)
    say(
        model=digest(get_model_state_dict(net)),
        optimizer=digest(get_optimizer_state_dict(net, optimizer.optimizer)),
    )
    accelerator.end_training()


main()
