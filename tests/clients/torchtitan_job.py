"""torchtitan: its CheckpointManager over an FSDP2 model, each way of saving that needs no GPU.

The last step is exported in the Hugging Face format, sharded as its index says, and loaded back by
the manager's own reader.
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
from client import asked, batches, digest, model, say
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

STEPS = 3
LAST = 5


class Adapter(StateDictAdapter):
    """Names of Hugging Face's kind in two files."""

    def __init__(self, names: list[str], *, is_split: bool) -> None:
        super().__init__(None, None)
        if is_split:
            self.fqn_to_index_mapping = {"hf." + n: 1 + i % 2 for i, n in enumerate(names)}

    def to_hf(self, state_dict):
        return {"hf." + name: value for name, value in state_dict.items()}

    def from_hf(self, hf_state_dict):
        return {name.removeprefix("hf."): value for name, value in hf_state_dict.items()}


def manager(net: nn.Module, folder: str, states: dict, is_split: bool, **how):
    groups = [
        ParamGroupConfig(
            pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-2, "fused": False}
        )
    ]
    optimizers = OptimizersContainer.Config(param_groups=groups, implementation="for-loop").build(
        model_parts=[net]
    )
    schedulers = LRSchedulersContainer(optimizers, lambda step: 1.0 / (1 + step))
    config = CheckpointManager.Config(enable=True, folder=folder, interval=1, **how)
    adapter = Adapter([n for n, _ in net.named_parameters()], is_split=is_split)
    return optimizers, schedulers, config.build(
        dataloader=None, model_parts=[net], optimizers=optimizers, lr_schedulers=schedulers,
        states=states, sd_adapter=adapter,
    )  # fmt: skip


class TrainState:
    def __init__(self, step: int) -> None:
        self.step = step

    def state_dict(self):
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict) -> None:
        self.step = int(state_dict["step"])


def main() -> None:
    what, path = asked()
    mode, last = os.environ["TITAN_MODE"], os.environ.get("TITAN_LAST", "")
    dist.init_process_group("gloo")
    torch.manual_seed(1 if what == "save" else 2)
    net = fully_shard(model())
    train = TrainState(0)
    how = {"last_save_in_hf": bool(last), "initial_load_in_hf": bool(last) and what == "load"}
    if what == "load" and last:
        how["initial_load_path"] = os.path.join(path, f"step-{LAST}")
        path = os.path.join(path, "elsewhere")
    optimizers, schedulers, checkpoints = manager(
        net, path, {"train_state": train}, last == "split", async_mode=mode, **how
    )
    if what == "save":
        for step, batch in enumerate(batches(STEPS), 1):
            net(batch).square().mean().backward()
            optimizers.step()
            schedulers.step()
            optimizers.zero_grad()
            train.step = step
            checkpoints.save(step)
            checkpoints.maybe_wait_for_staging()
        if last:
            checkpoints.maybe_wait_for_saving()
            checkpoints.save(LAST, last_step=True)
        checkpoints.maybe_wait_for_saving()
    else:
        assert checkpoints.load()
    facts = {"model": digest(net.state_dict())}
    if not last:  # an export holds nothing but the weights
        facts |= {
            "optimizer": digest(optimizers.state_dict()),
            "scheduler": json.dumps(schedulers.state_dict(), default=str, sort_keys=True),
            "step": train.step,
        }
    say(**facts)
    dist.barrier()
    checkpoints.close()
    dist.destroy_process_group()


main()
