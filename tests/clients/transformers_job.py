"""transformers: save_pretrained with distributed_checkpoint, its optimizer, its consolidation.

Its Trainer reaches torch.distributed.checkpoint through accelerate alone, and only on a GPU.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from client import asked, digest, rank, say
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.checkpoint import (
    _load_model_checkpoint_distributed,
    _save_model_checkpoint_distributed,
    consolidate_distributed_checkpoint,
    load_optimizer_distributed,
    save_optimizer_distributed,
)


def main() -> None:
    what, path = asked()
    dist.init_process_group("gloo")
    torch.manual_seed(1 if what == "save" else 2)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    net = LlamaForCausalLM(config)
    for layer in net.model.layers:
        fully_shard(layer)
    fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    weights, states = os.path.join(path, "weights"), os.path.join(path, "optimizer")
    if what == "save":
        generator = torch.Generator().manual_seed(3)
        for _ in range(2):
            tokens = torch.randint(0, 128, (2, 16), generator=generator)
            net(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _save_model_checkpoint_distributed(net, weights)
        save_optimizer_distributed(net, optimizer, states)
        trained = digest(get_model_state_dict(net))
        if rank() == 0:
            consolidate_distributed_checkpoint(weights, os.path.join(path, "whole"))
            again = LlamaForCausalLM(config)
            again.load_state_dict(
                load_file(os.path.join(path, "whole", "model-00001-of-00001.safetensors"))
            )
            if digest(again.state_dict()) != trained:
                raise AssertionError("the consolidated file does not hold what was saved")
        dist.barrier()
    else:
        _load_model_checkpoint_distributed(net, weights)
        load_optimizer_distributed(net, optimizer, states)
    say(
        model=digest(get_model_state_dict(net)),
        optimizer=digest(get_optimizer_state_dict(net, optimizer)),
    )
    dist.destroy_process_group()


main()
