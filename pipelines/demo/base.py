"""The demo's base model: a small Llama with a tokenizer of its own, pre-trained for some seconds on shipped text."""

import json
import re
import time
from pathlib import Path
from string import printable

import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from components.runtime.steps import say
from pipelines.demo.generate import CORPUS

_MERGED_VOCABULARY = 700
_BATCH = 32
_STEPS = 400
_LEARNING_RATE = 4e-3
_INITIAL_SPREAD = 0.08  # near 1 / sqrt(hidden size); with the usual 0.02 the model is slow to find out about copying


def build_base(folder: Path) -> None:
    """Write a model folder: config, tokenizer and float16 safetensors weights, the same on every run."""
    started = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads, and one is the fastest for a model this small
    torch.set_flush_denormal(True)
    disable_progress_bar()
    text = CORPUS.read_text(encoding="utf-8")
    tokenizer = _train_tokenizer(text)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=_INITIAL_SPREAD,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    loss = _pretrain(model, [tokenizer(f"<s>{line}</s>")["input_ids"] for line in text.splitlines()])
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.set_num_threads(threads)
    weights = model.num_parameters() / 1e6
    say("demo", f"base model of {weights:.1f} M weights, loss {loss:.2f}, in {time.monotonic() - started:.0f} s")


def _train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """BPE over text with a visible space and a fallback to bytes, as Llama-2's."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learner = Tokenizer(BPE())
    learner.normalizer = normalizer
    trainer = BpeTrainer(vocab_size=_MERGED_VOCABULARY, initial_alphabet=list(printable.strip()), show_progress=False)
    learner.train_from_iterator(re.findall(r"\w+", text), trainer)
    learned = json.loads(learner.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    splits = [(word[:place], word[place:]) for word in learned["vocab"] for place in range(1, len(word))]
    tokenizer = Tokenizer(
        BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=[pair for pair in splits if set(pair) <= learned["vocab"].keys()],  # all, as SentencePiece merges
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _pretrain(model: LlamaForCausalLM, lines: list[list[int]]) -> float:
    """Next-token training on random lines; returns the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS, pct_start=0.1)
    ids = pad_sequence([torch.tensor(line) for line in lines], batch_first=True, padding_value=-100)
    loss = torch.zeros(())
    for step in range(1, _STEPS + 1):
        batch = ids[torch.randint(len(ids), (_BATCH,))]
        loss = model(input_ids=batch.clamp(min=0), labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            say("demo", f"pre-training the base model, step {step} of {_STEPS}, loss {loss.item():.2f}")
    return loss.item()
