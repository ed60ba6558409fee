"""What llama.cpp's converter needs of a tokenizer and today's model folders lack.

It takes vocabularies with byte fallback (Llama-2, Mistral, Phi-3) from SentencePiece's ``tokenizer.model``, and added
tokens from ``tokenizer_config.json``. Folders saved by Transformers 5 have both in ``tokenizer.json`` only; from
that alone the converter makes files without merge order and added tokens, whose answers are nonsense.
"""

import json
import struct
from pathlib import Path
from typing import Any

from components.runtime.outputs import read_json

_TOKENIZER, _SENTENCEPIECE, _SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_BPE = 2  # a SentencePiece model's type
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of its pieces


def stage(model: Path, folder: Path) -> Path:
    """Make `folder` the model folder `model` again, by links, with all that llama.cpp needs of the tokenizer."""
    folder.mkdir()
    for path in model.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path.absolute())
    if (model / _TOKENIZER).is_file():
        description = read_json(model / _TOKENIZER)
        if description["model"].get("byte_fallback"):
            _write_settings(description, folder / _SETTINGS)
            if not (model / _SENTENCEPIECE).is_file():
                (folder / _SENTENCEPIECE).write_bytes(sentencepiece_model(description))
    return folder


def model_name(address: str, config: dict[str, Any]) -> str:
    """The model's name in the file. It tells llama.cpp that Phi-3's special tokens swallow the space after them."""
    name = Path(address).name
    is_phi = "Phi3ForCausalLM" in config.get("architectures", [])
    return name if not is_phi or "phi-3" in name.lower() else f"phi-3 {name}"


def _write_settings(description: dict[str, Any], path: Path) -> None:
    """Add the added tokens, and whether a space goes before the text, to the tokenizer's settings."""
    settings = read_json(path) if path.exists() else {}
    settings["added_tokens_decoder"] = {str(token["id"]): token for token in description["added_tokens"]}
    scheme = (description.get("pre_tokenizer") or {}).get("prepend_scheme", "always")
    if scheme != "always":
        settings["add_prefix_space"] = False  # "first" is before the very first token only, and there a chat has <s>
    path.unlink(missing_ok=True)  # the link, not what it leads to
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def sentencepiece_model(description: dict[str, Any]) -> bytes:
    """A SentencePiece BPE model from the content of a ``tokenizer.json`` with byte fallback.

    SentencePiece merges the two neighbours whose union has the highest score; a score here is minus the rank of the
    merge. The two agree where every way to split a token is a merge, as in tokenizers that came from SentencePiece.

    Written field by field after sentencepiece_model.proto of https://github.com/google/sentencepiece: its Python module
    needs a newer protobuf than kfp allows.
    """
    vocabulary: dict[str, int] = description["model"]["vocab"]
    special = {token["content"] for token in description["added_tokens"] if token["special"]}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(description["model"]["merges"]):
        ranks.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", ""), rank)

    def kind(token: str) -> int:
        if token == description["model"].get("unk_token"):
            return _UNKNOWN
        if token in special:
            return _CONTROL
        return _BYTE if len(token) == len("<0x00>") and token.startswith("<0x") else _NORMAL

    pieces = [
        _text(1, token.encode()) + _float(2, -ranks.get(token, len(ranks) + number)) + _integer(3, kind(token))
        for token, number in sorted(vocabulary.items(), key=lambda item: item[1])
    ]
    trainer = _integer(3, _BPE) + _integer(4, len(pieces)) + _integer(35, 1)  # the last: bytes for what is unknown
    normalizer = _text(1, b"identity") + _integer(4, 0)  # spaces stay as they are
    return b"".join(_text(1, piece) for piece in pieces) + _text(2, trainer) + _text(3, normalizer)


def _text(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    return bytes(content) + bytes([value])
