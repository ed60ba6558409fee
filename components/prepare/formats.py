"""Rows of every known form, turned into one: a list of messages with roles system, user and assistant.

JSON paths count from 0, as jq and every programming language do: ``messages[0].content`` is the first message's.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from components.errors import Tune16Error
from components.prepare.chat import MARK_END, MARK_START, Messages
from components.prepare.findings import Place
from components.prepare.sensitive import quoted

Row = dict[str, Any]

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_LLAMA2_TURN = re.compile(r"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=<s>|\[INST\])|\Z)", re.DOTALL)
_LISTS = {"messages": "messages", "sharegpt": "conversations", "prompt_completion": "completion"}
_LISTED = 20  # keys that a message lists
_ROLES = ("system", "user", "assistant")
_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)


# The keys of each form, and others that often go with them and mean nothing here: these are not worth a warning.
_BESIDE = {"id", "idx", "index", "source", "category", "dataset", "lang", "language", "tags", "metadata"}
_KEYS = {
    "messages": {"messages", "prompt", "prompt_id"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "input", "output", "system", "text"},
    "prompt_completion": {"prompt", "completion"},
    "llama2_text": {"text"},
    "oasst": {
        *("message_tree_id", "message_id", "parent_id", "role", "text", "rank", "user_id", "created_date", "emojis"),
        *("review_count", "review_result", "deleted", "synthetic", "model_name", "detoxify", "tree_state", "labels"),
    },
}
KNOWN_KEYS = {form: keys | _BESIDE for form, keys in _KEYS.items()}


class BadRowError(Exception):
    """A row that cannot be used: the rule it breaks, what is wrong with it, and the JSON path of that.

    `number` is the message's place in the conversation, from 0; a message tree's messages stand on lines of their own.
    """

    def __init__(self, rule: str, message: str, path: str = "", number: int = 0) -> None:
        super().__init__(message)
        self.rule = rule
        self.path = path
        self.number = number


def detect_format(row: Row, name: str) -> str:
    """The form of a data set, from the keys of its first row.

    Raises:
        Tune16Error: it is none of the known ones.
    """
    keys = set(row)
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"prompt", "completion"} <= keys:
        return "prompt_completion"
    if {"message_tree_id", "parent_id", "text"} <= keys:
        return "oasst"
    if "text" in keys:
        return "llama2_text"
    raise Tune16Error(
        f"{name}: the rows have the keys {_listed(keys)}, which is no known form. Known: messages; "
        "conversations (ShareGPT); instruction, input, output (Alpaca); prompt, completion; text in [INST] form; "
        "oasst1's message trees."
    )


def _listed(keys: set[str]) -> str:
    shown = [quoted(key)[1:-1] for key in sorted(keys)[:_LISTED]]
    return ", ".join(shown) + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")


def to_messages(row: Row, form: str) -> Messages:
    """Turn one row into a checked conversation.

    Raises:
        BadRowError: the row has not this form, roles are out of order, or there is nothing to learn in it.
    """
    messages = _CONVERTERS[form](row)
    _check(messages, row, form)
    return messages


def locate(place: Place, row: Row, form: str, number: int) -> tuple[Place, str]:
    """Where the content of a conversation's message `number` stands: its place and its JSON path.

    A row that cannot be read has the place of its first faulty message, and its own path.
    """
    if form == "oasst":
        return row["places"][number], "text"
    if form == "sharegpt":
        return place, f"conversations[{number}].value"
    if form == "messages":
        return place, f"messages[{number}].content"
    if form == "alpaca":
        return place, [*(["system"] if row.get("system") else []), "instruction", "output"][number]
    if form == "llama2_text":
        return place, "text"
    if isinstance(row["prompt"], str):
        return place, ("prompt", "completion")[number]
    length = len(row["prompt"])
    key, number = ("prompt", number) if number < length else ("completion", number - length)
    return place, f"{key}[{number}].content"


def _check(messages: Messages, row: Row, form: str) -> None:
    """System first if at all, then user and assistant in turn, the assistant last, and no message empty."""
    expected = "user"
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system" and number == 0:
            pass
        elif role != expected:
            raise _bad_message("roles-out-of-order", f"is from {role!r}, but {expected!r} is due.", row, form, number)
        else:
            expected = "assistant" if expected == "user" else "user"
        if not content or content.isspace():
            raise _bad_message("empty-content", f"the message ({role}) is empty.", row, form, number)
        if MARK_START in content or MARK_END in content:
            raise _bad_message("noncharacter", "has a Unicode noncharacter (U+FDD0 or U+FDD1).", row, form, number)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRowError("no-answer", "the conversation has no answer at its end.", _LISTS.get(form, ""))


def _bad_message(rule: str, message: str, row: Row, form: str, number: int) -> BadRowError:
    return BadRowError(rule, message, locate(("", 0), row, form, number)[1], number)


def _from_messages(row: Row) -> Messages:
    return _message_list(row, "messages")


def _message_list(row: Row, key: str) -> Messages:
    messages = []
    for number, item in enumerate(_items(row, key)):
        role = item.get("role")
        if role not in _ROLES:
            raise _unknown_role(item, "role", _ROLES, f"{key}[{number}].", number)
        messages.append({"role": role, "content": _text(item, "content", f"{key}[{number}].", number)})
    return messages


def _items(row: Row, key: str) -> list[Row]:
    """The list of objects under `key`."""
    value = row.get(key)
    if key not in row:
        raise BadRowError("missing-key", "it is missing.", key)
    if not isinstance(value, list):
        raise BadRowError("wrong-type", f"it is {kind_of(value)}, a list of messages is needed.", key)
    for number, item in enumerate(value):
        if not isinstance(item, dict):
            raise BadRowError("wrong-type", f"it is {kind_of(item)}, an object is needed.", f"{key}[{number}]", number)
    return value


def _unknown_role(item: Row, key: str, known: Iterable[str], where: str, number: int) -> BadRowError:
    if key not in item:
        return BadRowError("missing-key", "it is missing.", f"{where}{key}", number)
    message = f"the role is {quoted(item[key])}; known: {', '.join(known)}."
    return BadRowError("unknown-role", message, f"{where}{key}", number)


def _from_sharegpt(row: Row) -> Messages:
    messages = []
    for number, turn in enumerate(_items(row, "conversations")):
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            raise _unknown_role(turn, "from", _SHAREGPT_ROLES, f"conversations[{number}].", number)
        messages.append({"role": role, "content": _text(turn, "value", f"conversations[{number}].", number)})
    return messages


def _from_alpaca(row: Row) -> Messages:
    question = _text(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{_text(row, 'input')}"
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    return [
        *system,
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row, "output")},
    ]


def _from_prompt_completion(row: Row) -> Messages:
    if isinstance(row.get("prompt"), list):
        return _message_list(row, "prompt") + _message_list(row, "completion")
    return [
        {"role": "user", "content": _text(row, "prompt")},
        {"role": "assistant", "content": _text(row, "completion")},
    ]


def _from_llama2_text(row: Row) -> Messages:
    """Text that is in Llama-2's chat form already: taken apart, so that no token of the template stands twice."""
    text = _text(row, "text")
    messages: Messages = []
    position = 0
    while match := _LLAMA2_TURN.match(text, position):
        question, answer = match[1], match[2]
        system = _LLAMA2_SYSTEM.match(question)
        if system and not messages:
            messages.append({"role": "system", "content": system[1].strip()})
            question = system[2]
        messages.append({"role": "user", "content": question.strip()})
        messages.append({"role": "assistant", "content": answer.strip()})
        position = match.end()
    if text[position:].strip() or not messages:
        raise BadRowError("not-llama2-text", f"no [INST] question [/INST] answer at character {position + 1}.", "text")
    if not messages[-1]["content"]:
        raise BadRowError("no-answer", "the conversation has no answer at its end.", "text")
    return messages


def _from_oasst(row: Row) -> Messages:
    messages = []
    for number, message in enumerate(row["messages"]):
        role = _OASST_ROLES.get(str(message.get("role")))
        if role is None:
            raise _unknown_role(message, "role", _OASST_ROLES, "", number)
        messages.append({"role": role, "content": _text(message, "text", "", number)})
    return messages


def _text(item: Row, key: str, where: str = "", number: int = 0) -> str:
    value = item.get(key)
    if isinstance(value, str):
        return value
    if key not in item:
        raise BadRowError("missing-key", "it is missing.", f"{where}{key}", number)
    raise BadRowError("wrong-type", f"it is {kind_of(value)}, text is needed.", f"{where}{key}", number)


def kind_of(value: Any) -> str:
    """The type of a value, for a message."""
    return "null" if value is None else f"a {type(value).__name__}"


_CONVERTERS: dict[str, Callable[[Row], Messages]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "llama2_text": _from_llama2_text,
    "oasst": _from_oasst,
}
