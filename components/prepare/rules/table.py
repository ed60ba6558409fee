"""The rules of a data set: what each is called, whether breaking it refuses the data set, and what to do then."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning")


@dataclass(frozen=True)
class Rule:
    """An error refuses the data set; a warning is reported, and training continues."""

    severity: Severity
    remedy: str


def _error(remedy: str) -> Rule:
    return Rule("error", remedy)


def _warning(remedy: str) -> Rule:
    return Rule("warning", remedy)


RULES: dict[str, Rule] = {
    # The file.
    "broken-compression": _error("Compress the file again, or provide it uncompressed."),
    "broken-parquet": _error("Write the Parquet file again."),
    "broken-csv": _error("Quote fields that have commas, quotes or line breaks in them, and double the quotes inside."),
    "zip-bomb": _error("Provide the file uncompressed, if it is meant to be that large."),
    "row-too-long": _error("Put each row on a line of its own, and split rows of this size."),
    "not-utf-8": _error("Save the file as UTF-8."),
    "byte-order-mark": _warning("It is ignored. Save the file as UTF-8 without a byte order mark (BOM)."),
    "truncated": _error("The file was cut off while it was copied or written: copy it again, or remove the rest."),
    "not-rows": _error(
        "Write one object a line: `jq -c . FILE`, or with pandas to_json(…, orient='records', lines=True)."
    ),
    "array-in-jsonl": _error("Name the file .json, or let --fix write the rows as lines."),
    # The JSON.
    "broken-json": _error("Write the row again with a JSON library."),
    "not-an-object": _error("Make the row an object with the format's keys."),
    "too-deep": _error("Flatten the row: no format needs more than a few levels."),
    "duplicate-key": _error("Keep one of them: which one counts is not defined."),
    "not-a-number": _error(
        "JSON has neither NaN and Infinity nor numbers that large: write null, or leave the key out."
    ),
    "wrong-columns": _error("Give every row as many values as the header has names."),
    # The form.
    "missing-key": _error("Add the key, or set format."),
    "wrong-type": _error("Give the value the type that the format requires."),
    "unknown-key": _warning("It is ignored. Remove it, or correct its spelling."),
    "unsupported": _error("Ignoring it would change what is learnt: rewrite these rows, or leave them out."),
    "not-llama2-text": _error("Write the text as [INST] question [/INST] answer, or use another format."),
    # The conversation.
    "unknown-role": _error("Use one of the known roles."),
    "roles-out-of-order": _error("Let user and assistant take turns, a system message only at the start."),
    "no-answer": _error("End the conversation with the assistant's answer, or remove it."),
    "empty-content": _error("Fill it in, or remove the row."),
    # The characters.
    "noncharacter": _error("Remove it: Unicode's noncharacters stand for nothing in any text."),
    "nul": _error("Remove the NUL character; --fix does."),
    "lone-surrogate": _error(
        "Remove it, or write the whole pair: half a surrogate pair is not a character; --fix removes it."
    ),
    "template-token": _warning(
        "The row is left out, since the token would be read as the template's own. --fix removes only the token."
    ),
    # The content.
    "too-few-rows": _error("Add rows with other questions: some are trained on, and others are held out."),
    "duplicate": _warning("Only the first of them is trained on."),
    "near-duplicate": _warning("Both are kept. Remove one of them; --fix leaves the later one out."),
    "different-answers": _warning("Check which answer is right: the model learns a mixture of them."),
    "leakage": _warning("The rows were kept on the training side, so that no held-out row repeats one of them."),
    "overlap": _warning("Scores may be too good: check whether the held-out row copies a training row."),
    "secret": _warning("Revoke it where it was issued, and remove it; --fix writes a placeholder."),
    "personal-data": _warning("Remove it, or make sure that you may train on it; --fix writes a placeholder."),
    # The tokens.
    "too-long": _warning("It is cut at the end. Raise prepare.max_tokens, or split the conversation."),
    "answer-cut-away": _warning("The row is left out. Raise prepare.max_tokens, or shorten the question."),
    "not-rendered": _error("Change the row, or choose another template with prepare.template."),
    "thought-left-out": _warning("Only the rest of the answer is learnt, as this template does it."),
    "lost-by-tokenizer": _error(
        "The model's tokenizer files are damaged or incomplete: fetch tokenizer.json and the files beside it again."
    ),
    "beyond-embedding": _error("Use the tokenizer that belongs to these weights, or enlarge the model's embedding."),
    "beyond-context": _warning("The model was not made for longer rows: lower prepare.max_tokens."),
    "no-trainable-tokens": _error("Remove the row: the tokenizer gives no tokens for its answer."),
}
