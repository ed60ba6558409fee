"""A training run's settings as arguments of Transformers and TRL."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from trl import DistillationConfig, SFTConfig

from components.config import TrainConfig
from components.runtime.errors import Tune16Error

_SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}
_OPTIMIZERS = {"paged_adamw_8bit": "paged_adamw_8bit", "adamw": "adamw_torch"}


def training_arguments(config: TrainConfig, dtype: torch.dtype, max_tokens: int, scratch: Path) -> TrainingArguments:
    """The arguments of TRL's trainers; making them also joins the processes that train together.

    Args:
        config: the settings.
        dtype: number format of the computation.
        max_tokens: longest row.
        scratch: folder for what the trainers write by themselves.

    Raises:
        Tune16Error: Weights & Biases is configured, but without an API key.
    """
    options = _options(config, dtype, scratch)
    arguments: TrainingArguments
    if config.method == "distill":
        arguments = DistillationConfig(beta=0.0, **options)  # forward KL
    else:
        arguments = SFTConfig(max_length=max_tokens, packing=config.packing, eval_packing=False, **options)
    arguments._n_gpu = 1  # a process trains on its own card, however many it sees
    return arguments


def sequences_per_step(arguments: TrainingArguments) -> int:
    """Rows, or micro-batches, of all processes in one step of the optimiser."""
    batch: int = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return batch


def _options(config: TrainConfig, dtype: torch.dtype, scratch: Path) -> dict[str, Any]:
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
        "save_strategy": "no",  # state.Resumable keeps checkpoints of its own
        "logging_nan_inf_filter": False,  # it waits for the GPU in every micro-batch; _metrics refuses such losses
        "report_to": _trackers(config),
        "disable_tqdm": True,
        "seed": config.seed,
    }


def _trackers(config: TrainConfig) -> list[str]:
    """MLflow where its server is named in the environment, Weights & Biases where a project is set.

    Raises:
        Tune16Error: Weights & Biases is configured, but without an API key.
    """
    trackers = ["mlflow"] if os.environ.get("MLFLOW_TRACKING_URI") else []
    if config.wandb_project:
        if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
            raise Tune16Error(
                "train.wandb_project: is set, but WANDB_API_KEY is not in the environment. Put it into the "
                "Secret that with_tokens_secret names, or set WANDB_MODE=offline."
            )
        os.environ["WANDB_PROJECT"] = config.wandb_project
        trackers.append("wandb")
    return trackers
