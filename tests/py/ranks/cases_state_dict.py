"""state_dict.py against torch's on models that several ranks hold together."""

from __future__ import annotations

import copy
import itertools

import state_dict_models as m
import torch
import torch.distributed as dist
from common import mesh_of, sizes
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict as theirs
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import dcp_native.state_dict as ours

Options = theirs.StateDictOptions
OPTIONS = [
    {},
    {"cpu_offload": True},
    {"full_state_dict": True},
    {"full_state_dict": True, "cpu_offload": True},
    {"ignore_frozen_params": True},
    {"flatten_optimizer_state_dict": True},
    {"strict": False},
]


class Layers(nn.Module):
    """What the parallel styles below take: two linears, and a buffer and sizes that are odd."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.odd = nn.Linear(8, 3, bias=False)
        self.scale = nn.Parameter(torch.rand(8), requires_grad=False)
        self.register_buffer("count", torch.ones(5))

    def forward(self, x):
        return self.odd(self.down(self.up(x)) * self.scale)


def layers():
    torch.manual_seed(7)
    return nn.Sequential(Layers(), nn.Sequential(Layers()))


def plain(size):
    return layers()


def ddp(size):
    return DDP(layers())


def ddp_of_activations(size):
    model = layers()
    model[0] = checkpoint_wrapper(model[0])
    return DDP(model)


def ddp_of_compiled(size):
    return DDP(torch.compile(layers(), backend="eager"))


def compiled_of_ddp(size):
    return torch.compile(DDP(layers()), backend="eager")


def fsdp2(size):
    model = layers()
    for module in (model[0].up, model[1][0], model):
        fully_shard(module, mesh=mesh_of(size))
    return model


def fsdp2_of_activations(size):
    model = layers()
    model[0] = checkpoint_wrapper(model[0])
    fully_shard(model[0], mesh=mesh_of(size))
    return fully_shard(model, mesh=mesh_of(size))


def fsdp2_compiled(size):
    return torch.compile(fsdp2(size), backend="eager")


def fsdp2_with_hooks(size):
    """With the state dict hooks that FSDP2 registers at the first forward."""
    model = fsdp2(size)
    model[0].odd = model[1][0].odd = nn.Identity()
    model(torch.ones(2, 8))
    for module in (model[0].up, model[1][0], model):
        module.reshard()
    return model


def hsdp2(size):
    return fully_shard(layers(), mesh=mesh_of(1, size, names=("r", "s")))


def tensor_parallel(size):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = layers()
    for part in (model[0], model[1][0]):
        parallelize_module(part, mesh_of(size), plan)
    return model


def two_d(size):
    mesh = mesh_of(*((1, size) if size < 4 else (2, size // 2)), names=("dp", "tp"))
    model = layers()
    for part in (model[0], model[1][0]):
        parallelize_module(part, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def fsdp1(size):
    return FSDP(layers(), use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_flat(size):
    model = layers()
    for param in model.parameters():
        param.requires_grad_(True)
    model[0] = FSDP(model[0], device_id=torch.device("cpu"))
    return FSDP(model, device_id=torch.device("cpu"))


def fsdp1_compiled(size):
    model = layers()
    model[0] = torch.compile(model[0], backend="eager")
    return FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp1_unsharded(size):
    return FSDP(
        layers(),
        use_orig_params=True,
        sharding_strategy=ShardingStrategy.NO_SHARD,
        device_id=torch.device("cpu"),
    )


WRAPPED = (
    plain, ddp, ddp_of_activations, ddp_of_compiled, compiled_of_ddp, fsdp2, fsdp2_of_activations,
    fsdp2_compiled, fsdp2_with_hooks, hsdp2, tensor_parallel, two_d,
)  # fmt: skip
FSDP1 = (fsdp1, fsdp1_flat, fsdp1_compiled, fsdp1_unsharded)


def optimizers(model, kind=m.adamw):
    if kind is m.several and len(m.trainable(model)) < 2:
        kind = m.adamw
    return kind(model)


def settled(state):
    """The same without anything that a later call changes."""
    if isinstance(state, DTensor):
        return DTensor.from_local(
            state.to_local().clone(), state.device_mesh, state.placements,
            shape=state.shape, stride=state.stride(),
        )  # fmt: skip
    if isinstance(state, dict):
        return {k: settled(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(settled(v) for v in state)
    if type(state) is torch.Tensor:
        return state.clone()
    return copy.deepcopy(state)


def zero(model, optims):
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.zero_()
    for optim in optims:
        optim.state.clear()


def seen(model, optims, implementation):
    """All that there is, as torch sees it."""
    return theirs.get_state_dict(model, optims)


def run(implementation, make, size, kind, options):
    """Gets, zeroes, sets; returns what was got and what there is afterwards."""
    model = make(size)
    optims = optimizers(model, kind)
    if make not in FSDP1:
        m.train(optims)
    options = Options(**options)
    got = settled(implementation.get_state_dict(model, optims, options=options))
    if options.full_state_dict and options.cpu_offload:
        return got, None, None
    model_state, optim_state = settled(got)
    if make not in FSDP1:
        zero(model, optims)
    keys = implementation.set_state_dict(
        model, optims, model_state_dict=model_state, optim_state_dict=optim_state, options=options
    )
    return got, list(keys), list(model_state), seen(model, optims, implementation)


def compare(ctx, make, kind, options):
    want = m.outcome(lambda: run(theirs, make, ctx.size, kind, options))
    got = m.outcome(lambda: run(ours, make, ctx.size, kind, options))
    m.same(got, want, f"{make.__name__} {kind.__name__} {options}")
    return want


def case_all_wrappers_and_options_equal_torch(ctx):
    worked = 0
    for i, make in enumerate(WRAPPED):
        for j, options in enumerate(OPTIONS):
            kind = (m.adamw, m.several, m.momentum_in_groups)[(i + j) % 3]
            worked += len(compare(ctx, make, kind, options)) > 2
    assert worked > len(WRAPPED) * len(OPTIONS) * 0.7, worked


def case_optimizers_in_backward_equal_torch(ctx):
    for make in (ddp, fsdp2, two_d):
        compare(ctx, make, m.in_backward, {})


@sizes(2)
def case_fsdp1_equals_torch(ctx):
    for make in FSDP1:
        # Whole tensors offloaded to the CPU: stock FSDP1 on a CPU reads freed memory there.
        for options in (o for o in OPTIONS if not {"full_state_dict", "cpu_offload"} <= o.keys()):
            compare(ctx, make, m.adamw, options)


def from_rank0(implementation, make, size, cpu_offload, meta):
    """Whole state that only rank 0 has, into a model that all hold."""
    whole = layers()
    source = optimizers(whole)
    m.train(source, seed=3)
    state = settled(theirs.get_state_dict(whole, source))
    if dist.get_rank() != 0:
        state = ({}, {})
    model = make(size)
    if meta:
        model = model.to("meta")
    optims = [] if meta else optimizers(model)
    options = Options(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=cpu_offload)
    keys = implementation.set_model_state_dict(model, state[0], options=options)
    for optim in optims:
        implementation.set_optimizer_state_dict(model, optim, state[1], options=options)
    return (
        list(keys),
        list(state[0]),
        seen(model, optims, implementation) if optims else dict(model.named_parameters()),
    )


def case_broadcast_from_rank0_equals_torch(ctx):
    for make in (ddp, fsdp2, tensor_parallel, two_d, compiled_of_ddp):
        for meta in (False, True) if make is fsdp2 else (False,):
            want, got = (
                m.outcome(lambda i=i, x=make, y=meta: from_rank0(i, x, ctx.size, False, y))
                for i in (theirs, ours)
            )
            m.same(got, want, f"{make.__name__} {meta}")
            assert len(want) == 3, want


def case_whole_state_goes_from_any_wrapper_into_any_other(ctx):
    makes = (plain, ddp, fsdp2, tensor_parallel, fsdp2_of_activations)
    whole = Options(full_state_dict=True)
    for source, target in itertools.permutations(makes, 2):
        one, two = source(ctx.size), target(ctx.size)
        a, b = optimizers(one), optimizers(two)
        m.train(a)
        zero(two, b)
        state = settled(ours.get_state_dict(one, a, options=whole))
        assert not any(isinstance(v, DTensor) for v in state[0].values())
        ours.set_state_dict(
            two, b, model_state_dict=dict(state[0]), optim_state_dict=settled(state[1]),
            options=whole,
        )  # fmt: skip
        again = ours.get_state_dict(two, b, options=whole)
        for one_state in (again, state):
            for group in one_state[1]["param_groups"]:
                group["betas"] = list(group["betas"])  # torch, too, makes a list of whole tuples
        m.same(settled(again), settled(state), f"{source.__name__} to {target.__name__}")


def case_state_is_the_live_tensors(ctx):
    for make in (ddp, fsdp2, fsdp2_with_hooks, tensor_parallel, two_d):
        model = make(ctx.size)
        optims = optimizers(model)
        m.train(optims)
        want, got = (m.places(list(i.get_state_dict(model, optims))) for i in (theirs, ours))
        assert got == want and got, make.__name__


def case_sharding_a_model_in_place_is_seen_by_the_next_call(ctx):
    model = layers()
    assert not isinstance(ours.get_model_state_dict(model)["0.up.weight"], DTensor)
    fully_shard(model, mesh=mesh_of(ctx.size))
    state = ours.get_model_state_dict(model)
    assert isinstance(state["0.up.weight"], DTensor)
    m.same(state, theirs.get_model_state_dict(model))
    optims = optimizers(model)
    m.same(
        ours.get_optimizer_state_dict(model, optims), theirs.get_optimizer_state_dict(model, optims)
    )


def case_hooks_that_exchange_parameters_run_first(ctx):
    """FSDP2 puts sharded parameters back when it is asked for its state."""
    results = []
    for implementation in (theirs, ours):
        model = fsdp2_with_hooks(ctx.size)
        model[1][0].unshard()
        assert not isinstance(model[1][0].scale, DTensor)
        state = implementation.get_model_state_dict(model)
        assert isinstance(state["1.0.scale"], DTensor)
        model[1][0].unshard()
        implementation.set_model_state_dict(model, {k: v * 2 for k, v in state.items()})
        results.append((settled(state), model.state_dict()))
    m.same(results[1], results[0])
