"""The weights that a model's architecture needs, compared with those that its files hold, from their headers alone.

Transformers initialises a missing weight randomly and continues. What is needed is asked of Transformers
itself: the model is built without memory (torch's meta device).
"""

from pathlib import Path
from typing import Any

import torch

from components.models.tensors import StoredTensor, read_header, weight_files
from components.runtime.errors import Tune16Error, first_line

_UNUSED = (".rotary_emb.inv_freq", ".attention.bias", ".masked_bias")  # buffers that older files carry along


def check_weights(source: Path, where: str) -> None:
    """Check that the model folder `source` has every weight that its config.json asks for, and none that it does not.

    Raises:
        Tune16Error: the first weight that is missing, has another shape, is there twice, or belongs to nothing.
    """
    stored: dict[str, StoredTensor] = {}
    for file in weight_files(source):
        for tensor in read_header(file):
            if tensor.name in stored:
                raise Tune16Error(f"{where}: the weight {tensor.name} is in {stored[tensor.name].file.name} and in "
                                  f"{file.name}. Fetch the model again.")  # fmt: skip
            stored[tensor.name] = tensor
    needed, tied = _needed(source, where)
    for name, shape in needed.items():
        if name not in stored:
            if name in tied:
                continue
            raise Tune16Error(f"{where}: the weight {name} is missing{_similar(name, stored)}. {_REMEDY}")
        if stored[name].shape != shape:
            found, wanted = (" x ".join(map(str, sizes)) for sizes in (stored[name].shape, shape))
            raise Tune16Error(f"{where}: the weight {name} is {found}, but config.json asks for {wanted}. {_REMEDY}")
    for name in stored.keys() - needed.keys():
        if not name.endswith(_UNUSED):
            raise Tune16Error(f"{where}: holds the weight {name}, which is not part of the architecture. {_REMEDY}")


_REMEDY = "Use the model as published, or save it again with save_pretrained."


def _needed(source: Path, where: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """The shape of each weight, and the names of those that another one may stand in for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever the library raises on an unknown config.json
        reason = first_line(error)
        raise Tune16Error(f"{where}: Transformers cannot build a model from its config.json: {reason}") from None
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return shapes, tied


def _similar(name: str, stored: dict[str, StoredTensor]) -> str:
    """A hint at a weight that may be meant, under another prefix."""
    last = name.removeprefix("model.")
    found = next((other for other in sorted(stored) if other.endswith(last)), "")
    return f"; the files have {found} instead" if found else ""
