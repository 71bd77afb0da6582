"""The layer rule and the house rules of the sources, as far as a machine can check them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
C_FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".c", ".h", ".cpp", ".cu"))
OWN_FILES = C_FILES + sorted((ROOT / "dcp_native").rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70
MAX_COLUMNS = 100

INCLUDE = re.compile(r'^\s*#\s*include\s+[<"]([^">]+)[">]', re.M)
BANNED = {
    "sprintf", "strcpy", "strcat", "gets", "atoi", "alloca", "assert", "exit", "abort", "system",
    "printf", "fprintf", "puts", "vfprintf", "perror",
}  # fmt: skip
ALLOCATION = {"malloc", "calloc", "realloc", "free"}
FILE_CALLS = {
    "open", "openat", "close", "read", "write", "pread", "pwrite", "fsync", "fdatasync", "rename",
    "renameat", "unlink", "unlinkat", "mkdir", "ftruncate", "fallocate", "fopen", "fread", "fwrite",
    "syscall", "setpriority", "nanosleep", "fork", "vfork", "posix_spawn", "execv", "execve",
    "socket", "socketpair", "sendmsg", "recvmsg", "shutdown", "poll", "waitpid", "kill", "prctl",
    "setsid", "chdir",
}  # fmt: skip
SYSTEM_FILES = {"io_posix.c", "io_uring.c", "shm_posix.c", "arena_map_posix.c", "process_posix.c"}
"""The table of system calls, its queue, shared memory, memory by descriptor, processes."""


def code_of(path: Path) -> str:
    """The file's text without comments, strings and character literals."""
    text = path.read_text()
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)


def includes_of(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def calls_of(path: Path) -> set[str]:
    return set(re.findall(r"(?<![\w.>])(\w+)\s*\(", code_of(path)))


@pytest.mark.parametrize("path", sorted((CSRC / "core").glob("*.[ch]")), ids=lambda p: p.name)
def test_core_is_c_and_libc_alone(path):
    for name in includes_of(path):
        assert not re.search(r"Python|torch|c10|ATen|cuda|nccl|pybind", name), name
        if "/" not in name and not name.startswith("dcp_") and (CSRC / "core" / name).exists():
            continue
        assert name.startswith("dcp_") or name.endswith(".h"), name


@pytest.mark.parametrize("path", sorted((CSRC / "include").glob("*.h")), ids=lambda p: p.name)
def test_border_headers_are_plain_c(path):
    for name in includes_of(path):
        assert name.startswith("dcp_") or "/" not in name or name.startswith("sys/"), name
        assert "Python" not in name


@pytest.mark.parametrize("path", sorted((CSRC / "core").glob("*.c")), ids=lambda p: p.name)
def test_core_does_not_print_exit_or_bypass_its_tables(path):
    called = calls_of(path)
    allowed = {"abort"} if path.name == "error.c" else set()
    assert not (called & BANNED) - allowed
    if path.name != "alloc.c":
        assert not called & ALLOCATION
    if path.name not in SYSTEM_FILES:
        assert not called & FILE_CALLS


@pytest.mark.parametrize("path", sorted((CSRC / "writer").iterdir()), ids=lambda p: p.name)
def test_the_writer_is_core_and_a_main(path):
    for name in includes_of(path):
        assert (CSRC / "core" / name).exists() or "/" not in name, name
        assert not re.search(r"Python|torch|c10|ATen|cuda|nccl|pybind", name), name
    assert path.suffix == ".c" and "main" in calls_of(path)
    assert not calls_of(path) & (FILE_CALLS | ALLOCATION)


@pytest.mark.parametrize("path", sorted((CSRC / "cuda").iterdir()), ids=lambda p: p.name)
def test_cuda_needs_none_of_its_headers_and_nothing_of_the_core(path):
    """What is compiled everywhere sees our own prototypes alone."""
    for name in includes_of(path):
        border, own = CSRC / "include" / name, CSRC / "cuda" / name
        if name in ("kernels_image.inc",) or border.exists() or own.exists():
            continue
        if path.name == "check_prototypes.c":
            assert name in ("cuda.h", "cuda_runtime_api.h", "cufile.h", "nccl.h"), name
        else:
            assert not (CSRC / "core" / name).exists(), name
            assert not re.search(r"Python|torch|c10|ATen|cuda|cufile|nccl|pybind", name), name
    assert not calls_of(path) & (BANNED | ALLOCATION)
    assert not calls_of(path) & (FILE_CALLS - {"nanosleep"})


def test_the_package_links_nothing_of_cuda():
    (native,) = (ROOT / "dcp_native").glob("_native*.so")
    symbols = subprocess.run(["nm", "-D", native], capture_output=True, text=True, check=True)
    needed = subprocess.run(["readelf", "-d", native], capture_output=True, text=True, check=True)
    assert "PyInit__native" in symbols.stdout
    assert not re.search(r"\b(cuda|cu[A-Z]|cuFile|nccl)\w*$", symbols.stdout, re.M)
    assert not re.search(r"NEEDED.*(cuda|cudart|cufile|nccl)", needed.stdout)


@pytest.mark.parametrize("path", sorted((CSRC / "py").glob("*.c")), ids=lambda p: p.name)
def test_glue_opens_no_file_and_knows_no_cpp(path):
    assert not calls_of(path) & (FILE_CALLS | BANNED)
    for name in includes_of(path):
        if not (CSRC / "include" / name).exists():
            assert not re.search(r"torch|c10|ATen|cuda|nccl|pybind", name), name


def test_the_bridge_is_the_only_cpp():
    assert {p.parent.name for p in C_FILES if p.suffix == ".cpp"} == {"bridge"}
    for path in (CSRC / "bridge").glob("*"):
        assert not [
            n
            for n in includes_of(path)
            if n.startswith("dcp_") and not (CSRC / "include" / n).exists()
        ]


def test_core_objects_have_no_symbols_of_python_cpp_or_cuda():
    library = ROOT / "build" / "libcore.a"
    if not library.exists():
        subprocess.run(["make", "-s", "build/libcore.a"], cwd=ROOT, check=True)
    symbols = subprocess.run(["nm", "-u", library], capture_output=True, text=True, check=True)
    bad = [
        line for line in symbols.stdout.splitlines()
        if re.match(r"\s+U (Py|_Py|_Z|cuda|cu[A-Z]|nccl)", line)
    ]  # fmt: skip
    assert not bad


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_and_lines_are_short(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= MAX_FILE_LINES
    assert [i + 1 for i, line in enumerate(lines) if len(line) > MAX_COLUMNS] == []
    assert "\t" not in path.read_text()


@pytest.mark.parametrize("path", OWN_FILES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_files_say_what_they_are(path):
    text = path.read_text()
    if path.suffix == ".py":
        assert text.startswith('"""')
    else:
        assert re.match(r"/\*\n \* " + re.escape(path.name) + r": ", text), "head comment"
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)


@pytest.mark.parametrize(
    "path", [p for p in C_FILES if p.suffix != ".h"], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_functions_are_short(path):
    """A definition starts with its name in column 0 and ends with a brace in column 0."""
    lines = code_of(path).splitlines()
    start = None
    for number, line in enumerate(lines):
        if line.startswith("{"):
            start = number
        elif line.startswith("}") and start is not None:
            assert number - start - 1 <= MAX_FUNCTION_LINES, f"line {start + 1}"
            start = None
