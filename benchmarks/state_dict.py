"""state_dict.py: what a trainer asks its model and optimizer for and gives them: ours and torch's.

    python benchmarks/state_dict.py            # 4,400 parameters, 200 MiB: two minutes
    python benchmarks/state_dict.py --quick    # seconds; the test suite runs this

First one process, AdamW that has stepped. Times are CPU seconds of the calling thread. The limit is
what can not be left out: to detach or copy every tensor once, in a plain loop. What both return
must be the same names in the same order and the same memory; what both load, the same values.

Then two ranks make state dicts full and cut them again: full_state_dict_cases.py.
"""

import copy
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import full_state_dict_cases
import torch
from program import machine, median_of, options, publish, row, say, seconds, times
from torch import nn
from torch.distributed.checkpoint import state_dict as theirs

from dcp_native import state_dict as ours

PARAMETERS, QUICK_PARAMETERS = 4400, 176
PER_BLOCK = 16
TARGET_RATIO = 10
WIDTH = 4


class Block(nn.Module):
    """A transformer block's modules, at a size at which only their number counts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkvo"})
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.norm1 = nn.LayerNorm(WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)


def trainer(parameters: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(*(Block() for _ in range(parameters // PER_BLOCK)))
    optim = torch.optim.AdamW(model.parameters())
    for param in model.parameters():
        param.grad = torch.rand_like(param)
    optim.step()
    optim.zero_grad()
    return model, optim


def addresses(state: Any) -> Any:
    """The state with every tensor replaced by where it lies."""
    if isinstance(state, torch.Tensor):
        return state.data_ptr()
    if isinstance(state, dict):
        return [(key, addresses(value)) for key, value in state.items()]
    if isinstance(state, list):
        return [addresses(value) for value in state]
    return state


def values(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: values(value) for key, value in state.items()}
    return [values(v) for v in state] if isinstance(state, list) else state


def timed(call: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        gc.collect()
        start = time.thread_time()
        call()
        return time.thread_time() - start

    return run


class Case:
    """One function under both, with the trainer it is called on and a state to load."""

    def __init__(self, parameters: int) -> None:
        self.model, self.optim = trainer(parameters, seed=0)
        other = trainer(parameters, seed=1)
        self.loaded = copy.deepcopy(theirs.get_state_dict(*other))
        self.tensors = list(self.model.parameters())

    def call(self, name: str, implementation: Any) -> Any:
        function = getattr(implementation, name)
        if name == "get_model_state_dict":
            return function(self.model)
        if name == "get_optimizer_state_dict":
            return function(self.model, self.optim)
        if name == "set_model_state_dict":
            return function(self.model, dict(self.loaded[0]))
        return function(self.model, self.optim, self.loaded[1])

    def limit(self, name: str) -> Callable[[], object]:
        """The work on tensors alone; optimizer state is handed over without any."""
        if name == "get_model_state_dict":
            return lambda: {i: tensor.detach() for i, tensor in enumerate(self.tensors)}
        if name == "set_model_state_dict":
            pairs = list(zip(self.tensors, self.loaded[0].values(), strict=True))

            def copies() -> None:
                with torch.no_grad():
                    for target, value in pairs:
                        target.copy_(value)

            return copies
        return lambda: {i: dict(state) for i, state in enumerate(self.optim.state.values())}

    def result(self, name: str, implementation: Any) -> Any:
        """What the call returned, or did."""
        if name.startswith("get"):
            return addresses(self.call(name, implementation))
        with torch.no_grad():
            for tensor in self.tensors:
                tensor.zero_()
        self.optim.state.clear()
        self.call("get_optimizer_state_dict", theirs)
        self.call(name, implementation)
        state = self.model.state_dict() if "model" in name else self.optim.state_dict()
        return values(state)


NAMES = (
    "get_model_state_dict",
    "get_optimizer_state_dict",
    "set_model_state_dict",
    "set_optimizer_state_dict",
)


def main(argv: list[str] | None = None) -> int:
    args = options(__doc__, repeats=7).parse_args(argv)
    about = machine()
    torch.set_num_threads(1)
    rows, details, wrong = [], {}, []
    say("one process gets and sets state ...")
    case = Case(QUICK_PARAMETERS if args.quick else PARAMETERS)
    for name in NAMES:
        ours_s, theirs_s, limit_s = median_of(
            args.repeats,
            timed(lambda name=name: case.call(name, ours)),
            timed(lambda name=name: case.call(name, theirs)),
            timed(case.limit(name)),
        )
        details[name] = {"ours_s": ours_s, "torch_s": theirs_s, "limit_s": limit_s}
        rows.append(
            row(
                f"{name}, {len(case.tensors):,} parameters",
                seconds(ours_s),
                f"{seconds(theirs_s)} ({times(theirs_s, ours_s)})",
                seconds(limit_s),
                f">= {TARGET_RATIO}x",
                theirs_s >= TARGET_RATIO * ours_s,
            )
        )
    # Afterwards: optimizer state that is checked is made anew, so not at its place in memory.
    for name in NAMES:
        if case.result(name, ours) != case.result(name, theirs):
            wrong.append(f"{name}: not what torch gives")
    full_rows, details["full_state_dict"], full_wrong = full_state_dict_cases.run(
        args.quick, args.repeats
    )
    return publish("state_dict", args, about, rows + full_rows, details, wrong + full_wrong)


if __name__ == "__main__":
    sys.exit(main())
