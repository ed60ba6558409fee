"""The tokenizer that prepare encodes with: the model's own, made fast where it is slow, with the same result."""

import json
import re
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE = "▁"
_WORD_AFTER_SPACES = f"{_SPACE}+[^{_SPACE}]*"


def make_encoder(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer:
    """A tokenizer that gives the same tokens and offsets as `tokenizer`, several times faster for Llama-2's kind.

    Tokenizers made from SentencePiece merge whole texts: slow, and nothing is ever found in the cache of words. Where
    no token of the vocabulary has a space after a letter, no merge crosses the start of a word, so words can be
    merged one by one.
    """
    backend = tokenizer.backend_tokenizer
    encoder = Tokenizer.from_str(backend.to_str())
    if _merges_whole_texts(encoder):
        split = pre_tokenizers.Split(Regex(_WORD_AFTER_SPACES), behavior="isolated")
        own = encoder.pre_tokenizer
        encoder.pre_tokenizer = pre_tokenizers.Sequence([own, split]) if own else split
    return encoder


def _merges_whole_texts(encoder: Tokenizer) -> bool:
    """Whether it is byte-pair encoding without a split into words, and no merge crosses the start of a word."""
    definition = json.loads(encoder.to_str())
    model, own = definition["model"], definition["pre_tokenizer"]
    if model["type"] != "BPE" or model.get("dropout") or _SPACE not in model["vocab"]:
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    if own and not (own["type"] == "Metaspace" and own.get("split") is False):
        return False
    crossing = re.compile(f"[^{_SPACE}]{_SPACE}")
    return not any(crossing.search(token) for token in model["vocab"])
