"""app.py: what every process of the demo shares: start-up, the sharded model and the application
state that is saved.

The application state is written as DCP's tutorial writes it: one `Stateful` per part, tensors by
get_state_dict, so that the same lines save and load on any number of ranks.
"""

import ctypes
import hashlib
import importlib
import json
import pathlib
import random
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.distributed as dist
from gpt import GPT, Loader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

BATCH = 4


def start_up() -> tuple[int, int]:
    """Makes this process a deterministic, single-threaded rank. Returns (rank, ranks)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def checkpoint_module(name: str) -> ModuleType:
    """`import dcp_native as dcp`, or torch's own module for comparison."""
    return importlib.import_module(name)


def path_taken(dcp: ModuleType) -> str:
    """Which implementation the last finished save or load went through: "native" or "torch"."""
    report = dcp.last_report() if hasattr(dcp, "last_report") else None
    return report["path"] if report else "torch"


class Train:
    """Model and optimizer, as one Stateful."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state: dict) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


class Progress:
    """Counters that every rank shares."""

    def __init__(self, ranks: int) -> None:
        self.step, self.ranks = 0, ranks

    def state_dict(self) -> dict:
        return {"step": self.step, "ranks": self.ranks}

    def load_state_dict(self, state: dict) -> None:
        self.step = state[
            "step"
        ]  # `ranks` says how many wrote the checkpoint; it does not change how many we are


class Random:
    """The generators of this rank, under a name of its own: every rank draws other numbers."""

    def __init__(self, rank: int) -> None:
        self._key = f"rank{rank}"

    def state_dict(self) -> dict:
        return {self._key: {"torch": torch.get_rng_state(), "python": random.getstate()}}

    def load_state_dict(self, state: dict) -> None:
        torch.set_rng_state(state[self._key]["torch"])
        random.setstate(state[self._key]["python"])


class App:
    """Everything a training run is made of. `state(random)` is what goes to save and load."""

    def __init__(self, rank: int, ranks: int, seed: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = GPT()
        mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        torch.manual_seed(100 + rank)
        random.seed(100 + rank)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=100)
        self.loader = Loader(rank, ranks, BATCH)
        self.progress = Progress(ranks)
        self.train = Train(self.model, self.optimizer)
        self.random = Random(rank)

    def state(self, with_random: bool = True) -> dict:
        state = {
            "train": self.train,
            "schedule": self.schedule,
            "loader": self.loader,
            "progress": self.progress,
        }
        if with_random:
            state["random"] = self.random
        return state

    def step(self) -> float:
        """One training step; returns this rank's loss."""
        tokens, targets = self.loader.next_batch()
        loss = torch.nn.functional.cross_entropy(
            self.model(tokens).flatten(0, 1), targets.flatten()
        )
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        return loss.item()

    def load(self, dcp: ModuleType, path: str) -> None:
        """Loads the checkpoint in `path`. Generators belong to a rank: other numbers of ranks
        keep their own.
        """
        written_by = {"progress": {"ranks": 0}}
        dcp.load(written_by, checkpoint_id=path)
        dcp.load(
            self.state(with_random=written_by["progress"]["ranks"] == self.progress.ranks),
            checkpoint_id=path,
        )

    def digests(self, full: bool = True) -> dict[str, str]:
        """SHA-256 of every tensor and the text of every other value, by name.

        Full tensors do not depend on how they are sharded; gathering them is a collective call.
        `full=False` takes this rank's shards instead.
        """
        out: dict[str, str] = {}
        _describe(self.state(with_random=False), "", full, out)
        return out

    def poison(self) -> None:
        """Spoils every tensor and counter, so that a load that forgets one is caught."""
        for tensor in _tensors(self.train.state_dict()):
            tensor.fill_(-1.0)
        self.progress.step = self.loader.position = -1
        self.schedule.last_epoch = -1


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.to_local() if isinstance(value, DTensor) else value
    elif isinstance(value, (dict, list)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _tensors(v)


def _describe(value: object, key: str, full: bool, out: dict[str, str]) -> None:
    if hasattr(value, "state_dict"):
        value = value.state_dict()
    if isinstance(value, dict):
        for k, v in value.items():
            _describe(v, f"{key}.{k}" if key else str(k), full, out)
    elif isinstance(value, list):
        for i, v in enumerate(value):
            _describe(v, f"{key}.{i}", full, out)
    elif isinstance(value, torch.Tensor):
        if isinstance(value, DTensor):
            value = value.full_tensor() if full else value.to_local()
        value = value.contiguous()
        data = (
            (ctypes.c_char * value.nbytes).from_address(value.data_ptr()) if value.nbytes else b""
        )
        digest = hashlib.sha256(data).hexdigest()
        out[key] = f"{value.dtype} {tuple(value.shape)} {digest}"
    elif key != "progress.ranks":
        out[key] = repr(value)


def newest_complete(root: str) -> int | None:
    """The highest step under `root` whose checkpoint is complete (has `.metadata`), or None."""
    steps = [
        int(p.parent.name.removeprefix("step-"))
        for p in pathlib.Path(root).glob("step-*/.metadata")
    ]
    return max(steps, default=None)


def write_json(path: str, value: object) -> None:
    pathlib.Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: str) -> dict:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
