"""The commands as people call them, each in a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.convert.converter import read_rows
from components.convert.llamacpp import converter
from components.convert.trial import MAX_NEW_TOKENS, try_file
from pipelines.demo.generate import CORPUS, ORDERS, make_corpus, make_orders

BIN = Path(sys.executable).parent


def call(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        check=False,
    )


def test_plan_prints_a_table_or_json() -> None:
    table = call(BIN / "tune16", "plan", "llama2-7b-16gb")
    assert table.returncode == 0 and "frozen linears" in table.stdout and "total, of 14.20" in table.stdout
    plan = json.loads(call(BIN / "tune16", "plan", "mistral-7b-16gb", "--json").stdout)
    assert plan["fits"] and plan["total"] == sum(plan["parts"].values()) and plan["hours"] is None


def test_plan_for_another_model_and_gpu_with_time_and_cost() -> None:
    options = ("--model", "Qwen/Qwen2.5-7B-Instruct", "--gpu", "l4", "--price", "0.8", "--tokens", "20")
    table = call(BIN / "tune16", "plan", *options)
    assert "of 21.80" in table.stdout and "█" in table.stdout and "tokens/s on each GPU, estimated" in table.stdout
    assert re.search(r"20 million tokens take about [\d,]+ minutes, \d+\.\d\d at that price", table.stdout)
    plan = json.loads(call(BIN / "tune16", "plan", *options, "--json").stdout)
    assert plan["cost"] == pytest.approx(0.8 * plan["hours"])


def test_plan_needs_nothing_but_a_config(tmp_path: Path) -> None:
    """Granite-3.3-2B's own, alone in a folder or by its path: the plan is known before the model is fetched."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = {"architectures": ["GraniteForCausalLM"], "intermediate_size": 8192, "vocab_size": 49159, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    named = json.loads(call(BIN / "tune16", "plan", "--model", "ibm-granite/granite-3.3-2b-instruct", "--json").stdout)
    for place in (tmp_path, tmp_path / "config.json"):
        assert json.loads(call(BIN / "tune16", "plan", "--model", place, "--json").stdout) == named


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nothing"], "There is no recipe 'nothing'"),
        (["plan", "--set", "train.rnk=3"], "unknown key 'train.rnk'. Did you mean 'rank'?"),
        (["plan", "--set", "prepare.max_tokens=131072"], "Any one of these fits: max_tokens_per_row "),
        (["plan", "--gpu", "gtx"], "Unknown GPU 'gtx'. Known: t4, v100-16"),
        (["run", "demo", "--set", "train.epochs=-1"], "'train.epochs' is -1"),
    ],
)
def test_mistakes_end_with_one_message_and_code_two(arguments: list[str], message: str) -> None:
    done = call(BIN / "tune16", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_steps_on_local_folders(orders: Path, tmp_path: Path) -> None:
    done = call(
        sys.executable, "-m", "components", "prepare",
        "--model", "nowhere/at-all", "--data", orders, "--output", tmp_path / "rows",
    )  # fmt: skip
    assert done.returncode == 2 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "--rows" in call(sys.executable, "-m", "components", "train", "--help").stdout


def test_the_demos_files_are_what_the_generator_makes() -> None:
    corpus = make_corpus()
    assert CORPUS.read_text() == corpus
    assert ORDERS.read_text() == make_orders()
    rows = [json.loads(line) for line in ORDERS.read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) >= 1000
    assert not any(row["prompt"] in corpus for row in rows)


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    """The main job: the real pipeline through kfp.local with a real S3 server, and the tuned model clearly better."""
    environment = {name: "" for name in os.environ if name.startswith("AWS_S3")}
    done = call(BIN / "tune16", "run", "demo", "--folder", tmp_path, "--json", **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    # prepare and quantize need only preflight: kfp starts them in either order.
    order = [*result["steps"]]
    assert order[0] == "preflight" and {*order[1:3]} == {"prepare", "quantize"}
    assert order[3:] == ["train", "evaluate", "merge", "convert", "upload", "register", "deploy"]
    assert all(step["seconds"] is not None for step in result["steps"].values())
    assert re.fullmatch(r"step 148/148  held-out loss [\d.]+", result["steps"]["train"]["said"])
    base, tuned = result["evaluation"]["base"], result["evaluation"]["tuned"]
    assert tuned["loss"]["value"] <= 0.7 * base["loss"]["value"]
    assert tuned["exact_match"]["value"] >= base["exact_match"]["value"] + 0.5
    assert result["evaluation"]["verdict"] == "promoted"
    assert re.fullmatch(r"s3://tune16/tune16/demo/\d{8}T\d{6}Z-[0-9a-f]{8}", result["address"])
    assert "Promoted" in Path(result["report"]).read_text()
    log = (Path(result["folder"]) / "pipeline.log").read_text()
    assert "SUCCESS" in log
    check_gguf(Path(result["folder"]))


def check_gguf(run: Path) -> None:
    """The Q8_0 file answers as the merged model does with Transformers, and the others' scores are in the report."""
    if not converter():
        return
    (merged,), (gguf,), (rows,) = (
        run.glob(f"steps/*/{place}") for place in ("merge/merged", "convert/gguf", "prepare/rows")
    )
    figures = json.loads((gguf / "gguf.json").read_text())["files"]
    assert set(figures) == {"F16", "Q4_K_M", "Q5_K_M", "Q8_0"}
    assert all(name in (gguf / "report.html").read_text() for name in figures)
    asked = read_rows(merged, rows, 1)[:100]
    tokenizer = AutoTokenizer.from_pretrained(merged / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged / "merged", dtype=torch.float32)
    wanted = []
    for row in asked:
        inputs = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, pad_token_id=0)
        wanted.append(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    trial = try_file(gguf / "model-Q8_0.gguf", "Q8_0", asked, lambda number: None)
    assert trial.same_tokens == len(asked)
    assert sum(ours == theirs for ours, theirs in zip(trial.answers, wanted, strict=True)) >= 0.95 * len(asked)


@pytest.mark.slow
def test_a_users_mistake_inside_a_step_is_told_plainly(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{broken\n')
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"preflight: {{model: {tmp_path / 'none'}, data: {rows}}}\n")
    done = call(BIN / "tune16", "run", recipe, "--folder", tmp_path / "runs")
    assert done.returncode == 2
    assert "there is no such file or folder" in done.stderr and "Traceback" not in done.stderr
