"""What processes that train together agree on. A process that trains alone agrees with itself.

accelerate joins them, by the variables that :mod:`.pod` sets: NCCL between GPUs, gloo between CPUs.
"""

import os
import random
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import distributed

from components.models.loading import device
from components.runtime.retry import OUTAGE_SECONDS


def join() -> PartialState:
    """Join the others; returns their number and this process's index among them.

    A process that is late, or waits for the storage, is waited for: its pod may have to be started first.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=2 * OUTAGE_SECONDS))


def is_first() -> bool:
    """Whether this is the only process, or the first of those that train together."""
    return os.environ.get("RANK", "0") == "0"


def agreed(*flags: bool) -> list[bool]:
    """Each flag, true in all processes where it is true in one."""
    if not distributed.is_initialized():
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32, device=device())
    distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def least(number: int) -> int:
    """The smallest of this number in all processes: their GPUs may differ, their steps must not."""
    if not distributed.is_initialized():
        return number
    smallest = torch.tensor(number, device=device())
    distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
    return int(smallest)


def add_up(values: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over all processes; returns it."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


def add_up_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace gradients by their sums over all processes, in one message; one that is missing is zero."""
    if not distributed.is_initialized():
        return
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    flat = add_up(gradients[0] if len(gradients) == 1 else torch.cat([one.reshape(-1) for one in gradients]))
    if len(gradients) > 1:
        parts = torch.split(flat, [one.numel() for one in gradients])
        for one, part in zip(gradients, parts, strict=True):
            one.copy_(part.view_as(one))


def take_firsts(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give every process the first one's values."""
    if distributed.is_initialized():
        for parameter in parameters:
            distributed.broadcast(parameter.data, 0)


def of_all(value: Any) -> list[Any]:
    """The value of every process, in their order; it must be what pickle takes."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def of_first(value: Any) -> Any:
    """The first process's value."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def randomness() -> dict[str, Any]:
    """The state of every random generator of this process."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else "",
    }


def set_randomness(state: dict[str, Any]) -> None:
    """Put back what :func:`randomness` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
