"""quantize and merge on a model of 1.3 billion random weights and on one twice as deep, beside a copy of the files,
`from_pretrained(load_in_4bit)` and PEFT's `merge_and_unload`, each in a process of its own.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from measure import run, write

from components.models.tensors import TensorWriter, write_index

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS = 2048, 5504, 32000, 16
LAYERS_PER_FILE = 8
RANK = 64

# Each command is its imports and its work on sys.argv: model, target, adapter.
COPY = ("import shutil", "shutil.copytree(sys.argv[1], sys.argv[2])")
QUANTIZE = (
    "from components.config import QuantizeConfig; from components.quantize.checkpoint import quantize_checkpoint",
    "quantize_checkpoint(sys.argv[1], Path(sys.argv[2]), QuantizeConfig())",
)
MERGE = (
    "from components.merge.merger import merge_weights",
    "merge_weights(Path(sys.argv[1]), Path(sys.argv[3]), Path(sys.argv[2]))",
)
LOAD_IN_4BIT = (
    "import bitsandbytes; from transformers import AutoModelForCausalLM, BitsAndBytesConfig",
    """
settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=settings, dtype="auto")
model.save_pretrained(sys.argv[2])
""",
)
MERGE_AND_UNLOAD = (
    "from transformers import AutoModelForCausalLM; from peft import PeftModel",
    """
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(base, sys.argv[3]).merge_and_unload().save_pretrained(sys.argv[2])
""",
)


def write_model(folder: Path, num_layers: int) -> int:
    """A Llama of random float16 weights, several files; returns the number of weights."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "dtype": "float16",
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    files = num_layers // LAYERS_PER_FILE
    file_of_tensor: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        with TensorWriter(folder / name, num_tensors=16 * LAYERS_PER_FILE) as writer:
            if number == 0:
                writer.add("model.embed_tokens.weight", _random(VOCABULARY, HIDDEN))
            for layer in range(number * LAYERS_PER_FILE, (number + 1) * LAYERS_PER_FILE):
                for module, rows, columns in _linears():
                    writer.add(f"model.layers.{layer}.{module}.weight", _random(rows, columns))
                for norm in ("input_layernorm", "post_attention_layernorm"):
                    writer.add(f"model.layers.{layer}.{norm}.weight", torch.ones(HIDDEN, dtype=torch.float16))
            if number == files - 1:
                writer.add("model.norm.weight", torch.ones(HIDDEN, dtype=torch.float16))
                writer.add("lm_head.weight", _random(VOCABULARY, HIDDEN))
        file_of_tensor |= dict.fromkeys(writer.names, name)
    write_index(folder, file_of_tensor)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // 2


def _linears() -> list[tuple[str, int, int]]:
    attention = [(f"self_attn.{name}_proj", HIDDEN, HIDDEN) for name in "qkvo"]
    return [
        *attention,
        ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
        ("mlp.up_proj", INTERMEDIATE, HIDDEN),
        ("mlp.down_proj", HIDDEN, INTERMEDIATE),
    ]


def _random(rows: int, columns: int) -> torch.Tensor:
    return (torch.randn(rows, columns) * 0.02).half()


def write_adapter(folder: Path, num_layers: int) -> None:
    """A rank-64 adapter on all linears."""
    folder.mkdir()
    modules = [module.rpartition(".")[2] for module, _, _ in _linears()]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": modules, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with TensorWriter(folder / "adapter_model.safetensors", num_tensors=14 * num_layers) as writer:
        for layer in range(num_layers):
            for module, rows, columns in _linears():
                name = f"base_model.model.model.layers.{layer}.{module}"
                writer.add(f"{name}.lora_A.weight", torch.randn(RANK, columns) * 0.02)
                writer.add(f"{name}.lora_B.weight", torch.randn(rows, RANK) * 0.02)


def measure(folder: Path, num_layers: int, peers: bool) -> dict[str, object]:
    """All commands once on one model, after one copy that warms the page cache."""
    model, adapter, out = folder / "model", folder / "adapter", folder / "out"
    figures: dict[str, object] = {"weights": write_model(model, num_layers)}
    write_adapter(adapter, num_layers)
    commands = {"warm-up": COPY, "copy": COPY, "quantize": QUANTIZE, "merge": MERGE}
    if peers:
        commands |= {"from_pretrained(load_in_4bit)": LOAD_IN_4BIT, "merge_and_unload": MERGE_AND_UNLOAD}
    for name, (imports, work) in commands.items():
        figures[name] = run(imports, work, model, out, adapter)
        print(f"{num_layers} layers: {name} {figures[name]}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
    shutil.rmtree(model)
    shutil.rmtree(adapter)
    return figures


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        figures = {f"{layers} layers": measure(Path(scratch), layers, peers=layers == 24) for layers in (24, 48)}
    write("stream", figures)
