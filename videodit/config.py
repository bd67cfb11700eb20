"""Run configs: frozen dataclass ← YAML files ← dotted command-line overrides. The only module that knows jsonargparse.

Values are merged as plain data with every key checked (`videodit.settings`); jsonargparse then checks and converts the
types. So each mistake is named with the place it came from, in one line, as a `UserError`.
"""

import argparse
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jsonargparse

from videodit.errors import UserError
from videodit.settings import (
    Values,
    allows_none,
    check_key,
    describe,
    flatten,
    group_types,
    leaf_types,
    put,
    read_yaml,
    split_argv,
    value_of,
    write_yaml,
)

ConfigT = TypeVar("ConfigT")

jsonargparse.set_parsing_settings(
    docstring_parse_attribute_docstrings=True,  # --help shows the string literal below each field
    instantiate_subclass_spec_in_any=False,  # a config file never names a class to build
)


@dataclass(frozen=True)
class Argument:
    """A required text argument of a verb that is no part of its config: `SRC`, or `--out DIR`."""

    name: str
    doc: str
    positional: bool = False

    @property
    def shown(self) -> str:
        return self.name.upper() if self.positional else f"--{self.name} {self.name.upper()}"


def parse_config(
    cls: type[ConfigT], argv: Sequence[str], prog: str, description: str = "", example: str = ""
) -> ConfigT:
    """Build `cls` from its defaults, then `--config FILE.yaml`, then `--key value` overrides.

    Keys of nested dataclasses are dotted, dashes and underscores are the same, a bare `--flag` means true, and an
    option whose field is a list or tuple may be given as `[a, b]`, repeated, or both.

    Args:
        cls: a dataclass; its fields may be dataclasses.
        argv: the arguments after the verb.
        prog: the verb as the user typed it, for example "videodit train dit".
        description: one sentence for `--help`.
        example: one command for `--help`.
    Returns:
        an instance of cls.
    Raises:
        UserError: unknown key, wrong type, missing value, unreadable file, or a ValueError of the dataclass itself.
        SystemExit: 0 after `--help`.
    """
    return parse_command(cls, argv, prog, description, example)[0]


def parse_command(
    cls: type[ConfigT],
    argv: Sequence[str],
    prog: str,
    description: str = "",
    example: str = "",
    arguments: Sequence[Argument] = (),
) -> tuple[ConfigT, dict[str, str]]:
    """As `parse_config`, for a verb that also takes `arguments`: they are returned beside the config, by name."""
    if any(token in ("-h", "--help") for token in argv):
        _print_help(cls, prog, description, example, arguments)
        raise SystemExit(0)
    leaves = leaf_types(cls)
    free = [a.name for a in arguments if a.positional]
    named = [a.name for a in arguments if not a.positional] + ["config"]
    given: dict[str, str] = {}
    layers: list[tuple[str, Values]] = []
    overrides: dict[str, list[str]] = {}
    for key, text in split_argv(argv, cls, named):
        if key is None and free:
            given[free.pop(0)] = text
        elif key is None:
            raise UserError(f"unexpected argument {text!r}: settings are given as --key value, see {prog} --help")
        elif key == "config":
            layers.append((text, read_yaml(Path(text))))
        elif key in named:
            given[key] = text
        else:
            check_key(cls, key, also=named)
            overrides.setdefault(key, []).append(text)
    missing = next((a for a in arguments if not given.get(a.name)), None)
    if missing:
        name = missing.shown.split()[0]
        raise UserError(f"{name} is missing: give {prog} {missing.shown} ({missing.doc.rstrip('.')})")
    values: Values = {}
    for key, texts in overrides.items():
        put(values, key, value_of(texts, leaves.get(key, Any)))
    return _build(cls, [*layers, ("", values)]), given


def from_dict(
    cls: type[ConfigT], values: Mapping[str, Any], origin: str = "config", *, base: Mapping[str, Any] | None = None
) -> ConfigT:
    """Build `cls` from nested plain values, what they leave out from `base`. Raises UserError.

    Args:
        cls: a dataclass.
        values: nested plain values.
        origin: what error messages call them.
        base: nested plain values below them; by default nothing.
    """
    return _build(cls, [("", dict(base or {})), (origin, dict(values))])


def load_yaml(cls: type[ConfigT], path: str | Path, overrides: Mapping[str, Any] | None = None) -> ConfigT:
    """Read a YAML file into `cls`, checked as `parse_config` does; overrides have dotted keys. Raises UserError."""
    values: Values = {}
    for key, value in (overrides or {}).items():
        put(values, key, value)
    return _build(cls, [(str(path), read_yaml(Path(path))), ("", values)])


def to_dict(config: Any) -> Values:
    """Give the config as nested plain values that YAML and JSON can hold: tuples become lists, paths become text."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def to_yaml(config: Any) -> str:
    """Give the config as YAML, fields in their order; `load_yaml` reads the same config back."""
    return write_yaml(to_dict(config))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _build(cls: type[ConfigT], layers: Sequence[tuple[str, Values]]) -> ConfigT:
    """Merge the layers, later ones win, and build the dataclass. A layer's origin is "" for the command line."""
    leaves = leaf_types(cls)
    flat: dict[str, tuple[str, Any]] = {}
    for origin, values in layers:
        flat.update({key: (origin, value) for key, value in flatten(cls, values, origin)})
    merged: Values = {}
    for key, (origin, value) in flat.items():
        if value is None and key in leaves and not allows_none(leaves[key]):
            _refuse(key, origin, value, leaves[key])
        put(merged, key, value)
    parser = _plain_parser(cls)  # type: ignore[arg-type]  # mypy: a dataclass type may not be hashable
    try:
        return cls(**vars(parser.instantiate(parser.parse_object(merged))))
    except jsonargparse.ArgumentError as error:
        message = str(error)
        required = re.search(r"required: ([\w.]+)", message)
        if required:
            raise UserError(f"{required[1]} is required: give --{required[1]} VALUE or set it in the config") from None
        path = ".".join(re.findall(r'Parser key "([^"]+)"', message))
        near = [k for k in flat if k == path or path.startswith(f"{k}.") or k.startswith(f"{path}.")] if path else []
        if not near:
            raise UserError(" ".join(message.split())) from None
        origin, value = flat[near[0]]
        _refuse(near[0], origin, value, leaves.get(near[0], leaves.get(path, Any)))
    except ValueError as error:  # a cross-field check of the dataclass: its message names the value and the fix
        raise UserError(" ".join(str(error).split())) from None


def _refuse(key: str, origin: str, value: Any, hint: Any) -> NoReturn:
    where = f"{origin}: {key}" if origin else f"--{key}"
    shown = "null" if value is None else repr(value) if isinstance(value, str) else str(value)
    raise UserError(f"{where} {shown} does not fit: give {describe(hint)}") from None


def _parser(cls: type, **settings: Any) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False, **settings)
    parser.add_class_arguments(cls)
    return parser


@functools.cache  # reading the fields' docstrings takes a tenth of a second
def _plain_parser(cls: type) -> jsonargparse.ArgumentParser:
    return _parser(cls)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Each setting with its type in words and its default, if it has one; description and example as they are."""

    def _get_type_str(self, action: argparse.Action) -> str | None:
        hint = getattr(action, "_typehint", None) or action.type
        if hint is None:
            return None
        return describe(hint).replace(" (quoted, in YAML)", "").replace(" such as 0.5 or 1e-3", "")

    def _get_help_string(self, action: argparse.Action) -> str:
        text: str = super()._get_help_string(action)
        if action.default == "":
            return text.replace(", default: %(default)s", "")
        if isinstance(action.default, bool):
            return text.replace("%(default)s", str(action.default).lower())
        if isinstance(action.default, tuple):
            return text.replace("%(default)s", str(_plain(action.default)))
        return text


def _print_help(cls: type, prog: str, description: str, example: str, arguments: Sequence[Argument]) -> None:
    rows = [*arguments, Argument("config", "YAML file of settings; given again, the later file wins.")]
    parser = _parser(
        cls,
        prog=prog,
        usage=" ".join([prog, *(a.shown for a in arguments), "[--config CONFIG] [--key value ...]"]),
        description="\n".join([description, "", "arguments:", *(f"  {a.shown:<21} {a.doc}" for a in rows)]),
        epilog=f"example:\n  {example}" if example else "",
        formatter_class=_HelpFormatter,
    )
    unused = {help_key for key in group_types(cls) for help_key in (key, f"{key}.help")}
    for action in parser._actions:  # jsonargparse offers some spellings that are not taken here
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        if action.dest in unused:
            action.help = argparse.SUPPRESS
    parser.print_help()
