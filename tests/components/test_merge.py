"""The step merge: every weight is rounded once, and the result does as it was evaluated."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from components.config import EvaluateConfig, MergeConfig
from components.merge.merger import merge_adapter, merge_weights, read_deltas
from components.runtime.errors import Tune16Error
from tests.components.conftest import Flow, Made
from tests.conftest import ARCHITECTURES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # PEFT looks on the Hub for a local base
]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in ARCHITECTURES),
        ("llama", {"target_modules": "q_proj,v_proj"}),
        ("llama", {"rank_stabilized": True}),
    ],
)
def test_merged_logits_are_the_adapters_logits(
    made: Callable[..., Made], tmp_path: Path, kind: str, settings: dict[str, Any]
) -> None:
    from peft import PeftModel

    run = made(kind, **settings)
    numbers = merge_adapter(str(run.base), run.adapter, tmp_path / "out", MergeConfig(dtype="float32"))
    assert numbers["num_merged"] == len(read_deltas(run.adapter)) > 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, run.adapter)
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-3, atol=1e-4)
        assert (adapted(ids).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["q_proj"]])
def test_heads_and_embeddings_merge_tied_or_not(
    make_model: Callable[..., Path], tmp_path: Path, tied: bool, targets: list[str]
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    source = make_model("llama", dtype=torch.float32, tie_word_embeddings=tied)
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied layers, which is the point here
        adapted: PeftModel = get_peft_model(AutoModelForCausalLM.from_pretrained(source), config)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_weights(source, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_merge_rounds_each_weight_once(made: Callable[..., Made], tmp_path: Path) -> None:
    run = made("llama")
    merge_adapter(str(run.base), run.adapter, tmp_path / "out", MergeConfig())
    deltas = read_deltas(run.adapter)
    after = {k: v for f in (tmp_path / "out" / "merged").glob("*.safetensors") for k, v in load_file(f).items()}
    before = {k: v for f in run.base.glob("*.safetensors") for k, v in load_file(f).items()}
    assert after.keys() == before.keys()
    for name, weight in before.items():
        wanted = weight
        if name in deltas:
            wanted = (weight.double() + deltas[name].scale * (deltas[name].b.double() @ deltas[name].a.double())).half()
        assert after[name].dtype == weight.dtype
        torch.testing.assert_close(after[name], wanted, rtol=1e-3, atol=6e-8)  # the last bit of float16


def test_a_merged_model_that_does_not_do_as_it_was_judged_is_refused(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.merge import merger

    flow.judge("judged", EvaluateConfig(num_prompts=10, max_new_tokens=40))
    written = merger.generation_settings
    monkeypatch.setattr(merger, "generation_settings", lambda *inputs: {**written(*inputs), "eos_token_id": [3]})
    with pytest.raises(Tune16Error, match="would not end its answers: its generation_config.json does not name"):
        flow.merge("endless", "judged")
    monkeypatch.undo()
    adapter = tmp_path / "adapter"
    shutil.copytree(flow.adapter, adapter)
    (adapter / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}")
    with pytest.raises(Tune16Error, match="Its files were changed after training"):
        merge_adapter(str(flow.base), adapter, tmp_path / "out", MergeConfig(), flow.rows, flow.folder / "judged")
    assert not (flow.folder / "endless").exists() and not (tmp_path / "out").exists()


def test_the_rows_asked_are_the_longest_that_fit() -> None:
    from components.merge.published import _choose

    assert _choose([10, 2000, 30, 20], 55) == [2, 3]
    assert _choose([10, 2000, 30, 20], 1) == [2, 3]
    assert _choose([2000, 1500], 1) == [1]
    assert len(_choose(list(np.arange(1, 100)), 10**9)) == 32
