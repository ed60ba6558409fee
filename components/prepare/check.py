"""The check of a data set: one pass over its files, in which every rule looks at every row.

Memory holds 37 bytes per row (four digests, the line and the side), 64 more for each of the first rows, which are
compared for near duplicates, and the batch at hand.
"""

import hashlib
import string
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from components.config import PrepareConfig
from components.errors import Tune16Error
from components.prepare.chat import Messages
from components.prepare.content import KNOWN_TOKENS, check_content
from components.prepare.findings import Findings, Place
from components.prepare.formats import KNOWN_KEYS, BadRowError, Row, detect_format, to_messages
from components.prepare.leakage import MOST_RUNS, OVERLAP, Overlaps
from components.prepare.near_duplicates import MOST_ROWS, Signatures, earlier_alike, signatures
from components.prepare.readers import read_rows
from components.prepare.sensitive import path_key, quoted
from components.prepare.shingles import BATCH_BYTES, Words
from components.prepare.trees import best_threads

_SAY_EVERY_ROWS = 50_000
_DETECTED_ROWS = 100  # rows among which one has to have a known form
_COMPARED_BYTES = 1 << 16  # of each row, for near duplicates and overlap
_BATCH_ROWS = 512
_BARE = (string.whitespace + string.punctuation).encode()

Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]


class Checked:
    """What the check found: the rows' form, which of them to skip and to hold out, and the findings.

    A row is held out by the hash of its question (system message and first question, case and spaces aside): it
    stays on its side when rows are added. Rows whose bare questions (no system message, no punctuation) are equal are
    never on both sides: where they would be, all are trained on.

    Digests have 64 bits: among a million rows, two are taken for equal with a probability of 3 in 100 million.
    """

    def __init__(self, form: str, findings: Findings, share: float) -> None:
        self.form = form
        self.findings = findings
        self._held_out_below = min(int(share * 2**64), 2**64 - 1)
        self._contents, self._questions, self._bare, self._prompts = (array("Q") for _ in range(4))
        self._lines = array("I")
        self._files: list[tuple[int, str]] = []  # the first row of each file
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._signatures = bytearray()
        self._overlaps = Overlaps()

    def __len__(self) -> int:
        return len(self._contents)

    def add(self, place: Place, messages: Messages, text: str) -> None:
        """Take a row in; `text` is its contents, one after the other."""
        file, line = place
        if not self._files or self._files[-1][1] != file:
            self._files.append((len(self), file))
        self._lines.append(line)
        normal = " ".join(text.casefold().split()).encode("utf-8", "replace")
        question = messages[0]["content"]
        if messages[0]["role"] == "system":
            bare = messages[1]["content"]
            question = f"{question}\x1f{bare}"
        else:
            bare = question
        normal_question = " ".join(question.casefold().split()).encode("utf-8", "replace")
        answer = messages[-1]["content"]
        prompt = normal_question if len(messages) == 2 else text[: -len(answer)].casefold().encode("utf-8", "replace")
        self._contents.append(_digest(_exact(messages)))
        self._questions.append(_digest(normal_question))
        self._bare.append(_digest(bare.casefold().encode("utf-8", "replace").translate(None, _BARE)))
        self._prompts.append(_digest(prompt))
        self._wait(normal[:_COMPARED_BYTES])

    def _wait(self, normal: bytes) -> None:
        if len(self) > MOST_ROWS:
            return
        self._waiting.append(normal)
        self._waiting_bytes += len(normal) + 1
        if (
            len(self._waiting) >= _BATCH_ROWS
            or self._waiting_bytes > BATCH_BYTES - _COMPARED_BYTES
            or len(self) == MOST_ROWS
        ):
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
        del questions  # an array that is looked at cannot grow
        self._waiting, self._waiting_bytes = [], 0

    def finish(self) -> None:
        """Find what only shows when all rows are known."""
        self._compare()
        self.is_duplicate = ~_is_first(self._contents)
        self.is_held_out = self._sides()
        made: Signatures = np.frombuffer(self._signatures, dtype=np.uint8).reshape(-1, 64)
        self.alike = earlier_alike(made)
        self.alike[self.is_duplicate[: len(made)]] = -1
        self.findings.num_rows = len(self)
        self._tell_duplicates()
        self._tell_answers()
        self._tell_overlaps()

    def _sides(self) -> Bools:
        questions = np.frombuffer(self._questions, dtype=np.uint64)
        bare = np.frombuffer(self._bare, dtype=np.uint64)
        wanted = questions < np.uint64(self._held_out_below)
        is_held_out = wanted & ~np.isin(bare, bare[~wanted])
        if not is_held_out[~self.is_duplicate].any():
            return np.asarray(bare == bare[questions.argmin()])
        self._tell(
            "leakage", np.flatnonzero(wanted & ~is_held_out), lambda _: "its question is one of the training rows'."
        )
        return is_held_out

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
            lambda row: f"says nearly the same as {self.place_text(int(self.alike[row]))}.",
        )
        if len(self) > MOST_ROWS:
            self.findings.notes.append(
                f"The first {MOST_ROWS:,} rows were compared for near duplicates and overlap; the other "
                f"{len(self) - MOST_ROWS:,} were not."
            )

    def _tell_answers(self) -> None:
        """Rows whose question another row asks too, and answers otherwise."""
        prompts = np.frombuffer(self._prompts, dtype=np.uint64)
        other = ~_is_first(self._prompts) & ~self.is_duplicate
        self._tell(
            "different-answers",
            np.flatnonzero(other),
            lambda row: (
                f"asks what {self.place_text(int(np.argmax(prompts == prompts[row])))} asks, and answers otherwise."
            ),
        )

    def _tell_overlaps(self) -> None:
        rows, shares = self._overlaps.shares()
        sides = self.is_held_out
        told = {
            int(row): f"is held out, and {share:.0%} of its runs of eight words stand in rows to train on."
            for row, share in zip(rows, shares, strict=True)
            if share >= OVERLAP and sides[row]
        }
        later = np.flatnonzero(self.alike >= 0)
        for row, other in zip(later, self.alike[later], strict=True):
            if sides[row] != sides[other]:
                held_out, trained = (row, other) if sides[row] else (other, row)
                told[int(held_out)] = (
                    f"is held out, and says nearly the same as {self.place_text(trained)}, to train on."
                )
        self._tell("overlap", np.array(sorted(told), dtype=np.int64), lambda row: told[row])
        if self._overlaps.is_full:
            self.findings.notes.append(
                f"Held-out rows were compared with the first {MOST_RUNS:,} runs of eight words in training rows only."
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
        file, line = self.place(int(row))
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
        tell: takes progress lines.

    Raises:
        Tune16Error: the form is not known, or there is no row and no fault either.
    """
    findings = Findings()
    form = config.format if config.format != "auto" else _form_of(files, name)
    checked = Checked(form, findings, config.held_out_share)
    for place, row, messages in conversations(files, form, findings):
        text = "\x1f".join([message["content"] for message in messages])
        check_content(place, row, form, messages, text, tokens, findings)
        checked.add(place, messages, text)
        if len(checked) % _SAY_EVERY_ROWS == 0:
            tell(f"checked {len(checked):,} rows")
    if len(checked):
        checked.finish()
        tell(f"checked {len(checked):,} rows of the form {form}")
    elif not findings.rules("error"):
        raise Tune16Error(f"{name}: the data set is empty.")
    return checked


def conversations(files: list[Path], form: str, findings: Findings) -> Iterator[tuple[Place, Row, Messages]]:
    """All rows as conversations; bad ones go to `findings`."""
    known = KNOWN_KEYS.get(form, set())
    unknown: set[str] = set()
    rows = _with_known_keys(read_rows(files, findings), known, unknown, form, findings)
    for place, row in best_threads(rows, findings) if form == "oasst" else rows:
        try:
            messages = to_messages(row, form)
        except BadRowError as error:
            where = row["places"][error.number] if form == "oasst" else place
            findings.add(where, error.rule, str(error), error.path)
        else:
            yield place, row, messages


def _with_known_keys(
    rows: Iterator[tuple[Place, Row]], known: set[str], unknown: set[str], form: str, findings: Findings
) -> Iterator[tuple[Place, Row]]:
    """The rows as they are. A key that is not known is told once; all rows that have one are counted."""
    for place, row in rows:
        if not row.keys() <= known:
            for key in row.keys() - known - unknown:
                unknown.add(key)
                findings.add(place, "unknown-key", f"{quoted(key)} is no key of the form {form}.", path_key(key))
                findings.count("unknown-key", -1)
            findings.count("unknown-key", 1)
        yield place, row


def _form_of(files: list[Path], name: str) -> str:
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


def _exact(messages: Messages) -> bytes:
    return "\x1f".join([part for message in messages for part in message.values()]).encode("utf-8", "surrogatepass")


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _is_first(digests: "array[int]") -> Bools:
    """Whether each digest stands there for the first time."""
    numbers = np.frombuffer(digests, dtype=np.uint64)
    order = np.argsort(numbers, kind="stable")
    is_first = np.ones(len(numbers), dtype=bool)
    ordered = numbers[order]
    is_first[order[1:][ordered[1:] == ordered[:-1]]] = False
    return is_first
