"""What became of a data set's rows, in numbers, and what its report shows."""

from dataclasses import dataclass

from components.prepare.rules.check import Checked
from components.prepare.tokenize.chat import Template
from components.prepare.tokenize.tokens import Tokens


@dataclass
class Counts:
    """What became of the rows and tokens."""

    rows: int = 0
    duplicates: int = 0
    cut: int = 0
    dropped_template_token: int = 0
    dropped_answer_cut_away: int = 0
    train_rows: int = 0
    held_out_rows: int = 0
    train_tokens: int = 0
    train_answer_tokens: int = 0
    held_out_tokens: int = 0
    held_out_answer_tokens: int = 0
    longest: int = 0


@dataclass(frozen=True)
class Prepared:
    """What the report shows of a prepared data set."""

    counts: Counts
    checked: Checked
    template: Template
    tokens: Tokens
