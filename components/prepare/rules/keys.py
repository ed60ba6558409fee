"""What makes rows equal: digests of their content, question and prompt.

They have 64 bits: among a million rows, two are taken for equal with a probability of 3 in 100 million.
"""

import hashlib
from array import array
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from components.prepare.tokenize.chat import Messages

Digests = npt.NDArray[np.uint64]

_BLOCK = 1 << 16
_PUNCTUATION = ".,;:!?\"'"


class RowKeys(NamedTuple):
    """The digests of one row.

    `content`: all of it, as it is. `normal`: the same, case and spaces aside. `question`: system message and first
    question, case and spaces aside. `bare`: the first question alone, punctuation around its words aside too.
    `prompt`: everything before the last answer.
    """

    content: int
    normal: int
    question: int
    bare: int
    prompt: int


def row_keys(messages: Messages, text: str) -> RowKeys:
    """The keys of a conversation; `text` is all its contents, one after the other."""
    exact = "\x1f".join([part for message in messages for part in message.values()])
    has_system = messages[0]["role"] == "system"
    question = normal("\x1f".join([message["content"] for message in messages[: 1 + has_system]]))
    bare = " ".join([word.strip(_PUNCTUATION) for word in messages[has_system]["content"].casefold().split()])
    is_single = len(messages) == 2 + has_system
    asked = _digest(question)
    prompt = asked if is_single else _digest(normal(text[: -len(messages[-1]["content"])]))
    return RowKeys(_digest(exact), _digest(normal(exact)), asked, _digest(bare), prompt)


def normal(text: str) -> str:
    """`text` with case and spaces aside."""
    return " ".join(text.casefold().split())


def first_of_each(digests: "array[int]") -> npt.NDArray[np.bool_]:
    """Whether each digest occurs for the first time."""
    numbers = np.frombuffer(digests, dtype=np.uint64)
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    is_first = np.ones(len(numbers), dtype=bool)
    is_first[order[1:][ordered[1:] == ordered[:-1]]] = False
    return is_first


def common(few: Digests, many: Digests) -> Digests:
    """The digests that are in both, in blocks of the larger: sorting that would take several times its memory."""
    sought = np.unique(few)
    is_found = np.zeros(len(sought), dtype=bool)
    for start in range(0, len(many) if len(sought) else 0, _BLOCK):
        block = many[start : start + _BLOCK]
        places = np.searchsorted(sought, block).clip(max=len(sought) - 1)
        is_found[places[sought[places] == block]] = True
    return sought[is_found]


def _digest(text: str) -> int:
    content = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
