"""run.py: the main job, behind `make demo`: a training run killed inside its saves loses nothing.

Trains a small GPT with FSDP2 on two gloo ranks under torchrun, kills the whole job with SIGKILL
while an async and later a sync save is in flight, resumes, and checks that the run equals an
undisturbed one bit for bit; loads its last checkpoint on 3 and on 1 ranks; exchanges checkpoints
with stock torch.distributed.checkpoint both ways; prints times beside stock torch and the machine's
own limit. Exits with 1 if any check fails. Everything is made in a temporary directory.
"""

import argparse
import os
import pathlib
import shutil
import signal
import statistics
import sys
import tempfile
import time
from importlib.metadata import version

from jobs import DemoError, Job, in_flight, newest_complete, read_json, read_log

ROOT = pathlib.Path(__file__).resolve().parent.parent
STOCK = "torch.distributed.checkpoint"
STEPS = 12
SAVE_EVERY = 2
KILLS = ((8, "async"), (10, "sync"))  # train_gpt.py saves sync and async in turn
KILL_ATTEMPTS = 5
ROUNDS = 3


class Report:
    """The checks, in order, and whether all of them held."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.lines: list[str] = []
        self.ok = True

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", flush=True)

    def check(self, ok: bool, text: str, why: str = "") -> None:
        self.ok = self.ok and ok
        self.lines.append(f"ok    {text}" if ok else f"FAIL  {text} {why}".rstrip())
        self.say(self.lines[-1])

    def seconds(self) -> float:
        return time.monotonic() - self._start


class Demo:
    def __init__(self, scratch: pathlib.Path, dcp: str, report: Report) -> None:
        self.scratch, self.dcp, self.report = scratch, dcp, report
        self.checkpoints = scratch / "checkpoints"
        self.checkpoints.mkdir()
        self.last = self.checkpoints / f"step-{STEPS}"
        self.paths: list[str] = []  # which implementation each save and load went through

    def train_undisturbed(self) -> None:
        """The run that the other is compared with. It saves and loads nothing."""
        with self._training("undisturbed", "undisturbed", save_every=0) as job:
            job.finish()
        self.report.say(f"trained {STEPS} steps undisturbed, for comparison")

    def kill_in_save(self, step: int, kind: str) -> None:
        directory = self.checkpoints / f"step-{step}"
        text = f"SIGKILL of the whole job inside the {kind} save of step {step}"
        for attempt in range(KILL_ATTEMPTS):
            if self._kill_once(directory, f"killed-{step}-{attempt}"):
                left, newest = len(os.listdir(directory)), newest_complete(self.checkpoints)
                text += f": {left} files, no .metadata; newest complete is step {newest}"
                self.report.check(newest == step - SAVE_EVERY, text)
                return
            shutil.rmtree(directory)  # that save was faster than the kill: try again
        self.report.check(False, text, f"came too late {KILL_ATTEMPTS} times")

    def resume(self) -> None:
        with self._training("resumed", "killed", SAVE_EVERY) as job:
            job.finish()
        resumed, losses, paths = read_log(self.scratch / "killed.log")
        self.paths += paths
        expected = dict(read_log(self.scratch / "undisturbed.log")[1])
        steps = ", then ".join(str(step) for step in resumed if step is not None)
        self.report.check(
            resumed[-1] == KILLS[-1][0] - SAVE_EVERY and newest_complete(self.checkpoints) == STEPS,
            f"resumed on 2 ranks from step {steps}, over the unfinished files, to step {STEPS}",
        )
        wrong = sorted({step for step, values in losses if values != expected.get(step)})
        self.report.check(
            not wrong and {step for step, _ in losses} == expected.keys(),
            f"the losses of all {len(losses)} steps equal the undisturbed run's, bit for bit",
            f"(steps that differ: {wrong})",
        )
        ours = read_json(self.scratch / "killed.json")
        self.report.check(
            ours == read_json(self.scratch / "undisturbed.json"),
            f"so does its final state: {len(ours)} full tensors and values",
        )

    def reshard(self) -> None:
        """2 ranks wrote it; 3 ranks load and rewrite it, unevenly split; 1 rank loads both."""
        ours, of_3, train = self.dcp, self.scratch / "of-3", "train"
        load, load_of_3, stock_of_3 = (
            f"load {ours} {self.last}",
            f"load {ours} {of_3}",
            f"load {STOCK} {of_3}",
        )
        on_3 = self._verify(3, load, f"save {ours} {of_3}", train)
        self._check_loads(on_3[load], "loaded on 3 ranks (uneven shards)")
        on_1 = self._verify(1, load, load_of_3, stock_of_3, train)
        self._check_loads(on_1[load], "loaded on 1 rank")
        self._check_loads(on_1[load_of_3], "saved by 3 ranks, loaded on 1")
        self._check_loads(on_1[stock_of_3], "saved by 3 ranks, loaded on 1 by stock torch")
        steps = on_3[train] + on_1[train]
        self.report.check(
            not any(step["wrong"] for step in steps),
            f"trains on, loss {' and '.join(format(step['loss'], '.3f') for step in steps)}",
        )

    def exchange(self) -> tuple[list[tuple[str, float, float]], int]:
        """Both ways between us and stock, timed. Returns rows (name, save, load) and bytes."""
        ours, timed = self.dcp, []
        for i in range(ROUNDS):
            a, b = self.scratch / f"ours-{i}", self.scratch / f"stock-{i}"
            pair = (
                [f"save {ours} {a}", f"load {ours} {a}"],
                [f"save {STOCK} {b}", f"load {STOCK} {b}"],
            )
            timed += [*pair[i % 2], *pair[1 - i % 2], f"limit {a}"]
        first, stock_reads, we_read = (
            f"load {ours} {self.last}",
            f"load {STOCK} {self.last}",
            f"load {ours} {b}",
        )
        results = self._verify(2, first, *timed, stock_reads, we_read)
        self._check_loads(results[stock_reads], "saved by us, loaded by stock torch")
        self._check_loads(results[we_read], "saved by stock torch, loaded by us")
        every = [r for action in timed if action.startswith("load") for r in results[action]]
        self._check_loads(every, f"each of {len(every)} timed loads")

        def median(verb: str, key: str = "seconds") -> float:
            values = [r[key] for a in timed if a.startswith(f"{verb} ") for r in results[a]]
            return statistics.median(values)

        rows = [
            ("ours" if ours == STOCK else ours, median(f"save {ours}"), median(f"load {ours}")),
            (f"torch {version('torch')}", median(f"save {STOCK}"), median(f"load {STOCK}")),
            ("the machine's limit: direct I/O", median("limit", "write"), median("limit", "read")),
        ]
        return rows, int(median("limit", "bytes"))

    def check_paths(self) -> None:
        """Had dcp_native quietly handed the work to torch, all of the above would prove nothing."""
        if self.dcp != STOCK:
            native = self.paths.count("native")
            text = f"{native} of {len(self.paths)} saves and loads took the native path"
            self.report.check(0 < native == len(self.paths), text)

    def _training(self, name: str, record: str, save_every: int) -> Job:
        return Job(
            self.scratch, name, 2, "train_gpt.py",
            "--dcp", self.dcp if save_every else STOCK,
            "--checkpoints", self.checkpoints if save_every else self.scratch / "none",
            "--steps", STEPS, "--save-every", save_every,
            "--losses", self.scratch / f"{record}.log",
            "--digests", self.scratch / f"{record}.json",
        )  # fmt: skip

    def _kill_once(self, directory: pathlib.Path, name: str) -> bool:
        """Runs the job until it saves into `directory` and kills it. True if the save was cut."""
        for old in self.scratch.glob("killed.log.pid*"):
            old.unlink()
        with self._training(name, "killed", SAVE_EVERY) as job:
            job.wait_until(lambda: in_flight(directory))
            pids = self.scratch.glob("killed.log.pid*")
            job.kill([int(path.read_text(encoding="ascii")) for path in pids])
        return in_flight(directory)

    def _verify(self, ranks: int, *actions: str) -> dict[str, list[dict]]:
        """Runs verify.py; returns its results by action."""
        name = f"verify-on-{ranks}"
        results = self.scratch / f"{name}.json"
        files = ("--expected", self.scratch / "killed.json", "--results", results)
        with Job(self.scratch, name, ranks, "verify.py", *files, *actions) as job:
            job.finish()
        by_action: dict[str, list[dict]] = {}
        for result in read_json(results):
            by_action.setdefault(result["action"], []).append(result)
            if f" {self.dcp} " in result["action"]:
                self.paths.append(result["path"])
        return by_action

    def _check_loads(self, results: list[dict], text: str) -> None:
        wrong = [name for result in results for name in result["wrong"]]
        count = min(result["compared"] for result in results)
        self.report.check(
            not wrong, f"{text}: all {count} tensors and values equal", f"(wrong: {wrong[:4]})"
        )


def print_table(report: Report, rows: list[tuple[str, float, float]], total_bytes: int) -> None:
    print("\nverified")
    for line in report.lines:
        print(f"  {line}")
    size = total_bytes / 1e9
    print(f"\n{size * 1e3:.0f} MB over 2 ranks, cold loads, median of {ROUNDS}")
    head = "   ".join(f"{verb:>8} {'GB/s':>6} {'x limit':>8}" for verb in ("save s", "load s"))
    print(f"  {'':<32} {head}")
    _, limit_save, limit_load = rows[-1]
    for name, save, load in rows:
        print(
            f"  {name:<32} {save:8.3f} {size / save:6.2f} {save / limit_save:8.1f}  "
            f" {load:8.3f} {size / load:6.2f} {load / limit_load:8.1f}"
        )


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--dcp", default="dcp_native", help=f"the module to show; {STOCK} works too")
    p.add_argument("--dir", type=pathlib.Path, default=ROOT / "build", help="on the disk to use")
    args = p.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing stays behind
    report = Report()
    with tempfile.TemporaryDirectory(prefix="dcp-demo-", dir=args.dir) as scratch:
        demo = Demo(pathlib.Path(scratch), args.dcp, report)
        try:
            demo.train_undisturbed()
            for step, kind in KILLS:
                demo.kill_in_save(step, kind)
            demo.resume()
            demo.reshard()
            rows, total_bytes = demo.exchange()
            demo.check_paths()
        except DemoError as e:
            print(f"demo: {e}", file=sys.stderr)
            return 1
    print_table(report, rows, total_bytes)
    print(f"\n{'all checks passed' if report.ok else 'A CHECK FAILED'} in {report.seconds():.0f} s")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
