"""Settings as plain data: which keys a config dataclass has, and how YAML and the command line spell their values.

Knows no config library; `videodit.config` turns the plain data read here into the dataclass.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from videodit.errors import UserError

Values = dict[str, Any]  # nested, as YAML gives it

# ---- types --------------------------------------------------------------------------------------------------------


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Give the members of a union without None; a hint that is no union is its own only member."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for member in typing.get_args(hint) if member is not type(None))
    return (hint,)


def allows_none(hint: Any) -> bool:
    """Say whether null is a value of this type."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return hint is Any or (is_union and type(None) in typing.get_args(hint))


def holds(hint: Any, *containers: type) -> bool:
    """Say whether a value of this type may be one of the containers, for example `list`."""
    return any((typing.get_origin(member) or member) in containers for member in alternatives(hint))


def describe(hint: Any) -> str:
    """Say in words what to give for a type."""
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number such as 0.5 or 1e-3",
        str: "text (quoted, in YAML)",
        Path: "a path",
    }
    words = []
    for kind in alternatives(hint):
        origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
        if origin is Literal:
            words.append("one of " + ", ".join(map(str, inner)))
        elif origin is tuple and inner and Ellipsis not in inner:
            words.append(f"a list of {len(inner)}: [{', '.join(describe(i) for i in inner)}]")
        elif origin in (list, tuple):
            words.append(f"a list [a, b, ...], each {describe(inner[0]) if inner else 'a value'}")
        elif isinstance(kind, type) and issubclass(kind, Enum):
            words.append("one of " + ", ".join(kind.__members__))
        elif origin is dict:
            words.append("a mapping {key: value}")
        else:
            words.append(names.get(kind) or str(getattr(kind, "__name__", kind)))
    return " or ".join(words + ["null"] * (allows_none(hint) and hint is not Any))


# ---- keys ---------------------------------------------------------------------------------------------------------


def leaf_types(cls: type) -> dict[str, Any]:
    """Map the dotted key of every field that holds a value, not a group of fields, to its type."""
    return {key: hint for key, (hint, nested) in _walk(cls) if nested is None}


def group_types(cls: type) -> dict[str, Any]:
    """Map the dotted key of every field that is itself a dataclass to its type."""
    return {key: hint for key, (hint, nested) in _walk(cls) if nested is not None}


def _walk(cls: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, type | None]]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], prefix + field.name
        nested = next((m for m in alternatives(hint) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)
        yield key, (hint, nested)
        if nested:
            yield from _walk(nested, f"{key}.")


def check_key(cls: type, key: str, origin: str = "", also: Sequence[str] = ()) -> None:
    """Refuse a key that the dataclass has not, naming the nearest one that it has.

    Args:
        cls: the config dataclass.
        key: the dotted key.
        origin: the file it came from; "" is the command line.
        also: further keys that the command line takes.
    Raises:
        UserError: the key is unknown, or names a group of settings.
    """

    def spell(k: str) -> str:
        return k if origin else f"--{k}"

    leaves = leaf_types(cls)
    parents = [key.rsplit(".", i)[0] for i in range(1, key.count(".") + 1)]
    if key in leaves or any(p in leaves and holds(leaves[p], dict) for p in parents):
        return
    where = f"{origin}: " if origin else ""
    if key in group_types(cls):
        example = next(k for k in leaves if k.startswith(f"{key}."))
        raise UserError(f"{where}{spell(key)} is a group of settings: set one of them, for example {spell(example)}")
    candidates = [*leaves, *also, *group_types(cls)]
    last = {candidate: candidate.rsplit(".", 1)[-1] for candidate in candidates}
    group, _, name = key.rpartition(".")
    beside = {last[c]: c for c in candidates if c.rpartition(".")[0] == group}
    elsewhere = [c for c in candidates if c not in beside.values()]
    near = (
        [c for c in candidates if last[c] == name]  # the right name in the wrong group
        or [beside[n] for n in difflib.get_close_matches(name, beside, n=1, cutoff=0.6)]
        or difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.7)
        or [c for c in candidates if difflib.get_close_matches(name, [last[c]], cutoff=0.75)]
    )
    advice = f"did you mean {spell(near[0])}?" if near else "--help lists the settings"
    raise UserError(f"{where}unknown setting {spell(key)}: {advice}")


def flatten(cls: type, values: Mapping[Any, Any], origin: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give the dotted key and value of every setting in nested values, each key checked. Raises UserError."""
    groups = group_types(cls)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in groups and isinstance(value, Mapping):
            yield from flatten(cls, value, origin, f"{key}.")
        elif key in groups and value is None:
            if allows_none(groups[key]):
                yield key, None  # otherwise an empty group in YAML: it sets nothing
        else:
            check_key(cls, key, origin)
            yield key, value


def put(values: Values, key: str, value: Any) -> None:
    """Set a dotted key in nested values."""
    *groups, leaf = key.split(".")
    for group in groups:
        if not isinstance(values.get(group), dict):
            values[group] = {}
        values = values[group]
    values[leaf] = value


# ---- YAML ---------------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number (YAML 1.1 reads text) and refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((at for at, key in enumerate(keys) if key in keys[:at] and key != "<<"), None)
        if twice is not None:
            mark = node.value[twice][0].start_mark
            raise yaml.constructor.ConstructorError(None, None, f"{keys[twice]} is there twice", mark)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """Safe YAML that quotes the texts which _StrictLoader would read as numbers."""


for _side in (_StrictLoader, _StrictDumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str) -> Any:
    """Read one safe YAML document. Raises yaml.YAMLError."""
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def write_yaml(values: Values) -> str:
    """Give values as YAML, keys in their order; `parse_yaml` reads the same back."""
    # ASCII with escapes: unescaped, PyYAML writes U+0085 in a way that it reads back as a space.
    return yaml.dump(values, Dumper=_StrictDumper, sort_keys=False, allow_unicode=False, width=120)


def read_yaml(path: Path) -> Values:
    """Read a file of settings. Raises UserError: missing, unreadable, not YAML, or not a mapping."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such config file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"cannot read config file {path}: it is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_yaml_problem(error)}") from None
    if values is not None and not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else f"only {str(values)[:40]!r}"
        raise UserError(f"{path} holds {kind}, not settings: write one `key: value` a line")
    return values or {}


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Where and why a text is no YAML, and what to do."""
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or " ".join(str(getattr(error, "reason", "check its syntax")).split())
    if "'\\t'" in problem:
        problem = "it is indented by a tab: use spaces"
    elif problem == "but found another document":
        problem = "a second document begins here: remove the line ---"
    elif "could not determine a constructor for the tag" in problem:
        problem = f"{problem.rpartition(' ')[2]} is no plain value: write text, a number, true, false, a list or keys"
    return f"{line} is not valid YAML: {problem}"


# ---- the command line ---------------------------------------------------------------------------------------------


def split_argv(argv: Sequence[str], cls: type, named: Sequence[str]) -> Iterator[tuple[str | None, str]]:
    """Split a command line into (key, text); a positional argument has key None.

    Dashes and underscores in keys are the same, and a bare `--flag` is true if its field is a bool.

    Args:
        argv: the arguments after the verb.
        cls: the config dataclass.
        named: further keys that take a value.
    Raises:
        UserError: a key without its value.
    """
    leaves = leaf_types(cls)
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            yield None, token
            continue
        name, equals, text = token[2:].partition("=")
        key = name.replace("-", "_")
        is_flag = holds(leaves.get(key), bool)
        if equals:
            yield key, text
        elif tokens and not tokens[0].startswith("--"):
            yield key, tokens.pop(0)
        elif is_flag:
            yield key, "true"
        elif key in leaves or key in named:
            raise UserError(f"--{name} has no value: give --{name} VALUE")
        else:
            check_key(cls, key, also=named)


def option_values(argv: Sequence[str], name: str) -> list[str]:
    """Give every value of `--name VALUE` or `--name=VALUE`, without checking the rest."""
    spaced = [value for option, value in zip(argv, argv[1:]) if option == f"--{name}"]
    return spaced + [token.partition("=")[2] for token in argv if token.startswith(f"--{name}=")]


def value_of(texts: Sequence[str], hint: Any) -> Any:
    """Give what the texts of one option stand for: `[a, b]` and repetition make lists; scalars stay text."""
    if holds(hint, list, tuple):
        if allows_none(hint) and texts[-1] == "null":
            return None
        written_of = [_bracketed(text, "[]") for text in texts]
        if written_of == [None] and holds(hint, str):
            return texts[0]
        return [item for text, written in zip(texts, written_of) for item in ([text] if written is None else written)]
    if holds(hint, dict):
        written = _bracketed(texts[-1], "{}")
        return texts[-1] if written is None else written
    return texts[-1]


def _bracketed(text: str, brackets: str) -> Any:
    """The list or mapping that the text is, None if it is neither."""
    if not (text.startswith(brackets[0]) and text.endswith(brackets[1])):
        return None
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return None
