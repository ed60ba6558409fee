"""The rules of a data set: what each is called, whether breaking it refuses the data set, and what to do then."""

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning")


@dataclass(frozen=True)
class Rule:
    """An error refuses the data set; a warning is told, and training goes on."""

    severity: Severity
    remedy: str


def _error(remedy: str) -> Rule:
    return Rule("error", remedy)


def _warning(remedy: str) -> Rule:
    return Rule("warning", remedy)


RULES: dict[str, Rule] = {
    # The file.
    "broken-compression": _error("Compress the file again, or hand it over unpacked."),
    "broken-parquet": _error("Write the Parquet file again."),
    "broken-csv": _error("Quote fields that have commas, quotes or line breaks in them, and double the quotes inside."),
    "zip-bomb": _error("Hand the file over unpacked, if it is meant to be that large."),
    "row-too-long": _error("Put each row on a line of its own, and split rows of this size."),
    "not-utf-8": _error("Save the file as UTF-8."),
    "byte-order-mark": _warning("It is passed over. Save the file as UTF-8 without a byte order mark (BOM)."),
    "truncated": _error("The file was cut off while it was copied or written: copy it again, or remove the rest."),
    "not-rows": _error(
        "Write one object a line: `jq -c . FILE`, or with pandas to_json(…, orient='records', lines=True)."
    ),
    "array-in-jsonl": _error("Name the file .json, or let --fix write the rows as lines."),
    # The JSON.
    "broken-json": _error("Write the row again with a JSON library."),
    "not-an-object": _error("Make the row an object with the form's keys."),
    "too-deep": _error("Flatten the row: no form needs more than a few levels."),
    "duplicate-key": _error("Keep one of them: which one counts is nowhere defined."),
    "not-a-number": _error(
        "NaN and Infinity are no JSON, nor are numbers that large: write null, or leave the key out."
    ),
    "wrong-columns": _error("Give every row as many values as the header has names."),
    # The form.
    "missing-key": _error("Add the key, or name the form with format."),
    "wrong-type": _error("Give the value the type that the form asks for."),
    "unknown-key": _warning("It is passed over. Remove it, or correct its spelling."),
    "unsupported": _error("Passed over, it would change what is learnt: rewrite these rows, or leave them out."),
    "not-llama2-text": _error("Write the text as [INST] question [/INST] answer, or take another form."),
    # The conversation.
    "unknown-role": _error("Take one of the known roles."),
    "roles-out-of-order": _error("Let user and assistant take turns, a system message only at the start."),
    "no-answer": _error("End the conversation with the assistant's answer, or remove it."),
    "empty-content": _error("Fill it in, or remove the row."),
    # The characters.
    "noncharacter": _error("Remove it: Unicode's noncharacters stand for nothing in any text."),
    "nul": _error("Remove the NUL character; --fix does."),
    "lone-surrogate": _error(
        "Remove it, or write the whole pair: half a surrogate pair is no character; --fix removes it."
    ),
    "template-token": _warning(
        "The row is left out, since the token would be read as the template's own. --fix takes out the token alone."
    ),
    # The content.
    "too-few-rows": _error("Add rows with other questions: some are trained on, and others are held out."),
    "duplicate": _warning("Only the first of them is trained on."),
    "near-duplicate": _warning("Both are kept. Remove what says the same; --fix leaves the later one out."),
    "different-answers": _warning("Check which answer is right: the model learns a mixture of them."),
    "leakage": _warning("The rows were kept on the training side, so that none is judged that was trained on."),
    "overlap": _warning("Scores may be too good: look whether the held-out row is a copy of what is trained on."),
    "secret": _warning("Withdraw it where it was issued, and remove it; --fix writes a placeholder."),
    "personal-data": _warning("Remove it, or make sure that you may train on it; --fix writes a placeholder."),
    # The tokens.
    "too-long": _warning("It is cut at the end. Raise prepare.max_tokens, or split the conversation."),
    "answer-cut-away": _warning("The row is left out. Raise prepare.max_tokens, or shorten the question."),
    "not-rendered": _error("Change the row, or choose another template with prepare.template."),
    "thought-left-out": _warning("Only the rest of the answer is learnt, as this template has it."),
    "lost-by-tokenizer": _error(
        "The model's tokenizer files are damaged or incomplete: fetch tokenizer.json and what lies beside it again."
    ),
    "beyond-embedding": _error("Take the tokenizer that belongs to these weights, or enlarge the model's embedding."),
    "beyond-context": _warning("What lies further away was never seen by the model: lower prepare.max_tokens."),
    "no-trainable-tokens": _error("Remove the row: the tokenizer makes nothing of its answer."),
}
