"""Distillation: the student learns the probabilities that a larger teacher gives to every token of the data's answers.

The loss is KL(teacher || student) over the whole vocabulary (Hinton et al., https://arxiv.org/abs/1503.02531), which
TRL's DistillationTrainer computes in tiles, so that logits never exist in full. TRL lets the student write the answers
itself; here they are the data's, which needs no generation, teaches weak students too, and gives the same held-out loss
for the same weights.
"""

from typing import Any

import torch
from trl import DistillationTrainer
from trl.trainer.utils import pad

from components.models.labels import IGNORED
from components.runtime.errors import Tune16Error
from components.train.state import Resumable


class GivenAnswersTrainer(Resumable, DistillationTrainer):
    """A DistillationTrainer on rows with ``input_ids`` and ``labels``, of which only labelled tokens are learnt."""

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision, which TRL's own loss bypasses."""
        return self.accelerator.autocast()

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's sampler, whose order depends on the epoch alone: a resumed run has not drawn those before."""
        sampler = super()._get_train_sampler(dataset)
        sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(sampler.seed + epoch)
        return sampler

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, of which it learns where ``tool_mask`` is 1: the first token of a row stands for the prompt.

        Prompts and answers are padded apart; so a batch is as wide as its longest row and no wider.
        """
        rows = [torch.tensor(row["input_ids"]) for row in inputs]
        learnt = [(torch.tensor(row["labels"]) != IGNORED).long() for row in inputs]
        fill = self._tokenizer.pad_token_id
        batch = {
            "prompt_ids": pad([ids[:1] for ids in rows], fill, "left"),
            "prompt_mask": pad([torch.ones_like(ids[:1]) for ids in rows], 0, "left"),
            "completion_ids": pad([ids[1:] for ids in rows], fill, "right"),
            "completion_mask": pad([torch.ones_like(ids[1:]) for ids in rows], 0, "right"),
            "tool_mask": pad([mask[1:] for mask in learnt], 0, "right"),
        }
        batch["num_items_in_batch"] = batch["tool_mask"].sum()
        if self.model.training:
            self.state.num_input_tokens_seen += sum(len(ids) for ids in rows)
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self.state.num_input_tokens_seen]
        return {name: values.to(self.accelerator.device) for name, values in batch.items()}


def fit_teacher(teacher: Any, student: Any) -> Any:
    """Cut the teacher's head to the student's vocabulary: sizes of one family pad theirs differently.

    Raises:
        Tune16Error: the teacher's vocabulary is smaller than the student's.
    """
    words, wanted = teacher.config.vocab_size, student.config.vocab_size
    if words < wanted:
        raise Tune16Error(f"train.teacher: has {words:,} tokens, the student {wanted:,}. Use one of its family.")
    if words > wanted:
        head = teacher.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight[:wanted].clone(), requires_grad=False)
        head.out_features = teacher.config.vocab_size = wanted
    return teacher.eval().requires_grad_(False)
