"""What the steps merge, convert and evaluate leave, small: enough to publish."""

import json
from pathlib import Path

from components.config import PROMOTED, ConvertConfig, EvaluateConfig, MergeConfig, TrainConfig
from components.runtime.outputs import write_record
from components.storage import s3
from components.storage.files import describe_files

Outputs = tuple[Path, Path, Path]
_SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 9,
}


def write_outputs(folder: Path, num_bytes: int = 25_600, data: str = "d") -> Outputs:
    """The three folders; `num_bytes` is the size of the weights, `data` the name of the data set."""
    merged, gguf, evaluation = (folder / name for name in ("merged", "gguf", "evaluation"))
    for made in (merged / "merged", merged / "adapter", gguf, evaluation):
        made.mkdir(parents=True)
    (merged / "merged" / "model.safetensors").write_bytes((bytes(range(256)) * (num_bytes // 256 + 1))[:num_bytes])
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64, **_SHAPE}
    (merged / "merged" / "config.json").write_text(json.dumps(config))
    (merged / "adapter" / "adapter_model.safetensors").write_bytes(b"adapter")
    (merged / "adapter" / "report.html").write_text("training")
    (evaluation / "report.html").write_text("evaluation")
    (evaluation / "README.md").write_text("card")
    scores = {name: {} for name in ("base", "tuned", "loss_difference")} | {"champion": None}
    (evaluation / "evaluation.json").write_text(json.dumps(scores))
    facts = {
        "model": "m",
        "teacher": "",
        "held_out_sha256": "h",
        "prepare": {"max_tokens": 32},
        "bits": 4,
        "stop_token": "</s>",
    }
    write_record(merged / "adapter", "train", TrainConfig(), data=data, **facts)
    write_record(merged, "merge", MergeConfig(), model="m", files=describe_files(merged / "merged"))
    for name in ("model-Q8_0.gguf", "model-Q4_K_M.gguf", "adapter.gguf", "report.html"):
        (gguf / name).write_bytes(name.encode())
    (gguf / "gguf.json").write_text(json.dumps({"files": {"Q8_0": {"loss": 1.5}}}))
    write_record(gguf, "convert", ConvertConfig(quantizations="Q8_0,Q4_K_M"), model="m")
    write_record(evaluation, "evaluate", EvaluateConfig(), verdict=PROMOTED)
    return merged, gguf, evaluation


def left(bucket: str) -> list[str]:
    """What lies in the bucket, but for leases."""
    return [stored.key for stored in s3.list_objects(bucket, "") if "/lease/" not in stored.key]


def retrain(outputs: tuple[Path, Path, Path], data: str, champion: str) -> None:
    """Make the outputs those of a run on other data that was compared with `champion`."""
    facts = {
        "model": "m",
        "teacher": "",
        "data": data,
        "held_out_sha256": "h",
        "prepare": {"max_tokens": 32},
        "bits": 4,
    }
    write_record(outputs[0] / "adapter", "train", TrainConfig(), **facts)
    scores = {name: {} for name in ("base", "tuned", "loss_difference")} | {"champion": {"version": champion}}
    (outputs[2] / "evaluation.json").write_text(json.dumps(scores))
