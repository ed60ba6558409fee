"""Secrets and personal data in text: found by a table of patterns, and never shown, only named."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

_LONG_NUMBER = re.compile(r"\d[\d -]{8}", re.ASCII)
_QUOTED = 40  # characters of a value that a message may quote


@dataclass(frozen=True)
class Pattern:
    """One kind of secret or personal data.

    A text without `trigger` (where that is empty, without a long number) is not searched, which makes it fast.
    `is_real` refuses what only looks like it.
    """

    rule: Literal["secret", "personal-data"]
    kind: str
    placeholder: str
    trigger: str
    expression: re.Pattern[str]
    is_real: Callable[[str], bool] = lambda _: True


def find(text: str) -> Iterator[tuple[Pattern, str]]:
    """Every piece of `text` that is a secret or personal data, with its pattern."""
    for pattern in _worth_searching(text):
        for match in pattern.expression.finditer(text):
            if pattern.is_real(match[0]):
                yield pattern, match[0]


def redact(text: str) -> str:
    """`text` with placeholders for all secrets and personal data."""
    for pattern in _worth_searching(text):
        text = pattern.expression.sub(
            lambda match, pattern=pattern: pattern.placeholder if pattern.is_real(match[0]) else match[0],  # type: ignore[misc]
            text,
        )
    return text


def _worth_searching(text: str) -> list[Pattern]:
    has_number = _LONG_NUMBER.search(text) is not None
    return [pattern for pattern in PATTERNS if (pattern.trigger in text if pattern.trigger else has_number)]


def quoted(value: object) -> str:
    """A value from a data set as a message may show it: redacted, short, and printable."""
    text = redact(value if isinstance(value, str) else repr(value))
    return repr(f"{text[:_QUOTED]}…" if len(text) > _QUOTED else text)


def path_key(key: str) -> str:
    """A key as a part of a JSON path: as it is where it is plain, else quoted."""
    return key if key.isidentifier() and quoted(key)[1:-1] == key else f"[{quoted(key)}]"


def _has_digit(text: str) -> bool:
    return any(character.isdigit() for character in text)


def _is_luhn(text: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812)."""
    digits = [int(character) for character in text if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """The check digits of ISO 13616."""
    letters = text.replace(" ", "")
    return int("".join(str(int(letter, 36)) for letter in letters[4:] + letters[:4])) % 97 == 1


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.ASCII | re.DOTALL)


# Lookbehinds stand after the first character, so that the search for that character stays fast.
PATTERNS = (
    Pattern(
        "secret",
        "a private key",
        "[PRIVATE_KEY]",
        "PRIVATE KEY",
        _pattern(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,20}PRIVATE KEY-----|\Z)"),
    ),
    Pattern("secret", "an AWS access key", "[AWS_KEY]", "A", _pattern(r"A(?<!\w.)(?:KIA|SIA)[A-Z0-9]{16}\b")),
    Pattern(
        "secret",
        "an AWS secret key",
        "[AWS_SECRET_KEY]",
        "ecret",
        _pattern(r"(?:aws|AWS).{0,20}(?:secret|SECRET|Secret).{0,20}?[^\w/+][A-Za-z0-9/+]{40}(?![\w/+=])"),
        _has_digit,
    ),
    Pattern("secret", "a GitHub token", "[GITHUB_TOKEN]", "gh", _pattern(r"gh[pousr]_[A-Za-z0-9]{36,255}")),
    Pattern("secret", "a GitHub token", "[GITHUB_TOKEN]", "github_pat_", _pattern(r"github_pat_\w{22,255}")),
    Pattern("secret", "a Hugging Face token", "[HF_TOKEN]", "hf_", _pattern(r"hf_(?<!\w...)[A-Za-z0-9]{30,}")),
    Pattern("secret", "an OpenAI key", "[OPENAI_KEY]", "sk-", _pattern(r"sk-(?<!\w...)[\w-]{20,}"), _has_digit),
    Pattern("secret", "a Slack token", "[SLACK_TOKEN]", "xox", _pattern(r"xox[abeoprs]-[A-Za-z0-9-]{10,}")),
    Pattern("secret", "a Google key", "[GOOGLE_KEY]", "AIza", _pattern(r"AIza[\w-]{35}(?![\w-])")),
    Pattern(
        "secret",
        "a JSON web token",
        "[WEB_TOKEN]",
        "eyJ",
        _pattern(r"eyJ(?<![\w-]...)[\w-]{8,4096}\.[\w-]{8,4096}\.[\w-]{8,4096}"),
    ),
    Pattern(
        "secret", "a bearer token", "[BEARER_TOKEN]", "earer ", _pattern(r"[Bb]earer +[\w.~+/=-]{20,}"), _has_digit
    ),
    Pattern(
        "personal-data",
        "an e-mail address",
        "[EMAIL]",
        "@",
        _pattern(r"[\w.%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    ),
    Pattern(
        "personal-data",
        "a card number",
        "[CARD_NUMBER]",
        "",
        _pattern(r"\d(?<!\d\d)(?:[ -]?\d){12,18}(?!\d)"),
        _is_luhn,
    ),
    Pattern(
        "personal-data",
        "an IBAN",
        "[IBAN]",
        "",
        _pattern(r"[A-Z](?<!\w.)[A-Z]\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
        _is_iban,
    ),
)
