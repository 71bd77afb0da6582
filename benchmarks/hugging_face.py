"""hugging_face.py: exports, consolidations and loads of Hugging Face files by two ranks.

    python benchmarks/hugging_face.py                # 2 GB over 2 ranks
    python benchmarks/hugging_face.py --quick        # tiny: proves the program

Both sides save and load the same sharded state through their own functions and classes. "rows": all
weights sharded along dim 0; "columns": along dim 1, so that every rank writes short rows between
the other's. wall: from a barrier to the end of the slowest rank.

export: with save_distributed and enable_consolidation into one file (the layout of a file per
5 GB), all in: write, consolidate, index, everything on the disk; torch does not sync what it
consolidates, so it gets a sync of the file system. extra: most memory of a rank beyond what it held
before. limit: direct writes of as many bytes, by both ranks at once.
consolidation: consolidate_safetensors_files on one rank, of shard files that torch wrote and that
are in the page cache. limit: direct writes of the result.
load: of an export into four files. Cold: the page cache of the files is dropped before every load;
limit: direct reads of the files, divided over both ranks. Hot: it is warm; limit: a memcpy of each
rank's bytes.
dequantisation: fp8 weights with block scales that become bfloat16, hot, on one rank.

Every export is read back with the safetensors package and compared, and so is every load.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import limits
import program
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import torch.multiprocessing as mp
from hugging_face_cases import (
    BLOCK,
    blank,
    build,
    differing,
    differing_files,
    local_bytes,
    spread,
    write_quantised,
)
from torch.distributed.checkpoint import _consolidate_hf_safetensors as torch_consolidate
from torch.distributed.checkpoint import hf_storage as torch_hf
from torch.distributed.checkpoint import quantized_hf_storage as torch_quantized
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dcp_native as dcp
from dcp_native import _consolidate_hf_safetensors as our_consolidate
from dcp_native import hf_storage as our_hf
from dcp_native import quantized_hf_storage as our_quantized

RANKS = 2
EXPORT_TIMES = 8
EXPORT_EXTRA_BYTES = 64 << 20
COLD_SHARE = 0.85
LOADED_FILES = 4
CASES = {"rows": 0, "columns": 1}
PARTS = ("export", "consolidation", "load", "dequantisation")


def timed(what: Callable[[], object], is_idle: bool = False) -> tuple[float, int]:
    """Seconds of the slowest rank; most extra bytes of a rank.  An idle rank does nothing."""
    limits.release_free_memory()
    limits.restart_peak()
    before = limits.status_bytes("VmRSS")
    dist.barrier()
    start = time.monotonic()
    if not is_idle:
        what()
    numbers = torch.tensor(
        [time.monotonic() - start, limits.status_bytes("VmHWM") - before], dtype=torch.float64
    )
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers[0].item(), int(numbers[1].item())


class Rank:
    """One rank's measurements; the figures are the same on all."""

    def __init__(self, args: argparse.Namespace, where: str) -> None:
        self.args = args
        self.where = where
        self.rank = dist.get_rank()
        self.limits = limits.Limits(limits.REQUEST_BYTES if args.quick else limits.BUFFER_BYTES)
        self.found: dict[str, dict] = {}
        self.wrong: list[str] = []

    def contest(
        self,
        what: str,
        size_bytes: int,
        contenders: dict[str, Callable[[str], object]],
        check: Callable[[str, str], list[str]],
        before: Callable[[], object] = lambda: None,
        is_alone: bool = False,
    ) -> None:
        """Contenders take turns, each with a path of its own that is removed; medians are kept.

        Args:
            check: what is wrong with the contender's result, from its name and path.
            before: rank 0 calls it before each turn.
            is_alone: only rank 0 works.
        """
        samples: dict[str, list[tuple[float, int]]] = {name: [] for name in contenders}
        for turn in range(self.args.repeats):
            for name in list(contenders)[:: 1 if turn % 2 else -1]:
                path = f"{self.where}/{name}"
                if self.rank == 0:
                    before()
                dist.barrier()
                idle = is_alone and self.rank > 0
                samples[name].append(timed(partial(contenders[name], path), idle))
                if name != "limit":
                    self.wrong += [f"{what}, {name}: {text}" for text in check(name, path)]
                self.remove(path)
        self.found[what] = {"bytes": size_bytes} | {
            name: {
                "wall_s": statistics.median(s for s, _ in pairs),
                "walls_s": [s for s, _ in pairs],
                "extra_bytes": max(b for _, b in pairs),
            }
            for name, pairs in samples.items()
        }

    def remove(self, path: str) -> None:
        """A directory that no rank needs any more, if it is there."""
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            limits.settle(self.where)
        dist.barrier()

    def write_limit(self, size_bytes: int, path: str) -> None:
        file = f"{path}{self.rank}"
        self.limits.write(file, size_bytes)
        os.unlink(file)

    # ---- parts ----

    def export(self, case: str, state: dict) -> None:
        def save(module: Any, function: Callable, path: str) -> None:
            writer = module.HuggingFaceStorageWriter(
                path, save_distributed=True, enable_consolidation=True
            )
            function(state, storage_writer=writer)
            if module is torch_hf:
                limits.settle(path)

        own = local_bytes(state)
        self.contest(
            f"export, {case}",
            own * RANKS,
            {
                "ours": partial(save, our_hf, dcp.save),
                "torch": partial(save, torch_hf, torch_dcp.save),
                "limit": partial(self.write_limit, own),
            },
            lambda _, path: differing_files(path, state),
        )

    def consolidation(self, case: str, state: dict) -> None:
        source = f"{self.where}/shards"
        writer = torch_hf.HuggingFaceStorageWriter(source, save_distributed=True)
        torch_dcp.save(state, storage_writer=writer)

        def consolidate(module: Any, path: str) -> None:
            os.mkdir(path)
            module.consolidate_safetensors_files(source, path, dict.fromkeys(state, 1))
            if module is torch_consolidate:
                limits.settle(path)

        total = local_bytes(state) * RANKS
        self.contest(
            f"consolidation, {case}",
            total,
            {
                "ours": partial(consolidate, our_consolidate),
                "torch": partial(consolidate, torch_consolidate),
                "limit": partial(self.write_limit, total),
            },
            lambda _, path: differing_files(path, state),
            before=partial(limits.warm_page_cache, source),
            is_alone=True,
        )
        self.remove(source)

    def load(self, case: str, state: dict) -> None:
        source = f"{self.where}/export"
        writer = our_hf.HuggingFaceStorageWriter(
            source, fqn_to_index_mapping=spread(state, LOADED_FILES), save_distributed=True,
            enable_consolidation=True,
        )  # fmt: skip
        dcp.save(state, storage_writer=writer)
        target = blank(state)
        files = sorted(pathlib.Path(source).glob("*.safetensors"))

        def load(module: Any, function: Callable, path: str) -> None:
            function(target, storage_reader=module.HuggingFaceStorageReader(source))

        def read(path: str) -> None:
            for file in files[self.rank :: RANKS]:
                self.limits.read(str(file), file.stat().st_size // 4096 * 4096)

        def check(name: str, path: str) -> list[str]:
            wrong = differing(state, target)
            for tensor in target.values():
                tensor.to_local().fill_(1)
            return wrong

        own = local_bytes(state)
        for heat, limit, before in (
            ("cold", read, limits.drop_page_cache),
            ("hot", lambda path: self.limits.memcpy(own), limits.warm_page_cache),
        ):
            self.contest(
                f"load, {case}, {heat}",
                own * RANKS,
                {
                    "ours": partial(load, our_hf, dcp.load),
                    "torch": partial(load, torch_hf, torch_dcp.load),
                    "limit": limit,
                },
                check,
                before=partial(before, source),
            )
        self.remove(source)

    def dequantisation(self) -> None:
        source = pathlib.Path(self.where, "quantised")
        shapes, target, results = {}, {}, {}
        if self.rank == 0:
            shapes = write_quantised(source, (8 if self.args.quick else 512) << 20)
            target = {n: torch.ones(shape, dtype=torch.bfloat16) for n, shape in shapes.items()}

        def load(module: Any, function: Callable, path: str) -> None:
            reader = module.QuantizedHuggingFaceStorageReader(
                str(source), target_dtype=torch.bfloat16, block_size=BLOCK
            )
            function(target, storage_reader=reader, no_dist=True)

        def check(name: str, path: str) -> list[str]:
            """Both sides' values are the same in every turn, and are values."""
            wrong = []
            for key, tensor in target.items():
                values = tensor.view(torch.int16)
                same = torch.equal(results.setdefault(key, values.clone()), values)
                wrong += [] if same and tensor.std() > 0 else [key]
                tensor.fill_(1)
            return wrong

        self.contest(
            "dequantisation, fp8 blocks to bfloat16",
            sum(rows * columns for rows, columns in shapes.values()),
            {
                "ours": partial(load, our_quantized, dcp.load),
                "torch": partial(load, torch_quantized, torch_dcp.load),
            },
            check,
            before=partial(limits.warm_page_cache, str(source)),
            is_alone=True,
        )

    def run(self) -> dict:
        mesh = init_device_mesh("cpu", (RANKS,))
        for case, dim in CASES.items():
            state = build(dim, self.args.quick, mesh)
            for part in (p for p in self.args.only if p != "dequantisation"):
                getattr(self, part)(case, state)
        if "dequantisation" in self.args.only:
            self.dequantisation()
        wrong = [None] * RANKS
        dist.all_gather_object(wrong, self.wrong)
        return {"found": self.found, "wrong": [text for texts in wrong for text in texts]}


def run_rank(rank: int, args: argparse.Namespace, where: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}/rendezvous", rank=rank, world_size=RANKS
    )
    results = Rank(args, where).run()
    if rank == 0:
        pathlib.Path(where, "results.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def rows_of(found: dict[str, dict]) -> list[dict]:
    rows = []
    for what, sides in found.items():
        ours, torch_ = sides["ours"]["wall_s"], sides["torch"]["wall_s"]
        limit = sides["limit"]["wall_s"] if "limit" in sides else None
        share = "" if limit is None else f", {limit / ours:.0%} of the limit"
        target, met = "", None
        if what.startswith("export"):
            target, met = f"{EXPORT_TIMES}x", torch_ >= EXPORT_TIMES * ours
        elif what == "load, rows, cold":  # of columns every rank reads every page
            target, met = f"{COLD_SHARE:.0%} of the limit", limit >= COLD_SHARE * ours
        rows.append(
            program.row(
                f"HF {what}, {sides['bytes'] / 1e9:.2g} GB",
                f"{program.seconds(ours)}{share}",
                f"{program.seconds(torch_)} ({program.times(torch_, ours)})",
                "" if limit is None else program.seconds(limit),
                target,
                met,
            )
        )
        if what.startswith("export"):
            ours, torch_ = sides["ours"]["extra_bytes"], sides["torch"]["extra_bytes"]
            rows.append(
                program.row(
                    f"HF {what}: extra memory of a rank",
                    f"{ours / 2**20:.1f} MiB",
                    f"{torch_ / 2**20:.1f} MiB",
                    "",
                    f"{EXPORT_EXTRA_BYTES >> 20} MiB",
                    ours <= EXPORT_EXTRA_BYTES,
                )
            )
    return rows


def main() -> int:
    parser = program.options(__doc__, 3)
    parser.add_argument("--dir", type=pathlib.Path, default=program.ROOT / "build")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    about = program.machine()
    os.environ["OMP_NUM_THREADS"] = "1"
    # Children import what this process does, wherever it was started.
    paths = (str(program.ROOT), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir=args.dir) as where:
        mp.spawn(run_rank, (args, where), RANKS)
        results = json.loads(pathlib.Path(where, "results.json").read_text(encoding="utf-8"))
    found, wrong = results["found"], results["wrong"]
    return program.publish("hugging_face", args, about, rows_of(found), found, wrong)


if __name__ == "__main__":
    sys.exit(main())
