"""A data set's rows as conversations, whatever their form."""

from collections.abc import Iterator
from pathlib import Path

from components.prepare.input.formats import BadRowError, Row, detect_format, to_messages, unknown_keys
from components.prepare.input.readers import read_rows
from components.prepare.input.trees import best_threads
from components.prepare.rules.findings import Findings, Place
from components.prepare.rules.sensitive import quoted
from components.prepare.tokenize.chat import Messages
from components.runtime.errors import Tune16Error

_MOST_KEYS = 1000  # unknown keys that are remembered
_DETECTED_ROWS = 100  # rows among which one has to have a known form


def conversations(files: list[Path], form: str, findings: Findings) -> Iterator[tuple[Place, Row, Messages]]:
    """All rows as conversations; bad ones go to `findings`."""
    rows = _with_unknown_keys_told(read_rows(files, findings), form, findings)
    for place, row in best_threads(rows, findings) if form == "oasst" else rows:
        try:
            messages = to_messages(row, form)
        except BadRowError as error:
            where = row["places"][error.number] if form == "oasst" else place
            findings.add(where, error.rule, str(error), error.path)
        else:
            yield place, row, messages


def _with_unknown_keys_told(
    rows: Iterator[tuple[Place, Row]], form: str, findings: Findings
) -> Iterator[tuple[Place, Row]]:
    """The rows as they are. An unknown key is reported once; all rows that have one are counted."""
    told: set[str] = set()
    for place, row in rows:
        has_unknown = False
        for path, key in unknown_keys(row, form):
            has_unknown = True
            if key not in told and len(told) < _MOST_KEYS:
                told.add(key)
                findings.show(place, "unknown-key", f"{quoted(key)} is not a key of the format {form}.", path)
        findings.count("unknown-key", has_unknown)
        yield place, row


def form_of(files: list[Path], name: str) -> str:
    """The form of the first of some rows that has a known one; empty where no row can be read."""
    refusal: Tune16Error | None = None
    for _, (place, row) in zip(range(_DETECTED_ROWS), read_rows(files, Findings()), strict=False):
        try:
            return detect_format(row, f"{name}: {place[0]}:{place[1]}")
        except Tune16Error as error:
            refusal = refusal or error
    if refusal:
        raise refusal
    return ""
