"""Real tokenizers without network: Hugging Face's own form of the vocabularies that come with llama.cpp's source."""

import struct
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from components.convert.llamacpp import converter

# What stands in the models' own tokenizer.json.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_STRING, _ARRAY = 8, 9  # types of values


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of ``llama2``, ``phi3``, ``llama3`` or ``qwen2``."""
    files = {"llama2": "llama-spm", "phi3": "phi-3", "llama3": "llama-bpe", "qwen2": "qwen2"}
    fields = _read(files[name])
    build = _sentencepiece if name in ("llama2", "phi3") else _byte_level
    return build(name, fields)


def _read(name: str) -> dict[str, Any]:
    """The metadata of a GGUF file; gguf's own reader takes a minute for that of Llama-3."""
    folder = converter()
    assert folder
    content = (folder / "models" / f"ggml-vocab-{name}.gguf").read_bytes()
    place = 16  # behind magic, version and number of tensors

    def number(form: str) -> Any:
        nonlocal place
        found = struct.unpack_from(f"<{form}", content, place)[0]
        place += struct.calcsize(form)
        return found

    def text() -> str:
        nonlocal place
        length = number("Q")
        place += length
        return content[place - length : place].decode()

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return number("BbHhIif?"[kind] if kind < _STRING else "Qqd"[kind - 10])

    return {text(): value(number("I")) for _ in range(number("Q"))}


def _sentencepiece(name: str, fields: Any) -> PreTrainedTokenizerFast:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    base = tokens[:32000]
    known = set(base)
    merges = [
        (token[:place], token[place:])
        for token in base[259:]
        for place in range(1, len(token))
        if token[:place] in known and token[place:] in known
    ]
    built = Tokenizer(
        BPE(
            vocab={token: number for number, token in enumerate(base)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", "<s>"])
    if name == "phi3":
        built.add_tokens([AddedToken("</s>", rstrip=True, normalized=False)])
        kinds = [AddedToken(token, rstrip=token != "<|endoftext|>", special=True) for token in tokens[32000:32011]]
        built.add_special_tokens(kinds)
    else:
        built.add_special_tokens(["</s>"])
    end = "<|endoftext|>" if name == "phi3" else "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token="<s>", eos_token=end, unk_token="<unk>")


def _byte_level(name: str, fields: Any) -> PreTrainedTokenizerFast:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    added = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    first = tokens.index(added[0])
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens[:first])}
    built = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=name == "llama3"))
    split = _LLAMA3_SPLIT if name == "llama3" else _QWEN2_SPLIT
    if name == "qwen2":
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(added)
    if name == "qwen2":
        return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    begin = "<|begin_of_text|>"
    built.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, built.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=built, bos_token=begin, eos_token="<|eot_id|>")
