"""Where a model's answers end: one rule for evaluation and publication.

A chat template ends answers with a token that a base model's own files often do not name; without it servers
would never stop. The rule is stored where servers look for it: in ``generation_config.json``.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.runtime.outputs import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"


def generation_settings(model: Path, tokenizer: "PreTrainedTokenizerBase", stop_token: str) -> dict[str, Any]:
    """The content of ``generation_config.json`` for a tune of the model in the folder `model`.

    Everything is the base model's but the ends, of which the template's is the first, and the padding.
    """
    settings = read_json(model / GENERATION_CONFIG) if (model / GENERATION_CONFIG).is_file() else {}
    own = settings.get("eos_token_id", read_json(model / "config.json").get("eos_token_id"))
    ends = [tokenizer.convert_tokens_to_ids(stop_token), *as_list(own)]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    return {**settings, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}


def as_list(eos_token_id: Any) -> list[Any]:
    """The ends of an ``eos_token_id``, which files and models write as one id or as several."""
    return eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
