"""Tables of videos, row by row."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from videodit.data.storage import open_file, split_suffix
from videodit.errors import MissingExtra, UserError


def table_rows(table: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a .csv, .tsv, .jsonl or .parquet file, here or elsewhere, with the number of the line.

    A cell that holds a JSON list is that list, empty ones are left out; spaces around the names of a CSV's columns are.

    Raises:
        OSError: if it cannot be read.
        UserError: if it is no such table, or cannot be had from elsewhere.
        MissingExtra: for Parquet without pyarrow.
    """
    kind = split_suffix(table)[1].lower()
    if kind == ".parquet":
        yield from enumerate(_parquet_rows(table), 1)
        return
    try:
        with open_file(table) as data, io.TextIOWrapper(data, encoding="utf-8-sig", newline="") as file:
            if kind != ".jsonl":
                reader = csv.DictReader(file, dialect="excel-tab" if kind == ".tsv" else "excel")
                reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
                for row in reader:
                    yield reader.line_num, {name: _listed(value) for name, value in row.items() if name and value}
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    record = json.loads(text)
                    if not isinstance(record, dict):
                        raise UserError(
                            f'{table}, line {line}: an object such as {{"path": ..., "caption": ...}} is needed'
                        )
                    yield line, record
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is no UTF-8 table ({error}): save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{table}, line {line} is no JSON: {getattr(error, 'msg', error)}") from error


def _parquet_rows(table: str) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet") from None
    try:
        with open_file(table) as data, pyarrow.parquet.ParquetFile(data) as file:
            for batch in file.iter_batches():
                for row in zip(*batch.columns):
                    values = {name: _python_value(cell) for name, cell in zip(batch.schema.names, row) if cell.is_valid}
                    yield values
    except pyarrow.ArrowException as error:
        raise UserError(f"{table} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def _python_value(cell: Any) -> Any:
    """What Python has for a Parquet value, its text where it has nothing, or the value itself."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):  # a nanosecond, a year after 9999, text that is not UTF-8
        pass
    try:
        return cell.cast("string").as_py()
    except (ValueError, NotImplementedError):  # ArrowException is one of them
        return cell


def _listed(value: Any) -> Any:
    """A CSV cell that holds a JSON list as that list, any other as it is."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value
