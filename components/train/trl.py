"""Losses that TRL computes: its SFTTrainer where the engine cannot take a model, its DistillationTrainer for a teacher.

Of TRL's trainers the constructor, ``compute_loss`` and ``log`` are used: the loop is ours
(:mod:`components.train.loop`), the same for every learner.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import LoraConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer

from components.config import TrainConfig
from components.models.labels import IGNORED
from components.models.loading import bound_float16, device
from components.runtime.errors import Tune16Error
from components.train.learner import MAX_HELD_OUT_ROWS, Batch, Learner


class TrlLearner(Learner):
    """A learner whose loss is a TRL trainer's.

    Args:
        trainer: TRL's trainer, with its model, its rows and its way to make a micro-batch of them.
        config: the settings.
        dtype: number format of the computation.
    """

    measured: tuple[str, ...] = ("entropy", "mean_token_accuracy")

    def __init__(self, trainer: Trainer, config: TrainConfig, dtype: torch.dtype) -> None:
        self._trainer, self._dtype = trainer, dtype
        trainer.remove_callback(PrinterCallback)
        self.model = trainer.model
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.parameters:  # TRL makes a 4-bit model's adapter bfloat16; loss scaling needs float32
            parameter.data = parameter.data.float()
        if dtype == torch.float16:
            bound_float16(self.model)
        if config.activation_checkpointing:
            self.model.get_base_model().activation_checkpointing_enable()
        self.per_step, self._rows = config.gradient_accumulation, config.micro_batch
        self.num_batches = -(-len(trainer.train_dataset) // self._rows)
        self.num_held_out = -(-len(trainer.eval_dataset) // self._rows)

    def batch(self, number: int, held_out: bool = False) -> Batch:
        """So many rows, in the order of the data set, put together as TRL does."""
        rows = self._trainer.eval_dataset if held_out else self._trainer.train_dataset
        chosen = range(number * self._rows, min((number + 1) * self._rows, len(rows)))
        return self._collate([rows[index] for index in chosen])

    def loss(self, content: tuple[dict[str, torch.Tensor], int]) -> torch.Tensor:
        """TRL's loss, which divides by a number of tokens that it is told: by 1, so that it is a sum."""
        inputs, num_learnt = content
        with self._autocast():
            inputs = send_to_device(inputs, device())
            loss: torch.Tensor = self._trainer.compute_loss(self.model, inputs, num_items_in_batch=torch.tensor(1))
        means = self._last_metrics()
        sums = loss.new_tensor([num_learnt * means[name] for name in self.measured], dtype=torch.float32)
        return torch.cat([loss.float().reshape(1), sums])

    def _last_metrics(self) -> dict[str, float]:
        """What TRL has measured in the last micro-batch: it keeps that for its own log, which is emptied here."""
        self._trainer.log({})
        entry: dict[str, float] = self._trainer.state.log_history.pop()
        return {name.removeprefix("eval_"): value or 0.0 for name, value in entry.items()}

    def _autocast(self) -> AbstractContextManager[Any]:
        is_mixed = self._dtype != torch.float32
        return torch.autocast(device().type, dtype=self._dtype if is_mixed else torch.bfloat16, enabled=is_mixed)

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        content = self._trainer.data_collator(rows)
        num_learnt = int((content["labels"] != IGNORED).sum())
        return Batch((content, num_learnt), num_learnt, sum(len(row["input_ids"]) for row in rows))


def plain_learner(
    base: Any, lora: LoraConfig, rows: Path, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, **facts: Any
) -> TrlLearner:
    """TRL's SFTTrainer on the answers of the data.

    Args:
        base: the quantised model.
        lora: the adapter's configuration.
        rows: folder with the tokenised rows.
        tokenizer: the model's.
        config: the settings.
        facts: ``dtype``, ``max_tokens`` of a row, and ``scratch``, a folder for what TRL writes.
    """
    arguments = SFTConfig(
        max_length=facts["max_tokens"],
        packing=config.packing,
        eval_packing=False,
        average_tokens_across_devices=False,
        **_arguments(config, facts["dtype"], facts["scratch"]),
    )
    trainer = SFTTrainer(model=base, peft_config=lora, **_inputs(arguments, rows, tokenizer))
    return TrlLearner(trainer, config, facts["dtype"])


class DistillationLearner(TrlLearner):
    """The student learns the probabilities that a larger teacher gives to every token of the data's answers.

    The loss is KL(teacher || student) over the whole vocabulary (Hinton et al., https://arxiv.org/abs/1503.02531),
    which TRL's DistillationTrainer computes in tiles, so that logits never exist in full. TRL lets the student write
    the answers itself; here they are the data's, which needs no generation, teaches weak students too, and gives the
    same held-out loss for the same weights.
    """

    measured = ("entropy",)

    def _collate(self, rows: list[dict[str, Any]]) -> Batch:
        """TRL's batch, of which it learns where ``tool_mask`` is 1: the first token of a row stands for the prompt.

        Prompts and answers are padded apart; so a batch is as wide as its longest row and no wider.
        """
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        learnt = [(torch.tensor(row["labels"]) != IGNORED).long() for row in rows]
        fill = self._trainer.processing_class.pad_token_id
        first, rest = [row[:1] for row in ids], [row[1:] for row in ids]
        content = {
            "prompt_ids": torch.stack(first),
            "prompt_mask": torch.stack([torch.ones_like(row) for row in first]),
            "completion_ids": pad_sequence(rest, batch_first=True, padding_value=fill),
            "completion_mask": pad_sequence([torch.ones_like(row) for row in rest], batch_first=True),
            "tool_mask": pad_sequence([mask[1:] for mask in learnt], batch_first=True),
        }
        num_learnt = int(content["tool_mask"].sum())
        return Batch((content, num_learnt), num_learnt, sum(map(len, ids)))


def distillation_learner(
    base: Any,
    teacher: Any,
    lora: LoraConfig,
    rows: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    **facts: Any,
) -> DistillationLearner:
    """TRL's DistillationTrainer on the answers of the data; arguments as for :func:`plain_learner`, and the teacher."""
    arguments = DistillationConfig(beta=0.0, **_arguments(config, facts["dtype"], facts["scratch"]))  # forward KL
    trainer = DistillationTrainer(
        model=base,
        teacher_model=fit_teacher(teacher, base),
        peft_config=lora,
        **_inputs(arguments, rows, tokenizer),
    )
    return DistillationLearner(trainer, config, facts["dtype"])


def _arguments(config: TrainConfig, dtype: torch.dtype, scratch: Path) -> dict[str, Any]:
    """What TRL's trainers have to know to compute a loss; how training goes on is the loop's."""
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": config.micro_batch,
        "per_device_eval_batch_size": config.micro_batch,
        "gradient_checkpointing": config.activation_checkpointing,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": [],
        "disable_tqdm": True,
        "seed": config.seed,
    }


def _inputs(arguments: TrainingArguments, rows: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What both of TRL's trainers take: arguments, tokenizer, the rows to train on, and some of those held out."""
    arguments._n_gpu = 1  # a process trains on its own GPU, however many it sees
    train, held_out = (
        Dataset.from_parquet(
            str(rows / f"{name}.parquet"), columns=["input_ids", "labels"], cache_dir=arguments.output_dir
        )
        for name in ("train", "held_out")
    )
    return {
        "args": arguments,
        "train_dataset": train,
        "eval_dataset": held_out.select(range(min(len(held_out), MAX_HELD_OUT_ROWS))),
        "processing_class": tokenizer,
    }


def fit_teacher(teacher: Any, student: Any) -> Any:
    """Cut the teacher's head to the student's vocabulary: sizes of one family pad theirs differently.

    Raises:
        Tune16Error: the teacher's vocabulary is smaller than the student's.
    """
    size, wanted = teacher.config.vocab_size, student.config.vocab_size
    if size < wanted:
        raise Tune16Error(f"train.teacher: has {size:,} tokens, the student {wanted:,}. Use one of its family.")
    if size > wanted:
        head = teacher.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight[:wanted].clone(), requires_grad=False)
        head.out_features = teacher.config.vocab_size = wanted
    return teacher.eval().requires_grad_(False)
