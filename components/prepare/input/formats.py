"""Rows of every known form, turned into one: a list of messages with roles system, user and assistant.

JSON paths count from 0, as jq and every programming language do: ``messages[0].content`` is the first message's.

A key that changes what is learnt is either understood or refused, never ignored: the system message beside a
conversation, earlier turns, the weight of an answer are understood; tool calls, thoughts and pictures are not yet.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from components.prepare.input.strictjson import join
from components.prepare.rules.findings import Place
from components.prepare.rules.sensitive import path_key, quoted
from components.prepare.tokenize.chat import MARK_END, MARK_START, UNLEARNT, Messages, is_learnt
from components.runtime.errors import Tune16Error

Row = dict[str, Any]

_ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
_LLAMA2_TURN = re.compile(r"\s*(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?:</s>|(?=<s>|\[INST\])|\Z)", re.DOTALL)
_LISTS = {"messages": ("messages",), "sharegpt": ("conversations",), "prompt_completion": ("prompt", "completion")}
_LISTED = 20  # keys that a message lists
_OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
_LLAMA2_SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)


# The keys of each format, and others that often accompany them and have no meaning here: these need no warning.
_BESIDE = {"id", "idx", "index", "source", "category", "dataset", "lang", "language", "tags", "metadata"}
_KEYS = {
    "messages": {"messages", "prompt", "prompt_id", "system"},
    "sharegpt": {"conversations", "system"},
    "alpaca": {"instruction", "input", "context", "output", "system", "history", "text"},
    "prompt_completion": {"prompt", "completion", "system"},
    "llama2_text": {"text"},
    "oasst": {
        *("message_tree_id", "message_id", "parent_id", "role", "text", "rank", "user_id", "created_date", "emojis"),
        *("review_count", "review_result", "deleted", "synthetic", "model_name", "detoxify", "tree_state", "labels"),
    },
}
KNOWN_KEYS = {form: keys | _BESIDE for form, keys in _KEYS.items()}
_MESSAGE_KEYS = {"role", "content", "from", "value", "weight", "train"}

# Keys that change what a row teaches and that no form here understands: why a row that fills them in is refused.
_EMPTY: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {})  # values of keys that count as not set
_TOOLS = "training on tool calls is not supported yet"
_THOUGHTS = "separate reasoning is not supported yet. Write it into the content, as the model's template does"
_MEDIA = "only text is supported"
_QUESTION = "it may be a part of the question, for which this format has no key. Write it into the question"
_MEANING = {
    **dict.fromkeys(("tools", "tool_calls", "tool_call_id", "functions", "function_call"), _TOOLS),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought"), _THOUGHTS),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _MEDIA),
    **dict.fromkeys(("history", "context", "input", "instruction"), _QUESTION),
}
_TOOL_ROLES = {"tool", "function", "observation", "function_call", "tool_call", "tool_response", "ipython"}
_LABEL = "label"  # of a preference: whether the answer is wanted


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
        Tune16Error: it is not a known one.
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
        f"{name}: the rows have the keys {_listed(keys)}, which is not a known format. Known: messages; "
        "conversations (ShareGPT); instruction, input, output (Alpaca); prompt, completion; text in [INST] form; "
        "oasst1's message trees."
    )


def _listed(keys: set[str]) -> str:
    shown = [quoted(key)[1:-1] for key in sorted(keys)[:_LISTED]]
    return ", ".join(shown) + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")


def to_messages(row: Row, form: str) -> Messages:
    """Turn one row into a checked conversation.

    Raises:
        BadRowError: the row has another format, roles are out of order, or it has nothing to train on.
    """
    messages = _CONVERTERS[form](row)
    _refuse_unsupported(row, KNOWN_KEYS[form])
    if row.get(_LABEL) is False:
        raise _unsupported(_LABEL, "training on rejected answers is not supported yet. Remove the row")
    _check(messages, row, form)
    return _up_to_the_last_learnt(messages)


def unknown_keys(row: Row, form: str) -> Iterator[tuple[str, str]]:
    """JSON path and name of each key that is ignored, in the row and in its messages."""
    for key in sorted(row.keys() - KNOWN_KEYS[form]):
        yield path_key(key), key
    for name in _LISTS.get(form, ()):
        for number, item in enumerate(_as_list(row.get(name))):
            if isinstance(item, dict) and not item.keys() <= _MESSAGE_KEYS:
                for key in sorted(item.keys() - _MESSAGE_KEYS):
                    yield join(f"{name}[{number}]", key), key


def _refuse_unsupported(item: Row, known: set[str], where: str = "") -> None:
    """Refuse what is filled in under a key that changes what is learnt, unless the form knows the key."""
    for key in item.keys() & (_MEANING.keys() - known):
        if item[key] not in _EMPTY:
            raise _unsupported(f"{where}{key}", _MEANING[key])


def _unsupported(path: str, why: str) -> BadRowError:
    return BadRowError("unsupported", f"{why}.", path)


def _up_to_the_last_learnt(messages: Messages) -> Messages:
    """The conversation without what follows its last answer that is to be learnt.

    Raises:
        BadRowError: there is no such answer.
    """
    end = len(messages)
    while end and not (messages[end - 1]["role"] == "assistant" and is_learnt(messages[end - 1])):
        end -= 1
    if not end:
        raise BadRowError("no-answer", "none of its answers is trained on (weight 0, or train false).")
    return messages[:end]


def locate(place: Place, row: Row, form: str, number: int) -> tuple[Place, str]:
    """Where the content of a conversation's message `number` stands: its place and its JSON path.

    A row that cannot be read has the place of its first faulty message, and its own path.
    """
    if form == "oasst":
        return row["places"][number], "text"
    if form == "llama2_text":
        return place, "text"
    if not _is_empty(row.get("system")):
        if number == 0:
            return place, "system"
        number -= 1
    if form == "alpaca":
        turns = [f"history[{turn}][{side}]" for turn in range(len(_as_list(row.get("history")))) for side in (0, 1)]
        return place, [*turns, "instruction", "output"][number]
    if form == "prompt_completion" and not _prompt_messages(row):
        return place, ("prompt", "completion")[number]
    key = _LISTS[form][0]
    length = len(_as_list(row[key]))
    if form == "prompt_completion" and number >= length:
        key, number = "completion", number - length
    item = _as_list(row[key])[number]
    return place, f"{key}[{number}].{'value' if 'from' in item and 'content' not in item else 'content'}"


def _check(messages: Messages, row: Row, form: str) -> None:
    """System first if at all, then user and assistant in turn, the assistant last, and no message empty."""
    expected = "user"
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system" and number == 0:
            pass
        elif role != expected:
            raise _bad_message("roles-out-of-order", f"is from {role!r}, expected {expected!r}.", row, form, number)
        else:
            expected = "assistant" if expected == "user" else "user"
        if not content or content.isspace():
            raise _bad_message("empty-content", f"the message ({role}) is empty.", row, form, number)
        if MARK_START in content or MARK_END in content:
            raise _bad_message("noncharacter", "has a Unicode noncharacter (U+FDD0 or U+FDD1).", row, form, number)
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRowError("no-answer", "the conversation has no answer at its end.", _LISTS.get(form, ("",))[-1])


def _bad_message(rule: str, message: str, row: Row, form: str, number: int) -> BadRowError:
    return BadRowError(rule, message, locate(("", 0), row, form, number)[1], number)


def _from_messages(row: Row) -> Messages:
    return [*_system(row), *_message_list(row, "messages")]


def _from_sharegpt(row: Row) -> Messages:
    return [*_system(row), *_message_list(row, "conversations")]


def _system(row: Row) -> Messages:
    """The system message that stands in a column of its own, if one does."""
    return [] if _is_empty(row.get("system")) else [{"role": "system", "content": _text(row, "system")}]


def _message_list(row: Row, key: str) -> Messages:
    """The messages under `key`, each with role and content (OpenAI) or from and value (ShareGPT)."""
    messages = []
    for number, item in enumerate(_items(row, key)):
        where = f"{key}[{number}]."
        if not item.keys() <= _MESSAGE_KEYS:
            _refuse_unsupported(item, set(), where)
        who = "from" if "from" in item and "role" not in item else "role"
        what = "value" if "value" in item and "content" not in item else "content"
        if who not in item:
            raise BadRowError(
                "missing-key", "it is missing.", f"{where}{'from' if what == 'value' else 'role'}", number
            )
        role = _ROLES.get(str(item[who]))
        if role is None:
            raise _unknown_role(item[who], _ROLES, f"{where}{who}", number)
        message = {"role": role, "content": _text(item, what, where, number)}
        if ("weight" in item or "train" in item) and not _is_to_learn(item, where):
            message |= UNLEARNT
        messages.append(message)
    return messages


def _is_to_learn(item: Row, where: str) -> bool:
    """Whether a message counts in the loss: its weight is 1 or 0 (as OpenAI has it), or train is true or false."""
    learnt = True
    known: tuple[tuple[str, dict[Any, bool]], ...] = (
        ("weight", {1: True, 0: False}),
        ("train", {True: True, False: False}),
    )
    for key, values in known:
        value: Any = item.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in values:
            raise _unsupported(f"{where}{key}", f"it is {quoted(value)}; known: {' and '.join(map(str, values))}")
        learnt = learnt and values[value]
    return learnt


def _as_list(value: Any) -> list[Any]:
    """A list, also one that stands there as its JSON text, as tables have it; of anything else, an empty one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return []
    return value if isinstance(value, list) else []


def _items(row: Row, key: str) -> list[Row]:
    """The list of objects under `key`."""
    value = row.get(key)
    if key not in row:
        raise BadRowError("missing-key", "it is missing.", key)
    items = _as_list(value)
    if not items and value != []:
        text = ", which is not a JSON list," if isinstance(value, str) else ","
        raise BadRowError("wrong-type", f"it is {kind_of(value)}{text} where a list of messages is needed.", key)
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRowError("wrong-type", f"it is {kind_of(item)}, an object is needed.", f"{key}[{number}]", number)
    return items


def _unknown_role(role: Any, known: Iterable[str], path: str, number: int) -> BadRowError:
    if str(role) in _TOOL_ROLES:
        return BadRowError("unsupported", f"the role is {quoted(role)}: {_TOOLS}.", path, number)
    return BadRowError("unknown-role", f"the role is {quoted(role)}; known: {', '.join(known)}.", path, number)


def _from_alpaca(row: Row) -> Messages:
    parts = [_text(row, "instruction")]
    more = [key for key in ("input", "context") if not _is_empty(row.get(key))]
    if len(more) > 1:
        raise _unsupported("context", "both input and context are set, and which comes first is not defined")
    parts += [_text(row, key) for key in more]
    return [
        *_system(row),
        *_history(row),
        {"role": "user", "content": "\n\n".join(part for part in parts if part)},
        {"role": "assistant", "content": _text(row, "output")},
    ]


def _history(row: Row) -> Messages:
    """Earlier questions and answers, in pairs, which are learnt as well."""
    value = row.get("history")
    pairs = _as_list(value)
    if not pairs and value not in _EMPTY:
        raise BadRowError("wrong-type", f"it is {kind_of(value)}, a list of pairs is needed.", "history")
    messages: Messages = []
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRowError("wrong-type", "a pair of question and answer is needed.", f"history[{number}]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _prompt_messages(row: Row) -> list[Any]:
    """The prompt where it is a list of messages; a text that only begins as a list does is a question."""
    prompt = row.get("prompt")
    items = _as_list(prompt)
    is_text = isinstance(prompt, str) and not all(
        isinstance(item, dict) and {"role", "from"} & {*item} for item in items
    )
    return [] if is_text else items


def _is_empty(value: Any) -> bool:
    """Whether a column is not filled in: 0 counts as filled in, but is not text."""
    return value is None or (isinstance(value, (str, list)) and not value)


def _from_prompt_completion(row: Row) -> Messages:
    if _prompt_messages(row):
        return [*_system(row), *_message_list(row, "prompt"), *_message_list(row, "completion")]
    return [
        *_system(row),
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
        if "role" not in message:
            raise BadRowError("missing-key", "it is missing.", "role", number)
        role = _OASST_ROLES.get(str(message["role"]))
        if role is None:
            raise _unknown_role(message["role"], _OASST_ROLES, "role", number)
        messages.append({"role": role, "content": _text(message, "text", "", number)})
    return messages


def _text(item: Row, key: str, where: str = "", number: int = 0) -> str:
    """The text under `key`; a list of OpenAI's text parts counts as one text."""
    value = item.get(key)
    if isinstance(value, str):
        return value
    if key not in item:
        raise BadRowError("missing-key", "it is missing.", f"{where}{key}", number)
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        return "".join(_part(part, f"{where}{key}[{index}]", number) for index, part in enumerate(value))
    raise BadRowError("wrong-type", f"it is {kind_of(value)}, text is needed.", f"{where}{key}", number)


def _part(part: Row, path: str, number: int) -> str:
    """The text of one part of a content."""
    if part["type"] != "text":
        raise BadRowError("unsupported", f"a part of the type {quoted(part['type'])}: {_MEDIA}.", path, number)
    if not isinstance(part.get("text"), str):
        raise BadRowError("wrong-type", f"it is {kind_of(part.get('text'))}, text is needed.", f"{path}.text", number)
    return str(part["text"])


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
