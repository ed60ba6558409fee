"""How much GPU memory a fine-tune needs, from the model's configuration alone.

The plan adds up what one training step holds at its peak: frozen weights, the adapter with its gradients and optimiser
state, activations, logits, and the workspace of a dequantised layer.
"""

from dataclasses import dataclass
from typing import Any

from components.config import PrepareConfig, QuantizeConfig, TrainConfig
from components.errors import Tune16Error

GIBIBYTE = 2**30

_LINEARS_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LINEARS_FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_LINEARS_OF_ARCHITECTURE = {
    "LlamaForCausalLM": _LINEARS_SPLIT,
    "MistralForCausalLM": _LINEARS_SPLIT,
    "Qwen2ForCausalLM": _LINEARS_SPLIT,
    "Qwen3ForCausalLM": _LINEARS_SPLIT,
    "Phi3ForCausalLM": _LINEARS_FUSED,
}

# Shapes of well-known models, so that their recipes can be planned without network:
# hidden, layers, heads, key/value heads, intermediate, vocabulary (from their config.json).
_LLAMA2_7B = ("LlamaForCausalLM", 4096, 32, 32, 32, 11008, 32000)
_KNOWN_SHAPES = {
    "NousResearch/Llama-2-7b-chat-hf": _LLAMA2_7B,
    "meta-llama/Llama-2-7b-chat-hf": _LLAMA2_7B,
    "meta-llama/Llama-3.1-8B-Instruct": ("LlamaForCausalLM", 4096, 32, 32, 8, 14336, 128256),
    "mistralai/Mistral-7B-Instruct-v0.3": ("MistralForCausalLM", 4096, 32, 32, 8, 14336, 32768),
    "Qwen/Qwen2.5-7B-Instruct": ("Qwen2ForCausalLM", 3584, 28, 28, 4, 18944, 152064),
    "microsoft/Phi-3.5-mini-instruct": ("Phi3ForCausalLM", 3072, 32, 32, 32, 8192, 32064),
}

# Bytes a weight takes: NF4 has half a byte, an 8-bit scale per 64 weights and a 32-bit one per 256 of those; LLM.int8
# has one byte and a 32-bit scale per row, which does not count.
_BYTES_PER_WEIGHT = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0, 16: 2.0}
_LOSS_CHUNK_TOKENS = 256


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer that decide its memory."""

    architecture: str
    hidden: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate: int
    vocabulary: int
    head_dim: int
    tied_embeddings: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each linear layer of one decoder layer."""
        query = self.num_heads * self.head_dim
        key = self.num_key_value_heads * self.head_dim
        shapes = {
            "q_proj": (query, self.hidden),
            "k_proj": (key, self.hidden),
            "v_proj": (key, self.hidden),
            "qkv_proj": (query + 2 * key, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "gate_up_proj": (2 * self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return {name: shapes[name] for name in _LINEARS_OF_ARCHITECTURE[self.architecture]}

    @property
    def num_linear_weights(self) -> int:
        """Weights in the linear layers of all decoder layers."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def num_embedding_weights(self) -> int:
        """Weights of the embedding and the head."""
        return self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)


def known_shape(model: str) -> ModelShape | None:
    """The shape of a well-known model by its Hugging Face id, or None."""
    entry = _KNOWN_SHAPES.get(model.partition("@")[0])
    return None if entry is None else ModelShape(*entry, head_dim=entry[1] // entry[3])


def read_shape(config: dict[str, Any], where: str) -> ModelShape:
    """Read the shape from the content of a config.json; `where` names the model in messages.

    Raises:
        Tune16Error: the architecture is not supported, or a size is missing.
    """
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in _LINEARS_OF_ARCHITECTURE:
        known = ", ".join(_LINEARS_OF_ARCHITECTURE)
        raise Tune16Error(f"{where}: the architecture {architecture} is not supported. Supported: {known}.")
    if "quantization_config" in config:
        raise Tune16Error(f"{where}: is quantised already. Name the full-precision model; Tune16 quantises it itself.")
    try:
        heads = config["num_attention_heads"]
        return ModelShape(
            architecture,
            hidden=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise Tune16Error(f"{where}: its config.json has no {error}.") from None


def adapted_linears(shape: ModelShape, target_modules: str) -> dict[str, tuple[int, int]]:
    """The linear layers of a decoder layer that get an adapter.

    Raises:
        Tune16Error: a name in `target_modules` is none of the model's linear layers.
    """
    if target_modules == "all-linear":
        return shape.linears
    names = [name.strip() for name in target_modules.split(",")]
    for name in names:
        if name not in shape.linears:
            raise Tune16Error(
                f"train.target_modules: {shape.architecture} has no linear layer {name!r}. It has: all-linear, "
                f"{', '.join(shape.linears)}."
            )
    return {name: shape.linears[name] for name in names}


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step holds at its peak, in bytes per part, against the GPU's bytes."""

    parts: dict[str, int]
    available: int

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within what is available."""
        return self.total <= self.available

    def lines(self) -> list[str]:
        """The plan for people: one line per part, then the sum."""
        parts = [f"{name:<20} {size / GIBIBYTE:6.2f} GiB" for name, size in self.parts.items()]
        word = "fits" if self.fits else "does not fit"
        total = f"{'together':<20} {self.total / GIBIBYTE:6.2f} GiB: {word} {self.available / GIBIBYTE:.2f} GiB"
        return [*parts, total]


def plan(
    shape: ModelShape, quantize: QuantizeConfig, prepare: PrepareConfig, train: TrainConfig, gpu_memory: float
) -> MemoryPlan:
    """Plan the peak memory of one training step in `gpu_memory` GiB.

    Source of the activation figures: measurements of TRL with PEFT on Llama-2-7b, of which a layer boundary costs
    2 bytes x hidden per token and the one layer that is recomputed about four times its activations.
    """
    linears = adapted_linears(shape, train.target_modules)
    num_adapter = shape.num_layers * train.rank * sum(rows + columns for rows, columns in linears.values())
    num_tokens = train.micro_batch * prepare.max_tokens
    layer_activations = 2 * num_tokens * (6 * shape.hidden + 2 * shape.intermediate)
    kept_layers = 0 if train.activation_checkpointing else shape.num_layers
    largest_linear = max(rows * columns for rows, columns in shape.linears.values())
    bytes_of_optimizer = 8 if train.optimizer == "adamw" else 2
    parts = {
        "frozen linears": shape.num_linear_weights * _BYTES_PER_WEIGHT[quantize.bits],
        "embedding and head": 2 * shape.num_embedding_weights,
        "adapter": 4 * num_adapter,
        "adapter gradients": 4 * num_adapter * (2 if train.num_gpus * train.num_nodes > 1 else 1),  # DDP keeps a copy
        "optimiser state": bytes_of_optimizer * num_adapter,
        "layer boundaries": 2 * num_tokens * shape.hidden * shape.num_layers,
        "activations": layer_activations * (kept_layers + 2),
        "attention mask": 2 * num_tokens**2 if train.packing else 0,
        "logits": 3 * 4 * min(num_tokens, _LOSS_CHUNK_TOKENS) * shape.vocabulary,
        "dequantised layer": 2 * 2 * largest_linear if quantize.bits < 16 else 0,
    }
    return MemoryPlan({name: round(size) for name, size in parts.items()}, round(gpu_memory * GIBIBYTE))
