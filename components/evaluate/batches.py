"""Rows in batches that fit the GPU's memory: by tokens, not by rows, and smaller ones where that was too much."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from components.models.loading import available_memory
from components.runtime.errors import Tune16Error
from components.runtime.steps import say

Result = TypeVar("Result")

_SHARE = 0.6  # of what is free, for keys, values and activations; the rest is for logits and fragments
_TOKENS_ON_A_CPU = 1 << 16


def tokens_at_once(model: Any) -> int:
    """Tokens that `model` may process at once, with their keys and values."""
    if not torch.cuda.is_available():
        return _TOKENS_ON_A_CPU
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim
    activations = 6 * config.hidden_size + 3 * config.intermediate_size
    free = available_memory() - torch.cuda.memory_allocated()
    return max(1, int(_SHARE * free / ((cache + activations) * model.dtype.itemsize)))


def in_batches(
    lengths: list[int], most_rows: int, most_tokens: int, work: Callable[[list[int]], list[Result]]
) -> list[Result]:
    """Do `work` on all rows, given by their numbers, a batch of similar lengths at a time; the longest first.

    A batch is padded to its longest row. Where the GPU's memory is not enough, the batch is halved.

    Args:
        lengths: tokens of each row.
        most_rows: rows of a batch at most.
        most_tokens: tokens of a batch at most, padding counted; a single longer row is a batch all the same.
        work: the results of some rows, in their order.

    Returns:
        The results in the order of the rows.

    Raises:
        Tune16Error: a single row is too long for the memory.
    """
    results: dict[int, Result] = {}
    for batch in _batches(lengths, most_rows, most_tokens):
        results |= zip(batch, _halved(batch, lengths, work), strict=True)
    return [results[number] for number in range(len(lengths))]


def _batches(lengths: list[int], most_rows: int, most_tokens: int) -> Iterator[list[int]]:
    waiting = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while waiting:
        size = max(1, min(most_rows, most_tokens // max(1, lengths[waiting[0]])))
        yield waiting[:size]
        waiting = waiting[size:]


def _halved(batch: list[int], lengths: list[int], work: Callable[[list[int]], list[Result]]) -> list[Result]:
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        pass  # outside the handler, where the error no longer holds the failed try's tensors
    if len(batch) == 1:
        raise Tune16Error(
            f"evaluate: a row of {lengths[batch[0]]:,} tokens does not fit the GPU's memory. Lower prepare.max_tokens "
            "or evaluate.max_new_tokens, or evaluate on a larger GPU."
        )
    torch.cuda.empty_cache()
    say("evaluate", f"{len(batch)} rows of up to {lengths[batch[0]]:,} tokens ran out of memory: halved")
    half = len(batch) // 2
    return _halved(batch[:half], lengths, work) + _halved(batch[half:], lengths, work)
