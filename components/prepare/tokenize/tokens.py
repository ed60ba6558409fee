"""Conversations as token sequences of which only the answers are trained on, and what is lost on the way.

That is what the tokenizer does not give back, what the template leaves out, and what the cut takes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tokenizers.models import BPE

from components.models.labels import IGNORED
from components.prepare.rules.findings import Findings, Place
from components.prepare.rules.sensitive import quoted
from components.prepare.tokenize.chat import Messages, NotRenderedError, Sample, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIRST_ROWS, _EVERY_ROW = 2000, 50  # rows whose text is compared with their decoded tokens

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


@dataclass(frozen=True)
class Limits:
    """What the model can take in: rows of its embedding, and positions; 0 where its configuration says nothing."""

    num_embeddings: int = 0
    num_positions: int = 0


class Tokens:
    """Renders and tokenises batches of rows; one becomes several where its answers do not fit into one text.

    `lengths[n]` counts the rows of n tokens before any cut, `longest` is the length of the longest, and `examples` are
    the first rows with the spans of their answers.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: Template,
        max_tokens: int,
        findings: Findings,
        limits: Limits = Limits(),
    ) -> None:
        self._backend = backend = tokenizer.backend_tokenizer
        if isinstance(backend.model, BPE) and backend.pre_tokenizer is None:
            backend.model._resize_cache(0)  # its entries would be whole rows: never found again, only kept
        self._encode = backend.encode_batch
        self._samples = template.samples
        self._max_tokens = max_tokens
        self._findings = findings
        self._limits = limits
        special = sorted((re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values()), key=len)
        self._special = re.compile("|".join(reversed(special)) or "(?!)")
        self._num_seen = 0
        self.lengths = np.zeros(max_tokens + 2, dtype=np.int64)
        self.longest = 0
        self.examples: list[Sample] = []

    def batch(self, rows: Iterable[PlacedRow]) -> list[TokenRow]:
        """Tokenise, cut and count; rows that have nothing left to learn are reported and left out."""
        rendered = [(row, sample) for row in rows for sample in self._rendered(row)]
        self.examples = self.examples or [sample for _, sample in rendered[:3]]
        encodings = self._encode([sample.text for _, sample in rendered], add_special_tokens=False)
        made = (self._cut(*parts, encoding) for parts, encoding in zip(rendered, encodings, strict=True))
        return [row for row in made if row]

    def _rendered(self, row: PlacedRow) -> list[Sample]:
        """The row's samples; none where the template refuses it, which is reported."""
        try:
            samples = self._samples(row.messages)
        except NotRenderedError as error:
            path = f"message {error.number + 1}" if error.number >= 0 else ""
            self._findings.add(row.place, "not-rendered", str(error), path)
            return []
        thoughts = [_thought(message["content"]) for message in row.messages if message["role"] == "assistant"]
        if any(thought and not any(thought in sample.text for sample in samples) for thought in thoughts):
            self._findings.add(row.place, "thought-left-out", "the model's template leaves the answer's thought out.")
        return samples

    def _cut(self, row: PlacedRow, sample: Sample, encoding: Any) -> TokenRow | None:
        row = replace(row, messages=sample.messages)
        input_ids = np.array(encoding.ids, dtype=np.int32)
        if not self._is_given_back(row.place, sample.text, encoding.ids) or not self._is_known(row.place, input_ids):
            return None
        labels = _labels(encoding, input_ids, sample.spans)
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
        if 0 < self._limits.num_positions < len(input_ids):
            told = f"has {len(input_ids):,} tokens; the model was made for {self._limits.num_positions:,} positions."
            self._findings.add(row.place, "beyond-context", told)
        return TokenRow(row, input_ids, labels)

    def _is_given_back(self, place: Place, text: str, ids: list[int]) -> bool:
        """Whether the tokens decode to the text, but for what the tokenizer normalises; else that is reported.

        The first rows and some of the others are checked. Spaces around special tokens are ignored: they depend on the
        kind of tokenizer.
        """
        self._num_seen += 1
        if self._num_seen > _FIRST_ROWS and self._num_seen % _EVERY_ROW:
            return True
        found = self._backend.decode(ids, skip_special_tokens=False)
        if found == text or self._pieces(found) == self._pieces(text):
            return True
        wanted, given = _around_difference(text, found)
        told = f"the tokenizer does not reproduce the text: {quoted(wanted)} becomes {quoted(given)}."
        self._findings.add(place, "lost-by-tokenizer", told)
        return False

    def _pieces(self, text: str) -> list[str]:
        normalize = self._backend.normalizer.normalize_str if self._backend.normalizer else str
        pieces = [normalize(piece).replace("\u2581", " ").strip() for piece in self._special.split(text)]
        return [piece for piece in pieces if piece]

    def _is_known(self, place: Place, ids: Ids) -> bool:
        """Whether the embedding has a row for every token; else that is reported."""
        if not self._limits.num_embeddings or ids.max(initial=0) < self._limits.num_embeddings:
            return True
        token = int(ids.max())
        told = (
            f"the token {self._backend.id_to_token(token)!r} has the id {token}, but the model's embedding has only "
            f"{self._limits.num_embeddings:,} rows."
        )
        self._findings.add(place, "beyond-embedding", told)
        return False


def _thought(content: str) -> str:
    """What stands between an answer's think tags."""
    return content.partition("</think>")[0].rpartition("<think>")[2].strip() if "</think>" in content else ""


def _around_difference(left: str, right: str) -> tuple[str, str]:
    """What the two texts have from a little before their first difference."""
    pairs = enumerate(zip(left, right, strict=False))
    start = next((number for number, (one, other) in pairs if one != other), min(len(left), len(right)))
    start = max(0, start - 10)
    return left[start:], right[start:]


def _labels(encoding: Any, input_ids: Ids, spans: list[tuple[int, int]]) -> Ids:
    """The ids of the answers' tokens, and IGNORED elsewhere. A token counts to the span that its characters lie in."""
    labels = np.full_like(input_ids, IGNORED)
    for start, end in spans:
        first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
        last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
        if first is not None and last is not None:
            labels[first : last + 1] = input_ids[first : last + 1]
    return labels
