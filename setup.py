"""Builds the two extension modules and the writer's executable; everything else about the package
is in pyproject.toml.

`_native` is C11 and needs libc alone, with CUDA and without: it looks CUDA's functions up at run
time.  Where nvcc is found its kernels are compiled and embedded, where CUDA's headers are found our
prototypes are compared with them; without them the rest is built all the same.  `_writer` is the
same core with a main instead of Python: the process that writes background saves, installed beside
the modules.  `_bridge` is the one C++ source and is tied to the torch release whose headers it
sees, so torch must be installed first and build isolation must be off:

    pip install torch setuptools wheel
    pip install --no-build-isolation -e .

torch is found, not imported: importing it takes seconds and may need a GPU driver.

Switches, from the environment:
    DCP_NATIVE_SANITIZE=address,undefined   compile and link with these sanitizers
    DCP_NATIVE_DEBUG=1                      no optimisation, debug info, core assertions on
    DCP_NATIVE_COVERAGE=1                   count executed lines (gcov)
    DCP_NATIVE_CUDA=0                       build as where there is no CUDA toolkit

tools/compile_commands.py reads the flags from here, so this file imports setuptools late.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent

NO_TORCH = """
dcp_native: cannot build without torch.

Its C++ module is compiled against the headers of the torch release it will run with, and {python}
has no torch{why}.

  1. Install torch, setuptools and wheel there:  {python} -m pip install torch setuptools wheel
  2. Install dcp_native without build isolation, so that the build sees that torch:
         {python} -m pip install --no-build-isolation .
"""


@dataclass
class Module:
    """One extension module or executable, as plain data."""

    name: str
    sources: list[str]
    depends: list[str]
    include_dirs: list[str]
    compile_args: list[str]
    link_args: list[str] = field(default_factory=list)
    macros: list[tuple[str, str | None]] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)
    library_dirs: list[str] = field(default_factory=list)
    language: str = "c"


def find_torch() -> Path | None:
    """The directory of the installed torch package, when it has C++ headers."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    return root if (root / "include" / "c10").is_dir() else None


def paths(*patterns: str) -> list[str]:
    """Files of the tree by glob, relative to its root, in one order on every machine."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


CUDA_IMAGE = Path("build/cuda/kernels_image.inc")
"""The kernels as numbers for C, where nvcc made them: csrc/cuda/cuda_image.c looks for it."""

PROTOTYPES = "csrc/cuda/check_prototypes.c"
"""Compiled where there is something to compare with, and linked nowhere."""

CUDA_ARCHITECTURES = ("80", "90", "100")
"""Code for these; newer devices compile the oldest one's PTX when it is loaded."""


def cuda_roots() -> list[Path]:
    """Where a CUDA toolkit may be, the one that was asked for first."""
    if os.environ.get("DCP_NATIVE_CUDA") == "0":
        return []
    asked = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    found = [str(Path(on_path).resolve().parent.parent)] if on_path else []
    return [Path(root) for root in [*asked, *found, "/usr/local/cuda"]]


def find_nvcc() -> Path | None:
    return next((n for root in cuda_roots() if (n := root / "bin" / "nvcc").exists()), None)


def cuda_include_dirs() -> list[str]:
    """Headers of CUDA, cuFile and NCCL: of torch's wheels, which it was built with, or a toolkit.

    Empty where CUDA's are not among them.
    """
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in (spec and spec.submodule_search_locations) or []]
    places = [p for wheel in wheels for p in sorted(wheel.glob("*/include"))]
    places += [root / "include" for root in cuda_roots()]
    # The wheels lack what the runtime's header includes from crt/.
    needed = ("cuda_runtime_api.h", "cuda.h", "crt/host_defines.h")
    holders = [next((p for p in places if (p / name).exists()), None) for name in needed]
    if None in holders:
        return []
    holders += [next((p for p in places if (p / n).exists()), None) for n in ("cufile.h", "nccl.h")]
    return list(dict.fromkeys(str(p) for p in holders if p is not None))


def compile_kernels(nvcc: Path, source: str, target: Path) -> None:
    """A fat binary of the kernels, for the architectures that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = [a for a in CUDA_ARCHITECTURES if f"sm_{a}" in listed.stdout.split()]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in known]
    codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in known[:1]]
    # Old drivers cannot unpack what new compilers compress.
    command = [nvcc, "--fatbin", "--no-compress", "-std=c++17", "-O3", *codes]
    command += ["-Icsrc/include", "-Icsrc/cuda"]
    target.parent.mkdir(parents=True, exist_ok=True)
    fat = target.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, source, "-o", fat], capture_output=True, text=True, check=True)
    image = fat.read_bytes()
    image += b"\0" * (-len(image) % 8)
    words = [f"{int.from_bytes(image[i : i + 8], 'little'):#x}," for i in range(0, len(image), 8)]
    lines = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    fat.write_text("\n".join(lines) + "\n")
    fat.replace(target)


def is_on(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def apply_switches(module: Module) -> Module:
    """What the environment asks for.  Later flags win over Python's own -O3 and -g."""
    sanitize = os.environ.get("DCP_NATIVE_SANITIZE", "")
    if sanitize:
        flags = [f"-fsanitize={sanitize}", "-fno-sanitize=vptr"]
        module.compile_args += [*flags, "-fno-omit-frame-pointer", "-g", "-O1"]
        module.link_args += flags
    if is_on("DCP_NATIVE_COVERAGE"):
        module.compile_args += ["--coverage", "-O0"]
        module.link_args += ["--coverage"]
    if is_on("DCP_NATIVE_DEBUG"):
        module.compile_args += ["-O0", "-g"]
        module.macros += [("DCP_DEBUG", "1")]
    return module


def torch_release(torch: Path | None) -> str:
    """What torch/version.py says, without the local part: "2.13.0"; "" without torch."""
    if torch is None:
        return ""
    found = re.search(r"__version__ = '([^'+]+)", (torch / "version.py").read_text())
    return found[1] if found else ""


def build_id() -> str:
    """Names the sources of the core, which an extension module and a writer have to share."""
    digest = hashlib.sha256()
    for path in paths("csrc/core/*", "csrc/include/*", "csrc/writer/*"):
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()[:16]


def native_module(torch: Path | None) -> Module:
    return apply_switches(
        Module(
            name="dcp_native._native",
            sources=[
                path
                for path in paths("csrc/core/*.c", "csrc/cuda/*.c", "csrc/py/*.c")
                if path != PROTOTYPES
            ],
            depends=paths(
                "csrc/include/*.h",
                "csrc/core/*.h",
                "csrc/cuda/*.h",
                "csrc/cuda/*.cu",
                "csrc/py/*.h",
            ),
            include_dirs=[
                *("csrc/include", "csrc/core", "csrc/cuda", "csrc/py"),
                str(CUDA_IMAGE.parent),
            ],
            compile_args=["-std=c11", "-fvisibility=hidden", "-O3", "-pthread"],
            link_args=["-pthread", "-ldl"],
            macros=[
                ("_GNU_SOURCE", None),
                ("DCP_BUILD_ID", f'"{build_id()}"'),
                ("DCP_BUILT_FOR_TORCH", f'"{torch_release(torch)}"'),
            ],
        )
    )


def writer_module() -> Module:
    """The executable's own part; the core is linked from the objects of `_native`."""
    return apply_switches(
        Module(
            name="dcp_native._writer",
            sources=paths("csrc/writer/*.c"),
            depends=paths("csrc/include/*.h", "csrc/core/*.h"),
            include_dirs=["csrc/include", "csrc/core"],
            compile_args=["-std=c11", "-O3", "-pthread"],
            link_args=["-pthread"],
            macros=[("_GNU_SOURCE", None)],
        )
    )


def bridge_module(torch: Path | None) -> Module:
    """-g0: debug info of torch's headers doubles the compile time and says nothing about ours."""
    module = Module(
        name="dcp_native._bridge",
        sources=paths("csrc/bridge/*.cpp"),
        depends=paths("csrc/include/*.h", "csrc/bridge/*.h"),
        include_dirs=["csrc/include"],
        compile_args=["-std=c++20", "-fvisibility=hidden", "-g0"],
        link_args=["-ldl"],
        libraries=["c10", "torch_cpu", "torch_python"],
        language="c++",
    )
    if torch is not None:
        module.compile_args += ["-isystem", str(torch / "include")]
        module.library_dirs = [str(torch / "lib")]
        # A torch of another version under the same path must not find the old object up to date.
        module.depends.append(str(torch / "include/torch/headeronly/version.h"))
    return apply_switches(module)


def modules(torch: Path | None) -> list[Module]:
    return [bridge_module(torch), native_module(torch), writer_module()]


def main() -> None:
    try:
        from setuptools import Extension, setup
        from setuptools.command.build_ext import build_ext
        from setuptools.command.build_py import build_py
        from setuptools.modified import newer_group
    except ModuleNotFoundError:
        sys.exit(f"dcp_native: {sys.executable} has no setuptools; install setuptools and wheel")

    torch = find_torch()

    native, writer = native_module(torch), writer_module()

    class BuildAll(build_ext):
        """The stock command, which also builds the executable and says in words that torch is
        missing.

        Commands that compile nothing (sdist, egg_info) run without torch.
        """

        def writer_paths(self) -> tuple[str, str]:
            """Where the executable is built, and where `--inplace` copies it to."""
            package, name = writer.name.split(".")
            source = self.get_finalized_command("build_py").get_package_dir(package)
            return os.path.join(self.build_lib, package, name), os.path.join(source, name)

        def run(self) -> None:
            if torch is None:
                found = importlib.util.find_spec("torch")
                why = "" if found is None else f" with C++ headers ({found.origin})"
                sys.exit(NO_TORCH.format(python=sys.executable, why=why))
            super().run()

        def build_extensions(self) -> None:
            self.build_kernels()
            self.check_prototypes()
            super().build_extensions()
            self.build_writer()

        def build_kernels(self) -> None:
            """What a build without nvcc lacks only makes some copies faster."""
            nvcc, inputs = find_nvcc(), paths("csrc/cuda/kernel*", "csrc/include/dcp_limits.h")
            if nvcc is None:
                CUDA_IMAGE.unlink(missing_ok=True)
            elif self.force or not CUDA_IMAGE.exists() or newer_group(inputs, str(CUDA_IMAGE)):
                try:
                    compile_kernels(nvcc, "csrc/cuda/kernels.cu", CUDA_IMAGE)
                except subprocess.CalledProcessError as e:
                    CUDA_IMAGE.unlink(missing_ok=True)
                    self.warn(f"the kernels are left out: {nvcc} failed\n{e.stdout}{e.stderr}")
            if CUDA_IMAGE.exists():
                native.depends.append(str(CUDA_IMAGE))

        def check_prototypes(self) -> None:
            """Compares our prototypes of CUDA's functions with its headers, where there are any."""
            places = cuda_include_dirs()
            (target,) = self.compiler.object_filenames([PROTOTYPES], output_dir=self.build_temp)
            inputs = [PROTOTYPES, "setup.py", *native.depends]
            if not places or not (self.force or newer_group(inputs, target)):
                return
            self.compiler.compile(
                [PROTOTYPES],
                output_dir=self.build_temp,
                macros=native.macros,
                include_dirs=native.include_dirs,
                extra_postargs=["-std=c11"] + [f"-idirafter{place}" for place in places],
            )

        def build_writer(self) -> None:
            """Links main and the objects that `_native` has just been made of."""
            compiler, target = self.compiler, Path(self.writer_paths()[0])
            core = [source for source in native.sources if source.startswith("csrc/core/")]
            objects = compiler.object_filenames(core, output_dir=self.build_temp)
            inputs = [*writer.sources, *writer.depends, *core]
            if not self.force and target.exists() and not newer_group(inputs, str(target)):
                return
            missing = [s for s, o in zip(core, objects, strict=True) if not os.path.exists(o)]
            for module, sources in ((native, missing), (writer, writer.sources)):
                compiled = compiler.compile(
                    sources,
                    output_dir=self.build_temp,
                    macros=module.macros,
                    include_dirs=module.include_dirs,
                    extra_postargs=module.compile_args,
                )
            library = compiler.library_filename("dcp_core", output_dir=self.build_temp)
            Path(library).unlink(missing_ok=True)
            compiler.create_static_lib(objects, "dcp_core", output_dir=self.build_temp)
            compiler.link_executable(
                [*compiled, library],
                target.name,
                output_dir=str(target.parent),
                extra_postargs=writer.link_args,
            )

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            self.copy_file(*self.writer_paths(), level=self.verbose)

        def get_outputs(self) -> list[str]:
            return sorted({*super().get_outputs(), self.writer_paths()[0]})

        def get_output_mapping(self) -> dict[str, str]:
            built, inplace = self.writer_paths()
            return super().get_output_mapping() | ({built: inplace} if self.inplace else {})

    class BuildWithHook(build_py):
        """The stock command, which also puts dcp_native.pth beside the package, in site-packages.

        An editable install takes Python files from the tree, but not this one.
        """

        def hook(self) -> str:
            install = self.get_finalized_command("install")
            root = install.install_lib if self.editable_mode else self.build_lib
            return os.path.join(root, "dcp_native.pth")

        def run(self) -> None:
            super().run()
            self.mkpath(os.path.dirname(self.hook()))
            self.copy_file("dcp_native.pth", self.hook())

        def get_outputs(self, include_bytecode: bool = True) -> list[str]:
            return [*super().get_outputs(include_bytecode), self.hook()]

    setup(
        ext_modules=[
            Extension(
                module.name,
                sources=module.sources,
                depends=module.depends,
                include_dirs=module.include_dirs,
                define_macros=module.macros,
                extra_compile_args=module.compile_args,
                extra_link_args=module.link_args,
                libraries=module.libraries,
                library_dirs=module.library_dirs,
                language=module.language,
            )
            for module in (bridge_module(torch), native)
        ],
        cmdclass={"build_ext": BuildAll, "build_py": BuildWithHook},
        # The bridge is one slow file and the core many quick ones: side by side they take as long
        # as the bridge alone.
        options={"build_ext": {"parallel": os.cpu_count() or 1}},
    )


if __name__ == "__main__":
    main()
