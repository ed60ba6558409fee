"""The step convert: the merged model as GGUF files for llama.cpp, each tested on held-out rows.

llama.cpp writes the 16-bit file and the adapter's, and quantises; every file is then loaded and gets the same held-out
rows and prompts, so that the report shows what each saving costs.
"""

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.config import ConvertConfig
from components.convert import llamacpp
from components.convert.report import write_report
from components.convert.tokenizer import model_name, stage
from components.convert.trial import MAX_NEW_TOKENS, Trial, row_loss, try_file
from components.models.references import parse
from components.models.tensors import num_weights
from components.planning.disk import check_space, gguf_bytes
from components.runtime.errors import Tune16Error
from components.runtime.outputs import PUBLISHED, new_folder, read_json, read_record, write_json, write_record
from components.runtime.report import size
from components.runtime.steps import say

SCORES_FILE = "gguf.json"
FULL = "F16"

# Every generated token reads the whole file from memory, at some 20 GB/s: 8 answers of a 7B with 16 bits take eight
# minutes, and smaller files get more rows.
_READ_BYTES = 100e9
_FEWEST_ROWS, _MOST_ROWS = 8, 200
# Of the mean loss, in nats and as a share: ten times the effect of rounding. Of a single token: an eighth, to which
# bfloat16 rounds logits.
_LARGEST_GAP, _LARGEST_SHARE, _LARGEST_OF_ONE = 0.02, 0.01, 0.125
_LONGEST_ROW = 1024  # tokens; llama-cpp-python keeps the logits of all of them


def convert_model(merged: Path, data: Path, output: Path, config: ConvertConfig) -> list[Trial]:
    """Convert a merged model.

    Args:
        merged: output of the step merge.
        data: output of the step prepare.
        output: becomes a folder with ``model-<quantisation>.gguf``, ``adapter.gguf`` (LoRA, for llama.cpp's server),
            ``gguf.json`` and ``report.html``. Where no quantisation is set, or llama.cpp is not installed, the
            report says so and there is no GGUF file.
        config: the quantisations.

    Returns:
        The results of each file, the 16-bit one first.

    Raises:
        Tune16Error: llama.cpp does not support the model, or the inputs do not belong together.
    """
    tools = llamacpp.converter()
    reason = ""
    if not config.names:
        reason = "gguf_quantizations is empty"
    elif tools is None:
        reason = "llama.cpp is not installed here; `make llama` builds it, with a C++ compiler"
    rows: list[dict[str, Any]] = []
    trials: list[Trial] = []
    with new_folder(output) as folder:
        if tools and not reason:
            check_space(output, gguf_bytes(num_weights(merged / "merged"), config.names))
            with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
                full = _convert(tools, merged, folder, Path(scratch))
                rows = read_rows(merged, data, full.stat().st_size)
                _check_against_weights(full, merged, data)
                trials = [
                    _try(full, FULL, rows),
                    *(_quantize(full, folder, name, rows) for name in config.names if name != FULL),
                ]
                if FULL in config.names:
                    shutil.move(full, folder)
        _write(trials, rows, folder, reason)
        made = config if trials else ConvertConfig(quantizations="")  # else a run with llama.cpp would change nothing
        write_record(folder, "convert", made, model=read_record(merged, "merge")["model"])
    say("convert", f"no GGUF files: {reason}" if reason else f"{len(config.names)} files written and tested")
    return trials


def _convert(tools: Path, merged: Path, folder: Path, scratch: Path) -> Path:
    """Write the adapter into `folder` and the whole model with 16 bits into `scratch`."""
    full = scratch / f"model-{FULL}.gguf"
    base = parse(read_record(merged, "merge")["model"], "model")
    staged = stage(merged / "merged", scratch / "staged")
    name = model_name(base.address, read_json(staged / "config.json"))
    llamacpp.convert_weights(tools, staged, full, name)
    say("convert", f"{FULL}: {size(full.stat().st_size)}")
    adapter = stage_adapter(merged / "adapter", scratch / "adapter")
    llamacpp.convert_adapter(tools, adapter, staged, folder / "adapter.gguf")
    return full


def stage_adapter(adapter: Path, folder: Path) -> Path:
    """The adapter again, by links, with the alpha of plain LoRA: llama.cpp does not scale by alpha / sqrt(rank)."""
    folder.mkdir()
    (folder / "adapter_model.safetensors").symlink_to((adapter / "adapter_model.safetensors").absolute())
    config = read_json(adapter / "adapter_config.json")
    if config.get("use_rslora"):
        config |= {"lora_alpha": config["lora_alpha"] * math.sqrt(config["r"]), "use_rslora": False}
    write_json(folder / "adapter_config.json", config)
    return folder


def read_rows(merged: Path, data: Path, num_bytes: int) -> list[dict[str, Any]]:
    """Held-out rows, as many as a file of `num_bytes` answers in some minutes.

    Raises:
        Tune16Error: the model was trained on other data.
    """
    if read_record(merged / "adapter", "train")["held_out_sha256"] != read_record(data, "prepare")["held_out_sha256"]:
        raise Tune16Error(f"The model in {merged} was trained on another split of the data than the one in {data}.")
    rows: list[dict[str, Any]] = pq.read_table(data / "held_out.parquet").to_pylist()
    short = [row for row in rows if len(row["input_ids"]) <= _LONGEST_ROW]
    count = int(min(max(_READ_BYTES / num_bytes, _FEWEST_ROWS), _MOST_ROWS))
    return short[:count] or [min(rows, key=lambda row: len(row["input_ids"]))]


def _check_against_weights(full: Path, merged: Path, data: Path) -> None:
    """Compare the 16-bit file's loss with that of the weights it was made from, on the rows that the step merge used.

    Raises:
        Tune16Error: they differ by more than rounding: the conversion has lost a part of the model.
    """
    if not (merged / PUBLISHED).is_file():
        say("convert", "the step merge measured no loss of the weights, so the file is not compared with them")
        return
    published = read_json(merged / PUBLISHED)
    rows = pq.read_table(data / "held_out.parquet").take(published["rows"]).to_pylist()
    loss = row_loss(full, rows)
    gap = loss - published["loss"]
    say("convert", f"{FULL}: loss {loss:.4f}, the weights' {published['loss']:.4f} on the same {len(rows)} rows")
    largest = _LARGEST_GAP + _LARGEST_SHARE * published["loss"] + _LARGEST_OF_ONE / math.sqrt(published["tokens"])
    if abs(gap) > largest:
        raise Tune16Error(
            f"convert: the loss of the 16-bit GGUF file is {loss:.3f}, that of the weights it was made from "
            f"{published['loss']:.3f}. llama.cpp does not compute this model as Transformers does (perhaps a sliding "
            "window or a scaling of positions). Leave gguf_quantizations empty to publish the weights alone."
        )


def _quantize(full: Path, folder: Path, name: str, rows: list[dict[str, Any]]) -> Trial:
    file = folder / f"model-{name}.gguf"
    llamacpp.quantize(full, file, name)
    return _try(file, name, rows)


def _try(file: Path, name: str, rows: list[dict[str, Any]]) -> Trial:
    def advance(number: int) -> None:
        if number % max(1, len(rows) // 4) == 0:
            say("convert", f"{name}: {number} of {len(rows)} prompts answered")

    trial = try_file(file, name, rows, advance)
    say("convert", f"{name}: {size(trial.size)}, loss {trial.loss:.4f}, {trial.speed:.1f} tokens/s")
    return trial


def _write(trials: list[Trial], rows: list[dict[str, Any]], folder: Path, reason: str) -> None:
    """Write every file's results, as JSON and as a page."""
    settings = {"rows": len(rows), "max_new_tokens": MAX_NEW_TOKENS, "sampling": "greedy"}
    files = {trial.name: trial.as_dict(trials[0]) for trial in trials}
    write_json(folder / SCORES_FILE, {"files": files, "settings": settings})
    write_report(trials, rows, settings, folder, reason)
