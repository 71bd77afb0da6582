"""Writes compile_commands.json for clangd and others, from the flags that setup.py builds with.

usage: python tools/compile_commands.py [file]      (default: compile_commands.json in the tree)

Needs the standard library only; without torch the C++ source is listed without torch's headers.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_setup() -> ModuleType:
    """setup.py as a module: its flags, without running a build."""
    spec = importlib.util.spec_from_file_location("dcp_native_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def entry(compiler: str, arguments: list[str], source: str) -> dict[str, object]:
    return {
        "directory": str(ROOT),
        "file": source,
        "arguments": [compiler, *arguments, "-c", source],
    }


def commands() -> list[dict[str, object]]:
    setup = load_setup()
    python_include = ["-isystem", sysconfig.get_path("include")]
    entries = []
    for module in setup.modules(setup.find_torch()):
        compiler = "c++" if module.language == "c++" else "cc"
        arguments = [f"-I{path}" for path in module.include_dirs]
        arguments += [f"-D{name}" if v is None else f"-D{name}={v}" for name, v in module.macros]
        arguments += module.compile_args + python_include
        entries += [entry(compiler, arguments, source) for source in module.sources]
    tests = ["-std=c11", "-D_GNU_SOURCE", "-DDCP_DEBUG"]
    tests += [f"-I{path}" for path in ("csrc/include", "csrc/core", "csrc/cuda", "tests/c")]
    entries += [entry("cc", tests, source) for source in setup.paths("tests/c/*.c")]
    return entries


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "compile_commands.json"
    entries = commands()
    target.write_text(json.dumps(entries, indent=1) + "\n")
    print(f"{target}: {len(entries)} files")


if __name__ == "__main__":
    main()
