"""Brings a copy of this source tree up to date: what git tracks, and new files it does not ignore.

    python tools/copy_tree.py build/cuda-tree

A tree holds one build of the package; this makes a second one for another torch.  Times are kept,
so that only what changed is compiled; what is gone here goes there, but for what builds leave.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def listed() -> list[str]:
    found = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [name for name in found.stdout.split("\0") if name and (ROOT / name).is_file()]


def main() -> None:
    copy, names = Path(sys.argv[1]), listed()
    kept = copy / ".copied"
    for name in set(kept.read_text().split("\0") if kept.exists() else ()) - set(names):
        (copy / name).unlink(missing_ok=True)
    for name in names:
        source, target = ROOT / name, copy / name
        if not target.exists() or target.stat().st_mtime_ns != source.stat().st_mtime_ns:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    kept.write_text("\0".join(names))


if __name__ == "__main__":
    main()
