"""The step train: QLoRA on the quantised base model with TRL, PEFT and bitsandbytes."""

import json
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments
from trl import DistillationConfig, SFTConfig, SFTTrainer

from components.config import QuantizeConfig, TrainConfig
from components.errors import Tune16Error
from components.gpus import Gpu, known_gpu
from components.memory import HOST_MEMORY, Step
from components.models import available_memory, choose_dtype, load_base
from components.outputs import new_folder, read_record, write_record
from components.references import parse
from components.report import significant
from components.shapes import read_shape
from components.steps import say
from components.train.engine.engine import unsupported
from components.train.engine.packing import packed_dataset
from components.train.engine.trainer import EngineTrainer, fewest
from components.train.progress import Progress
from components.train.report import write_report

_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}
_OPTIMIZERS = {"paged_adamw_8bit": "paged_adamw_8bit", "adamw": "adamw_torch"}
_MAX_EVALUATED_ROWS = 200


def train_adapter(
    model: Path, data: Path, output: Path, config: TrainConfig, teacher: Path | None = None
) -> dict[str, float]:
    """Train an adapter.

    Args:
        model: output of the step quantize.
        data: output of the step prepare.
        output: becomes a folder with the adapter in PEFT's format, the tokenizer and ``report.html``.
        config: adapter, optimiser, schedule and so on.
        teacher: the step quantize's output for the model to learn from, where the method is distillation.

    Returns:
        Rounded metrics: losses, steps, tokens, tokens/s, seconds and peak memory.

    Raises:
        Tune16Error: inputs do not belong together, or a setting does not suit the model or the device.
    """
    prepared, quantized = read_record(data, "prepare"), read_record(model, "quantize")
    _check_same_model(prepared["model"], quantized["model"])
    trackers = _trackers(config)
    dtype = choose_dtype(config.compute_dtype)
    with new_folder(output) as folder, tempfile.TemporaryDirectory() as scratch:
        options = _options(config, dtype, trackers, Path(scratch))
        if config.method == "distill":
            trainer = _distillation_trainer(model, teacher, data, options, dtype, config)
        else:
            trainer = _build(model, data, prepared["config"]["max_tokens"], options, dtype, config)
        _schedule(trainer, dtype, config)
        trainer.train()
        metrics = _metrics(trainer)
        _save(trainer, folder, quantized["model"])
        write_report(trainer.state.log_history, metrics, config, folder)
        write_record(
            folder,
            "train",
            config,
            model=quantized["model"],
            teacher=read_record(teacher, "quantize")["model"] if config.teacher and teacher else "",
            bits=quantized["config"]["bits"],
            compute_dtype=str(dtype).removeprefix("torch."),
            data=prepared["data"],
            held_out_sha256=prepared["held_out_sha256"],
            prepare=prepared["config"],
            metrics=metrics,
        )
    return metrics


def _check_same_model(of_data: str, of_weights: str) -> None:
    if of_data != of_weights:
        raise Tune16Error(
            f"The data was tokenised for {of_data}, but the weights are of {of_weights}. Prepare the data again."
        )


def _build(
    model: Path, data: Path, max_tokens: int, options: dict[str, Any], dtype: torch.dtype, config: TrainConfig
) -> SFTTrainer:
    """Put the trainer together: model, adapter, rows, arguments."""
    base = load_base(model, dtype)
    arguments = SFTConfig(max_length=max_tokens, packing=config.packing, eval_packing=False, **options)
    arguments._n_gpu = 1  # a process trains on its own card, however many it sees
    has_bfloat16 = int(dtype == torch.bfloat16)
    if fewest(has_bfloat16) != has_bfloat16:
        raise Tune16Error("train.compute_dtype: the nodes' cards differ, and some have no bfloat16. Set it to float16.")
    shared: dict[str, Any] = {
        "processing_class": AutoTokenizer.from_pretrained(data / "tokenizer"),
        "peft_config": _lora(config, base),
        "callbacks": [Progress()],
    }
    step = _step(model, max_tokens, dtype, config)
    reason = unsupported(base, step.shape, max_tokens) if config.engine == "tune16" else "engine is trl"
    if reason:
        say("train", f"plain TRL and PEFT, as {reason}")
        trainer = _plain_trainer(base, data, arguments, shared)
    else:
        trainer = _engine_trainer(base, data, arguments, step, config, shared)
    return trainer


def _schedule(trainer: Trainer, dtype: torch.dtype, config: TrainConfig) -> None:
    """Set when the trainer logs and looks at the rows held out."""
    trainer.remove_callback(PrinterCallback)  # Progress says it in a line
    steps = math.ceil(len(trainer.train_dataset) / _sequences_per_step(trainer.args))
    steps = max(1, math.ceil(steps * config.epochs))
    trainer.args.eval_steps = max(1, steps // config.num_evaluations)
    trainer.args.logging_steps = max(1, steps // 50)
    say("train", f"{steps:,} steps, {dtype}")


def _sequences_per_step(arguments: TrainingArguments) -> int:
    batch: int = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return batch


def _plain_trainer(base: Any, data: Path, arguments: SFTConfig, shared: dict[str, Any]) -> SFTTrainer:
    rows, held_out = _rows(data, arguments)
    trainer = SFTTrainer(model=base, args=arguments, train_dataset=rows, eval_dataset=held_out, **shared)
    _keep_adapter_in_float32(trainer)
    return trainer


def _rows(data: Path, arguments: TrainingArguments) -> tuple[Dataset, Dataset]:
    """The tokenised rows to train on, and those to look at now and then."""
    rows, held_out = (
        Dataset.from_parquet(
            str(data / f"{name}.parquet"), columns=["input_ids", "labels"], cache_dir=arguments.output_dir
        )
        for name in ("train", "held_out")
    )
    return rows, held_out.select(range(min(len(held_out), _MAX_EVALUATED_ROWS)))


def _distillation_trainer(
    model: Path, teacher: Path | None, data: Path, options: dict[str, Any], dtype: torch.dtype, config: TrainConfig
) -> Trainer:
    """The trainer that learns from a teacher.

    Raises:
        Tune16Error: the teacher's weights are missing or another model's, or there are too few rows for one step.
    """
    from components.train.distillation import GivenAnswersTrainer, fit_teacher

    if teacher is None or not read_record(teacher, "quantize")["model"]:
        raise Tune16Error("train.teacher: its weights are not there. Run the step quantize with this teacher first.")
    student = load_base(model, dtype)
    arguments = DistillationConfig(beta=0.0, **options)  # forward KL
    arguments._n_gpu = 1
    rows, held_out = _rows(data, arguments)
    left_over = len(rows) % _sequences_per_step(arguments)
    if left_over == len(rows):
        raise Tune16Error(
            f"train: {len(rows)} rows are fewer than one step of {_sequences_per_step(arguments)}. Lower "
            "train.micro_batch or train.gradient_accumulation."
        )
    say("train", f"learning from {read_record(teacher, 'quantize')['model']}; {left_over} rows an epoch fill no step")
    trainer = GivenAnswersTrainer(
        model=student,
        teacher_model=fit_teacher(load_base(teacher, dtype), student),
        args=arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(data / "tokenizer"),
        peft_config=_lora(config, student),
        callbacks=[Progress()],
    )
    _keep_adapter_in_float32(trainer)
    return trainer


def _engine_trainer(
    base: Any, data: Path, arguments: SFTConfig, step: Step, config: TrainConfig, shared: dict[str, Any]
) -> EngineTrainer:
    """The engine's trainer: on a GPU a step is split into the passes that the memory plan finds fastest.

    Without one a pass has as many tokens as the configuration's micro-batch.
    """
    tokens, planned = config.micro_batch * step.max_tokens, None
    if torch.cuda.is_available():
        planned = step.solve(fewest(available_memory()))
        if not planned.fits:
            raise Tune16Error(
                f"train: rows of {step.max_tokens:,} tokens need {planned.total / 2**30:.1f} GiB of this GPU's "
                f"{planned.available / 2**30:.1f}, and {planned.host / 2**30:.0f} of the {HOST_MEMORY // 2**30} GiB "
                "that may wait in the host's memory. Lower prepare_max_tokens or train_rank; see `tune16 plan`."
            )
        tokens, arguments.gradient_accumulation_steps = planned.pass_tokens, planned.num_passes
        for line in (planned if _card() else replace(planned, step_seconds=None)).lines():
            say("train", line)
    rows_per_pass = None if config.packing else config.micro_batch
    rows, share = packed_dataset(data / "train.parquet", tokens, config.seed, rows_per_pass=rows_per_pass)
    held_out, _ = packed_dataset(data / "held_out.parquet", tokens, config.seed, max_rows=_MAX_EVALUATED_ROWS)
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = 1
    arguments.packing = arguments.gradient_checkpointing = arguments.remove_unused_columns = False
    arguments.dataset_kwargs = {"skip_prepare_dataset": True}
    say("train", f"engine: passes of {tokens:,} tokens, {share:.1%} filled")
    return EngineTrainer(step, planned, model=base, args=arguments, train_dataset=rows, eval_dataset=held_out, **shared)


def _step(model: Path, max_tokens: int, dtype: torch.dtype, config: TrainConfig) -> Step:
    """A training step on this quantised model, as the memory plan sees it."""
    content = json.loads((model / "config.json").read_text())
    content.pop("quantization_config", None)
    bits = QuantizeConfig(bits=read_record(model, "quantize")["config"]["bits"])
    return Step(read_shape(content, str(model)), bits, config, max_tokens, _card() or Gpu.usual(), dtype.itemsize)


def _card() -> Gpu | None:
    """The process's GPU, if it has one and its speed is known."""
    return known_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def _options(config: TrainConfig, dtype: torch.dtype, trackers: list[str], scratch: Path) -> dict[str, Any]:
    """The settings of TRL's trainers that have nothing to do with how they learn."""
    on_gpu = torch.cuda.is_available()
    optimizer = config.optimizer if config.optimizer != "auto" else ("paged_adamw_8bit" if on_gpu else "adamw")
    return {
        "output_dir": str(scratch),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.micro_batch,
        "per_device_eval_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": _SCHEDULES[config.schedule],
        "warmup_steps": config.warmup_share,
        "max_grad_norm": config.max_gradient_norm,
        "weight_decay": config.weight_decay,
        "optim": _OPTIMIZERS[optimizer],
        "gradient_checkpointing": config.activation_checkpointing,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not on_gpu,
        "ddp_backend": "gloo" if "WORLD_SIZE" in os.environ and not on_gpu else None,  # several processes on a CPU
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": on_gpu,
        "eval_strategy": "steps",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,  # it waits for the GPU in every pass; _metrics refuses such losses
        "report_to": trackers,
        "disable_tqdm": True,
        "seed": config.seed,
    }


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
    """TRL makes a 4-bit model's adapter bfloat16 whatever the device; float16's loss scaling needs float32."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _trackers(config: TrainConfig) -> list[str]:
    """MLflow where its server is named in the environment, Weights & Biases where a project is asked for.

    Raises:
        Tune16Error: Weights & Biases is asked for but nobody is logged in.
    """
    trackers = ["mlflow"] if os.environ.get("MLFLOW_TRACKING_URI") else []
    if config.wandb_project:
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
            raise Tune16Error(
                "train.wandb_project: is set, but there is no WANDB_API_KEY in the environment. Put it into the "
                "Secret that cluster_tokens names, or set WANDB_MODE=offline."
            )
        os.environ["WANDB_PROJECT"] = config.wandb_project
        trackers.append("wandb")
    return trackers


def _metrics(trainer: Trainer) -> dict[str, float]:
    """The run in numbers, rounded for people."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    if not losses or not all(map(math.isfinite, losses + held_out)):
        raise Tune16Error(
            "train: the loss is no number any more. Lower train_learning_rate, or set compute_dtype to float32."
        )
    seconds = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    num_tokens = max(entry.get("num_tokens", 0) for entry in history)
    metrics = {
        "train_loss_first": losses[0],
        "train_loss_last": losses[-1],
        "held_out_loss": held_out[-1],
        "steps": trainer.state.global_step,
        "tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
        "seconds": seconds,
        "peak_memory_gib": Progress.peak_memory(),
    }
    return {name: significant(value) for name, value in metrics.items()}


def _save(trainer: Trainer, folder: Path, model: str) -> None:
    """Write the adapter as PEFT reads it, naming the base model it belongs to, and the tokenizer."""
    reference = parse(model, "model")
    adapter = trainer.accelerator.unwrap_model(trainer.model)
    config = adapter.peft_config["default"]
    config.base_model_name_or_path = reference.address if reference.scheme == "hf" else str(reference)
    config.revision = reference.pin if reference.scheme == "hf" else None
    adapter.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; the step evaluate writes a full one
    trainer.processing_class.save_pretrained(folder)
