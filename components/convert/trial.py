"""One GGUF file loaded and tested: loss on held-out rows, answers to held-out prompts, tokens per second."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.models.pieces import token_text
from components.runtime.cpus import num_threads
from components.runtime.report import significant

MAX_NEW_TOKENS = 90

_BYTES_PER_THREAD = 32 << 20  # threads wait for each other after every matrix, longer than a small one takes


@dataclass
class Trial:
    """The results of one file.

    ``loss`` is in nats per answer token; ``speed`` in generated tokens per second, of a single conversation;
    ``same_tokens`` counts the prompts that the file's own template and tokenizer turn into the tokens of the training.
    """

    name: str
    size: int
    threads: int = 1
    loss: float = 0.0
    speed: float = 0.0
    same_tokens: int = 0
    answers: list[str] = field(default_factory=list)

    def same_answers(self, full: "Trial") -> float:
        """Share of the prompts that get the same answer as from the 16-bit file."""
        pairs = zip(self.answers, full.answers, strict=True)
        return sum(ours == theirs for ours, theirs in pairs) / len(self.answers)

    def as_dict(self, full: "Trial") -> dict[str, float]:
        """Rounded, for files and dashboards."""
        return {
            "bytes": self.size,
            "loss": significant(self.loss),
            "same_answers": significant(self.same_answers(full)),
            "tokens_per_second": significant(self.speed, 3),
            "threads": self.threads,
        }


def try_file(file: Path, name: str, rows: list[dict[str, Any]], advance: Callable[[int], None]) -> Trial:
    """Load `file` and test it on the held-out `rows` of the step prepare (``messages``, ``input_ids``, ``labels``).

    Answers are greedy and end after 90 tokens. `advance` is called with the number of prompts answered.
    """
    trial = Trial(name, file.stat().st_size, _threads(file))
    with loaded(file, max(len(row["input_ids"]) for row in rows) + MAX_NEW_TOKENS) as model:
        losses = [answer_losses(model, row["input_ids"], row["labels"]) for row in rows]
        trial.loss = float(np.concatenate(losses).mean())
        num_tokens, seconds = 0, 0.0
        for number, row in enumerate(rows, 1):
            prompt = prompt_tokens(model, row["messages"][:-1])
            trial.same_tokens += prompt == row["input_ids"][: len(prompt)]
            answer, tokens, took = _answer(model, prompt)
            trial.answers.append(answer)
            num_tokens, seconds = num_tokens + tokens, seconds + took
            advance(number)
    trial.speed = num_tokens / max(seconds, 1e-9)
    return trial


def row_loss(file: Path, rows: list[dict[str, Any]]) -> float:
    """Loss of a file in nats per answer token on `rows`."""
    with loaded(file, max(len(row["input_ids"]) for row in rows)) as model:
        return float(np.concatenate([answer_losses(model, row["input_ids"], row["labels"]) for row in rows]).mean())


@contextmanager
def loaded(file: Path, num_tokens: int, adapter: Path | None = None) -> Iterator[Any]:
    """A file in memory, with room for `num_tokens`, and perhaps with a LoRA file on it."""
    import llama_cpp

    threads = _threads(file)
    model = llama_cpp.Llama(
        str(file),
        n_ctx=num_tokens,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        lora_path=str(adapter) if adapter else None,
        verbose=False,
    )
    with closing(model):
        yield model


def _threads(file: Path) -> int:
    return max(1, min(num_threads(), file.stat().st_size // _BYTES_PER_THREAD))


def logits(model: Any, tokens: list[int]) -> npt.NDArray[np.float32]:
    """The logits of shape [tokens, vocabulary] for one sequence."""
    model.reset()
    model.eval(tokens)
    scores: npt.NDArray[np.float32] = model.scores[: len(tokens)]
    return scores


def answer_losses(model: Any, tokens: list[int], labels: list[int]) -> npt.NDArray[np.float64]:
    """Negative log-likelihood in nats of each token that has a label."""
    scores = logits(model, tokens)
    losses = []
    for place in (place for place in range(1, len(tokens)) if labels[place] >= 0):  # one by one: a row is 1 MB
        row = scores[place - 1].astype(np.float64)
        losses.append(row.max() + np.log(np.exp(row - row.max()).sum()) - row[labels[place]])
    return np.array(losses)


def prompt_tokens(model: Any, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation with the file's own chat template and tokenizer, up to where the answer begins."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    first, last = (model._model.token_get_text(token) for token in (model.token_bos(), model.token_eos()))
    formatter: Any = Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], eos_token=last, bos_token=first)
    text = formatter(messages=messages).prompt
    tokens: list[int] = model.tokenize(text.encode(), add_bos=False, special=True)
    return tokens


def _answer(model: Any, prompt: list[int]) -> tuple[str, int, float]:
    """The greedy answer to a prompt, its number of tokens, and the seconds after the first one."""
    import llama_cpp

    tokens: list[int] = []
    started = 0.0
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        started = started or time.perf_counter()  # the first token's time is the prompt's
        if llama_cpp.llama_vocab_is_eog(vocabulary, token):
            break
        tokens.append(token)
        if len(tokens) == MAX_NEW_TOKENS:
            break
    text = b"".join(token_text(vocabulary, token) for token in tokens).decode(errors="replace")
    return text.strip(), max(len(tokens) - 1, 0), time.perf_counter() - started
