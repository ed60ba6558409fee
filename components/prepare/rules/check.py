"""The check of a data set: one pass over its files, in which every rule looks at every row.

Memory holds 46 bytes per row (five digests, the line, the side, whether it is left out), 64 more for each of the first
rows, which are compared for near duplicates, and the batch at hand.
"""

from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from components.config import PrepareConfig
from components.prepare.input.conversations import conversations, form_of
from components.prepare.rules.content import KNOWN_TOKENS, check_content
from components.prepare.rules.findings import Findings, Place
from components.prepare.rules.keys import common, first_of_each, normal, row_keys
from components.prepare.rules.leakage import MOST_RUNS, OVERLAP, Overlaps
from components.prepare.rules.near_duplicates import MOST_ROWS, Signatures, earlier_alike, signatures
from components.prepare.rules.shingles import BATCH_BYTES, Words
from components.prepare.tokenize.chat import Messages
from components.runtime.errors import Tune16Error

_SAY_EVERY_ROWS = 50_000
_COMPARED_BYTES = 1 << 16  # of each row, for near duplicates and overlap
_BATCH_ROWS = 512

Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


class Checked:
    """What the check found: the rows' form, which of them to skip and to hold out, and the findings.

    A row is held out by the hash of its question (system message and first question, case and spaces aside): it
    stays on its side when rows are added. Rows whose bare questions (no system message, no punctuation) are equal are
    never on both sides: where they would be, all are trained on. Where all rows have the same first question, all
    that stands before a row's last answer is its question.
    """

    def __init__(self, form: str, findings: Findings, share: float) -> None:
        self.form = form
        self.findings = findings
        self._held_out_below = min(int(share * 2**64), 2**64 - 1)
        self._contents, self._normal, self._questions, self._bare, self._prompts = (array("Q") for _ in range(5))
        self._lines = array("I")
        self._has_tokens = bytearray()
        self._files: list[tuple[int, str]] = []  # the first row of each file
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._signatures = bytearray()
        self._overlaps = Overlaps()

    def __len__(self) -> int:
        return len(self._contents)

    def add(self, place: Place, messages: Messages, text: str, has_tokens: bool) -> None:
        """Add a row; `text` is its contents, one after the other. With the template's tokens it is left out."""
        file, line = place
        if not self._files or self._files[-1][1] != file:
            self._files.append((len(self), file))
        self._lines.append(line)
        self._has_tokens.append(has_tokens)
        keys = row_keys(messages, text)
        self._contents.append(keys.content)
        self._normal.append(keys.normal)
        self._questions.append(keys.question)
        self._bare.append(keys.bare)
        self._prompts.append(keys.prompt)
        self._wait(normal(text).encode("utf-8", "replace")[:_COMPARED_BYTES])

    def _wait(self, normal: bytes) -> None:
        if len(self) > MOST_ROWS:
            return
        self._waiting.append(normal)
        self._waiting_bytes += len(normal) + 1
        is_full = len(self._waiting) == _BATCH_ROWS or self._waiting_bytes > BATCH_BYTES - _COMPARED_BYTES
        if is_full or len(self) == MOST_ROWS:
            self._compare()

    def _compare(self) -> None:
        """Make the signatures of the rows that wait."""
        if not self._waiting:
            return
        words = Words(self._waiting)
        first = len(self._signatures) // 64
        self._signatures += signatures(words).tobytes()
        questions = np.frombuffer(self._questions, dtype=np.uint64)[first : first + len(self._waiting)]
        self._overlaps.add(words, first, questions < np.uint64(self._held_out_below))
        del questions  # an array with views cannot grow
        self._waiting, self._waiting_bytes = [], 0

    def finish(self) -> None:
        """Find what only all rows together show."""
        self._compare()
        shares, is_full = self._overlaps.shares(), self._overlaps.is_full
        del self._overlaps  # what follows needs the memory
        self.is_duplicate = ~first_of_each(self._contents)
        self.is_left_out = self.is_duplicate | np.frombuffer(self._has_tokens, dtype=bool)
        self.is_held_out = self._sides()
        made: Signatures = np.frombuffer(self._signatures, dtype=np.uint8).reshape(-1, 64)
        self.alike = earlier_alike(made)
        self.alike[self.is_duplicate[: len(made)]] = -1
        self.findings.num_rows = len(self)
        self._tell_too_few()
        self._tell_duplicates()
        self._tell_answers()
        self._tell_overlaps(shares, is_full)

    def _sides(self) -> Bools:
        questions = np.frombuffer(self._questions, dtype=np.uint64)
        bare = np.frombuffer(self._bare, dtype=np.uint64)
        if len(np.unique(questions)) == 1:  # such as a greeting that opens every conversation: the whole prompt counts
            questions = bare = np.frombuffer(self._prompts, dtype=np.uint64)
        wanted = questions < np.uint64(self._held_out_below)
        is_held_out = wanted.copy()
        is_held_out[wanted] = ~np.isin(bare[wanted], common(bare[wanted], bare[~wanted]))
        if not is_held_out[~self.is_left_out].any():
            kept = np.flatnonzero(~self.is_left_out)
            return np.asarray(bare == bare[kept[questions[kept].argmin()]]) if len(kept) else is_held_out
        self._tell(
            "leakage", np.flatnonzero(wanted & ~is_held_out), lambda _: "its question is also in the training rows."
        )
        return is_held_out

    def _tell_too_few(self) -> None:
        kept = ~self.is_left_out
        if kept.any() and self.is_held_out[kept].all() and not self.findings.rules("error"):
            told = "all rows ask the same question, so none can be held out."
            if kept.sum() == 1:
                told = "1 row is left; at least 2 are needed, to hold one out."
            self.findings.add((self._files[0][1], 0), "too-few-rows", told)

    def _tell_duplicates(self) -> None:
        contents = np.frombuffer(self._contents, dtype=np.uint64)
        self._tell(
            "duplicate",
            np.flatnonzero(self.is_duplicate),
            lambda row: f"is the same as {self.place_text(int(np.argmax(contents == contents[row])))}.",
        )
        self._tell(
            "near-duplicate",
            np.flatnonzero(self.alike >= 0),
            lambda row: f"is nearly the same as {self.place_text(int(self.alike[row]))}.",
        )
        if len(self) > MOST_ROWS:
            self.findings.notes.append(
                f"The first {MOST_ROWS:,} rows were compared for near duplicates and overlap; the other "
                f"{len(self) - MOST_ROWS:,} were not."
            )

    def _tell_answers(self) -> None:
        """Rows whose question another row answers differently."""
        prompts = np.frombuffer(self._prompts, dtype=np.uint64)
        other = ~first_of_each(self._prompts) & first_of_each(self._normal)
        self._tell(
            "different-answers",
            np.flatnonzero(other),
            lambda row: (
                f"asks the same as {self.place_text(int(np.argmax(prompts == prompts[row])))}, but its answer differs."
            ),
        )

    def _tell_overlaps(self, shares: dict[int, float], is_full: bool) -> None:
        sides = self.is_held_out
        told = {
            row: f"is held out, but {share:.0%} of its eight-word sequences are in training rows."
            for row, share in shares.items()
            if share >= OVERLAP and sides[row]
        }
        later = np.flatnonzero(self.alike >= 0)
        for row, other in zip(later, self.alike[later], strict=True):
            if sides[row] != sides[other]:
                held_out, trained = (row, other) if sides[row] else (other, row)
                told[int(held_out)] = (
                    f"is held out, but nearly the same as {self.place_text(int(trained))}, a training row."
                )
        self._tell("overlap", np.array(sorted(told), dtype=np.int64), lambda row: told[row])
        if is_full:
            self.findings.notes.append(
                f"Held-out rows were compared with only the first {MOST_RUNS:,} eight-word sequences in training rows."
            )

    def _tell(self, rule: str, rows: Rows, describe: Callable[[int], str]) -> None:
        shown = rows[: self.findings.num_shown]
        for row in shown:
            self.findings.add(self.place(int(row)), rule, describe(int(row)))
        self.findings.count(rule, len(rows) - len(shown))

    def place(self, row: int) -> Place:
        """File and line of a row by its number."""
        file = next(name for first, name in reversed(self._files) if first <= row)
        return file, self._lines[row]

    def place_text(self, row: int) -> str:
        """File and line of a row, for a message."""
        file, line = self.place(row)
        return f"{file}:{line}"


def check_rows(
    files: list[Path],
    config: PrepareConfig,
    name: str,
    tokens: frozenset[str] = KNOWN_TOKENS,
    tell: Callable[[str], None] = lambda _: None,
) -> Checked:
    """Read and check all rows.

    Args:
        files: the data set's.
        config: form and held-out share.
        name: the data set's, for messages.
        tokens: what must not stand in a content, because the tokenizer would not read it as text.
        tell: is called with progress lines.

    Raises:
        Tune16Error: the format is not known, or there are neither rows nor errors.
    """
    findings = Findings()
    form = config.format if config.format != "auto" else form_of(files, name)
    checked = Checked(form, findings, config.held_out_share)
    for place, row, messages in conversations(files, form, findings):
        text = "\x1f".join([message["content"] for message in messages])
        num_before = findings.counts["template-token"]
        check_content(place, row, form, messages, text, tokens, findings)
        checked.add(place, messages, text, has_tokens=findings.counts["template-token"] > num_before)
        if len(checked) % _SAY_EVERY_ROWS == 0:
            tell(f"checked {len(checked):,} rows")
    if len(checked):
        checked.finish()
        tell(f"checked {len(checked):,} rows of the format {form}")
    elif not findings.rules("error"):
        raise Tune16Error(f"{name}: the data set is empty.")
    return checked
