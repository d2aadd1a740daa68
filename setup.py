"""Package map. All metadata is in pyproject.toml; installing compiles nothing.

Unless asked to: `SWITCHKD_BUILD_EXT=1 pip install --no-build-isolation .` builds the native kernels
for the torch that is installed and puts them into the wheel, which is then one of this platform.

`kernels/` holds one package whose folder name is its import name, so `switchkd_kernels` can be
copied or installed on its own and never shadows other projects named `kernels`.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

AHEAD = os.environ.get("SWITCHKD_BUILD_EXT") == "1"


class BuildNative(build_py):
    """Python files, and with SWITCHKD_BUILD_EXT=1 the native libraries beside them."""

    def run(self):
        super().run()
        if AHEAD:
            path = Path(__file__).parent / "kernels/switchkd_kernels/_native.py"
            spec = importlib.util.spec_from_file_location("_native", path)
            native = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(native)
            folder = path.parent if self.editable_mode else Path(self.build_lib, "switchkd_kernels")
            native.compile_into(folder.resolve() / native.BUILT)
            if native.torch.version.cuda:
                try:
                    native.compile_cuda_into(folder.resolve() / native.BUILT_CUDA)
                except native.BuildError as error:
                    print(f"no CUDA kernels: {error}")


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return AHEAD


setup(
    packages=[
        *find_packages(include=["switchkd", "switchkd.*"]),
        "switchkd_kernels",
        "switchkd_kernels.csrc",
    ],
    package_dir={"switchkd_kernels": "kernels/switchkd_kernels", "switchkd_kernels.csrc": "csrc"},
    package_data={
        "switchkd": ["embedded/*", "embedded/*/*", "report/*.html", "report/*.css", "report/*.js"],
        "switchkd_kernels.csrc": ["*.cpp", "*.h", "cpu/*", "cuda/*"],
    },
    cmdclass={"build_py": BuildNative},
    distclass=NativeDistribution,
)
