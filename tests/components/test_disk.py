"""Disk space: the estimate against the sizes of real files, and the refusal to begin what does not fit."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from components.config import QuantizeConfig, Recipe
from components.models.shapes import known_shape
from components.planning.disk import check_space, gguf_bytes, needed
from components.quantize.checkpoint import quantize_checkpoint
from components.runtime.errors import Tune16Error

GB = 1e9


def test_the_estimate_is_what_published_files_of_llama_2_7b_take() -> None:
    """13.5 GB in 16 bits; 4.08 GB in Q4_K_M, 4.78 in Q5_K_M, 7.16 in Q8_0 (TheBloke/Llama-2-7B-Chat-GGUF)."""
    shape = known_shape("NousResearch/Llama-2-7b-chat-hf")
    assert shape
    num_weights = shape.num_linear_weights + shape.num_embedding_weights
    full = gguf_bytes(num_weights, ["F16"])
    assert full == pytest.approx(13.48 * GB, rel=0.01)
    for name, published in {"Q4_K_M": 4.08, "Q5_K_M": 4.78, "Q8_0": 7.16}.items():
        assert gguf_bytes(num_weights, [name]) - full == pytest.approx(published * GB, rel=0.05)
    assert gguf_bytes(num_weights, []) == 0
    steps = needed(shape, Recipe())
    assert steps["train"] == pytest.approx(3.86 * GB, rel=0.03)  # 3.5 GiB in NF4, and the embeddings in 16 bits
    assert steps["merge"] == 2 * full and max(steps, key=lambda name: steps[name]) == "convert"


def test_what_does_not_fit_is_not_begun(make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path / "not" / "there", 1)
    model, usage = make_model("llama"), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(Tune16Error, match=r"^The disk is too small: 0.* MiB are needed, and 0.00 MiB are free"):
        quantize_checkpoint(str(model), tmp_path / "quantized", QuantizeConfig())
    assert not list(tmp_path.glob("*quantized*"))
