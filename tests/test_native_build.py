"""How the native library is built: once, by whoever is first, and never in the way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from switchkd_kernels import _native

ROOT = Path(__file__).resolve().parents[1]
USE = """
import torch, switchkd_kernels as k
from switchkd_kernels import _backend
z = torch.randn(2, 9)
k.jsd(z, z), k.jsd(z, z)
print(_backend.choose(None, z))
"""
# A compiler that writes to a file how often it links, and is slow at it.
COUNTING = """#!/bin/sh
case " $* " in *" -shared "*) echo linked >> "$COUNT"; sleep 1;; esac
exec g++ "$@"
"""
needs_compiler = pytest.mark.skipif(
    _native.unavailable() is not None, reason="no compiler, or no native library"
)


def environment(tmp_path, **changes):
    path = {"PYTHONPATH": str(ROOT / "kernels"), "SWITCHKD_CACHE": str(tmp_path / "cache")}
    return {**os.environ, **path, **changes}


def start(tmp_path, **changes):
    return subprocess.Popen(
        [sys.executable, "-c", USE], env=environment(tmp_path, **changes), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """The package with sources that compile in a moment: its library has one op, and is refused."""
    package = tmp_path / "kernels" / "switchkd_kernels"
    package.mkdir(parents=True)
    for path in (ROOT / "kernels/switchkd_kernels").glob("*.py"):
        package.joinpath(path.name).write_bytes(path.read_bytes())
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "ops.cpp").write_text("int one() { return 1; }\n")
    (tmp_path / "csrc" / "cpu" / "kernels.cpp").write_text("static int two;\n")
    compiler = tmp_path / "c++"
    compiler.write_text(COUNTING)
    compiler.chmod(0o755)
    return {
        "PYTHONPATH": str(tmp_path / "kernels"), "CXX": str(compiler),
        "COUNT": str(tmp_path / "count"),
    }  # fmt: skip


@needs_compiler
def test_two_processes_build_once(tmp_path, small):
    running = [start(tmp_path, **small) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.split() == ["reference"], err
        assert "cannot be used" in err  # it has none of the ops
    assert (tmp_path / "count").read_text().split() == ["linked"]
    assert len(list((tmp_path / "cache").glob("native-*.so"))) == 1
    assert not list((tmp_path / "cache").glob("*.build-*"))


@needs_compiler
def test_a_killed_build_does_not_block_the_next(tmp_path, small):
    killed = start(tmp_path, **small)
    deadline = time.monotonic() + 30
    while not (tmp_path / "count").exists() and time.monotonic() < deadline:
        time.sleep(0.02)  # until it links, under its lock
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert list((tmp_path / "cache").glob("*.build-*"))
    assert not list((tmp_path / "cache").glob("native-*.so"))
    _, err = start(tmp_path, **small).communicate(timeout=60)
    assert "compiled the native kernels" in err
    assert not list((tmp_path / "cache").glob("*.build-*"))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"CXX": "/bin/false"}, ["no native CPU kernels", "/bin/false failed: exit 1", "CXX"]),
        ({"CXX": "no-such-compiler -O3"}, ["no C++ compiler: no-such-compiler -O3 is not on"]),
        ({"CXX": "g++ 'x"}, ['CXX must be a command, got "g++ \'x": No closing quotation']),
        ({"SWITCHKD_CACHE": "~nobody-has-it"}, ["~nobody-has-it is nowhere: ", "SWITCHKD_CACHE"]),
        ({"SWITCHKD_JIT": "0"}, []),
    ],
)
def test_without_a_compiler_the_reference_runs(tmp_path, changes, lines):
    out, err = start(tmp_path, **changes).communicate(timeout=60)
    assert out.split() == ["reference"]
    said = [line for line in err.splitlines() if "native" in line]
    assert len(said) == bool(lines), err
    for line in lines:
        assert line in said[0]


@needs_compiler
def test_the_first_error_of_the_compiler_is_said(tmp_path, small):
    (tmp_path / "csrc" / "ops.cpp").write_text("int one() { return none; }\n")
    out, err = start(tmp_path, **small).communicate(timeout=60)
    assert out.split() == ["reference"]
    assert err.count("no native CPU kernels") == 1 and "ops.cpp:1:" in err and "none" in err


def test_the_first_error_is_found_whatever_the_language(monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.ISO-8859-1")
    says = "printf 'Achtung\\n'; [ $LC_ALL = C ] && printf 'error: \\344\\n'"
    with pytest.raises(_native.BuildError, match="sh failed: error: \ufffd"):
        _native.run(["sh", "-c", f"({says}) >&2; exit 1"])


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("SWITCHKD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert _native.cache() == Path("/x/switchkd")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _native.cache() == Path.home() / ".cache/switchkd"
    monkeypatch.setenv("SWITCHKD_CACHE", "~/mine")
    assert _native.cache() == Path.home() / "mine"


@needs_compiler
def test_the_library_is_named_by_what_it_depends_on(monkeypatch):
    cxx = _native.compiler()
    before = _native.key(cxx)
    assert before == _native.key(cxx)
    monkeypatch.setattr(torch, "__version__", "0")
    assert _native.key(cxx) != before


# Of the undefined-behaviour checks those that pointers fail are left out: they multiply the time
# to compile, and the address sanitizer watches every load.
SANITIZE = ["-O1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-fno-sanitize=null,alignment,object-size,vptr"]


@pytest.mark.slow
@needs_compiler
def test_sanitizers_find_nothing_in_the_edge_cases_of_every_kernel(tmp_path):
    cpu = ROOT / "csrc" / "cpu"
    defines = ["-DSWITCHKD_CAPABILITY=baseline", "-DSWITCHKD_LANES=4", "-DSWITCHKD_INLINE=inline"]
    sources = [str(cpu / "kernels.cpp"), str(cpu / "check.cpp")]
    command = [*_native.compiler(), "-std=c++17", *SANITIZE, *defines, *sources, "-o", "check"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if built.returncode and "asan" in built.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
