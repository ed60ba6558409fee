"""The merged model as its users load it: from its own files alone, and checked as it was evaluated.

A model can be right in the evaluation and wrong where it is used: another template, no end to its answers, missing
weights. The weights stay on the disk and pass through memory layer by layer, so that any size can be asked; how
much is asked depends on the size.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from components.models.labels import IGNORED
from components.models.loading import load_model
from components.models.stopping import as_list
from components.models.tensors import weight_bytes
from components.runtime.errors import Tune16Error
from components.runtime.outputs import EVALUATION, PUBLISHED, read_json, read_record, write_json
from components.runtime.steps import say

_LONGEST_ROW = 1024  # tokens; the step convert asks the same rows of llama.cpp
_MOST_ROWS, _FEWEST_ROWS = 32, 2
_WORK = 8e12  # bytes of weights times tokens: some minutes on two cores
_ANSWER_SHARE = 0.25  # of the tokens, for answers
_FEWEST_ENDS = 5  # answers that were to end, and have had twice the time: a single one may be long by chance


def check_published(merged: Path, data: Path, evaluation: Path) -> dict[str, Any]:
    """Ask the merged model held-out rows, and compare it with the evaluation.

    Args:
        merged: folder with ``merged/``, the model; gets ``published.json``: rows, their losses, and answers.
        data: output of the step prepare.
        evaluation: output of the step evaluate.

    Returns:
        The content of ``published.json``.

    Raises:
        Tune16Error: the model does not load, renders prompts otherwise, or does not end its answers.
    """
    from transformers import AutoTokenizer

    folder = merged / "merged"
    judged = read_json(evaluation / EVALUATION)["samples"]
    rows = pq.read_table(data / "held_out.parquet").slice(0, len(judged)).to_pylist()
    size = weight_bytes(folder)
    chosen = _choose([len(row["input_ids"]) for row in rows], int(_WORK / size))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _check_prompts(tokenizer, data, [rows[number] for number in chosen])
    model = load_model(folder, "auto", on_disk=True).eval()
    _check_ends(model, tokenizer, read_record(data, "prepare")["stop_token"])
    most_new = max(4, min(64, int(_ANSWER_SHARE * _WORK / size / len(chosen))))
    limit = read_record(evaluation, "evaluate")["config"]["max_new_tokens"]
    sums, counts, ended, same, were_to_end = 0.0, 0, 0, 0, 0
    for number in chosen:
        row, answer = rows[number], judged[number]["tuned"]
        loss, count = _loss(model, row)
        sums, counts = sums + loss, counts + count
        text, has_ended = _answer(model, tokenizer, row["messages"][:-1], most_new)
        expected_tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
        is_to_end = expected_tokens < min(most_new / 2, limit)
        were_to_end += is_to_end
        ended += has_ended and is_to_end
        same += text == answer if has_ended else bool(text) and answer.startswith(text)
    if were_to_end >= _FEWEST_ENDS and not ended:
        raise Tune16Error(
            f"{folder}: the merged model does not end its answers, though {were_to_end} of {len(chosen)} ended in "
            "the evaluation. Check the samples in its report, and train longer."
        )
    found = {"rows": chosen, "tokens": counts, "loss": sums / counts}
    found |= {"answers_as_judged": same, "answers": len(chosen)}
    write_json(merged / PUBLISHED, found)
    say(
        "merge",
        f"loaded as published: loss {found['loss']:.4f} on {len(chosen)} held-out rows, {same} of {len(chosen)} "
        "answers as in the evaluation (on quantised weights)",
    )
    return found


def _choose(lengths: list[int], most_tokens: int) -> list[int]:
    """Rows to ask, the longest first, as many as have so many tokens together."""
    fitting = [number for number, length in enumerate(lengths) if length <= _LONGEST_ROW]
    numbers = sorted(fitting or [lengths.index(min(lengths))], key=lambda number: -lengths[number])
    chosen: list[int] = []
    for number in numbers[:_MOST_ROWS]:
        if len(chosen) >= _FEWEST_ROWS and sum(lengths[other] for other in [*chosen, number]) > most_tokens:
            break
        chosen.append(number)
    return chosen


def _check_prompts(tokenizer: Any, data: Path, rows: list[dict[str, Any]]) -> None:
    """Check that the published tokenizer renders a conversation as the one in training did."""
    from transformers import AutoTokenizer

    taught = AutoTokenizer.from_pretrained(data / "tokenizer", trust_remote_code=False)
    for row in rows:
        prompts = [
            one.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
            for one in (taught, tokenizer)
        ]
        if prompts[0] != prompts[1]:
            raise Tune16Error(
                f"The merged model's tokenizer renders a conversation as {tokenizer.decode(prompts[1])!r}, but the "
                f"model was trained on {taught.decode(prompts[0])!r}. Its files were changed after training."
            )


def _check_ends(model: Any, tokenizer: Any, stop_token: str) -> None:
    """Check that the folder's own files end answers where training did."""
    if tokenizer.convert_tokens_to_ids(stop_token) not in as_list(model.generation_config.eos_token_id):
        raise Tune16Error(
            f"The merged model would not end its answers: its generation_config.json does not name {stop_token!r}, the "
            "last token of the template."
        )


@torch.inference_mode()
def _loss(model: Any, row: dict[str, Any]) -> tuple[float, int]:
    """Summed negative log-likelihood in nats of a row's answers, and their number of tokens."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return float(losses), int((labels != IGNORED).sum())


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, prompt: list[dict[str, str]], most_new: int) -> tuple[str, bool]:
    """The greedy answer as Transformers' `generate` gives it by the folder's own files, and whether it ended."""
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=most_new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text: str = tokenizer.decode(out, skip_special_tokens=True)
    return text.strip(), int(out[-1]) in as_list(model.generation_config.eos_token_id)
