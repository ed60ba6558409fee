"""Tiny real models, a real S3 server, and prepared folders that tests share."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported; tests of the Hub set it back

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is: its kernels run on a CPU

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: the workers share the cores

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pipelines.demo.base import _train_tokenizer
from pipelines.demo.generate import CORPUS, ORDERS
from pipelines.s3server import S3Server

_LONGEST = ("tests/faults/test_scripts.py",)  # begun first, so that no worker ends with them alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))


ARCHITECTURES = ("llama", "mistral", "qwen2", "phi3", "granite")
BUCKET = "tune16"

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "phi3": Phi3Config,
    "qwen3": Qwen3Config,
    "granite": partial(
        GraniteConfig,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.05,
        logits_scaling=0.25,  # published ones have 8 and more, against which a tiny random model learns nothing
        tie_word_embeddings=True,
    ),
}
_SPECIAL_TOKENS = {
    "qwen2": ["<|im_start|>", "<|im_end|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "granite": ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
}
_TEMPLATES = {  # of models that bring their own
    "granite": (
        "{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}"
        "<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
    ),
}


_BYTE_LEVEL = {"qwen2", "qwen3"}  # Transformers reads the tokenizers of these as such, whatever their files say


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=1200, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS.read_text().splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return _train_tokenizer(CORPUS.read_text())


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a tiny random model with a tokenizer; the same arguments give the same folder."""
    made: dict[tuple[object, ...], Path] = {}

    def make(kind: str, dtype: torch.dtype = torch.float16, **changes: object) -> Path:
        key = (kind, dtype, tuple(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            tokenizer = _byte_level() if kind in _BYTE_LEVEL else _train_tokenizer(CORPUS.read_text())
            tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL_TOKENS.get(kind, [])})
            tokenizer.chat_template = _TEMPLATES.get(kind)
            torch.manual_seed(7)
            config = _CONFIGS[kind](**{**_SIZES, "vocab_size": len(tokenizer), **changes})
            model = AutoModelForCausalLM.from_config(config).to(dtype)
            model.save_pretrained(folder, max_shard_size="200KB")
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the demo's data set."""
    path = tmp_path_factory.mktemp("orders") / "orders.jsonl"
    path.write_text("".join(ORDERS.read_text().splitlines(keepends=True)[:160]))
    return path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The connection's variables, and an empty bucket."""
    for name, value in s3_server.environment(BUCKET).items():
        monkeypatch.setenv(name, value)
    from components.storage import s3

    client = s3.client()
    if BUCKET not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    for stored in s3.list_objects(BUCKET, ""):
        s3.delete(BUCKET, stored.key)
    return BUCKET
