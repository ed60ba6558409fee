"""GGUF files against Transformers: the same tokens, the same logits, and what the step makes of a merged model."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)

from components.config import (
    ConvertConfig,
    MergeConfig,
)
from components.convert.converter import convert_model
from components.merge.merger import merge_adapter
from components.runtime.errors import Tune16Error
from tests.components.conftest import Flow

pytest.importorskip("llama_cpp", reason="llama.cpp is not built here: `make llama`")

from components.convert import llamacpp
from components.convert.converter import read_rows, stage_adapter
from components.convert.tokenizer import model_name, sentencepiece_model, stage
from components.convert.trial import answer_losses, loaded, logits
from components.playground.serve.target import write_inverse
from components.runtime.outputs import write_record
from tests.components.test_train import Made
from tests.components.vocabularies import tokenizer as real_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": None,
}
ROPE3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.05,
    "logits_scaling": 8.0,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], str, dict[str, Any]]] = {
    "llama2": (LlamaConfig, "llama2", {}),
    "llama3": (LlamaConfig, "llama3", {"rope_parameters": ROPE3, "max_position_embeddings": 2048}),
    "mistral": (MistralConfig, "llama2", {"sliding_window": None}),
    "qwen2": (Qwen2Config, "qwen2", {"tie_word_embeddings": True}),
    "phi3": (Phi3Config, "phi3", {"num_key_value_heads": 4, "original_max_position_embeddings": 512}),
    "granite": (GraniteConfig, "llama3", {**GRANITE, "tie_word_embeddings": True}),
}
NASTY = [
    "Hello world",
    "  two spaces before, three   inside and one behind ",
    "\n\n\ttabs\tand\r\nline ends\n \n  \n",
    "🦙 emoji 👩‍👩‍👧‍👦 with joiners 🇳🇴 and ✅",
    "日本語のテキスト、한국어 텍스트 और हिन्दी",
    "العربية עברית ไทย",
    "special tokens inside text: </s> <s> <|im_end|> <|eot_id|> <|end|> [INST] <unk>",
    "<|im_start|>system\nobey<|im_end|>",
    "I'll we've DON'T it's 'quoted' `code` 1234567890 3.14 1,000",
    "x" * 300,
    "\u200b zero width \ufeff and \u00a0 hard space",
    "def f(x):\n    return {'a': [1, 2, 3]}  # комментарий",
    "é è ü ñ composed, e\u0301 decomposed",
    " ",
    "▁ the mark itself ▁▁",
]


@pytest.fixture(scope="module")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A tiny random model with a real vocabulary, and its 16-bit GGUF file."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            config, vocabulary, changes = FAMILIES[family]
            tokenizer = real_tokenizer(vocabulary)
            torch.manual_seed(1)
            size = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
            model = AutoModelForCausalLM.from_config(
                config(**{**SIZES, **size, "eos_token_id": tokenizer.eos_token_id, **changes})
            )
            model.half().save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            tools = llamacpp.converter()
            assert tools
            staged = stage(folder / "model", folder / "staged")
            settings = json.loads((staged / "config.json").read_text())
            llamacpp.convert_weights(tools, staged, folder / "model.gguf", model_name(f"org/{family}", settings))
            made[family] = folder / "model", folder / "model.gguf"
        return made[family]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, make_family: Callable[[str], tuple[Path, Path]]) -> None:
    folder, file = make_family(family)
    tokens = AutoTokenizer.from_pretrained(folder)("An order: two red lamps, 日本語 🦙.")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0].numpy()
    with loaded(file, 128) as gguf:
        got = logits(gguf, tokens)
    assert np.abs(got - wanted).max() <= 1e-2 * np.abs(wanted).max()
    assert (got.argmax(axis=1) == wanted.argmax(axis=1)).mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family: str, make_family: Callable[[str], tuple[Path, Path]]) -> None:
    folder, file = make_family(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with loaded(file, 16) as gguf:
        for text in NASTY:
            if family == "qwen2":  # llama.cpp takes </s> for an end token wherever a vocabulary has such a word
                text = unicodedata.normalize("NFC", text.replace("</s>", ""))  # nor does it compose characters
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert gguf.tokenize(text.encode(), add_bos=False, special=True) == wanted, repr(text)


@pytest.mark.slow
def test_added_tokens_survive_where_only_tokenizer_json_has_them(tmp_path: Path) -> None:
    """Transformers 5 writes no added_tokens_decoder, and llama.cpp's converter looks nowhere else."""
    from pipelines.demo.base import _train_tokenizer

    tokenizer = _train_tokenizer("some words to learn from")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mark|>"]})
    config = LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2})
    AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tools = llamacpp.converter()
    assert tools and not (tmp_path / "model" / "tokenizer.model").exists()
    staged = stage(tmp_path / "model", tmp_path / "staged")
    llamacpp.convert_weights(tools, staged, tmp_path / "model.gguf", "marked")
    text = "words<|mark|>learn <|mark|> some"
    with loaded(tmp_path / "model.gguf", 16) as gguf:
        assert gguf.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"]
    assert "added_tokens_decoder" not in (tmp_path / "model" / "tokenizer_config.json").read_text(), "only the copy"


def test_a_sentencepiece_model_has_the_merge_order_of_the_tokenizer() -> None:
    from sentencepiece import SentencePieceProcessor

    tokenizer = real_tokenizer("llama2")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = SentencePieceProcessor(model_proto=sentencepiece_model(description))
    assert pieces.vocab_size() == len(tokenizer)
    for text in ("Hello world", "unbelievably   spaced", "日本語 🦙"):
        assert pieces.encode(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


class Merged:
    """A tiny model, trained and merged by the real steps."""

    def __init__(self, made: Made, folder: Path) -> None:
        self.made, self.folder = made, folder
        merge_adapter(str(made.base), made.adapter, folder, MergeConfig())


@pytest.fixture(scope="module")
def merged(make_model: Callable[..., Path], orders: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    base = make_model("llama", dtype=torch.float16, hidden_size=256, num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("merged")
    return Merged(Made(base, folder, orders, learning_rate=2e-3), folder / "merged")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_the_step_makes_asks_and_describes_what_was_named(merged: Merged, tmp_path: Path) -> None:
    trials = convert_model(
        merged.folder, merged.made.rows, tmp_path / "out", ConvertConfig(quantizations="q8_0,Q4_K_M")
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "model-Q8_0.gguf", "model-Q4_K_M.gguf", "adapter.gguf", "gguf.json", "report.html", "tune16.json"
    }  # fmt: skip
    full, eight, four = trials
    assert [trial.name for trial in trials] == ["F16", "Q8_0", "Q4_K_M"]
    assert full.size > eight.size > four.size
    assert abs(eight.loss / full.loss - 1) < 0.02
    assert eight.same_answers(full) >= 0.8 and 0 <= four.same_answers(full) <= 1
    rows = read_rows(merged.folder, merged.made.rows, full.size)
    assert full.same_tokens == len(rows) == len(full.answers), "the file's template and tokenizer are the training's"
    figures = json.loads((tmp_path / "out" / "gguf.json").read_text())
    assert set(figures["files"]) == {"F16", "Q8_0", "Q4_K_M"} and figures["settings"]["max_new_tokens"] == 90
    report = (tmp_path / "out" / "report.html").read_text()
    assert "Q4_K_M" in report and "data:image/png" in report and "http" not in report.replace("http-equiv", "")


def test_a_rank_stabilised_adapter_gets_the_alpha_of_plain_lora(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"r": 16, "lora_alpha": 8, "use_rslora": True})
    )
    staged = stage_adapter(tmp_path / "adapter", tmp_path / "staged")
    config = json.loads((staged / "adapter_config.json").read_text())
    assert config == {"r": 16, "lora_alpha": 32.0, "use_rslora": False}, "8 / sqrt(16) = 32 / 16"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_base_and_adapter_files_together_are_the_merged_model(merged: Merged, tmp_path: Path) -> None:
    """And the loss of a file is that of Transformers on the same rows; without its adapter it is the base again."""
    tools = llamacpp.converter()
    assert tools
    convert_model(merged.folder, merged.made.rows, tmp_path / "out", ConvertConfig(quantizations="F16"))
    llamacpp.convert_weights(tools, stage(merged.made.base, tmp_path / "staged"), tmp_path / "base.gguf", "base")
    row = read_rows(merged.folder, merged.made.rows, 1)[0]
    with loaded(tmp_path / "out" / "model-F16.gguf", 128) as model:
        wanted = logits(model, row["input_ids"]).copy()
        losses = answer_losses(model, row["input_ids"], row["labels"])
    with loaded(tmp_path / "base.gguf", 128, adapter=tmp_path / "out" / "adapter.gguf") as model:
        got = logits(model, row["input_ids"])
        assert np.abs(got - wanted).max() <= 1e-2 * np.abs(wanted).max()
    with loaded(tmp_path / "base.gguf", 128) as model:
        base = logits(model, row["input_ids"]).copy()
    write_inverse(tmp_path / "out" / "adapter.gguf", tmp_path / "inverse.gguf")
    with loaded(tmp_path / "out" / "model-F16.gguf", 128, adapter=tmp_path / "inverse.gguf") as model:
        assert np.abs(logits(model, row["input_ids"]) - base).max() <= 1e-2 * np.abs(base).max()
    assert np.abs(base - wanted).max() > 0.1 * np.abs(base).max()
    hub = AutoModelForCausalLM.from_pretrained(merged.folder / "merged", dtype=torch.float32)
    with torch.inference_mode():
        loss = hub(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.item()
    assert abs(losses.mean() - loss) < 1e-2 * loss


def test_no_name_or_no_llama_cpp_makes_no_file_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    merged.mkdir()
    write_record(merged, "merge", MergeConfig(), model="org/model")
    assert convert_model(merged, tmp_path, tmp_path / "none", ConvertConfig(quantizations="")) == []
    assert "gguf_quantizations is empty" in capsys.readouterr().out
    monkeypatch.setattr(llamacpp, "converter", lambda: None)
    assert convert_model(merged, tmp_path, tmp_path / "missing", ConvertConfig()) == []
    assert "`make llama` builds it, with a C++ compiler" in capsys.readouterr().out
    for folder in ("none", "missing"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == {"gguf.json", "report.html", "tune16.json"}


@pytest.mark.slow
def test_an_architecture_that_llama_cpp_does_not_know_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NobodyKnowsForCausalLM"], "model_type": "x"}))
    tools = llamacpp.converter()
    assert tools
    with pytest.raises(Tune16Error, match="NobodyKnowsForCausalLM is not supported") as error:
        llamacpp.convert_weights(tools, tmp_path, tmp_path / "x.gguf", "x")
    assert "Traceback" not in str(error.value) and "gguf_quantizations empty" in str(error.value)


def test_a_quantisation_that_does_not_exist_lists_those_that_do() -> None:
    with pytest.raises(Tune16Error, match="unknown quantisation 'Q4_K_X'; known: F16, Q8_0, .*Q4_K_M"):
        ConvertConfig.load(quantizations="Q8_0,Q4_K_X")


def test_every_quantisation_on_the_list_is_llama_cpps() -> None:
    import llama_cpp

    from components.config import QUANTIZATIONS

    assert all(hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}") for name in QUANTIZATIONS)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_window_that_the_conversion_loses_is_told(
    make_model: Callable[..., Path], orders: Path, tmp_path: Path
) -> None:
    """llama.cpp has no sliding window for Mistral: the file computes something else than the weights."""
    pytest.importorskip("llama_cpp")
    flow = Flow(make_model("mistral", sliding_window=8), orders, tmp_path, epochs=4)
    flow.judge("evaluation")
    merged = flow.merge("merged", "evaluation")
    with pytest.raises(Tune16Error, match="the loss of the 16-bit GGUF file is .* the weights it was made from"):
        convert_model(merged, flow.rows, tmp_path / "gguf", ConvertConfig(quantizations="Q8_0"))
    assert not (tmp_path / "gguf").exists()
