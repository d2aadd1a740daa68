"""Package map. All metadata is in pyproject.toml; installing compiles nothing.

`kernels/` holds one package whose folder name is its import name, so `switchkd_kernels` can be
copied or installed on its own and never shadows other projects named `kernels`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["switchkd", "switchkd.*"]), "switchkd_kernels"],
    package_dir={"switchkd_kernels": "kernels/switchkd_kernels"},
    package_data={"switchkd": ["embedded/*", "embedded/*/*"]},
)
