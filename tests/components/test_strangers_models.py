"""Models as people bring them, after public bug reports: right, or refused in one line; never random, never lost."""

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from components.config import PrepareConfig, QuantizeConfig
from components.models.loading import load_model
from components.prepare.checkup import check_data
from components.prepare.dataset import prepare_dataset
from components.prepare.inputs import load_tokenizer
from components.prepare.tokenize.chat import ChatTemplate, NotRenderedError, OwnTemplate, Sample, choose_template
from components.quantize.checkpoint import quantize_checkpoint
from components.runtime.errors import Tune16Error

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI4_MINI = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|User|>", "<|Assistant|>")
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Good bye."},
]


def tokenizer(template: str | None, special: tuple[str, ...] = SPECIAL, **options: Any) -> PreTrainedTokenizerFast:
    inner = Tokenizer(BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(["Hello and good bye."], BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **{"bos_token": "<s>", "eos_token": "</s>", **options})
    made.chat_template = template
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", tokenizer(CHATML))


def write_model(folder: Path, made: PreTrainedTokenizerFast, **changes: Any) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{**sizes, "vocab_size": len(made), "max_position_embeddings": 512, **changes})
    LlamaForCausalLM(config).half().save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def write_rows(path: Path, answer: str = "Good bye.") -> str:
    rows = [{"prompt": f"Hello {number}?", "completion": answer} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# The model's own template.


def learnt(sample: Sample) -> list[str]:
    return [sample.text[start:end] for start, end in sample.spans]


@pytest.mark.parametrize(
    ("template", "stop", "end"),
    [
        (CHATML, "<|im_end|>", "<|im_end|>"),
        (ZEPHYR, "</s>", "</s>"),
        (PHI4_MINI, "<|end|>", "<|end|>"),
        (DEEPSEEK, "<|end|>", "<|end|>"),
    ],
)
def test_rows_are_rendered_as_the_model_will_see_them(template: str, stop: str, end: str) -> None:
    made = tokenizer(template)
    own = choose_template("auto", made, "llama")
    assert isinstance(own, OwnTemplate) and own.stop_token == stop
    (sample,) = own.samples(CHAT)
    assert sample.text == made.apply_chat_template(CHAT, tokenize=False)
    assert learnt(sample) == [f"Hello.{end}", f"Good bye.{end}"]
    (one,) = own.samples([*CHAT[:2], {**CHAT[2], "weight": "0"}, *CHAT[3:]])
    assert one.text == sample.text and learnt(one) == [f"Good bye.{end}"]


MISTRAL_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def test_a_question_that_is_written_otherwise_later_stands_as_it_is_asked() -> None:
    """Mistral-7B-Instruct-v0.3 writes the system message into the question that is last."""
    made = tokenizer(MISTRAL_V3)
    own = choose_template("auto", made, "mistral")
    samples = own.samples(CHAT)
    answers = [message["content"] for message in CHAT if message["role"] == "assistant"]
    assert [learnt(sample) for sample in samples] == [[f" {answer}</s>"] for answer in answers]
    for sample, place in zip(samples, (2, 4), strict=True):
        asked = made.apply_chat_template(CHAT[:place], tokenize=False, add_generation_prompt=True)
        assert CHAT[0]["role"] == "system" and CHAT[0]["content"] in asked
        assert sample.text[: sample.spans[0][0]] == asked


@pytest.mark.parametrize("name", sorted(path.name for path in (files("trl") / "chat_templates").iterdir()))  # type: ignore[attr-defined]
def test_every_template_that_trl_ships_is_rendered_or_refused_in_words(name: str) -> None:
    source = (files("trl") / "chat_templates" / name).read_text()
    if not name.endswith(".jinja"):
        pytest.skip("no template")
    special = tuple(sorted({*SPECIAL, *(token for token in WORDS if token in source)}))
    made = tokenizer(source, special)
    try:
        own = choose_template("auto", made, "llama", "this model")
        samples = own.samples(CHAT[1:])
    except (Tune16Error, NotRenderedError) as error:
        assert str(error)
        return
    if isinstance(own, ChatTemplate):  # of pictures: it shows nothing of a plain text
        assert "leaves the messages out" in own.note
        return
    assert samples[-1].text == made.apply_chat_template(CHAT[1:], tokenize=False)
    assert [text for sample in samples for text in learnt(sample)][-1].endswith(f"Good bye.{own.stop_token}") or (
        own.stop_token in learnt(samples[-1])[-1]
    )
    assert all("Hello?" not in text for sample in samples for text in learnt(sample))


BAR = "\uff5c"  # DeepSeek's bar is a wide one
WORDS = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<start_of_turn>"),
    *("<|return|>", "<|start|>", "<|message|>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<turn|>", "<|turn>"),
    *(f"<{BAR}end\u2581of\u2581sentence{BAR}>", f"<{BAR}Assistant{BAR}>"),
    *("<|end_of_role|>", "<|start_of_role|>", "<|end_of_text|>", "<|observation|>", "[gMASK]", "<sop>"),
)

REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "<think>\n{{ m['content'].split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m['content'] }}"
    "\n</think>\n\n{% endif %}{{ m['content'].split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_where_earlier_turns_are_rewritten_each_answer_is_learnt_in_its_own_context() -> None:
    own = choose_template("auto", tokenizer(REWRITING), "qwen3")
    thinking = [
        {**message, "content": f"<think>\nHm.\n</think>\n\n{message['content']}"} if message["role"] == "assistant"
        else message for message in CHAT
    ]  # fmt: skip
    first, second = own.samples(thinking)
    assert learnt(first) == ["<think>\nHm.\n</think>\n\nHello.<|im_end|>"] and len(first.messages) == 3
    assert learnt(second) == ["<think>\nHm.\n</think>\n\nGood bye.<|im_end|>"]
    assert "assistant\nHello.<|im_end|>" in second.text, "the earlier thought is gone, as at inference"
    assert [sample.text.count("<think>") for sample in own.samples(CHAT)] == [1, 1]


def test_what_the_template_loses_is_told(model: Path, tmp_path: Path) -> None:
    forgetful = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}</s>{% endfor %}"
    own = choose_template("auto", tokenizer(forgetful), "llama")
    with pytest.raises(NotRenderedError, match=r"leaves the message \(system\) out"):
        own.samples(CHAT)
    refusing = "{{ raise_exception('no system, please') if messages[0]['role'] == 'system' else '' }}" + CHATML
    with pytest.raises(NotRenderedError, match="no system, please"):
        choose_template("auto", tokenizer(refusing), "llama").samples(CHAT)
    (model / "chat_template.jinja").write_text(DEEPSEEK)
    data = write_rows(tmp_path / "rows.jsonl", "<think>Hm.</think>Good bye.")
    findings = check_data(data, PrepareConfig(), str(model)).findings
    assert findings.counts["thought-left-out"] == 20 and not findings.rules("error")


def test_only_a_model_without_a_usable_template_gets_one_of_ours_and_that_is_said() -> None:
    given = choose_template("auto", tokenizer(None), "llama")
    assert isinstance(given, ChatTemplate) and given.note == "chatml, the family's, since the model has none of its own"
    empty = choose_template("auto", tokenizer("[INST]"), "mistral")
    assert "leaves the messages out" in empty.note
    with pytest.raises(Tune16Error, match="ends answers without a token, so the tuned model would never stop"):
        choose_template("auto", tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}"), "llama")
    assert choose_template("chatml", tokenizer(ZEPHYR), "llama").note == "chatml, as prepare.template says"


def test_the_report_says_the_template_and_the_tokenizer_names_its_end(model: Path, tmp_path: Path) -> None:
    prepare_dataset(
        write_rows(tmp_path / "rows.jsonl"), str(model), tmp_path / "out", PrepareConfig(held_out_share=0.2)
    )
    assert "chat template: the model's own template" in (tmp_path / "out" / "report.html").read_text().replace(
        "&#x27;", "'"
    )
    made = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert (made.chat_template, made.eos_token, made.pad_token) == (CHATML, "<|im_end|>", "<|im_end|>")
    for row in pq.read_table(tmp_path / "out" / "train.parquet").to_pylist():
        assert row["input_ids"] == made.apply_chat_template(row["messages"], return_dict=True)["input_ids"]


# Tokenizers.


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (("tokenizer_config.json",), "has no tokenizer: tokenizer.json is missing"),
        ((), "has no tokenizer: tokenizer.json is missing"),
        (("tokenizer.model",), "has its tokenizer as tokenizer.model only"),
    ],
)
def test_a_tokenizer_that_is_not_whole_is_refused(
    model: Path, tmp_path: Path, keep: tuple[str, ...], told: str
) -> None:
    (model / "tokenizer.model").write_bytes(b"sentencepiece")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        if name not in keep:
            (model / name).unlink(missing_ok=True)
    with pytest.raises(Tune16Error, match=told):
        load_tokenizer(str(model), "auto", tmp_path / "x")


def test_text_that_the_tokenizer_loses_is_an_error_that_shows_both(model: Path, tmp_path: Path) -> None:
    description = json.loads((model / "tokenizer.json").read_text())
    description["model"]["vocab"].pop("G", None)  # the letter of a public report: a vocabulary with a hole
    description["model"]["merges"] = []
    description["model"]["vocab"] = {
        word: place for word, place in description["model"]["vocab"].items() if len(word) == 1
    }
    (model / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(
        Tune16Error, match=r"does not reproduce the text: '.*Good bye.*' becomes '.*ood bye.*\[lost-by-tokenizer\]"
    ):
        prepare_dataset(write_rows(tmp_path / "rows.jsonl"), str(model), tmp_path / "out", PrepareConfig())


def test_tokens_beyond_the_embedding_and_rows_beyond_the_context(tmp_path: Path) -> None:
    made = tokenizer(CHATML)
    small = write_model(tmp_path / "small", made, vocab_size=made.convert_tokens_to_ids("<|im_end|>"))
    data = write_rows(tmp_path / "rows.jsonl")
    told = rf"the token '<\|im_end\|>' has the id \d+, but the model's embedding has only {len(made) - 4:,} rows"
    with pytest.raises(Tune16Error, match=told):
        prepare_dataset(data, str(small), tmp_path / "out", PrepareConfig())
    short = write_model(tmp_path / "short", made, max_position_embeddings=8)
    findings = check_data(data, PrepareConfig(max_tokens=256), str(short)).findings
    assert findings.counts["beyond-context"] == 20
    assert "the model was made for 8 positions" in str(findings.shown("beyond-context")[0])


def test_a_tokenizer_without_end_and_padding_works(tmp_path: Path) -> None:
    made = tokenizer(CHATML, ("<|im_start|>", "<|im_end|>"), bos_token=None, eos_token=None)
    folder = write_model(tmp_path / "model", made)
    prepare_dataset(write_rows(tmp_path / "rows.jsonl"), str(folder), tmp_path / "out", PrepareConfig())
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").eos_token == "<|im_end|>"


# Weights.


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights = change(weights) or weights
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return edit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return edit


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (edit_weights(lambda w: w.pop("lm_head.weight") is None), "the weight lm_head.weight is missing"),
        (edit_weights(lambda w: w.pop(DOWN) is None), f"the weight {DOWN} is missing"),
        (
            edit_weights(lambda w: {f"language_model.{name}": value for name, value in w.items()}),
            "model.embed_tokens.weight is missing; the files have language_model.model.embed_tokens.weight instead",
        ),
        (
            edit_weights(lambda w: {name.removeprefix("model."): value for name, value in w.items()}),
            "model.embed_tokens.weight is missing; the files have embed_tokens.weight instead",
        ),
        (edit_config(vocab_size=999), "model.embed_tokens.weight is .* x 64, but config.json asks for 999 x 64"),
        (edit_weights(lambda w: w.update({DOWN: w[DOWN][:, :64].clone()})), f"the weight {DOWN} is 64 x 64"),
        (
            edit_weights(lambda w: w.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)})),
            "lora_A.weight, which is not part of the architecture",
        ),
        (edit_weights(lambda w: w["model.norm.weight"].fill_(torch.nan) is None), "model.norm.weight holds NaN"),
        (edit_config(torch_dtype="torch.float16", dtype="torch.float16"), "Write 'float16' there"),
        (edit_config(num_attention_heads=0), "Transformers cannot build a model|division|num_attention_heads"),
    ],
)
def test_weights_that_are_not_what_the_architecture_needs_are_refused_before_any_work(
    model: Path, tmp_path: Path, edit: Callable[[Path], None], told: str
) -> None:
    edit(model)
    with pytest.raises(Tune16Error, match=told):
        quantize_checkpoint(str(model), tmp_path / "out", QuantizeConfig())
    assert not (tmp_path / "out").exists()


def test_buffers_of_older_files_and_a_head_that_is_the_embedding_are_fine(model: Path, tmp_path: Path) -> None:
    edit_weights(lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))(model)
    quantize_checkpoint(str(model), tmp_path / "out", QuantizeConfig())
    tied = write_model(tmp_path / "tied", tokenizer(CHATML), tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    quantize_checkpoint(str(tied), tmp_path / "tied-out", QuantizeConfig())


def test_no_load_gives_a_weight_random_numbers(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "whole")
    load_model(tmp_path / "whole", torch.float32)
    edit_weights(lambda w: w.pop(DOWN) is None)(model)
    with pytest.raises(Tune16Error, match=f"the weight {DOWN} is missing, and would be set randomly"):
        load_model(model, torch.float32)
    edit_config(intermediate_size=96)(tmp_path / "whole")
    with pytest.raises(Tune16Error, match="the model cannot be loaded|is misshapen"):
        load_model(tmp_path / "whole", torch.float32)
