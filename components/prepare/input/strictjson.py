"""JSON as its standard has it: Python's decoder accepts duplicate keys, NaN, Infinity and 1e999."""

import json
import math
from collections.abc import Iterator
from typing import Any

from components.prepare.rules.sensitive import path_key, quoted


class _Doubled(dict[str, Any]):
    """An object with duplicate keys."""

    keys_twice: list[str]


class StrictDecoder:
    """Decodes, and afterwards reports what is not allowed, which costs next to nothing for valid rows."""

    def __init__(self) -> None:
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )
        self.decode = self._decoder.decode
        self.raw_decode = self._decoder.raw_decode
        self._is_clean = True

    def faults(self, row: Any) -> list[tuple[str, str, str]]:
        """Rule, message and JSON path of every fault in what was decoded last."""
        if self._is_clean:
            return []
        self._is_clean = True
        return list(_faults(row))

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        doubled = _Doubled(made)
        seen: set[str] = set()
        doubled.keys_twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        self._is_clean = False
        return doubled

    def _constant(self, name: str) -> float:
        self._is_clean = False
        return float(name)

    def _float(self, text: str) -> float:
        number = float(text)
        if math.isinf(number):
            self._is_clean = False
        return number


def _faults(row: Any) -> Iterator[tuple[str, str, str]]:
    """A walk without recursion: the row may be nested as deep as the decoder goes."""
    waiting: list[tuple[str, Any]] = [("", row)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield "not-a-number", f"{value} is not a number in JSON.", path
        if isinstance(value, _Doubled):
            for key in value.keys_twice:
                yield "duplicate-key", f"the key {quoted(key)} occurs twice in one object.", join(path, key)
        if isinstance(value, dict):
            waiting += [(join(path, key), inner) for key, inner in reversed(value.items())]
        elif isinstance(value, list):
            waiting += [(f"{path}[{number}]", inner) for number, inner in reversed(list(enumerate(value)))]


def join(path: str, key: str) -> str:
    """The JSON path of `key` in the object at `path`."""
    part = path_key(key)
    return part if not path else f"{path}{part}" if part.startswith("[") else f"{path}.{part}"
