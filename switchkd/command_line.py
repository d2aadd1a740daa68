"""Command line and YAML to configuration. Both know the same names; flags win over the file."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from switchkd.arguments import ScriptArguments
from switchkd.config import SwitchConfig
from switchkd.methods import preset
from switchkd.names import ALIASES, EMBEDDED_DIR, hint_of

CLASSES = (ScriptArguments, SwitchConfig)
DEMO = EMBEDDED_DIR / "demo.yaml"
SCIENTIFIC = re.compile(r"[-+.\d]+[eE][-+]?\d+").fullmatch
KINDS = {  # what to call a type in an error
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


class Parser(HfArgumentParser):
    """One line about a bad value, where argparse would print all options before."""

    def error(self, message: str):
        raise ValueError(re.sub(r"(argument --\w+)/[\w/-]+", r"\1", message))

    def flags(self, argv: list[str]) -> set[str]:
        """Those of a command line; ValueError for one that there is not."""
        flags = {a.split("=")[0] for a in argv if a.startswith("--")}
        for unknown in sorted(flags - self._option_string_actions.keys()):
            hint = hint_of(unknown, self._option_string_actions)
            raise ValueError(f"got the unknown option {unknown}{hint}")
        return flags


class Loader(yaml.SafeLoader):
    """Of two values for one key the last would win without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """A YAML mapping of known keys to values of their types; aliases are translated."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"config: got {path}, expected an existing YAML file")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"config {path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"config {path}: got {type(values).__name__}, expected key: value lines")
    types = {}
    for cls in CLASSES:
        hints = get_type_hints(cls)
        types |= {f.name: hints[f.name] for f in fields(cls) if f.init}
    clean = {}
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name not in types:
            hint = hint_of(str(key), [*types, *ALIASES])
            raise ValueError(f"config {path}: got the unknown key {key!r}{hint}")
        if name in clean:
            raise ValueError(f"config {path}: got {name} and its alias, expected one of them")
        try:
            clean[name] = _typed(name, value, types[name])
        except ValueError as error:
            raise ValueError(f"config {path}: {key}: {error}") from None
    return clean


def _typed(name: str, value, hint):
    """A value of a YAML file as an option of type `hint` takes it."""
    parts = (hint,) if get_origin(hint) in (None, list, dict) else get_args(hint)
    kinds = [get_origin(part) or part for part in parts]
    if value is False and name.endswith("_strategy"):
        return "no"  # which YAML 1.1 reads as false
    if str in kinds and type(value) in {int, float, bool} - {*kinds}:
        return str(value)  # student_layers: 0
    if str in kinds and dict not in kinds and type(value) is dict:
        return json.dumps(value)
    if dict in kinds and type(value) is dict:
        return {key: _number(x) if SCIENTIFIC(str(x)) else x for key, x in value.items()}
    if type(value) is str and str not in kinds:
        if list in kinds:
            return value.split()
        if float in kinds or int in kinds:
            value = _number(value, float if float in kinds else int)
    if type(value) in kinds or (float in kinds and type(value) is int):
        return value
    names = [KINDS[kind] for kind in kinds if kind in KINDS]
    raise ValueError(f"got {value!r}, expected {' or '.join(names)}")


def _number(text: str, kind: type = float):
    """A number that YAML 1.1 reads as text, such as 1e-4; other text as it is."""
    try:
        return kind(text)
    except ValueError:
        return text


def parse(argv: list[str] | None = None) -> tuple[ScriptArguments, SwitchConfig]:
    """The configuration of a command line and of the YAML file that it names.

    Without a config file and without a model, the embedded demonstration is configured.
    """
    argv = [_translate(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = Parser(
        CLASSES,
        prog="switchkd train",
        allow_abbrev=False,
        epilog="Further commands: switchkd sft, evaluate, report, plan, doctor.",
    )
    parser.add_argument("--config", help="YAML file with any of these options; flags win.")
    flags = parser.flags(argv)
    path = _value_of("--config", argv)
    if path is None and not flags & {"--model_name_or_path", "--dataset_name"}:
        path = str(DEMO)
    values = {} if path is None else read_yaml(path)
    if "--num_train_epochs" in flags:
        values.pop("max_steps", None)  # which would win over it
    method = _value_of("--method", argv) or values.get("method")
    parser.set_defaults(**preset(method, {*values, *(flag[2:] for flag in flags)}))
    parser.set_defaults(**values)
    script, config, _ = parser.parse_args_into_dataclasses(argv)
    return script, config


def _value_of(flag: str, argv: list[str]) -> str | None:
    """What follows a flag, the last time that it is there; None if it is not."""
    found = None
    for at, argument in enumerate(argv):
        name, sep, value = argument.partition("=")
        if name == flag:
            found = value if sep else "".join(argv[at + 1 : at + 2])
    return found


def _translate(argument: str) -> str:
    """A flag under its own name: neither an alias nor with dashes inside."""
    if not argument.startswith("--"):
        return argument
    flag, sep, value = argument[2:].partition("=")
    name = flag.replace("-", "_")
    return f"--{ALIASES.get(name, name)}{sep}{value}"
