"""Chat templates: conversations as the model will see them when it is served, with the positions of the answers.

A model's own template comes first (:class:`OwnTemplate`). Only where it has none does one of those beside this file
stand in, by name or by the model's family (:class:`ChatTemplate`): they mark answers with ``{% generation %}``. The
tokenizer that travels with the model gets the same template without the marks, which not every server understands.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError
from jinja2 import Template as JinjaTemplate
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser

from components.runtime.errors import Tune16Error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
Span = tuple[int, int]

UNLEARNT = {"weight": "0"}  # added to the messages that are not trained on

# Unicode's noncharacters: they stand for nothing in any text, and rows that have them are refused.
MARK_START = "\ufdd0"
MARK_END = "\ufdd1"

# The token that ends an answer, and the tokens that a template needs in the vocabulary.
_STOP_TOKENS = {
    "llama2": "",
    "mistral": "",
    "llama3": "<|eot_id|>",
    "qwen2": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "phi3": "<|end|>",
    "chatml": "<|im_end|>",
}
_SPECIAL_TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "qwen2": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}

# What each template writes around the contents. Within a content it would be read as the template's own.
TEMPLATE_TOKENS = {
    "llama2": ("<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    "mistral": ("<s>", "</s>", "[INST]", "[/INST]"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", *_SPECIAL_TOKENS["llama3"]),
    "qwen2": ("<|endoftext|>", *_SPECIAL_TOKENS["qwen2"]),
    "qwen3": ("<|endoftext|>", *_SPECIAL_TOKENS["qwen3"]),
    "phi3": ("<|system|>", "<|endoftext|>", *_SPECIAL_TOKENS["phi3"]),
    "chatml": _SPECIAL_TOKENS["chatml"],
}


def is_learnt(message: dict[str, str]) -> bool:
    """Whether an answer counts in the loss."""
    return "weight" not in message


_CHOOSE = f"Choose one with prepare.template: {', '.join(_STOP_TOKENS)}."


class _Generation(Extension):
    """The block tag ``{% generation %}``: surrounds what is inside with marks."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{MARK_START}{caller()}{MARK_END}"


@cache
def _compile(source: str) -> JinjaTemplate:
    return Environment(extensions=[_Generation]).from_string(source)


class NotRenderedError(Exception):
    """A template does not take a conversation, or loses a part of it: why, and which message (-1: all of it)."""

    def __init__(self, message: str, number: int = -1) -> None:
        super().__init__(message)
        self.number = number


@dataclass(frozen=True)
class Sample:
    """One text to train on: the conversation that it shows, the text, and the character spans of the answers.

    A span is what the model has to produce, the token that ends an answer included.
    """

    messages: Messages
    text: str
    spans: list[Span]


@dataclass(frozen=True)
class ChatTemplate:
    """A template of ours bound to a tokenizer's special tokens."""

    name: str
    source: str
    stop_token: str
    bos_token: str
    eos_token: str
    note: str = ""  # why it is this one

    @property
    def tokens(self) -> frozenset[str]:
        """What the template writes around the contents."""
        return frozenset(TEMPLATE_TOKENS[self.name])

    def samples(self, messages: Messages) -> list[Sample]:
        """The conversation as one text, in which every answer that is to be learnt has its span."""
        text, spans = self.render(messages)
        answers = [message for message in messages if message["role"] == "assistant"]
        learnt = [span for span, answer in zip(spans, answers, strict=True) if is_learnt(answer)]
        return [Sample(messages, text, learnt)]

    def render(self, messages: Messages) -> tuple[str, list[Span]]:
        """Render a whole conversation.

        Returns:
            The text with its special tokens, and the spans of all answers.
        """
        marked = _compile(self.source).render(
            messages=messages, bos_token=self.bos_token, eos_token=self.eos_token, add_generation_prompt=False
        )
        pieces = re.split(f"[{MARK_START}{MARK_END}]", marked)
        spans: list[Span] = []
        position = 0
        for number, piece in enumerate(pieces):
            if number % 2:
                spans.append((position, position + len(piece)))
            position += len(piece)
        return "".join(pieces), spans

    @property
    def plain_source(self) -> str:
        """The template without the marks, for the tokenizer that travels with the model."""
        return re.sub(r"\s*\{%-? (end)?generation -?%\}", "", self.source)


_QUESTION, _ANSWER = "\ufdd2", "\ufdd3"  # stand for contents where a template is tried out


class OwnTemplate:
    """The template that came with the model's tokenizer, as Transformers renders it.

    An answer is what a render adds after the prompt for it. Where the template writes earlier turns otherwise than the
    model saw them when it answered (Qwen 3 drops old thoughts), each answer is a sample of its own, in its own context.

    Raises:
        Tune16Error: the template cannot be used: it leaves messages out, or does not end answers with a token.
    """

    name = "own"

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", where: str) -> None:
        self._tokenizer = tokenizer
        self._special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special |= {str(token) for token in (tokenizer.eos_token,) if token}
        try:
            prompt, whole = self._prompt([_user(_QUESTION)]), self._apply([_user(_QUESTION), _assistant(_ANSWER)])
        except NotRenderedError as error:
            raise Tune16Error(f"{where}: its chat template cannot be used: {error}. {_CHOOSE}") from None
        if _QUESTION not in prompt or _ANSWER not in whole:
            raise UnusableTemplateError("its own leaves the messages out")
        self._after = whole.partition(_ANSWER)[2]
        found = [(self._after.find(token), -len(token), token) for token in self._special if token in self._after]
        if not found:
            raise Tune16Error(
                f"{where}: its chat template ends answers without a token, so the tuned model would never stop. "
                f"{_CHOOSE}"
            )
        self.stop_token = min(found)[2]
        self._end = self._after.index(self.stop_token) + len(self.stop_token)
        header = _common_start(prompt, whole)
        self.note = "the model's own template"
        if len(header) < len(prompt):
            self.note += (
                f"; its prompts end with {prompt[len(header) :]!r}, which it does not write before the data's "
                "answers: prompts will differ slightly from those in training"
            )

    @property
    def tokens(self) -> frozenset[str]:
        """What the template writes around the contents."""
        known = {token for tokens in TEMPLATE_TOKENS.values() for token in tokens}
        return frozenset(token for token in known if token in self.plain_source)

    @property
    def plain_source(self) -> str:
        """The template, for the tokenizer that travels with the model."""
        return str(self._tokenizer.get_chat_template())

    def samples(self, messages: Messages) -> list[Sample]:
        """The conversation as one text, or as one for each answer.

        Raises:
            NotRenderedError: the template refuses it, or loses a message.
        """
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        whole = self._apply(plain)
        places = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        singles = [Sample(messages[: n + 1], *self._answered(plain[: n + 1])) for n in places]
        for number, message in enumerate(plain):
            shown = next(single.text for single, place in zip(singles, places, strict=True) if place >= number)
            if message["content"].rpartition("</think>")[2].strip() not in shown:
                raise NotRenderedError(f"the model's template leaves the message ({message['role']}) out.", number)
        learnt = [single for single, place in zip(singles, places, strict=True) if is_learnt(messages[place])]
        if all(whole.startswith(single.text[: single.spans[0][1]]) for single in learnt):
            return [Sample(messages, whole, [span for single in learnt for span in single.spans])]
        return learnt

    def _answered(self, messages: Messages) -> tuple[str, list[Span]]:
        """A conversation up to its last answer, and that answer's span."""
        text, prompt = self._apply(messages), self._prompt(messages[:-1])
        start = len(prompt)
        if not text.endswith(self._after):
            raise NotRenderedError(f"the model's template does not end this answer with {self.stop_token!r}.")
        if not text.startswith(prompt):
            text, start = self._as_asked(messages, text, prompt)
        return text, [(start, len(text) - len(self._after) + self._end)]

    def _as_asked(self, messages: Messages, text: str, prompt: str) -> tuple[str, int]:
        """The prompt and its answer, where the template renders them differently together; and the answer's start.

        A header of its own for prompts (DeepSeek's opened thought) is left out. A question that is written otherwise
        (Mistral's last one has the system message in it) stands as the model is asked it.
        """
        before = self._apply([*messages[:-1], _assistant(_ANSWER)]).partition(_ANSWER)[0]
        common, question = _common_start(prompt, before), messages[-2]["content"].strip()
        if common.count(question) == before.count(question) > 0:
            return text, len(common)
        asked, shown = (part.rpartition(question)[2] for part in (prompt, before))
        if question not in prompt or not text.startswith(before) or not shown.startswith(asked):
            raise NotRenderedError(
                "the model's template writes the question differently once it is answered, so the answer's position "
                "cannot be determined.",
                len(messages) - 2,
            )
        return prompt + shown[len(asked) :] + text[len(before) :], len(prompt)

    def _prompt(self, messages: Messages) -> str:
        return self._apply(messages, add_generation_prompt=True)

    def _apply(self, messages: Messages, **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except (TemplateError, TypeError, ValueError) as error:
            raise NotRenderedError(f"the model's template rejects it: {str(error).partition(chr(10))[0]}.") from None


def _common_start(left: str, right: str) -> str:
    pairs = enumerate(zip(left, right, strict=False))
    return left[: next((number for number, (one, other) in pairs if one != other), min(len(left), len(right)))]


class UnusableTemplateError(Tune16Error):
    """A template that leaves the conversation out, which counts as none."""


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


Template = ChatTemplate | OwnTemplate


def choose_template(name: str, tokenizer: "PreTrainedTokenizerBase", model_type: str, where: str = "model") -> Template:
    """The template `name` for a tokenizer; ``auto`` is the tokenizer's own, or that of the model's family.

    `where` names the model in messages.

    Raises:
        Tune16Error: none is known for this model, or the tokenizer lacks the template's tokens.
    """
    note = f"{name}, as prepare.template says"
    if name == "auto":
        note = "the model has none of its own"
        if tokenizer.chat_template:
            try:
                return OwnTemplate(tokenizer, where)
            except UnusableTemplateError as error:
                note = str(error)
    vocabulary = tokenizer.get_vocab()
    if name == "auto":
        name = _detect(vocabulary, model_type)
        note = f"{name}, the family's, since {note}"
    missing = [token for token in _SPECIAL_TOKENS.get(name, ()) if token not in vocabulary]
    if missing:
        raise Tune16Error(
            f"prepare.template: {name} needs the token {missing[0]}, which this model's tokenizer does not have. "
            "llama2 and mistral need none."
        )
    source = (files("components.prepare.tokenize") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").strip()
    eos_token = str(tokenizer.eos_token or "")
    stop_token = _STOP_TOKENS[name] or eos_token
    if not stop_token:
        raise Tune16Error(f"prepare.template: {name} ends answers with eos_token, which the tokenizer lacks.")
    return ChatTemplate(name, source, stop_token, str(tokenizer.bos_token or ""), eos_token, note)


def _detect(vocabulary: dict[str, int], model_type: str) -> str:
    if "<|start_header_id|>" in vocabulary:
        return "llama3"
    if "<|im_start|>" in vocabulary:
        return model_type if model_type in ("qwen2", "qwen3") else "chatml"
    if "<|assistant|>" in vocabulary and "<|end|>" in vocabulary:
        return "phi3"
    if model_type == "llama":
        return "llama2"
    if model_type == "mistral":
        return "mistral"
    raise Tune16Error(f"prepare.template: no chat template is known for this model's tokenizer. {_CHOOSE}")
