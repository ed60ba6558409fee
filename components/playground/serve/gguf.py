"""A GGUF file in memory, run by llama.cpp."""

import codecs
import random
from pathlib import Path
from typing import Any

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from components.models.pieces import token_text
from components.playground.serve.api import Messages, Sampling, Writer
from components.runtime.cpus import num_threads
from components.runtime.errors import Tune16Error

_TEMPLATE = "tokenizer.chat_template"


class GgufModel:
    """A GGUF file in memory, with its own chat template, and perhaps with a LoRA file on it.

    Raises:
        Tune16Error: llama.cpp cannot load it, or it has no chat template.
    """

    def __init__(self, file: Path, context: int, gpu: bool = False, adapter: Path | None = None) -> None:
        options = {"n_threads": num_threads(), "n_threads_batch": num_threads(), "n_gpu_layers": -1 if gpu else 0}
        try:
            self._model: Any = llama_cpp.Llama(
                str(file), n_ctx=context, lora_path=str(adapter) if adapter else None, verbose=False, **options
            )
        except (ValueError, RuntimeError, AssertionError) as error:
            raise Tune16Error(f"{file}: llama.cpp cannot load it ({error}). Is it complete?") from None
        if _TEMPLATE not in self._model.metadata:
            raise Tune16Error(f"{file}: has no chat template, so it cannot be served for chat.")
        first, last = (
            self._model._model.token_get_text(token) for token in (self._model.token_bos(), self._model.token_eos())
        )
        template = self._model.metadata[_TEMPLATE]
        self._format: Any = Jinja2ChatFormatter(template, eos_token=last, bos_token=first)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model.model)
        self.context = min(context, self._model._model.n_ctx_train())

    def prompt(self, messages: Messages) -> list[int]:
        """See Model."""
        try:
            text = self._format(messages=messages).prompt
        except (TemplateError, TypeError) as error:
            raise ValueError(str(error)) from None
        tokens: list[int] = self._model.tokenize(text.encode(), add_bos=False, special=True)
        return tokens

    def answer(self, prompt: list[int], sampling: Sampling, writer: Writer) -> None:
        """See Model."""
        self._model.set_seed(random.getrandbits(31) if sampling.seed is None else sampling.seed & 0xFFFFFFFF)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self._model.generate(prompt, **_drawing(sampling)):
            if llama_cpp.llama_vocab_is_eog(self._vocabulary, token):
                writer.end("stop")
            else:
                writer.add(decoder.decode(token_text(self._vocabulary, token)))
            if writer.is_done:
                return


def _drawing(sampling: Sampling) -> dict[str, Any]:
    """The request's settings by llama.cpp's names; neutral ones are left out."""
    return {
        "temp": 1.0 if sampling.temperature is None else sampling.temperature,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "top_k": -1 if sampling.top_k is None else sampling.top_k,
        "min_p": sampling.min_p or 0.0,
        "repeat_penalty": sampling.repetition_penalty or 1.0,
    }
