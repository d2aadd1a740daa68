"""Builds and loads the C++ of csrc/: on first use, into a cache; nothing at install.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

log = logging.getLogger("switchkd_kernels")

HERE = Path(__file__).resolve().parent
BUILT = "_native_ops.so"  # in the package, where it was built ahead of time
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
    "avx512": (
        16,
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    ),
}


class BuildError(RuntimeError):
    """Why there is no native library, in one line."""


def csrc() -> Path:
    """The sources: in the installed package, or in the repository around an editable one."""
    for folder in (HERE / "csrc", HERE.parents[1] / "csrc"):
        if (folder / "ops.cpp").is_file():
            return folder
    raise BuildError(f"its sources are not in {HERE / 'csrc'}")


def compiler() -> list[str]:
    """$CXX, which may have arguments, or the first of g++ and clang++ on the path."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [["g++"], ["clang++"], ["c++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise BuildError(f"no C++ compiler: {' '.join(given) or 'g++'} is not on the path")


def run(command: list[str], where: Path | None = None) -> str:
    """Output of a command; BuildError with its first error."""
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        first = next((line for line in lines if "error:" in line), lines[0])
        raise BuildError(f"{command[0]} failed: {first.strip()}")
    return done.stdout


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
    include = [root / "include", root / "include/torch/csrc/api/include"]
    # OpenMP as torch has it: its parallel_for is in its headers, and a second runtime in the
    # process would bring threads of its own.
    each.append(
        [*cxx, "-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-fopenmp",
         f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
         *["-DSWITCHKD_X86"] * x86, *[part for path in include for part in ("-isystem", str(path))],
         "-c", str(source / "ops.cpp")]
    )  # fmt: skip
    library = root / "lib"
    own = sorted(
        [*library.glob("lib*omp*.so*"), *root.with_name("torch.libs").glob("lib*omp*.so*")]
    )
    openmp = str(own[0]) if own else "-fopenmp"
    return each, [*cxx, "-shared", f"-L{library}", "-ltorch_cpu", "-lc10", openmp]


def compile_into(target: Path) -> None:
    """Builds the library at `target`, in a folder beside it; BuildError if it cannot."""
    cxx, source = compiler(), csrc()
    each, link = commands(cxx, source)
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
    if given := os.environ.get("SWITCHKD_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "switchkd"


def key(cxx: list[str]) -> str:
    """A hash of the sources, torch, the compiler, its flags and the kind of processor."""
    source = csrc()
    parts = [torch.__version__, *cxx, run([*cxx, "--version"]), platform.machine()]
    parts.append(repr((FLAGS, INSTRUCTION_SETS)))
    for path in sorted(source.rglob("*")):
        if path.suffix in (".h", ".cpp"):
            parts += [str(path.relative_to(source)), path.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def built() -> Path:
    """The library: from the wheel, from the cache, or built into it now."""
    if (HERE / BUILT).is_file():
        return HERE / BUILT
    if os.environ.get("SWITCHKD_JIT") == "0":
        raise BuildError("SWITCHKD_JIT=0 forbids compiling it")
    try:
        import filelock
    except ImportError as error:
        raise BuildError(f"{error}; torch brings filelock") from error
    folder = cache()
    target = folder / f"native-{key(compiler())}.so"
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
    try:
        path = built()
        try:
            torch.ops.load_library(path)
            torch.ops.switchkd_native.use(os.environ.get("SWITCHKD_CPU", ""))
        except (OSError, RuntimeError, AttributeError) as error:
            raise BuildError(f"{path} cannot be used: {str(error).splitlines()[0]}") from error
    except BuildError as error:
        if os.environ.get("SWITCHKD_JIT") != "0":
            log.warning("no native CPU kernels, the slower reference runs: %s; %s", error, REMEDY)
        return str(error)
    return None
