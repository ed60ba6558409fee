"""OpenAssistant's message trees, one message a row, as conversations."""

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from components.prepare.input.formats import Row, kind_of
from components.prepare.rules.findings import Findings, Place

_TYPES: dict[str, Any] = {
    "message_tree_id": str,
    "message_id": str,
    "parent_id": (str, type(None)),
    "rank": (int, float, type(None)),
}


def best_threads(rows: Iterable[tuple[Place, Row]], findings: Findings) -> Iterator[tuple[Place, Row]]:
    """The best-ranked conversation of each tree.

    A tree's rows stand together, parents before children. Trees without an answer to the first question give nothing.
    """
    whole = (placed for placed in rows if _is_tree_row(*placed, findings))
    for _, tree in itertools.groupby(whole, key=lambda placed: placed[1]["message_tree_id"]):
        placed = list(tree)
        children: dict[Any, list[tuple[Place, Row]]] = {}
        for place, row in placed:
            children.setdefault(row.get("parent_id"), []).append((place, row))
        thread: list[tuple[Place, Row]] = []
        # Removed as they are read: messages that are each other's parents would be read for ever.
        while replies := children.pop(thread[-1][1]["message_id"] if thread else None, None):
            thread.append(
                min(replies, key=lambda reply: math.inf if reply[1].get("rank") is None else reply[1]["rank"])
            )
        if thread and thread[-1][1].get("role") != "assistant":
            thread.pop()
        if thread:
            places, messages = zip(*thread, strict=True)
            yield placed[0][0], {"messages": list(messages), "places": places}


def _is_tree_row(place: Place, row: Row, findings: Findings) -> bool:
    """Whether a row can be put into its tree; if not, that is reported."""
    faults = [key for key, kinds in _TYPES.items() if not isinstance(row.get(key), kinds)]
    for key in faults:
        if key in row:
            findings.add(place, "wrong-type", f"it is {kind_of(row[key])}.", key)
        else:
            findings.add(place, "missing-key", "it is missing.", key)
    return not faults
