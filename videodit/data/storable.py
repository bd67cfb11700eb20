"""What sidecars and tables say, as the clips' json can keep it, and names as any output can."""

import datetime
import decimal
import json
import math
from typing import Any

_DEEPEST = 64  # levels of lists and objects


def storable(value: Any) -> Any:
    """A value as JSON has it: times as ISO text, time spans in seconds, decimals as text, null for NaN and infinity.

    Raises:
        ValueError: if it holds bytes or something else that is no text, number, list or object, is nested deeper than
            64 levels, or has text that UTF-8 cannot hold.
    """
    return _storable(value, _DEEPEST)


def _storable(value: Any, levels: int) -> Any:
    if levels < 0:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        _check_text(value)
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal):
        return str(value)
    if isinstance(value, list | tuple):
        return [_storable(item, levels - 1) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {_storable(name, 0): _storable(item, levels - 1) for name, item in value.items()}
    raise ValueError(f"a value of type {type(value).__name__} cannot be kept: text, numbers, lists and objects can")


def parse_json(text: str) -> Any:
    """JSON, as `storable` keeps it.

    Raises:
        ValueError: if it is none, or cannot be kept.
    """
    try:
        return storable(json.loads(text))
    except RecursionError as error:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from error


def printable(text: str) -> str:
    """Text with \\udc.. in the place of what UTF-8 cannot hold, as in a file's name in another encoding."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text that UTF-8 cannot hold: {printable(text)[:80]!r}") from error
