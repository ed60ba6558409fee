"""Conversations as token sequences of which only the answers are trained on, and what is lost when they are cut."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers.models import BPE

from components.prepare.chat import ChatTemplate, Messages, Span
from components.prepare.findings import Findings, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of tokens that are not trained on, as in torch's cross-entropy

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PlacedRow:
    """A conversation, where it stands, and whether it is held out."""

    place: Place
    messages: Messages
    held_out: bool


@dataclass(frozen=True)
class TokenRow:
    """A row as it is trained on: ids and labels, cut to the limit."""

    row: PlacedRow
    input_ids: Ids
    labels: Ids


class Tokens:
    """Renders and tokenises batches of rows.

    `lengths[n]` counts the rows of n tokens before any cut, `longest` is the length of the longest, and `examples` are
    the first rows with the spans of their answers.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate, max_tokens: int, findings: Findings
    ) -> None:
        backend = tokenizer.backend_tokenizer
        if isinstance(backend.model, BPE) and backend.pre_tokenizer is None:
            backend.model._resize_cache(0)  # its words are whole rows: never found again, only kept
        self._encode = backend.encode_batch
        self._render = template.render
        self._max_tokens = max_tokens
        self._findings = findings
        self.lengths = np.zeros(max_tokens + 2, dtype=np.int64)
        self.longest = 0
        self.examples: list[tuple[str, list[Span]]] = []

    def batch(self, rows: Iterable[PlacedRow]) -> list[TokenRow]:
        """Tokenise, cut and count; rows that have nothing left to learn are told and left out."""
        rows = list(rows)
        rendered = [self._render(row.messages) for row in rows]
        self.examples = self.examples or rendered[:3]
        encodings = self._encode([text for text, _ in rendered], add_special_tokens=False)
        made = (self._cut(*parts) for parts in zip(rows, encodings, rendered, strict=True))
        return [row for row in made if row]

    def _cut(self, row: PlacedRow, encoding: Any, rendered: tuple[str, list[Span]]) -> TokenRow | None:
        input_ids = np.array(encoding.ids, dtype=np.int32)
        labels = _labels(encoding, input_ids, rendered[1])
        length, limit = len(input_ids), self._max_tokens
        self.longest = max(self.longest, length)
        self.lengths[min(length, limit + 1)] += 1
        if (labels == IGNORED).all():
            self._findings.add(row.place, "no-trainable-tokens", "its answers have no tokens.")
            return None
        if length > limit:
            input_ids, labels = input_ids[:limit], labels[:limit]
            rule = "answer-cut-away" if (labels == IGNORED).all() else "too-long"
            self._findings.add(row.place, rule, f"has {length:,} tokens, {length - limit:,} more than the limit.")
            if rule == "answer-cut-away":
                return None
        return TokenRow(row, input_ids, labels)


def _labels(encoding: Any, input_ids: Ids, spans: list[Span]) -> Ids:
    """The ids of the answers' tokens, and IGNORED elsewhere. A token counts to the span that its characters lie in."""
    labels = np.full_like(input_ids, IGNORED)
    for start, end in spans:
        first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
        last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
        if first is not None and last is not None:
            labels[first : last + 1] = input_ids[first : last + 1]
    return labels
