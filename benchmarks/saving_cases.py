"""saving_cases.py: the cases of saving.py that need running ranks; each returns numbers by name.

All saves of a case go to one directory that is removed in between, on the file system under
measurement. What is saved is loaded and compared at the end of each case.
"""

import pathlib
import shutil
import statistics

from bench import CONTENDERS, VARIANTS, run_case
from program import say
from ranks import Ranks

NATIVE = CONTENDERS["dcp_native"]
STEP_SIZES = (1_000, 5_000, 20_000, 100_000)
CHANGED_SHARE = 0.05
# With fewer, `.metadata` is built before the files, not beside them (csrc/core/save_write.c).
METADATA_BESIDE_CHUNKS = 4096


def _verify(ranks: Ranks, reader: str, path: pathlib.Path) -> list[str]:
    result = ranks.measure("load", contender=CONTENDERS[reader], path=str(path))
    return [f"{reader} reads {path}: {w}" for w in result["wrong"]]


def many(ranks: Ranks, case: str, size: str, where: pathlib.Path, repeats: int) -> dict:
    """Small tensors: first and steady saves of both sides, torch with one thread."""
    names = ["dcp_native", "torch1", *VARIANTS]
    return run_case(ranks, case, size, where, names, repeats, loads=False)


def _one_save(results: list[dict]) -> dict[str, float]:
    """Seconds of the parts of one save, on the rank that came last to the vote: it waited for no
    one, and what it did before the first byte is what the save cost.
    """
    r = min(results, key=lambda r: r["report"]["vote_ns"])
    steps = {name: (end - start) / 1e9 for name, (start, end) in r["steps"].items()}
    vote = r["report"]["vote_ns"] / 1e9
    parts = {
        "flatten": min(r["flatten_s"], steps["add"]),
        "hash": max(0.0, steps["add"] - r["flatten_s"]),
        "vote": vote,
        "claim": steps["open"] + steps["claim"],
        "metadata": max(x["report"]["metadata_ns"] for x in results) / 1e9,
        "write": steps["write"],
        "finish": steps["finish"],
    }
    before = r["steps"]["write"][0] / 1e9
    parts["rest"] = before - steps["add"] - vote - parts["claim"]
    if sum(x["report"]["kept_items"] for x in results) < METADATA_BESIDE_CHUNKS:
        before += parts["metadata"]
    parts["before the first byte"] = before
    return parts


def steady(
    ranks: Ranks, case: str, counts: tuple[int, ...], where: pathlib.Path, repeats: int
) -> tuple[list[dict], list[str]]:
    """Where the time of a save goes whose plan is reused, by number of tensors on a rank."""
    found, wrong, path = [], [], where / "steady"
    for count in counts:
        say(f"steady state, {case}, {count} tensors ...")
        ranks.do("build", case=case, size="full", count=count)
        ranks.do("save", contender=NATIVE | {"plan": "new"}, path=str(path))
        rounds, all_reduce = [], []
        for turn in range(repeats):
            shutil.rmtree(path)
            results = ranks.do("save_steps", path=str(path))
            wrong += [w for r in results for w in r["wrong"]]
            all_reduce.append(min(r["all_reduce_s"] for r in results))
            rounds.append(_one_save(results))
            if turn == repeats - 1:
                wrong += _verify(ranks, "dcp_native", path)
        shutil.rmtree(path)
        parts = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        found.append(
            {"case": case, "count": count, "parts_s": parts}
            | {"all_reduce_s": statistics.median(all_reduce)}
        )
    return found, wrong


def memory(ranks: Ranks, case: str, size: str, where: pathlib.Path) -> tuple[dict, list[str]]:
    """What a save needs besides the state: after everything kept was given back, and after that."""
    path = where / "memory"
    ranks.do("build", case=case, size=size)
    objects_bytes = max(ranks.do("trim"))
    extra = {}
    for what in ("first", "second"):
        contender = NATIVE | {"plan": "new" if what == "first" else "kept"}
        result = ranks.measure("save", contender=contender, path=str(path))
        extra[what] = result["extra_bytes"]
        extra[f"{what}_kept"] = result["kept_bytes"]
        wrong = result["wrong"] + _verify(ranks, "dcp_native", path)
        shutil.rmtree(path)
    return {"case": case, "objects_bytes": objects_bytes, **extra}, wrong


def _timed_save(ranks: Ranks, path: pathlib.Path, base: pathlib.Path | None) -> dict:
    """The slowest rank's time and, with a base, its hash pass; what was reused of all ranks."""
    keywords = {} if base is None else {"base": str(base)}
    contender = {**NATIVE, "plan": "any"}
    results = ranks.do("save", contender=contender, path=str(path), **keywords)
    reports = [r["report"] for r in results]
    return {
        "wall_s": max(r["wall_s"] for r in results),
        "pass_s": max(r.get("hash_ns", 0) for r in reports) / 1e9,
        "reused_bytes": sum(r.get("reused_bytes", 0) for r in reports),
        "wrong": [w for r in results for w in r["wrong"]]
        + [f"the base was not used: {r['base_reason']}" for r in reports if r.get("base_reason")],
    }


def incremental(
    ranks: Ranks, size: str, where: pathlib.Path, repeats: int
) -> tuple[dict | None, list[str]]:
    """A full save beside one that takes unchanged tensors from the save before it.

    None: this dcp_native has no `base=`. The base is removed before the result is loaded.
    """
    if not all(ranks.do("has_base")):
        return None, []
    total = sum(b["own_bytes"] for b in ranks.do("build", case="llama", size=size))
    full, base, path = where / "full", where / "base", where / "incremental"
    saves: dict[str, list[dict]] = {"full": [], "incremental": []}
    wrong, changed = [], 0
    for turn in range(repeats):
        ranks.do("configure", incremental_links="hard", content_hash=True)
        _timed_save(ranks, base, None)
        changed = sum(ranks.do("change", share=CHANGED_SHARE))
        saves["incremental"].append(_timed_save(ranks, path, base))
        shutil.rmtree(base)
        ranks.do("configure", content_hash=False)
        saves["full"].append(_timed_save(ranks, full, None))
        shutil.rmtree(full)
        if turn == repeats - 1:
            wrong += _verify(ranks, "dcp_native", path) + _verify(ranks, "torch1", path)
        shutil.rmtree(path)
        say(f"  incremental: round {turn + 1} of {repeats} done")
    wrong += [w for results in saves.values() for r in results for w in r["wrong"]]
    return {
        "bytes": total,
        "changed_bytes": changed,
        "full_s": statistics.median(r["wall_s"] for r in saves["full"]),
        "incremental_s": statistics.median(r["wall_s"] for r in saves["incremental"]),
        "pass_s": statistics.median(r["pass_s"] for r in saves["incremental"]),
        "reused_bytes": saves["incremental"][-1]["reused_bytes"],
    }, wrong
