"""Checkpoints and data of the GPU benchmarks, made on the spot: known shapes with random NF4 weights, random chats."""

import json
import random
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from components.config import PrepareConfig, QuantizeConfig
from components.models.loading import device
from components.models.shapes import ModelShape, known_shape
from components.runtime.outputs import write_record
from components.storage.files import describe_files

SHAPES = {
    "llama2-7b": "NousResearch/Llama-2-7b-chat-hf",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "phi3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
}
_CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Phi3ForCausalLM": transformers.Phi3Config,
}
MAX_TOKENS = 1024


def shape_of(name: str) -> ModelShape:
    """The sizes of a model by the benchmark's name."""
    shape = known_shape(SHAPES[name])
    assert shape is not None
    return shape


def make_model(shape: ModelShape, dtype: torch.dtype, num_layers: int | None = None) -> Any:
    """A model of this shape on the device at hand: linears in NF4, everything else in `dtype`, all random."""
    torch.manual_seed(0)
    config = _CONFIGS[shape.architecture](
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=num_layers or shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        sliding_window=None,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.dtype = dtype
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                setattr(parent, name, _nf4(child, dtype))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device())
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            value = torch.ones if "norm" in name else lambda *size, **options: torch.randn(*size, **options) * 0.02
            value = value(*parameter.shape, dtype=dtype, device=device())
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(value, requires_grad=False))
    model.is_loaded_in_4bit = True
    return model


def _nf4(linear: torch.nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    has_bias = linear.bias is not None
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, has_bias, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = torch.randn(linear.out_features, linear.in_features, dtype=dtype, device=device()) * 0.02
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(
        device()
    )
    layer.weight.quant_state.dtype = dtype
    return layer


def write_checkpoint(name: str, dtype: torch.dtype, folder: Path) -> Path:
    """A folder as the step quantize leaves it, which TRL and Unsloth load too."""
    model = make_model(shape_of(name), dtype)
    folder.mkdir(parents=True)
    tensors = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = model.config.to_dict() | {"architectures": [type(model).__name__]}
    content["quantization_config"] = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    (folder / "config.json").write_text(json.dumps(content, default=str))
    _tokenizer(shape_of(name).vocabulary).save_pretrained(folder)
    write_record(folder, "quantize", QuantizeConfig(), model="/random", files=describe_files(folder))
    return folder


def write_rows(vocabulary: int, folder: Path, num_rows: int = 1200) -> Path:
    """A folder as the step prepare leaves it: rows of chat-like lengths (log-normal, mean about 400, cut at 1,024)."""
    folder.mkdir(parents=True)
    source = random.Random(0)
    for file, count in (("train", num_rows), ("held_out", 8)):
        ids = [[source.randrange(3, vocabulary) for _ in range(draw_length(source))] for _ in range(count)]
        pq.write_table(pa.table({"input_ids": ids, "labels": ids}), folder / f"{file}.parquet")
    _tokenizer(vocabulary).save_pretrained(folder / "tokenizer")
    write_record(
        folder,
        "prepare",
        PrepareConfig(max_tokens=MAX_TOKENS),
        model="/random",
        data="/random",
        held_out_sha256="",
        stop_token="</s>",
    )
    return folder


def draw_length(source: random.Random) -> int:
    """Tokens of a chat."""
    return max(16, min(MAX_TOKENS, round(source.lognormvariate(5.75, 0.75))))


def _tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, vocabulary)}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
