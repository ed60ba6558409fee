"""The step train: QLoRA on the quantised base model, by the engine or by TRL, in one loop."""

import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, set_seed

from components.config import QuantizeConfig, TrainConfig
from components.engine.engine import unsupported
from components.models.loading import available_memory, card_facts, choose_dtype, load_base
from components.models.references import parse
from components.models.shapes import read_shape
from components.models.tensors import weight_files
from components.planning.gpus import Gpu, known_gpu
from components.planning.memory import HOST_MEMORY, MemoryPlan, Step
from components.runtime.build import build
from components.runtime.errors import Tune16Error
from components.runtime.outputs import new_folder, read_json, read_record, write_record
from components.runtime.report import significant
from components.runtime.retry import patience
from components.runtime.steps import TERMINATED_EXIT_CODE, deferred_termination, say
from components.storage.files import file_digest
from components.train.checkpoints.record import step_of
from components.train.checkpoints.state import read_split
from components.train.checkpoints.store import Checkpoints, Place
from components.train.distributed import processes
from components.train.distributed.processes import agreed, is_first, least, of_first
from components.train.learner import EngineLearner, Learner
from components.train.loop import Loop
from components.train.progress import ProgressLines
from components.train.report import write_report
from components.train.trackers import Trackers
from components.train.trl import distillation_learner, plain_learner


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a run: the outputs of the steps quantize and prepare, a teacher's weights, and the settings.

    Raises:
        Tune16Error: weights and rows are not of the same model.
    """

    weights: Path
    rows: Path
    config: TrainConfig
    teacher: Path | None = None

    def __post_init__(self) -> None:
        of_data, of_weights = self.prepared["model"], self.quantized["model"]
        if of_data != of_weights:
            raise Tune16Error(
                f"The data was tokenised for {of_data}, but the weights are of {of_weights}. Prepare the data again."
            )

    @cached_property
    def prepared(self) -> dict[str, Any]:
        """The record of the rows."""
        return read_record(self.rows, "prepare")

    @cached_property
    def quantized(self) -> dict[str, Any]:
        """The record of the weights."""
        return read_record(self.weights, "quantize")

    @property
    def max_tokens(self) -> int:
        """Longest row in tokens."""
        return int(self.prepared["config"]["max_tokens"])

    @cached_property
    def teachers_name(self) -> str:
        """The model that is learnt from; empty where there is none."""
        is_there = self.config.teacher and self.teacher and self.teacher.is_dir()
        return str(read_record(self.teacher, "quantize")["model"]) if is_there and self.teacher else ""

    @cached_property
    def dtype(self) -> torch.dtype:
        """Number format of the computation."""
        return choose_dtype(self.config.compute_dtype)

    def facts(self) -> dict[str, Any]:
        """Everything that decides the result: a checkpoint is of no other run than one with the same."""
        settings = self.config.model_dump(exclude={"checkpoint_minutes", "wandb_project"})
        folders = [self.weights, *([self.teacher] if self.teachers_name and self.teacher else [])]
        return {
            "model": self.quantized["model"],
            "teacher": self.teachers_name,
            "weights": [digest for folder in folders for digest in _checked_digests(folder)],
            "data": self.prepared["data"],
            "rows": [file_digest(self.rows / f"{name}.parquet") for name in ("train", "held_out")],
            "settings": settings,
            "number format": str(self.dtype),
            "versions": [build(), *map(version, ("torch", "transformers", "trl", "peft", "bitsandbytes"))],
        }


def _checked_digests(folder: Path) -> list[str]:
    """SHA-256 of each weight file.

    Raises:
        Tune16Error: one is not as the step quantize wrote it.
    """
    written = {file["path"]: file["sha256"] for file in read_record(folder, "quantize")["files"]}
    digests = {file: file_digest(file) for file in weight_files(folder)}
    if damaged := [file for file, digest in digests.items() if written.get(file.name) != digest]:
        raise Tune16Error(
            f"{damaged[0]}: is not the file that the step quantize wrote (its SHA-256 differs). Run it again."
        )
    return list(digests.values())


def train_adapter(inputs: TrainingInputs, output: Path, place: Place) -> dict[str, float]:
    """Train an adapter, from the newest whole checkpoint of this very run if there is one.

    Args:
        inputs: the inputs of the run.
        output: becomes a folder with the adapter in PEFT's format, the tokenizer and ``report.html``.
        place: where checkpoints are kept.

    Returns:
        Rounded metrics: losses, steps, tokens, tokens/s, seconds and peak memory.

    Raises:
        Tune16Error: a setting does not suit the model or the device, or another process works on the same run.
        SystemExit: the process was asked to end; a checkpoint has been kept.
    """
    processes.join()
    checkpoints = Checkpoints(inputs.facts(), place)
    with ExitStack() as stack:
        with _outlasting(inputs.config):
            stack.enter_context(checkpoints.held() if is_first() else nullcontext())
        with new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
            loop = _train(inputs, checkpoints, Path(scratch))
            metrics = _metrics(loop)
            _save(loop.learner.model, inputs, folder)
            write_report(loop.history, metrics, inputs.config, folder)
            write_record(
                folder,
                "train",
                inputs.config,
                model=inputs.quantized["model"],
                teacher=inputs.teachers_name,
                bits=inputs.quantized["config"]["bits"],
                compute_dtype=str(inputs.dtype).removeprefix("torch."),
                data=inputs.prepared["data"],
                held_out_sha256=inputs.prepared["held_out_sha256"],
                prepare=inputs.prepared["config"],
                stop_token=inputs.prepared["stop_token"],
                metrics=metrics,
                losses=_losses(loop.history),
            )
        if is_first():
            checkpoints.finish()
    return metrics


def _train(inputs: TrainingInputs, checkpoints: Checkpoints, scratch: Path) -> Loop:
    """Put the run together and let it train to its last step, or until one of the processes is asked to end."""
    for line in card_facts():
        say("train", line)
    trackers = Trackers(inputs.config, inputs.quantized) if is_first() else None
    is_complete = False
    try:
        with _outlasting(inputs.config):
            newest = newest_of_all(checkpoints, inputs.config.num_nodes > 1)
        learner = make_learner(inputs, scratch, newest)
        log = trackers.log if trackers else lambda entry: None
        loop = Loop(learner, inputs.config, inputs.dtype, checkpoints, log)
        say("train", f"{loop.num_steps:,} steps, {inputs.dtype}")
        with deferred_termination() as termination:
            is_complete = loop.run(newest, termination)
            if not is_complete:
                if is_first():
                    checkpoints.wait()
                agreed(
                    False
                )  # the others stay until the checkpoint is kept: with the first of them gone, all are ended
                raise SystemExit(TERMINATED_EXIT_CODE)
    finally:
        if trackers:
            trackers.end(has_failed=not is_complete)
    return loop


def newest_of_all(checkpoints: Checkpoints, on_several_nodes: bool) -> Path | None:
    """The checkpoint that the first process finds, on every process's disk."""
    newest = checkpoints.newest(in_s3_only=on_several_nodes) if is_first() else None
    step = of_first(step_of(newest) if newest else None)
    return newest if newest or step is None else checkpoints.fetch(step)


def _outlasting(config: TrainConfig) -> AbstractContextManager[None]:
    """Wait for a storage that does not answer where several nodes begin, which wait for each other; not later."""
    return patience() if config.num_nodes > 1 else nullcontext()


def make_learner(inputs: TrainingInputs, scratch: Path, newest: Path | None = None) -> Learner:
    """What computes losses and gradients: the engine where it can take this model, else TRL.

    Args:
        inputs: the inputs of the run.
        scratch: a folder for what TRL writes.
        newest: the checkpoint to continue from: a run keeps the micro-batches it began with.

    Raises:
        Tune16Error: a setting does not suit the model or the device.
    """
    config = inputs.config
    set_seed(config.seed)
    base = load_base(inputs.weights, inputs.dtype)
    has_bfloat16 = int(inputs.dtype == torch.bfloat16)
    if least(has_bfloat16) != has_bfloat16:
        raise Tune16Error("train.compute_dtype: the nodes' GPUs differ, and some lack bfloat16. Set it to float16.")
    lora, tokenizer = (
        _lora(config, base),
        AutoTokenizer.from_pretrained(inputs.rows / "tokenizer", trust_remote_code=False),
    )
    facts = {"dtype": inputs.dtype, "max_tokens": inputs.max_tokens, "scratch": scratch}
    if config.method == "distill":
        return distillation_learner(base, _teacher(inputs), lora, inputs.rows, tokenizer, config, **facts)
    step = _step(inputs)
    reason = unsupported(base, step.shape, inputs.max_tokens) if config.engine == "tune16" else "engine is trl"
    if reason:
        say("train", f"using plain TRL and PEFT: {reason}")
        return plain_learner(base, lora, inputs.rows, tokenizer, config, **facts)
    planned = _plan(step, newest) if torch.cuda.is_available() else None
    return EngineLearner(get_peft_model(base, lora), inputs.rows, step, planned)


def _teacher(inputs: TrainingInputs) -> Any:
    """The teacher's model.

    Raises:
        Tune16Error: its weights are missing.
    """
    if inputs.teacher is None or not inputs.teachers_name:
        raise Tune16Error("train.teacher: its weights are missing. Run the step quantize with this teacher first.")
    say("train", f"learning from {inputs.teachers_name}")
    return load_base(inputs.teacher, inputs.dtype)


def _plan(step: Step, newest: Path | None) -> MemoryPlan:
    """The plan for this GPU, with the micro-batches that the run has begun with, if it has.

    Raises:
        Tune16Error: the rows, or these micro-batches, do not fit.
    """
    available, begun_with = least(available_memory()), read_split(newest) if newest else None
    chosen = step.solve(available)  # which depends on the GPU's speed, so the first process chooses for all
    tokens, num = begun_with or of_first((chosen.micro_batch_tokens, chosen.num_micro_batches))
    planned = step.fullest(tokens, num, available)
    if not planned.fits:
        raise Tune16Error(
            f"train: {'micro-batches' if begun_with else 'rows'} of {planned.micro_batch_tokens:,} tokens need "
            f"{planned.total / 2**30:.1f} GiB of this GPU's {planned.available / 2**30:.1f}, and "
            f"{planned.host / 2**30:.0f} of the {HOST_MEMORY // 2**30} GiB available in the host's memory. "
            + (
                "The run began on a larger GPU: continue there, or remove its checkpoints."
                if begun_with
                else "Lower max_tokens_per_row or lora_rank; see `tune16 plan`."
            )
        )
    for line in (planned if _card() else replace(planned, step_seconds=None)).lines():
        say("train", line)
    return planned


def _step(inputs: TrainingInputs) -> Step:
    """A training step on this quantised model, as the memory plan sees it."""
    content = read_json(inputs.weights / "config.json")
    content.pop("quantization_config", None)
    bits = QuantizeConfig(bits=inputs.quantized["config"]["bits"])
    shape = read_shape(content, str(inputs.weights))
    return Step(shape, bits, inputs.config, inputs.max_tokens, _card() or Gpu.usual(), inputs.dtype.itemsize)


def _card() -> Gpu | None:
    """The process's GPU, if it has one and its speed is known."""
    return known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _lora(config: TrainConfig, base: Any) -> LoraConfig:
    """The adapter's configuration.

    Raises:
        Tune16Error: a target is not a linear layer of this model.
    """
    targets: str | list[str] = config.target_modules
    if targets != "all-linear":
        targets = [name.strip() for name in config.target_modules.split(",")]
        linears = {
            name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)
        }
        unknown = [name for name in targets if name not in linears]
        if unknown:
            raise Tune16Error(
                f"train.target_modules: this model has no linear layer {unknown[0]!r}. It has: all-linear, "
                f"{', '.join(sorted(linears))}."
            )
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rank_stabilized,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )


def _metrics(loop: Loop) -> dict[str, float]:
    """The run in numbers, rounded for people."""
    losses = [entry["loss"] for entry in loop.history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in loop.history if "eval_loss" in entry]
    metrics = {
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "held_out_loss": held_out[-1],
        "steps": loop.step,
        "tokens": loop.tokens,
        "tokens_per_second": loop.tokens / loop.seconds,
        "seconds": loop.seconds,
        "peak_memory_gib": ProgressLines.peak_memory(),
    }
    return {name: significant(value) for name, value in metrics.items()}


def _losses(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """What was logged of the losses, step by step."""
    return [
        {k: entry[k] for k in ("step", "loss", "eval_loss") if k in entry}
        for entry in history
        if "loss" in entry or "eval_loss" in entry
    ]


def _save(model: PeftModel, inputs: TrainingInputs, folder: Path) -> None:
    """Write the adapter as PEFT reads it, naming the base model it belongs to, and the tokenizer."""
    reference = parse(inputs.quantized["model"], "model")
    config = model.peft_config["default"]
    config.base_model_name_or_path = reference.address if reference.scheme == "hf" else str(reference)
    config.revision = reference.pin if reference.scheme == "hf" else None
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set, whose order is another in each process
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the step evaluate writes a full one
    AutoTokenizer.from_pretrained(inputs.rows / "tokenizer", trust_remote_code=False).save_pretrained(folder)
