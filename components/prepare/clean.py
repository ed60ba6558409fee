"""A cleaned copy of a data set: what can be repaired is, what cannot is left out, and both are counted."""

import json
from collections import Counter
from pathlib import Path

from components.prepare.input.conversations import conversations
from components.prepare.input.files import split_suffix
from components.prepare.input.formats import BadRowError, to_messages
from components.prepare.rules.check import Checked
from components.prepare.rules.content import mended
from components.prepare.rules.findings import Findings
from components.prepare.tokenize.chat import Messages
from components.runtime.errors import Tune16Error

# What can be repaired; rows with any other error are left out.
_MENDED = {
    "byte-order-mark": "taken out",
    "array-in-jsonl": "written as lines",
    "nul": "taken out",
    "lone-surrogate": "taken out",
    "template-token": "taken out",
    "secret": "replaced by placeholders",
    "personal-data": "replaced by placeholders",
    "unknown-key": "dropped",
}
_AS_IT_IS = ("different-answers", "leakage", "overlap", "too-long", "answer-cut-away")  # nothing to repair


def clean_path(path: Path) -> Path:
    """Where the copy goes: beside the file, as ``<stem>.clean.jsonl``.

    Raises:
        Tune16Error: something is there already.
    """
    target = path.with_name(path.name[: -len("".join(split_suffix(path)))] + ".clean.jsonl")
    if target.exists():
        raise Tune16Error(f"{target}: exists already, and --fix overwrites nothing. Move it away.")
    return target


def write_clean(path: Path, checked: Checked, tokens: frozenset[str]) -> tuple[Path, dict[str, int]]:
    """Write the cleaned copy of a checked file; every row becomes ``{"messages": […]}``.

    Returns:
        The copy's path, and how often each repair was made.

    Raises:
        Tune16Error: the copy's file exists already, or no row is left.
    """
    target = clean_path(path)
    partial = target.with_name(f".{target.name}.partial")
    done: Counter[str] = Counter()
    try:
        with partial.open("w", encoding="utf-8") as file:
            for number, (_, _, messages) in enumerate(conversations([path], checked.form, Findings())):
                row, action = _clean(messages, number, checked, tokens)
                done[action] += 1
                if row:
                    file.write(json.dumps({"messages": as_written(row)}, ensure_ascii=False) + "\n")
        if not done["rows kept"]:
            raise Tune16Error(f"{path}: no row is left after repair, so no cleaned copy was written.")
        clean_path(path)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    for rule in (*checked.findings.rules("error"), *checked.findings.rules("warning")):
        if rule in _MENDED:
            done[f"{rule}: {_MENDED[rule]}"] = checked.findings.counts[rule]
        elif rule not in _AS_IT_IS and f"{rule}: left out" not in done:
            done[f"{rule}: left out"] = checked.findings.counts[rule]
    return target, dict(done)


def _clean(messages: Messages, number: int, checked: Checked, tokens: frozenset[str]) -> tuple[Messages, str]:
    """The row as it is kept, empty where it is left out, and what was done."""
    if checked.is_duplicate[number]:
        return [], "duplicate: left out"
    if number < len(checked.alike) and checked.alike[number] >= 0:
        return [], "near-duplicate: left out"
    row = [{**message, "content": mended(message["content"], tokens)} for message in messages]
    try:
        to_messages({"messages": as_written(row)}, "messages")
    except BadRowError:
        return [], "empty after repair: left out"
    return row, "rows kept"


def as_written(messages: Messages) -> list[dict[str, str | int]]:
    """A conversation as a row has it: an answer that is not trained on has the weight 0."""
    return [{key: 0 if key == "weight" else text for key, text in message.items()} for message in messages]
