"""`switchkd COMMAND`: what `python -m switchkd.COMMAND` does; without a command, training."""

from __future__ import annotations

import sys
from importlib import import_module

from switchkd import __version__

MODULES = {name: f"switchkd.{name}" for name in ("evaluate", "plan", "doctor")}
MODULES["report"] = "switchkd.report.__main__"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv == ["--version"]:
        print(f"switchkd {__version__}")
        return 0
    if argv and argv[0] in MODULES:
        return import_module(MODULES[argv[0]]).main(argv[1:])
    return import_module("switchkd.train").main(argv)


if __name__ == "__main__":
    sys.exit(main())
