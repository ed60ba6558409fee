"""Files that are valid JSON but not rows: objects over several lines, a table by columns, rows inside an object."""

import json
import re
from pathlib import Path
from typing import Any

from components.prepare.input.files import DAMAGED, BombError, open_data
from components.prepare.rules.sensitive import quoted

_LARGEST = 64 << 20  # bytes; larger files are not examined
_BLANKS = re.compile(r"\s*")
_LISTS_OF_A_ROW = {"messages", "conversations", "prompt", "completion", "history", "tools", "tool_calls"}


def not_rows(path: Path, compression: str) -> str:
    """What a file of valid JSON is where it is not one object a line; empty where that is what it is, or it is broken.

    Only files whose first line is not a whole object, and files of a single object, are examined.
    """
    try:
        with open_data(path, compression) as file:
            first = file.readline(_LARGEST).decode("utf-8-sig")
            if not first.lstrip().startswith("{"):
                return ""
            whole = _decoded(first)
            rest = file.read(_LARGEST).decode() if whole is None or not _may_be_row(whole) else ""
    except (*DAMAGED, BombError, OSError, ValueError, RecursionError):
        return ""  # reported when the lines are read
    if whole is not None:
        return _kind_of_document(whole) if not rest.strip() else ""
    objects = _objects(first + rest)
    if len(objects) == 1:
        return _kind_of_document(objects[0]) or "valid JSON, but one object over several lines, not one object a line."
    return f"valid JSON, but {len(objects):,} objects over several lines, not one object a line." if objects else ""


def _may_be_row(value: dict[str, Any]) -> bool:
    return not _kind_of_document(value)


def _decoded(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _objects(text: str) -> list[Any]:
    """The objects that stand in a text one after the other; none where it holds anything else."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while (position := _next(text, position)) < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        found.append(value)
    return found


def _next(text: str, position: int) -> int:
    """The position of the next character that is not white space."""
    found = _BLANKS.match(text, position)
    return found.end() if found else position


def _kind_of_document(value: dict[str, Any]) -> str:
    """What a single object is that holds the rows instead of being one; empty where it may be a row."""
    values = list(value.values())
    if len(values) > 1 and all(isinstance(column, dict) and column for column in values):
        names = [set(column) for column in values]
        if all(other == names[0] for other in names) and all(name.isdigit() for name in names[0]):
            return "valid JSON, but a table by columns (pandas to_json), not one object a line."
    if len(values) > 1 and all(isinstance(column, list) and len(column) > 1 for column in values):
        is_table = len({len(column) for column in values}) == 1 and not value.keys() & _LISTS_OF_A_ROW
        if is_table:
            return "valid JSON, but a table by columns, not one object a line."
    for key, inner in value.items():
        is_rows = isinstance(inner, list) and len(inner) > 1 and all(isinstance(row, dict) for row in inner)
        if is_rows and key not in _LISTS_OF_A_ROW:
            return f"valid JSON, but one object whose key {quoted(key)} holds the rows, not one object a line."
    return ""
