"""Rows of every known form, turned into one: a list of messages with roles system, user and assistant."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from components.errors import Tune16Error
from components.prepare.chat import MARK_END, MARK_START, Messages

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_LLAMA2_TURN = re.compile(r"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=<s>|\[INST\])|\Z)", re.DOTALL)
_LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)


class BadRowError(Exception):
    """A row that cannot be used: the rule it breaks and what is wrong with it."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def detect_format(row: dict[str, Any], name: str) -> str:
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
        f"{name}: the rows have the keys {', '.join(sorted(keys))}, which is no known form. Known: messages; "
        "conversations (ShareGPT); instruction, input, output (Alpaca); prompt, completion; text in [INST] form; "
        "oasst1's message trees."
    )


def best_threads(rows: Iterable[tuple[Any, dict[str, Any]]]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """OpenAssistant's message trees, one message a row, as the best-ranked conversation of each tree.

    A tree's rows stand together, parents before children. Trees whose first question nobody answered give nothing.
    """
    for _, tree in itertools.groupby(rows, key=lambda placed: placed[1].get("message_tree_id")):
        placed = list(tree)
        children: dict[Any, list[dict[str, Any]]] = {}
        for _, row in placed:
            children.setdefault(row.get("parent_id"), []).append(row)
        thread: list[dict[str, Any]] = []
        while replies := children.get(thread[-1].get("message_id") if thread else None):
            thread.append(min(replies, key=lambda row: math.inf if row.get("rank") is None else row["rank"]))
        if thread and thread[-1].get("role") != "assistant":
            thread.pop()
        if thread:
            yield placed[0][0], {"messages": thread}


def to_messages(row: dict[str, Any], form: str) -> Messages:
    """Turn one row into a checked conversation.

    Raises:
        BadRowError: the row has not this form, roles are out of order, or there is nothing to learn in it.
    """
    messages = _CONVERTERS[form](row)
    _check(messages)
    return messages


def _check(messages: Messages) -> None:
    """System first if at all, then user and assistant in turn, the assistant last, and no message empty."""
    expected = "user"
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system" and number == 0:
            pass
        elif role != expected:
            raise BadRowError("roles-out-of-order", f"message {number + 1} is from {role!r}, but {expected!r} is due.")
        else:
            expected = "assistant" if expected == "user" else "user"
        if not content or content.isspace():
            raise BadRowError("empty-content", f"message {number + 1} ({role}) is empty.")
        if MARK_START in content or MARK_END in content:
            raise BadRowError("noncharacter", f"message {number + 1} has a Unicode noncharacter (U+FDD0 or U+FDD1).")
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRowError("no-answer", "the conversation has no answer at its end.")


def _from_messages(row: dict[str, Any]) -> Messages:
    return _message_list(row.get("messages"), "messages")


def _message_list(value: Any, key: str) -> Messages:
    if not isinstance(value, list):
        raise BadRowError("wrong-type", f"'{key}' is {_kind(value)}, a list of messages is needed.")
    messages = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise BadRowError("wrong-type", f"{key}[{number}] is {_kind(item)}, an object is needed.")
        role = item.get("role")
        if role not in ("system", "user", "assistant"):
            raise BadRowError("unknown-role", f"{key}[{number}].role is {role!r}; known: system, user, assistant.")
        messages.append({"role": role, "content": _text(item, "content", f"{key}[{number}].")})
    return messages


def _from_sharegpt(row: dict[str, Any]) -> Messages:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise BadRowError("wrong-type", f"'conversations' is {_kind(turns)}, a list of turns is needed.")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise BadRowError("wrong-type", f"conversations[{number}] is {_kind(turn)}, an object is needed.")
        role = _SHAREGPT_ROLES.get(str(turn.get("from")))
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise BadRowError("unknown-role", f"conversations[{number}].from is {turn.get('from')!r}; known: {known}.")
        messages.append({"role": role, "content": _text(turn, "value", f"conversations[{number}].")})
    return messages


def _from_alpaca(row: dict[str, Any]) -> Messages:
    question = _text(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{_text(row, 'input')}"
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    return [
        *system,
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(row, "output")},
    ]


def _from_prompt_completion(row: dict[str, Any]) -> Messages:
    if isinstance(row.get("prompt"), list):
        return _message_list(row["prompt"], "prompt") + _message_list(row.get("completion"), "completion")
    return [
        {"role": "user", "content": _text(row, "prompt")},
        {"role": "assistant", "content": _text(row, "completion")},
    ]


def _from_llama2_text(row: dict[str, Any]) -> Messages:
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
        raise BadRowError(
            "not-llama2-text", f"no [INST] question [/INST] answer at character {position + 1} of 'text'."
        )
    if not messages[-1]["content"]:
        raise BadRowError("no-answer", "the conversation has no answer at its end.")
    return messages


def _from_oasst(row: dict[str, Any]) -> Messages:
    roles = {"prompter": "user", "assistant": "assistant"}
    messages = []
    for message in row["messages"]:
        role = roles.get(str(message.get("role")))
        if role is None:
            raise BadRowError("unknown-role", f"role is {message.get('role')!r}; known: {', '.join(roles)}.")
        messages.append({"role": role, "content": _text(message, "text")})
    return messages


def _text(item: dict[str, Any], key: str, where: str = "") -> str:
    value = item.get(key)
    if isinstance(value, str):
        return value
    if key not in item:
        raise BadRowError("missing-key", f"'{where}{key}' is missing.")
    raise BadRowError("wrong-type", f"'{where}{key}' is {_kind(value)}, text is needed.")


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


_CONVERTERS: dict[str, Callable[[dict[str, Any]], Messages]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "prompt_completion": _from_prompt_completion,
    "llama2_text": _from_llama2_text,
    "oasst": _from_oasst,
}
