"""Models, optimizers and comparisons for the tests of state_dict.py, in one process and in many."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.distributed.tensor import DTensor


class Block(nn.Module):
    """Parameters, a buffer of each kind, and a child, all with names that repeat."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.scale = nn.Parameter(torch.rand(width))
        self.register_parameter("absent", None)
        self.register_buffer("kept", torch.rand(2))
        self.register_buffer("transient", torch.rand(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x)) * self.scale


class WithExtra(nn.Linear):
    """Extra state that is no tensor."""

    extra = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"extra": self.extra}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.extra = state["extra"]


class Renaming(nn.Module):
    """A state dict hook that takes a level out of the keys, which FQN modifiers tell of."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 3)
        self._register_state_dict_hook(self._shorten)
        self._register_load_state_dict_pre_hook(self._lengthen)

    def _fqn_modifiers(self) -> dict[str, str]:
        return {"weight": "hidden", "bias": "hidden"}

    @staticmethod
    def _shorten(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
        for key in [k for k in state_dict if k.startswith(prefix + "hidden.")]:
            state_dict[prefix + key[len(prefix) + 7 :]] = state_dict.pop(key)

    @staticmethod
    def _lengthen(state_dict: dict, prefix: str, *_: Any) -> None:
        for key in [k for k in state_dict if k in (prefix + "weight", prefix + "bias")]:
            state_dict[f"{prefix}hidden.{key[len(prefix) :]}"] = state_dict.pop(key)


class Overriding(nn.Linear):
    """Saves and loads by methods of its own."""

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"] * 2

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *more: Any) -> None:
        if prefix + "weight" in state_dict:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"] / 2
        super()._load_from_state_dict(state_dict, prefix, *more)


def plain() -> nn.Module:
    return nn.Sequential(Block(), nn.ModuleDict({"a": Block(), "b": nn.Linear(4, 2)}))


def deep() -> nn.Module:
    model: nn.Module = nn.Linear(2, 2)
    for _ in range(8):
        model = nn.Sequential(model, nn.ReLU())
    return model


def own_parameters() -> nn.Module:
    model = Block()
    model.more = nn.ParameterList([torch.rand(2), torch.rand(3)])
    model.others = nn.ParameterDict({"x": torch.rand(1)})
    return model


def shared() -> nn.Module:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4), "third": Block()})
    model["second"].weight = model["first"].weight
    model["again"] = model["third"]
    return model


def frozen() -> nn.Module:
    model = plain()
    for param in model[0].parameters():
        param.requires_grad_(False)
    return model


def activations() -> nn.Module:
    return nn.Sequential(
        checkpoint_wrapper(Block()), nn.Sequential(checkpoint_wrapper(offload_wrapper(Block())))
    )


def activation_root() -> nn.Module:
    return checkpoint_wrapper(plain())


def compiled() -> nn.Module:
    return torch.compile(plain(), backend="eager")


def compiled_part() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), torch.compile(Block(), backend="eager"), Block())


def compiled_in_activations() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(torch.compile(Block(), backend="eager")))


def activations_in_compiled() -> nn.Module:
    return torch.compile(activations(), backend="eager")


def extra() -> nn.Module:
    return nn.Sequential(WithExtra(3, 3), nn.Sequential(WithExtra(2, 2)), Block())


def extra_compiled() -> nn.Module:
    return torch.compile(extra(), backend="eager")


def hooked() -> nn.Module:
    model = plain()
    model[1]["a"].register_state_dict_post_hook(
        lambda module, state_dict, prefix, meta: state_dict.update(
            {prefix + "kept": state_dict[prefix + "kept"] + 1}
        )
    )
    model[0].register_state_dict_pre_hook(lambda *_: None)
    model[0].register_load_state_dict_pre_hook(lambda *_: None)
    model[0].register_load_state_dict_post_hook(lambda *_: None)
    return model


def overriding() -> nn.Module:
    return nn.Sequential(Overriding(3, 3), Block(), nn.Sequential(Overriding(2, 2)))


def parametrized() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), Block())


MODELS: tuple[Callable[[], nn.Module], ...] = (
    plain, deep, own_parameters, shared, frozen, activations, activation_root, compiled,
    compiled_part, compiled_in_activations, activations_in_compiled, extra, extra_compiled, hooked,
    overriding, parametrized,
)  # fmt: skip


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(trainable(model), lr=0.1)]


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(trainable(model), lr=0.1)]


def momentum_in_groups(model: nn.Module) -> list[torch.optim.Optimizer]:
    params = trainable(model)
    groups = [{"params": params[::2], "lr": 0.2}, {"params": params[1::2], "momentum": 0.5}]
    return [torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=False)]


def amsgrad_with_frozen(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1), amsgrad=True)]


def several(model: nn.Module) -> list[torch.optim.Optimizer]:
    params = trainable(model)
    return [torch.optim.AdamW(params[:1]), torch.optim.SGD(params[1:], lr=0.3, momentum=0.1)]


def in_backward(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer for each parameter, as optimizer-in-backward has them."""
    return [torch.optim.Adam([p]) for p in trainable(model)]


def named(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam([(n, p) for n, p in model.named_parameters() if p.requires_grad])]


OPTIMIZERS: tuple[Callable[[nn.Module], list[torch.optim.Optimizer]], ...] = (
    adamw, sgd, momentum_in_groups, amsgrad_with_frozen, several, in_backward, named,
)  # fmt: skip


def gradient_of(param: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    local = param.to_local() if isinstance(param, DTensor) else param
    grad = torch.rand(local.shape, generator=generator, dtype=param.dtype)
    if isinstance(param, DTensor):
        return DTensor.from_local(
            grad, param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
        )
    return grad


def train(optims: list[torch.optim.Optimizer], seed: int = 1) -> None:
    """One step with gradients made from the seed."""
    generator = torch.Generator().manual_seed(seed)
    for optim in optims:
        for param in itertools.chain.from_iterable(g["params"] for g in optim.param_groups):
            if param.requires_grad:
                param.grad = gradient_of(param, generator)
        optim.step()
        optim.zero_grad()


def option_kinds() -> list[dict[str, Any]]:
    """Every option that makes sense in one process, alone and together."""
    return [
        {},
        {"cpu_offload": True},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
        {"ignore_frozen_params": True},
        {"flatten_optimizer_state_dict": True},
        {"strict": False},
    ]


def same(got: Any, want: Any, where: str = "") -> None:
    """Equal in types, keys and their order, values to the bit, and _metadata."""
    assert type(got) is type(want), (where, type(got), type(want))
    if isinstance(want, dict):
        assert list(got) == list(want), (where, list(got), list(want))
        for key in want:
            same(got[key], want[key], f"{where}.{key}")
        assert getattr(got, "_metadata", None) == getattr(want, "_metadata", None), where
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            same(g, w, f"{where}.{i}")
    elif isinstance(want, DTensor):
        assert (got.placements, got.device_mesh) == (want.placements, want.device_mesh), where
        assert got.shape == want.shape and got.requires_grad == want.requires_grad, where
        same(got.to_local(), want.to_local(), where)
    elif isinstance(want, ShardedTensor):
        assert got.metadata() == want.metadata(), where
        shards = ([shard.tensor for shard in t.local_shards()] for t in (got, want))
        same(*shards, where)
    elif isinstance(want, torch.Tensor):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride()), (
            where
        )
        assert got.requires_grad == want.requires_grad and got.device == want.device, where
        assert torch.equal(got, want), where
    elif dataclasses.is_dataclass(want):
        same(vars(got), vars(want), where)
    else:
        assert got == want, (where, got, want)


def places(state: Any, prefix: str = "") -> dict[str, int]:
    """Where the bytes of each tensor lie."""
    if isinstance(state, DTensor):
        state = state.to_local()
    if isinstance(state, torch.Tensor):
        return {prefix: state.data_ptr()} if state.numel() else {}
    found: dict[str, int] = {}
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            found |= places(value, f"{prefix}/{key}")
    return found


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the type and text of what it raises."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)
