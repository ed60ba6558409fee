"""Weights in memory, run by Transformers, where there is no GGUF file."""

from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from components.models.loading import choose_dtype, device, load_model
from components.models.stopping import as_list
from components.playground.serve.api import Messages, Sampling, Writer
from components.runtime.errors import Tune16Error, first_line

_UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character


class WeightsModel:
    """A model folder in memory, with its own tokenizer, chat template and generation settings.

    Raises:
        Tune16Error: it cannot be loaded.
    """

    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder, choose_dtype("auto")).eval()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # whatever the library raises on an unknown folder
            reason = first_line(error)
            raise Tune16Error(f"{folder}: its tokenizer cannot be loaded: {reason}") from None
        if not self._tokenizer.chat_template:
            raise Tune16Error(f"{folder}: its tokenizer has no chat template, so it cannot be served for chat.")
        self._ends = set(as_list(self._model.generation_config.eos_token_id))
        self.context = int(self._model.config.max_position_embeddings)

    def prompt(self, messages: Messages) -> list[int]:
        """See Model."""
        try:
            tokens: list[int] = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
        except (TemplateError, TypeError) as error:
            raise ValueError(str(error)) from None
        return tokens

    def answer(self, prompt: list[int], sampling: Sampling, writer: Writer) -> None:
        """See Model."""
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = torch.tensor([prompt], device=device())
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_tokens,
            pad_token_id=self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0,
            stopping_criteria=StoppingCriteriaList([_Into(writer, self._tokenizer, len(prompt), self._ends)]),
            **_drawing(sampling),
        )


def _drawing(sampling: Sampling) -> dict[str, Any]:
    """The options of `generate`: what is not asked for stays as the model's own settings have it."""
    names = ("top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    if "top_k" in given:
        given["top_k"] = max(given["top_k"], 0)  # -1 is none, for others
    if sampling.temperature == 0:
        kept = {"repetition_penalty": given["repetition_penalty"]} if "repetition_penalty" in given else {}
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **kept}
    return {"do_sample": True, "temperature": 1.0 if sampling.temperature is None else sampling.temperature, **given}


class _Into(StoppingCriteria):
    """Brings every new token's text to the writer, and ends the generation where the writer is stopped."""

    def __init__(self, writer: Writer, tokenizer: Any, start: int, ends: set[int]) -> None:
        self._writer, self._tokenizer, self._start, self._ends = writer, tokenizer, start, ends
        self._written = ""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        tokens = input_ids[0, self._start :].tolist()
        if tokens[-1] in self._ends:
            self._writer.end("stop")
        else:
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            is_whole = not text.endswith(_UNFINISHED)
            self._writer.add(text[len(self._written) :] if is_whole else "")
            self._written = text if is_whole else self._written
        return torch.full((1,), self._writer.is_done, dtype=torch.bool, device=input_ids.device)
