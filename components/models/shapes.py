"""The sizes of a model, from its configuration alone."""

from dataclasses import dataclass
from typing import Any

from components.runtime.errors import Tune16Error

_LINEARS_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LINEARS_FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_LINEARS_OF_ARCHITECTURE = {
    "LlamaForCausalLM": _LINEARS_SPLIT,
    "MistralForCausalLM": _LINEARS_SPLIT,
    "Qwen2ForCausalLM": _LINEARS_SPLIT,
    "Qwen3ForCausalLM": _LINEARS_SPLIT,
    "Phi3ForCausalLM": _LINEARS_FUSED,
    "GraniteForCausalLM": _LINEARS_SPLIT,  # with factors of embedding, residuals, attention and logits
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
    "Qwen/Qwen2.5-1.5B-Instruct": ("Qwen2ForCausalLM", 1536, 28, 12, 2, 8960, 151936),
    "microsoft/Phi-3.5-mini-instruct": ("Phi3ForCausalLM", 3072, 32, 32, 32, 8192, 32064),
    "ibm-granite/granite-3.3-2b-instruct": ("GraniteForCausalLM", 2048, 40, 32, 8, 8192, 49159),
    "ibm-granite/granite-3.3-8b-instruct": ("GraniteForCausalLM", 4096, 40, 32, 8, 12800, 49159),
}
_TIED = {  # whose head is the embedding
    "Qwen/Qwen2.5-1.5B-Instruct",
    "ibm-granite/granite-3.3-2b-instruct",
    "ibm-granite/granite-3.3-8b-instruct",
}


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
    window: int | None = None  # tokens of a sliding attention window; None: full attention
    unsupported_feature: str = ""  # what the engine does not compute

    def why_plain(self, max_tokens: int) -> str:
        """Why the engine cannot train it on rows of so many tokens; empty if it can."""
        if self.window and self.window < max_tokens:
            return f"the model's attention window is {self.window:,} tokens, and rows have up to {max_tokens:,}"
        return self.unsupported_feature

    @property
    def query(self) -> int:
        """Columns of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key(self) -> int:
        """Columns of all key heads, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each linear layer of one decoder layer."""
        query, key = self.query, self.key
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
    name = model.partition("@")[0]
    entry = _KNOWN_SHAPES.get(name)
    if entry is None:
        return None
    return ModelShape(*entry, head_dim=entry[1] // entry[3], tied_embeddings=name in _TIED)


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
        raise Tune16Error(f"{where}: is already quantised. Name the full-precision model; Tune16 quantises it itself.")
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
            window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
            unsupported_feature=_unsupported_feature(config),
        )
    except KeyError as error:
        raise Tune16Error(f"{where}: its config.json has no {error}.") from None


def _unsupported_feature(config: dict[str, Any]) -> str:
    rotary = config.get("rope_parameters") or {}
    if rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        return "the model rotates only a part of each head"
    if config.get("hidden_act", "silu") != "silu" or config.get("attention_dropout") or config.get("resid_pdrop"):
        return "the model's activation is not SiLU, or it has dropout of its own"
    return ""


def adapted_linears(shape: ModelShape, target_modules: str) -> dict[str, tuple[int, int]]:
    """The linear layers of a decoder layer that get an adapter.

    Raises:
        Tune16Error: a name in `target_modules` is not one of the model's linear layers.
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
