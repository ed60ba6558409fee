"""The check of a data set without preparing it: the same rules, on a laptop, with or without a model."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from components.config import PrepareConfig
from components.prepare.clean import clean_path, write_clean
from components.prepare.dataset import token_batches
from components.prepare.inputs import find_files, load_tokenizer
from components.prepare.rules.check import Checked, check_rows
from components.prepare.rules.content import KNOWN_TOKENS, special_tokens
from components.prepare.rules.findings import Findings
from components.prepare.tokenize.tokens import Tokens
from components.runtime.errors import Tune16Error


@dataclass(frozen=True)
class Checkup:
    """What was found, and what became of the cleaned copy if one was asked for."""

    findings: Findings
    clean: Path | None = None
    done: dict[str, int] = field(default_factory=dict)


def check_data(
    data: str, config: PrepareConfig, model: str = "", fix: bool = False, tell: Callable[[str], None] = lambda _: None
) -> Checkup:
    """Check a data set; with a model also its tokens.

    Args:
        data: reference of the data set.
        config: form, split, template and limits.
        model: reference of the model whose tokenizer and template count; without one, the known templates' tokens are
            looked for and no row's length is known.
        fix: write a cleaned copy, for which `data` has to be one file on this disk.
        tell: is called with progress lines.

    Raises:
        Tune16Error: the data set cannot be found, has an unknown format, or the copy's file exists already.
    """
    if fix and not Path(data).is_file():
        raise Tune16Error(f"{data}: --fix needs a single file on this disk.")
    if fix:
        clean_path(Path(data))
    with tempfile.TemporaryDirectory() as scratch:
        found = find_files(data, config.configuration, config.split, Path(scratch) / "data")
        files = found.files
        if not model:
            checked, special = check_rows(files, config, data, tell=tell), KNOWN_TOKENS
        else:
            tokenizer, template, limits = load_tokenizer(model, config.template, Path(scratch) / "model")
            special = special_tokens(tokenizer, template)
            checked = check_rows(files, config, data, special, tell)
            _check_tokens(files, checked, Tokens(tokenizer, template, config.max_tokens, checked.findings, limits))
        checked.findings.note(found.note)
        if fix and not len(checked):
            checked.findings.notes.append("No cleaned copy was written: no row can be repaired.")
        if not fix or not len(checked):
            return Checkup(checked.findings)
        return Checkup(checked.findings, *write_clean(files[0], checked, special))


def _check_tokens(files: list[Path], checked: Checked, tokens: Tokens) -> None:
    """Tokenise all rows that prepare would, and keep nothing; a lone surrogate cannot be tokenised."""
    if not checked.findings.rules("error"):
        for _ in token_batches(files, checked, tokens):
            pass
    else:
        checked.findings.notes.append("Tokens were not counted: that needs a data set without errors.")
