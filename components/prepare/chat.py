"""Chat templates: which one a model speaks, and conversations rendered with the answers' places marked.

The templates beside this file mark answers with ``{% generation %}``, so that only answers are trained on. The
tokenizer that travels with the model gets the same template without the marks, which not every server understands.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, Template
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser

from components.errors import Tune16Error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
Span = tuple[int, int]

UNLEARNT = {"weight": "0"}  # what a message has beside role and content where it is not to be learnt

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
def _compile(source: str) -> Template:
    return Environment(extensions=[_Generation]).from_string(source)


@dataclass(frozen=True)
class ChatTemplate:
    """A template bound to a tokenizer's special tokens."""

    name: str
    source: str
    stop_token: str
    bos_token: str
    eos_token: str

    def render(self, messages: Messages) -> tuple[str, list[Span]]:
        """Render a whole conversation.

        Returns:
            The text with its special tokens, and the character spans of the answers: what the model has to produce,
            the token that ends an answer included.
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


def choose_template(name: str, tokenizer: "PreTrainedTokenizerBase", model_type: str) -> ChatTemplate:
    """Bind the template `name` to a tokenizer; ``auto`` finds out which one the tokenizer was made for.

    Raises:
        Tune16Error: none is known for this model, or the tokenizer lacks the template's tokens.
    """
    vocabulary = tokenizer.get_vocab()
    if name == "auto":
        name = _detect(vocabulary, str(tokenizer.chat_template or ""), model_type)
    missing = [token for token in _SPECIAL_TOKENS.get(name, ()) if token not in vocabulary]
    if missing:
        raise Tune16Error(
            f"prepare.template: {name} needs the token {missing[0]}, which this model's tokenizer does not have. "
            "llama2 and mistral need none."
        )
    source = (files("components.prepare") / "templates" / f"{name}.jinja").read_text(encoding="utf-8").strip()
    eos_token = str(tokenizer.eos_token or "")
    stop_token = _STOP_TOKENS[name] or eos_token
    if not stop_token:
        raise Tune16Error(f"prepare.template: {name} ends answers with eos_token, and the tokenizer has none.")
    return ChatTemplate(name, source, stop_token, str(tokenizer.bos_token or ""), eos_token)


def _detect(vocabulary: dict[str, int], own_template: str, model_type: str) -> str:
    if "<|start_header_id|>" in vocabulary:
        return "llama3"
    if "<|im_start|>" in vocabulary:
        return model_type if model_type in ("qwen2", "qwen3") else "chatml"
    if "<|assistant|>" in vocabulary and "<|end|>" in vocabulary:
        return "phi3"
    if "<<SYS>>" in own_template or (model_type == "llama" and not own_template):
        return "llama2"
    if "[INST]" in own_template or model_type == "mistral":
        return "mistral"
    raise Tune16Error(
        "prepare.template: no chat template is known for this model's tokenizer. Choose one: "
        f"{', '.join(_STOP_TOKENS)}."
    )
