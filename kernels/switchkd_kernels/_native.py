"""Builds and loads the C++ of csrc/: on first use, into a cache; nothing at install.

There are two libraries: one for the CPU, with the schemas of all ops, and one for NVIDIA GPUs.
A library is named by a hash of everything that its bits depend on. It is built in a folder beside
it under a file lock, which the system releases with the process that holds it, and renamed when it
is complete: of processes that race one builds, and a build that was killed leaves nothing to trip
over. `SWITCHKD_JIT=0` forbids building; ahead of time, setup.py puts the library into the wheel.

This file imports nothing of the package, so that setup.py can run it before there is one.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

log = logging.getLogger("switchkd_kernels")

HERE = Path(__file__).resolve().parent
BUILT = "_native_ops.so"  # in the package, where it was built ahead of time
BUILT_CUDA = "_native_cuda_ops.so"
LOCK_SECONDS = 600  # longer than any build
REMEDY = (
    "install a C++ compiler (g++ or clang++, or name one in CXX); SWITCHKD_JIT=0 stops the attempts"
)

# -ffp-contract: products and sums in one rounding. No -ffast-math: -inf and NaN are legal inputs.
FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
INSTRUCTION_SETS = {  # lanes of a register, and what allows them
    "baseline": (4, []),
    "avx2": (8, ["-mavx2", "-mfma"]),
    "avx512": (  # tuned for one that has them: 4 % on another, too
        16,
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mtune=skylake-avx512"],
    ),
}

# No -use_fast_math: draws divide and take logarithms as the reference does.
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_TARGETS = ("80", "90a", "100")  # compiled ahead of time, of those that nvcc knows


class BuildError(RuntimeError):
    """Why there is no native library, in one line."""


def csrc() -> Path:
    """The sources: in the installed package, or in the repository around an editable one."""
    for folder in (HERE / "csrc", HERE.parents[1] / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    raise BuildError(f"its sources are not in {HERE / 'csrc'}")


def named(variable: str) -> list[str]:
    """The command that an environment variable names, with its arguments; [] if it names none."""
    given = os.environ.get(variable, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise BuildError(f"{variable} must be a command, got {given!r}: {error}") from error


def compiler() -> list[str]:
    """$CXX, which may have arguments, or the first of g++ and clang++ on the path."""
    given = named("CXX")
    for command in [given] if given else [["g++"], ["clang++"], ["c++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise BuildError(f"no C++ compiler: {' '.join(given) or 'g++'} is not on the path")


def run(command: list[str], where: Path | None = None) -> str:
    """Output of a command; BuildError with its first error, which is looked for in English."""
    env = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, cwd=where, env=env, capture_output=True, encoding="utf-8", errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        first = next((line for line in lines if "error:" in line), lines[0])
        raise BuildError(f"{command[0]} failed: {first.strip()}")
    return done.stdout


def nvcc() -> list[str]:
    """$NVCC, which may have arguments, or nvcc on the path or in $CUDA_HOME/bin."""
    given = named("NVCC")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    for command in [given] if given else [["nvcc"], [str(home / "bin" / "nvcc")]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise BuildError(f"no CUDA compiler: {' '.join(given) or 'nvcc'} is not on the path")


def commands(cxx: list[str], source: Path) -> tuple[list[list[str]], list[str]]:
    """What compiles each object, and what links them."""
    root = Path(torch.__file__).parent
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    each = []
    for name, (lanes, flags) in INSTRUCTION_SETS.items():
        if name == "baseline" or x86:
            defines = [f"-DSWITCHKD_CAPABILITY={name}", f"-DSWITCHKD_LANES={lanes}"]
            kernels = str(source / "cpu" / "kernels.cpp")
            each.append([*cxx, "-std=c++17", *FLAGS, *flags, *defines, "-c", kernels])
    # OpenMP as torch has it: its parallel_for is in its headers, and a second runtime in the
    # process would bring threads of its own.
    flags = ["-fopenmp", *["-DSWITCHKD_X86"] * x86]
    each.append(with_torch(cxx, source / "ops.cpp", *flags))
    own = sorted(
        [*(root / "lib").glob("lib*omp*.so*"), *root.with_name("torch.libs").glob("lib*omp*.so*")]
    )
    openmp = str(own[0]) if own else "-fopenmp"
    return each, [*cxx, "-shared", *torch_libraries(), openmp]


def with_torch(cxx: list[str], file: Path, *flags: str) -> list[str]:
    """What compiles a file that includes torch's headers."""
    root = Path(torch.__file__).parent / "include"
    include = [part for path in (root, root / "torch/csrc/api/include")
               for part in ("-isystem", str(path))]  # fmt: skip
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    start = [*cxx, "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", abi]
    return [*start, *flags, *include, "-c", str(file)]


def torch_libraries() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]


def cuda_targets() -> tuple[str, ...]:
    """Those of CUDA_TARGETS that this nvcc knows."""
    known = run([*nvcc(), "--list-gpu-code"]).split()
    return tuple(one for one in CUDA_TARGETS if f"sm_{one.rstrip('a')}" in known)


def gencode(target: str) -> str:
    return f"-gencode=arch=compute_{target},code=sm_{target}"


def cuda_commands(
    cxx: list[str], source: Path, targets: tuple[str, ...]
) -> tuple[list[list[str]], list[str]]:
    """As `commands`, of the CUDA library for GPUs `targets`, such as 90a; cudart is part of it."""
    cuda, host = nvcc(), f"-ccbin={cxx[0]}"
    kernels = str(source / "cuda" / "select.cu")
    each = [
        with_torch(cxx, source / "cuda" / "ops.cpp"),
        [*cuda, host, *CUDA_FLAGS, *map(gencode, targets), "-c", kernels],
    ]
    return each, [*cuda, host, "-shared", "-cudart=static", *torch_libraries()]


def compile_into(target: Path) -> None:
    """Builds the CPU's library at `target`; BuildError if it cannot."""
    build(target, *commands(compiler(), csrc()))


def compile_cuda_into(target: Path, targets: tuple[str, ...] | None = None) -> None:
    """Builds the CUDA library at `target`, by default for all `cuda_targets`."""
    build(target, *cuda_commands(compiler(), csrc(), targets or cuda_targets()))


def build(target: Path, each: list[list[str]], link: list[str]) -> None:
    """Compiles and links in a folder beside `target`."""
    folder = Path(tempfile.mkdtemp(prefix=f"{target.stem}.build-", dir=target.parent))
    try:
        objects = [f"{i}.o" for i in range(len(each))]
        slowest_first = reversed(list(zip(each, objects, strict=True)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda one: run([*one[0], "-o", one[1]], folder), slowest_first))
        run([link[0], *objects, *link[1:], "-o", target.name], folder)
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cache() -> Path:
    """$SWITCHKD_CACHE, or `switchkd` in $XDG_CACHE_HOME or ~/.cache."""
    given = os.environ.get("SWITCHKD_CACHE")
    folder = Path(given or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        folder = folder.expanduser()
    except RuntimeError as error:  # such as a container's user that has no entry
        raise BuildError(f"{folder} is nowhere: {error} SWITCHKD_CACHE names a folder") from error
    return folder if given else folder / "switchkd"


def digest(*parts: str, files: list[Path]) -> str:
    source = csrc()
    parts = [torch.__version__, *parts]
    for path in sorted(files):
        parts += [str(path.relative_to(source)), path.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def key(cxx: list[str]) -> str:
    """A hash of the sources, torch, the compiler, its flags and the kind of processor."""
    files = [
        path
        for path in csrc().rglob("*")
        if path.suffix in (".h", ".cpp") and path.parent.name != "cuda"
    ]
    settings = repr((FLAGS, INSTRUCTION_SETS))
    return digest(*cxx, run([*cxx, "--version"]), platform.machine(), settings, files=files)


def cuda_key(cxx: list[str], targets: tuple[str, ...]) -> str:
    """A hash of the sources, torch, both compilers and their flags, and the GPUs."""
    cuda, source = nvcc(), csrc()
    files = [*source.glob("*.h"), *(source / "cuda").glob("*.*")]
    versions = run([*cxx, "--version"]), run([*cuda, "--version"])
    return digest(*cxx, *cuda, *versions, *CUDA_FLAGS, *targets, files=files)


def built() -> Path:
    """The CPU's library: from the wheel, from the cache, or built into it now."""
    return found(BUILT, "native", lambda: key(compiler()), compile_into)


def built_for(target: str) -> Path:
    """The same of the CUDA library for GPUs of one kind, such as 90a."""

    def compile_for(path: Path) -> None:
        compile_cuda_into(path, (target,))

    return found(BUILT_CUDA, "cuda", lambda: cuda_key(compiler(), (target,)), compile_for)


def found(
    ahead: str, stem: str, key: Callable[[], str], compile_into: Callable[[Path], None]
) -> Path:
    """A library that was built ahead of time, or is in the cache, or is built into it now."""
    if (HERE / ahead).is_file():
        return HERE / ahead
    if os.environ.get("SWITCHKD_JIT") == "0":
        raise BuildError("SWITCHKD_JIT=0 forbids compiling it")
    try:
        import filelock
    except ImportError as error:
        raise BuildError(f"{error}; torch brings filelock") from error
    folder = cache()
    target = folder / f"{stem}-{key()}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            return target
        with filelock.FileLock(target.with_suffix(".lock"), timeout=LOCK_SECONDS):
            if target.is_file():  # another process has built it meanwhile
                return target
            for left in folder.glob(f"{target.stem}.build-*"):  # of a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            start = time.perf_counter()
            log.warning("compiling the native kernels into %s, once", target)
            compile_into(target)
            log.warning("compiled the native kernels in %.0f s", time.perf_counter() - start)
    except filelock.Timeout as error:
        raise BuildError(f"another process has held {error.lock_file} too long") from error
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be used: {error}") from error
    return target


@functools.cache
def unavailable() -> str | None:
    """Why the native ops cannot be used; None, once `torch.ops.switchkd_native` can be.

    The first call may compile. What fails is said once, on the logger `switchkd_kernels`.
    """
    wanted = os.environ.get("SWITCHKD_CPU", "")
    if wanted not in ("", *INSTRUCTION_SETS):
        names = ", ".join(INSTRUCTION_SETS)
        raise ValueError(f"SWITCHKD_CPU must be one of {names}, got {wanted!r}")
    try:
        path = built()
        try:
            torch.ops.load_library(path)
            torch.ops.switchkd_native.use(wanted)
        except (OSError, RuntimeError, AttributeError) as error:
            raise BuildError(f"{path} cannot be used: {str(error).splitlines()[0]}") from error
    except BuildError as error:
        if os.environ.get("SWITCHKD_JIT") != "0":
            log.warning("no native CPU kernels, the slower reference runs: %s; %s", error, REMEDY)
        return str(error)
    return None
