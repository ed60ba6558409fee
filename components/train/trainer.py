"""The step train: QLoRA on the quantised base model with TRL, PEFT and bitsandbytes."""

import math
import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments
from trl import DistillationConfig, SFTConfig, SFTTrainer

from components.config import QuantizeConfig, TrainConfig
from components.engine.engine import unsupported
from components.engine.packing import packed_dataset
from components.models.loading import available_memory, bound_float16, card_facts, choose_dtype, load_base
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
from components.train.arguments import sequences_per_step, training_arguments
from components.train.checkpoints import Checkpoints, Place
from components.train.engine_trainer import EngineTrainer, least_over_processes
from components.train.progress import ProgressLines
from components.train.report import write_report
from components.train.state import Resumable, agree_on_newest, agreed, is_first, read_passes

_MAX_EVALUATED_ROWS = 200


@dataclass(frozen=True)
class TrainingInputs:
    """What a run is made of: the outputs of the steps quantize and prepare, a teacher's weights, and the settings.

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
            "weights": [file_digest(file) for folder in folders for file in weight_files(folder)],
            "data": self.prepared["data"],
            "rows": [file_digest(self.rows / f"{name}.parquet") for name in ("train", "held_out")],
            "settings": settings,
            "number format": str(self.dtype),
            "versions": [build(), *map(version, ("torch", "transformers", "trl", "peft", "bitsandbytes"))],
        }


def train_adapter(lesson: TrainingInputs, output: Path, place: Place) -> dict[str, float]:
    """Train an adapter, from the newest whole checkpoint of this very run if there is one.

    Args:
        lesson: what the run is made of.
        output: becomes a folder with the adapter in PEFT's format, the tokenizer and ``report.html``.
        place: where checkpoints are kept.

    Returns:
        Rounded metrics: losses, steps, tokens, tokens/s, seconds and peak memory.

    Raises:
        Tune16Error: a setting does not suit the model or the device, or another process works on the same run.
        SystemExit: the process was asked to end; a checkpoint has been kept.
    """
    checkpoints = Checkpoints(lesson.facts(), place)
    with ExitStack() as stack:
        with _outlasting(lesson.config):
            stack.enter_context(checkpoints.held() if is_first() else nullcontext())
        with new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
            trainer = _train(lesson, checkpoints, Path(scratch))
            metrics = _metrics(trainer)
            _save(trainer, folder, lesson.quantized["model"])
            write_report(trainer.state.log_history, metrics, lesson.config, folder)
            write_record(
                folder,
                "train",
                lesson.config,
                model=lesson.quantized["model"],
                teacher=lesson.teachers_name,
                bits=lesson.quantized["config"]["bits"],
                compute_dtype=str(lesson.dtype).removeprefix("torch."),
                data=lesson.prepared["data"],
                held_out_sha256=lesson.prepared["held_out_sha256"],
                prepare=lesson.prepared["config"],
                stop_token=lesson.prepared["stop_token"],
                metrics=metrics,
                losses=_losses(trainer.state.log_history),
            )
        if is_first():
            checkpoints.finish()
    return metrics


def _train(lesson: TrainingInputs, checkpoints: Checkpoints, scratch: Path) -> Resumable:
    """Put the trainer together and let it train to its last step, or until one of the processes is asked to end."""
    for line in card_facts():
        say("train", line)
    arguments = training_arguments(lesson.config, lesson.dtype, lesson.max_tokens, scratch)
    with _outlasting(lesson.config):
        newest = agree_on_newest(checkpoints, lesson.config.num_nodes > 1)
    build = _distillation_trainer if lesson.config.method == "distill" else _sft_trainer
    trainer = build(lesson, arguments, newest)
    _schedule(trainer, lesson)
    with deferred_termination() as termination:
        trainer.protect(checkpoints, lesson.config.checkpoint_minutes * 60, termination)
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        (is_asked,) = agreed(termination.is_asked)  # of all processes: none publishes what another calls unfinished
        if is_asked or trainer.state.global_step < trainer.state.max_steps:
            if is_first():
                checkpoints.wait()
            agreed(False)  # the others stay until the checkpoint is kept: with the first of them gone, all are ended
            raise SystemExit(TERMINATED_EXIT_CODE)
    return trainer


def _outlasting(config: TrainConfig) -> AbstractContextManager[None]:
    """Wait for a storage that is away where several nodes begin, which wait for each other; not while they train."""
    return patience() if config.num_nodes > 1 else nullcontext()


def _sft_trainer(lesson: TrainingInputs, arguments: SFTConfig, newest: Path | None) -> Resumable:
    """The trainer on the answers of the data, with the engine where it can take this model."""
    base = load_base(lesson.weights, lesson.dtype)
    has_bfloat16 = int(lesson.dtype == torch.bfloat16)
    if least_over_processes(has_bfloat16) != has_bfloat16:
        raise Tune16Error("train.compute_dtype: the nodes' cards differ, and some have no bfloat16. Set it to float16.")
    shared: dict[str, Any] = {
        "processing_class": AutoTokenizer.from_pretrained(lesson.rows / "tokenizer", trust_remote_code=False),
        "peft_config": _lora(lesson.config, base),
        "callbacks": [ProgressLines()],
    }
    step = _step(lesson)
    reason = unsupported(base, step.shape, lesson.max_tokens) if lesson.config.engine == "tune16" else "engine is trl"
    if not reason:
        return _engine_trainer(base, lesson, arguments, step, shared, newest)
    say("train", f"plain TRL and PEFT, as {reason}")
    rows, held_out = _rows(lesson.rows, arguments)
    trainer = PlainTrainer(model=base, args=arguments, train_dataset=rows, eval_dataset=held_out, **shared)
    _keep_adapter_in_float32(trainer)
    return trainer


class PlainTrainer(Resumable, SFTTrainer):
    """TRL's own trainer, with checkpoints."""


def _schedule(trainer: Trainer, lesson: TrainingInputs) -> None:
    """Set when the trainer logs and looks at the rows held out."""
    trainer.remove_callback(PrinterCallback)  # ProgressLines says it in a line
    steps = math.ceil(len(trainer.train_dataset) / sequences_per_step(trainer.args))
    steps = max(1, math.ceil(steps * lesson.config.epochs))
    trainer.args.eval_steps = max(1, steps // lesson.config.num_evaluations)
    trainer.args.logging_steps = max(1, steps // 50)
    say("train", f"{steps:,} steps, {lesson.dtype}")


def _rows(data: Path, arguments: TrainingArguments) -> tuple[Dataset, Dataset]:
    """The tokenised rows to train on, and those to look at now and then."""
    rows, held_out = (
        Dataset.from_parquet(
            str(data / f"{name}.parquet"), columns=["input_ids", "labels"], cache_dir=arguments.output_dir
        )
        for name in ("train", "held_out")
    )
    return rows, held_out.select(range(min(len(held_out), _MAX_EVALUATED_ROWS)))


def _distillation_trainer(lesson: TrainingInputs, arguments: DistillationConfig, newest: Path | None) -> Resumable:
    """The trainer that learns from a teacher.

    Raises:
        Tune16Error: the teacher's weights are missing or another model's, or there are too few rows for one step.
    """
    from components.train.distillation import GivenAnswersTrainer, fit_teacher

    if lesson.teacher is None or not lesson.teachers_name:
        raise Tune16Error("train.teacher: its weights are not there. Run the step quantize with this teacher first.")
    student = load_base(lesson.weights, lesson.dtype)
    rows, held_out = _rows(lesson.rows, arguments)
    left_over = len(rows) % sequences_per_step(arguments)
    if left_over == len(rows):
        raise Tune16Error(
            f"train: {len(rows)} rows are fewer than one step of {sequences_per_step(arguments)}. Lower "
            "train.micro_batch or train.gradient_accumulation."
        )
    say("train", f"learning from {lesson.teachers_name}; {left_over} rows an epoch fill no step")
    trainer = GivenAnswersTrainer(
        model=student,
        teacher_model=fit_teacher(load_base(lesson.teacher, lesson.dtype), student),
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(lesson.rows / "tokenizer", trust_remote_code=False),
        peft_config=_lora(lesson.config, student),
        callbacks=[ProgressLines()],
    )
    _keep_adapter_in_float32(trainer)
    return trainer


def _engine_trainer(
    base: Any, lesson: TrainingInputs, arguments: SFTConfig, step: Step, shared: dict[str, Any], newest: Path | None
) -> EngineTrainer:
    """The engine's trainer: on a GPU a step is split into the passes that the memory plan finds fastest.

    A run that goes on keeps the passes it began with. Without a GPU a pass has as many tokens as the configuration's
    micro-batch.
    """
    config = lesson.config
    tokens, planned = config.micro_batch * step.max_tokens, None
    if torch.cuda.is_available():
        planned = _plan(step, least_over_processes(available_memory()), read_passes(newest) if newest else None)
        tokens, arguments.gradient_accumulation_steps = planned.pass_tokens, planned.num_passes
        for line in (planned if _card() else replace(planned, step_seconds=None)).lines():
            say("train", line)
    rows_per_pass = None if config.packing else config.micro_batch
    rows, share = packed_dataset(lesson.rows / "train.parquet", tokens, config.seed, rows_per_pass=rows_per_pass)
    held_out, _ = packed_dataset(lesson.rows / "held_out.parquet", tokens, config.seed, max_rows=_MAX_EVALUATED_ROWS)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = 1
    arguments.packing = arguments.gradient_checkpointing = arguments.remove_unused_columns = False
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    say("train", f"engine: passes of {tokens:,} tokens, {share:.1%} filled")
    return EngineTrainer(step, planned, model=base, args=arguments, train_dataset=rows, eval_dataset=held_out, **shared)


def _plan(step: Step, available: int, begun_with: tuple[int, int] | None) -> MemoryPlan:
    """The plan for this GPU, with the passes that the run has begun with, if it has.

    Raises:
        Tune16Error: the rows, or these passes, do not fit.
    """
    planned = step.fullest(*begun_with, available) if begun_with else step.solve(available)
    if not planned.fits:
        raise Tune16Error(
            f"train: {'passes' if begun_with else 'rows'} of {planned.pass_tokens:,} tokens need "
            f"{planned.total / 2**30:.1f} GiB of this GPU's {planned.available / 2**30:.1f}, and "
            f"{planned.host / 2**30:.0f} of the {HOST_MEMORY // 2**30} GiB that may wait in the host's memory. "
            + (
                "The run began on a larger GPU: go on there, or remove its checkpoints."
                if begun_with
                else "Lower max_tokens_per_row or lora_rank; see `tune16 plan`."
            )
        )
    return planned


def _step(lesson: TrainingInputs) -> Step:
    """A training step on this quantised model, as the memory plan sees it."""
    content = read_json(lesson.weights / "config.json")
    content.pop("quantization_config", None)
    bits = QuantizeConfig(bits=lesson.quantized["config"]["bits"])
    shape = read_shape(content, str(lesson.weights))
    return Step(shape, bits, lesson.config, lesson.max_tokens, _card() or Gpu.usual(), lesson.dtype.itemsize)


def _card() -> Gpu | None:
    """The process's GPU, if it has one and its speed is known."""
    return known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _lora(config: TrainConfig, base: Any) -> LoraConfig:
    """The adapter's configuration.

    Raises:
        Tune16Error: a target is no linear layer of this model.
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


def _keep_adapter_in_float32(trainer: Trainer) -> None:
    """TRL makes a 4-bit model's adapter bfloat16 whatever the device; float16's loss scaling needs float32.

    In float16 the activations are bounded, too.
    """
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if trainer.args.fp16:
        bound_float16(trainer.model)


def _metrics(trainer: Resumable) -> dict[str, float]:
    """The run in numbers, rounded for people."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if not losses or not all(map(math.isfinite, losses + held_out)):
        raise Tune16Error(
            "train: the loss became NaN or infinite. Lower learning_rate, or set compute_dtype to float32."
        )
    num_tokens = max(entry.get("num_tokens", 0) for entry in history)
    metrics = {
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "held_out_loss": held_out[-1],
        "steps": trainer.state.global_step,
        "tokens": num_tokens,
        "tokens_per_second": num_tokens / trainer.seconds,
        "seconds": trainer.seconds,
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


def _save(trainer: Trainer, folder: Path, model: str) -> None:
    """Write the adapter as PEFT reads it, naming the base model it belongs to, and the tokenizer."""
    reference = parse(model, "model")
    adapter = trainer.accelerator.unwrap_model(trainer.model)
    config = adapter.peft_config["default"]
    config.base_model_name_or_path = reference.address if reference.scheme == "hf" else str(reference)
    config.revision = reference.pin if reference.scheme == "hf" else None
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set, whose order is another in each process
    adapter.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the step evaluate writes a full one
    trainer.processing_class.save_pretrained(folder)
