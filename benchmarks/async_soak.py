"""async_soak.py: many background saves while writer processes are killed: does the promise hold?

    python benchmarks/async_soak.py --saves 1000      # some minutes, 0.2 GB of disk
    python benchmarks/async_soak.py                   # a dozen saves; the test suite runs this

Two ranks save to one of two directories, over what is there. Before some saves each rank draws
whether, and when, it kills its own writer process by SIGKILL: anywhere between the call and a while
after the usual end. The promise: a save is committed on all ranks and what loads then is its
content, or it failed on all ranks and what loads is the checkpoint before it; it ends in time; a
directory holds no file of a save that failed before the one committed there; no writer outlives its
rank. What is drawn comes from the seed; the exact moment of a kill is the machine's. Exits with 1
if the promise was broken.
"""

import argparse
import contextlib
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

from processes import WRITER, runs
from program import ROOT, WRONG_SHOWN, BenchError, machine, say, seconds, write_json
from ranks import Ranks

RANKS, SLOTS = 2, 2
MODES = ("PROCESS", "THREAD")
THREAD_SHARE = 0.2  # of the saves, where both modes are asked for
KILL_SHARE = 0.35  # of the saves by PROCESS, on each rank
KILL_WINDOW = 1.2  # of the usual time of a save
SAVE_DEADLINE_S = 60
FAREWELL_S = 5
SHOWN_EVERY = 50


class Soak:
    """What was drawn, what became of it, and what each directory must hold."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks, disk: pathlib.Path) -> None:
        self.args, self.ranks = args, ranks
        self.random = random.Random(args.seed)
        self.slots = [disk / f"slot-{i}" for i in range(SLOTS)]
        self.holds: list[int | None] = [None] * SLOTS
        self.usual_s = 1.0
        self.counts = dict.fromkeys(("committed", "failed", "killed_writers", "with_kills"), 0)
        self.slowest = {"committed": 0.0, "failed": 0.0}
        self.errors: dict[str, int] = {}
        self.writers: set[int] = set()
        self.wrong: list[str] = []

    def _draw(self) -> tuple[int, str, list[float | None]]:
        """Where to save, how, and after which part of the usual time each rank kills."""
        slot, draw = self.random.randrange(SLOTS), self.random.random()
        modes = self.args.modes
        mode = modes[0] if len(modes) == 1 or draw >= THREAD_SHARE else "THREAD"
        kills = [
            self.random.uniform(0, KILL_WINDOW) if self.random.random() < self.args.kills else None
            for _ in range(RANKS)
        ]
        return slot, mode, kills if mode == "PROCESS" else [None] * RANKS

    def save(self, turn: int) -> None:
        slot, mode, kills = self._draw()
        path = self.slots[slot]
        # Every rank gets the same command; the moments of its kill differ by rank.
        results = self.ranks.do(
            "save", turn=turn, path=str(path), mode=mode, deadline_s=SAVE_DEADLINE_S,
            kills_after_s=[None if k is None else k * self.usual_s for k in kills],
        )  # fmt: skip
        outcomes = {r["committed"] for r in results}
        took_s = max(r["seconds"] for r in results)
        killed = sum(r["killed"] for r in results)
        self.counts["killed_writers"] += killed
        self.counts["with_kills"] += killed > 0
        self.writers.update(pid for r in results for pid in r["writers"])
        errors = [r["error"] for r in results]
        where = f"save {turn} by {mode} to {path.name}, {killed} writers killed"
        if "HUNG" in errors:
            raise BenchError(f"{where}: not done after {SAVE_DEADLINE_S} s")
        if len(outcomes) > 1:
            self.wrong.append(f"{where}: the ranks disagree: {errors}")
        committed = results[0]["committed"]
        if not committed and killed == 0:
            self.wrong.append(f"{where}: failed: {errors[0]}")
        name = "committed" if committed else "failed"
        self.counts[name] += 1
        self.slowest[name] = max(self.slowest[name], took_s)
        if committed:
            self.holds[slot] = turn
            self.usual_s = 0.7 * self.usual_s + 0.3 * took_s if turn else took_s
            self._check_files(where, path)
        else:
            kind = (errors[0] or errors[1]).partition("\n")[0][:100]
            self.errors[kind] = self.errors.get(kind, 0) + 1
        self._check(where, slot)

    def _check_files(self, where: str, path: pathlib.Path) -> None:
        names = sorted(os.listdir(path))
        if ".metadata" not in names or len(names) != 1 + RANKS:
            self.wrong.append(f"{where}: the directory holds {', '.join(names)}")

    def _check(self, where: str, slot: int) -> None:
        found = self.ranks.do("check", path=str(self.slots[slot]), turn=self.holds[slot])
        for rank, wrong in enumerate(found):
            self.wrong += [f"{where}: rank {rank}: {w}" for w in wrong]

    def all(self) -> None:
        for turn in range(self.args.saves):
            self.save(turn)
            if (turn + 1) % SHOWN_EVERY == 0:
                say(f"  {turn + 1} saves: {self.counts}, {len(self.wrong)} wrong")
        for slot in range(SLOTS):
            self._check("in the end", slot)

    def check_ended(self) -> None:
        """The ranks have ended: so must their writers, soon."""
        deadline = time.monotonic() + FAREWELL_S
        while left := [pid for pid in self.writers if runs(pid, WRITER)]:
            if time.monotonic() > deadline:
                self.wrong.append(f"{len(left)} writer processes outlive their ranks")
                return
            time.sleep(0.05)


def _modes(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(MODES):
        raise argparse.ArgumentTypeError(f"{unknown}: not of {', '.join(MODES)}")
    return text.split(",")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--saves", type=int, default=12)
    p.add_argument("--mib", type=int, default=48, help="of a save, both ranks together")
    p.add_argument("--seed", type=int, default=6)
    p.add_argument("--kills", type=float, default=KILL_SHARE, help="share of saves, on each rank")
    p.add_argument("--modes", type=_modes, default=list(MODES), metavar="A,B")
    p.add_argument("--dir", type=pathlib.Path, default=ROOT / "build", help="on the disk to use")
    p.add_argument("--json", type=pathlib.Path, help="where the results go")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.dir.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing stays behind
    about = machine()
    with contextlib.ExitStack() as stack:
        disk, scratch = (
            pathlib.Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="dcp-soak-", dir=base))
            )
            for base in (args.dir, None)
        )
        ranks = Ranks(
            RANKS, scratch, "soak_worker.py", watched=False, timeout_s=2 * SAVE_DEADLINE_S
        )
        soak = Soak(args, ranks, disk)
        try:
            ranks.wait_ready()
            # A tensor has 1 MiB on each rank; of every tenth both hold the same.
            ranks.do("build", tensors=max(10, args.mib // RANKS))
            soak.all()
        except BenchError as e:
            soak.wrong.append(str(e))
        finally:
            ranks.close()
        soak.check_ended()
    print(f"{args.saves} saves of about {args.mib} MiB by {RANKS} ranks, seed {args.seed}")
    for name, count in soak.counts.items():
        print(f"  {name}: {count}")
    for name, slowest_s in soak.slowest.items():
        print(f"  slowest {name}: {seconds(slowest_s) if slowest_s else '-'}")
    for error, count in sorted(soak.errors.items(), key=lambda item: -item[1]):
        print(f"  {count} x {error}")
    if not soak.writers:
        print("  there was no writer process: PROCESS ran as THREAD")
    print(f"{len(soak.wrong)} promises were broken")
    for text in soak.wrong[:WRONG_SHOWN]:
        print(f"  WRONG {text}")
    if args.json:
        results = {"machine": about, "counts": soak.counts, "slowest_s": soak.slowest}
        results |= {"errors": soak.errors, "has_writer": bool(soak.writers), "wrong": soak.wrong}
        write_json(args.json, results)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
