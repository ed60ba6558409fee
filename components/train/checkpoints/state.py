"""A checkpoint's files: adapter and optimiser as safetensors, all else that the next step depends on as JSON.

Nothing is pickled.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from components.runtime.outputs import read_json

_TENSORS, _STATE = "state.safetensors", "state.json"
_ADAPTER, _OPTIMIZER = "adapter", "optimizer"


def write_state(
    parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Callable[[Path], None]:
    """Copy a run's state as it is now; returns what writes the copy into a folder, whenever that is."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # paged states are the host's memory too, which the GPU may still be writing
    values, numbers = _split({str(number): dict(optimizer.state[one]) for number, one in enumerate(parameters)})
    own = {f"{_ADAPTER}/{number}": one.data for number, one in enumerate(parameters)}
    tensors = {name: value.to("cpu", copy=True) for name, value in (own | values).items()}
    content = json.dumps({**state, "optimizer": numbers})

    def write(folder: Path) -> None:
        save_file(tensors, folder / _TENSORS)
        (folder / _STATE).write_text(content)

    return write


def read_state(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of a checkpoint, which has been checked."""
    return load_file(checkpoint / _TENSORS), read_json(checkpoint / _STATE)


def read_split(checkpoint: Path) -> tuple[int, int] | None:
    """The split of the checkpoint's steps into micro-batches, where the memory plan had chosen one."""
    split = read_json(checkpoint / _STATE)["split"]
    return (split[0], split[1]) if split else None


def restore(
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, dict[str, Any]],
) -> None:
    """Put adapter and optimiser back, into memory of their own kind.

    bitsandbytes' ``load_state_dict`` would make paged states plain ones
    (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/782), so it makes new ones first.
    """
    (group,) = optimizer.param_groups
    for number, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{_ADAPTER}/{number}"])
        prefix = f"{_OPTIMIZER}/{number}/"
        saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if saved and hasattr(optimizer, "init_state"):
            optimizer.init_state(group, parameter, 0, number)
        state = optimizer.state[parameter]
        for name, value in saved.items():
            if name in state:
                state[name].copy_(value)
            else:  # torch's own optimisers: counters stay on the CPU, moments lie beside their parameter
                state[name] = value.to(parameter.device) if value.shape == parameter.shape else value
        state.update(numbers[str(number)])


def _split(states: dict[str, dict[str, Any]]) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The optimiser's tensors, by names such as ``optimizer/0/exp_avg``, and its plain numbers."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {number: {} for number in states}
    for number, state in states.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}/{number}/{name}"] = value
            else:
                numbers[number][name] = value
    return tensors, numbers
