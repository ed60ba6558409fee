"""What messages should not contain: invalid characters, the template's own tokens, secrets."""

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from components.prepare.input.formats import Row, locate
from components.prepare.rules.findings import Findings
from components.prepare.rules.sensitive import find, redact
from components.prepare.tokenize.chat import TEMPLATE_TOKENS, Messages, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from components.prepare.rules.findings import Place

KNOWN_TOKENS = frozenset(token for tokens in TEMPLATE_TOKENS.values() for token in tokens)
_SURROGATES = re.compile("[\ud800-\udfff]")


def special_tokens(tokenizer: "PreTrainedTokenizerBase", template: Template) -> frozenset[str]:
    """What this tokenizer or this template would not read as plain text."""
    return template.tokens | {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}


def check_content(place: "Place", row: Row, form: str, messages: Messages, text: str, tokens: frozenset[str],
                  findings: Findings) -> None:  # fmt: skip
    """Check a conversation's contents; `text` is all of them together, which is searched first."""
    if not _is_suspicious(text, tokens):
        return
    for number, message in enumerate(messages):
        where, path = locate(place, row, form, number)
        for rule, fault in _faults(message["content"], tokens):
            findings.add(where, rule, fault, path)


def _is_suspicious(text: str, tokens: frozenset[str]) -> bool:
    return bool(
        "\0" in text
        or not _is_encodable(text)
        or (any(start in text for start in _starts(tokens)) and _expression(tokens).search(text))
        or next(find(text), None)
    )


def _faults(content: str, tokens: frozenset[str]) -> Iterable[tuple[str, str]]:
    """Rule and message of each fault; no piece of the content is quoted but the template's tokens."""
    if "\0" in content:
        yield "nul", f"has a NUL character, at character {content.index(chr(0)) + 1}."
    if surrogate := _SURROGATES.search(content):
        yield "lone-surrogate", f"has half a surrogate pair, at character {surrogate.start() + 1}."
    for token in sorted(set(_expression(tokens).findall(content))):
        yield "template-token", f"contains {token!r}, at character {content.index(token) + 1}."
    for pattern, found in find(content):
        start = content.index(found) + 1
        yield pattern.rule, f"has {pattern.kind} of {len(found)} characters, at character {start}."


def mended(content: str, tokens: frozenset[str]) -> str:
    """`content` without NUL characters, lone surrogates and template tokens, and with placeholders for secrets."""
    content = _SURROGATES.sub("", content.replace("\0", ""))
    while (shorter := _expression(tokens).sub("", content)) != content:  # taking one out may join another
        content = shorter
    return redact(content)


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@cache
def _starts(tokens: frozenset[str]) -> tuple[str, ...]:
    """The characters that tokens begin with: a text without any of them is not searched."""
    return tuple({token[0] for token in tokens})


@cache
def _expression(tokens: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=lambda token: (-len(token), token))))
