"""How much GPU memory a fine-tune needs, and how the memory is used; from the model's configuration alone.

A plan follows one micro-batch of the engine (:mod:`components.engine`) through forward, loss and backward, adds up
what exists at each moment, and finds the split of a step into micro-batches and the number of blocks that keep their
activations with which a step is shortest.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, log2

from components.config import QuantizeConfig, Recipe, TrainConfig, form_field
from components.engine.limits import MLP_TOKENS, ROUND_TOKENS, keep_order, loss_tokens, round_up
from components.models.shapes import ModelShape, adapted_linears
from components.planning.gpus import Gpu
from components.runtime.report import size

GIBIBYTE = 2**30

# Bytes a weight takes: NF4 has half a byte, an 8-bit scale per 64 weights and a 32-bit one per 256 of those; LLM.int8
# has one byte and a 32-bit scale per row, which does not count.
_BYTES_PER_WEIGHT = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0, 16: 2.0}
_SPARE = 0.03  # share of the memory that is left for fragments; torch gives back what it caches before it gives up
_HOST_SECONDS_PER_BLOCK = 1.6e-3  # that Python needs per micro-batch, forward and backward; measured on an H200's host
HOST_MEMORY = 16 * GIBIBYTE  # for boundary activations: what the step train's pod has besides its own 8 GiB
_LIBRARIES = 72 * 2**20  # workspaces of the matrix products
_MOST_MICRO_BATCH_TOKENS = 65536
_PLAIN_LOSS_CHUNK_TOKENS = 256
_TILE_WORDS = 32768  # tokens of the vocabulary whose logits TRL's distillation loss holds at once

_ATTENTION, _MLP = 0, 1  # the two blocks of a decoder layer, in their order


@dataclass(frozen=True)
class MemoryPlan:
    """What a training step holds at its peak, in bytes per part, against the GPU's bytes, and how it is run.

    Attributes:
        parts: bytes by what they are for.
        available: bytes that tensors may fill.
        micro_batch_tokens: tokens that go through the model at once.
        num_micro_batches: micro-batches of a step on each GPU.
        num_kept: blocks, of two per decoder layer, that keep their activations; the others compute them again.
        num_blocks: all blocks.
        host: bytes of the host's memory that hold boundary activations; 0 keeps them on the GPU. At most
            :data:`HOST_MEMORY` fit.
        step_seconds: estimated time of a step; None where the GPU is not known.
    """

    parts: dict[str, int]
    available: int
    micro_batch_tokens: int
    num_micro_batches: int
    num_kept: int = 0
    num_blocks: int = 0
    host: int = 0
    step_seconds: float | None = None

    @property
    def total(self) -> int:
        """Peak in bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within what is available, on the GPU and on the host."""
        return self.total <= self.available and self.host <= HOST_MEMORY

    @property
    def tokens_per_second(self) -> float | None:
        """Estimated speed of one GPU."""
        return self.micro_batch_tokens * self.num_micro_batches / self.step_seconds if self.step_seconds else None

    def lines(self) -> list[str]:
        """The plan as text: one line per part, how a step is run, and at last whether it fits."""
        return [*(f"{name:<22} {size(part):>11}" for name, part in self.parts.items()), *self.facts(), self.result()]

    def result(self) -> str:
        """The plan in one sentence."""
        word = "fits" if self.fits else "does not fit"
        return f"training {word}: it needs {size(self.total)} of the GPU's {size(self.available)}"

    def facts(self) -> list[str]:
        """How a step is run, in sentences."""
        facts = [f"a step is {self.num_micro_batches} micro-batches of {self.micro_batch_tokens:,} tokens"]
        if self.num_blocks:
            facts.append(f"activations kept in {self.num_kept} of {self.num_blocks} blocks (two per layer)")
        if self.host:
            facts.append(f"{self.host / GIBIBYTE:.1f} GiB of activations are kept in the host's memory")
        if self.tokens_per_second:
            facts.append(f"about {self.tokens_per_second:,.0f} tokens/s on each GPU, estimated")
        return facts


def plan(shape: ModelShape, recipe: Recipe, gpu: Gpu | None = None, teacher: ModelShape | None = None) -> MemoryPlan:
    """Plan a recipe's training step in its ``preflight.gpu_memory``; with `gpu`, its time is estimated too.

    `teacher` is the shape of ``train.teacher`` where the method is distillation.

    Raises:
        Tune16Error: a target of the adapter is not a layer of the model.
    """
    available = round(recipe.preflight.gpu_memory * GIBIBYTE)
    assert bool(teacher) == bool(recipe.train.teacher), "a teacher has a shape"
    if teacher:
        return _plan_distillation(shape, teacher, recipe, available)
    if recipe.train.engine == "trl" or shape.why_plain(recipe.prepare.max_tokens):
        return _plan_plain(shape, recipe, available)
    number = 4 if recipe.train.compute_dtype == "float32" else 2
    step = Step(shape, recipe.quantize, recipe.train, recipe.prepare.max_tokens, gpu or Gpu.usual(), number)
    best = step.solve(available)
    return best if gpu else replace(best, step_seconds=None)


@dataclass(frozen=True)
class Step:
    """One training step of the engine on one model.

    Args:
        shape: of the model.
        quantize: of the frozen weights.
        train: settings of the training.
        max_tokens: of the longest row.
        gpu: whose speed decides what is worth its memory.
        bytes_per_number: of the computation's format.
    """

    shape: ModelShape
    quantize: QuantizeConfig
    train: TrainConfig
    max_tokens: int
    gpu: Gpu
    bytes_per_number: int = 2
    _adapted: dict[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_adapted", adapted_linears(self.shape, self.train.target_modules))

    @property
    def _bytes_per_weight(self) -> float:
        return self.bytes_per_number if self.quantize.bits == 16 else _BYTES_PER_WEIGHT[self.quantize.bits]

    @property
    def num_blocks(self) -> int:
        """Two per decoder layer."""
        return 2 * self.shape.num_layers

    def solve(self, available: int) -> MemoryPlan:
        """The fastest plan that fits; if none does, the smallest. Without packing, it is the configured micro-batch."""
        tokens = self.train.micro_batch * self.train.gradient_accumulation * self.max_tokens
        if not self.train.packing:
            micro_batch_tokens = self.train.micro_batch * self.max_tokens
            return self.fullest(micro_batch_tokens, self.train.gradient_accumulation, available)
        plans = []
        for num_micro_batches in self._splits(tokens):
            micro_batch_tokens = max(self.max_tokens, round_up(ceil(tokens / num_micro_batches)))
            plans.append(self.fullest(micro_batch_tokens, num_micro_batches, available))
        fitting = [one for one in plans if one.fits and not one.host]
        if fitting:
            return max(fitting, key=lambda one: one.tokens_per_second or 0)
        return min(plans, key=lambda one: one.total)

    def _splits(self, tokens: int) -> list[int]:
        """Numbers of micro-batches to try: from all tokens in one to the longest row in each, about 5 % apart."""
        numbers, size = {1, max(1, tokens // self.max_tokens)}, float(self.max_tokens)
        while size < min(tokens, _MOST_MICRO_BATCH_TOKENS):
            numbers.add(ceil(tokens / size))
            size *= 1.05
        return sorted(numbers)

    def fullest(self, micro_batch_tokens: int, num_micro_batches: int, available: int) -> MemoryPlan:
        """The plan with as many blocks that keep their activations as fit; if none does, with the host's memory."""
        low, high = 0, self.num_blocks
        if not self.plan(micro_batch_tokens, num_micro_batches, 0, available).fits:
            return self.plan(micro_batch_tokens, num_micro_batches, 0, available, True)
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.plan(micro_batch_tokens, num_micro_batches, middle, available).fits
            low, high = (middle, high) if fits else (low, middle - 1)
        return self.plan(micro_batch_tokens, num_micro_batches, low, available)

    def plan(
        self, micro_batch_tokens: int, num_micro_batches: int, num_kept: int, available: int, offload: bool = False
    ) -> MemoryPlan:
        """The plan with this many blocks that keep their activations, or with boundaries in the host's memory."""
        shape, number = self.shape, self.bytes_per_number
        num_adapter = sum(self._adapter_numbers(kind) for kind in (_ATTENTION, _MLP)) * shape.num_layers
        boundary, kept, working = max(self._moments(micro_batch_tokens, num_kept, offload), key=sum)
        parts = {
            "frozen linears": shape.num_linear_weights * self._bytes_per_weight,
            "embedding and head": number * shape.num_embedding_weights,
            "adapter": 4 * num_adapter,
            "adapter gradients": 4 * num_adapter,
            "optimiser state": (8 if self.train.optimizer == "adamw" else 2) * num_adapter,
            "layer boundaries": boundary,
            "kept activations": kept,
            "working memory": working + _LIBRARIES,
            "fragments": _SPARE * available,
        }
        return MemoryPlan(
            {name: round(size) for name, size in parts.items()},
            available,
            micro_batch_tokens,
            num_micro_batches,
            num_kept,
            self.num_blocks,
            host=self.num_blocks * _pinned(micro_batch_tokens * shape.hidden * number) if offload else 0,
            step_seconds=self._seconds(micro_batch_tokens, num_micro_batches, num_kept, num_adapter),
        )

    def more_that_keep(self, num_kept: int, micro_batch_tokens: int, spare: int) -> int:
        """How many further blocks can keep their activations in `spare` bytes."""
        more = 0
        for index in keep_order(self.num_blocks)[num_kept:]:
            spare -= self._kept(index % 2, micro_batch_tokens)
            if spare < 0:
                break
            more += 1
        return more

    def _moments(self, tokens: int, num_kept: int, offload: bool) -> Iterator[tuple[int, int, int]]:
        """Bytes of boundaries, kept activations and working memory, at the loss and in the backward of each block."""
        keeping = set(keep_order(self.num_blocks)[:num_kept])
        boundary = tokens * self.shape.hidden * self.bytes_per_number
        boundaries = [boundary * (2 if offload else index + 1) for index in range(self.num_blocks)]
        of_block = [self._kept(kind, tokens) for kind in (_ATTENTION, _MLP)]
        working = {(kind, kept): self._working(kind, tokens, kept) for kind in (_ATTENTION, _MLP) for kept in (0, 1)}
        kept = sum(of_block[index % 2] for index in keeping)
        yield boundaries[-1] + boundary, kept, self._loss_working(tokens)
        for index in reversed(range(self.num_blocks)):
            yield boundaries[index], kept, working[index % 2, index in keeping]
            kept -= of_block[index % 2] if index in keeping else 0

    def _linears(self, kind: int) -> dict[str, tuple[int, int]]:
        is_mlp = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        return {name: size for name, size in self.shape.linears.items() if (name in is_mlp) == (kind == _MLP)}

    def _adapter_numbers(self, kind: int) -> int:
        linears = [size for name, size in self._linears(kind).items() if name in self._adapted]
        return self.train.rank * sum(rows + columns for rows, columns in linears)

    def _reduced(self, kind: int) -> int:
        """Numbers per token of the products with A."""
        return self.train.rank * sum(name in self._adapted for name in self._linears(kind))

    def _kept(self, kind: int, tokens: int) -> int:
        """Bytes that a block keeps, besides its input."""
        shape, number = self.shape, self.bytes_per_number
        if kind == _MLP:
            return tokens * number * (2 * shape.intermediate + self._reduced(kind))
        attention = 2 * shape.query + 2 * shape.key + self._reduced(kind)
        if shape.architecture == "Qwen3ForCausalLM":
            attention += shape.query + shape.key  # before their norms
        return tokens * (number * attention + 4 * shape.num_heads)

    def _working(self, kind: int, tokens: int, is_kept: int) -> int:
        """Most bytes that the backward of a block needs for the time being."""
        shape, number = self.shape, self.bytes_per_number
        again = 0 if is_kept else self._kept(kind, min(tokens, MLP_TOKENS) if kind == _MLP else tokens)
        adapters = 2 * self._adapter_numbers(kind)
        hidden, dropped = tokens * shape.hidden, self.train.dropout > 0
        if kind == _MLP:
            part = min(tokens, MLP_TOKENS)
            weights = 3 * shape.intermediate * shape.hidden
            outputs = hidden if part < tokens else 0
            inner = part * shape.intermediate * (3 if dropped else 2)
            return again + number * (weights + adapters + hidden + outputs + inner)
        qkv = tokens * (shape.query + 2 * shape.key)
        out_weights, in_weights = shape.query * shape.hidden, (shape.query + 2 * shape.key) * shape.hidden
        query = tokens * shape.query
        accumulated = 4 * query  # FlashAttention's float32 gradient of the queries
        moments = (
            number * (out_weights + query + qkv) + accumulated,
            number * (in_weights + qkv + hidden * (4 if dropped else 2)) - (self._kept(kind, tokens) - number * query),
        )
        return again + number * (adapters + hidden) + max(moments)

    def _loss_working(self, tokens: int) -> int:
        at_once = min(tokens, loss_tokens(self.shape.vocabulary))
        numbers = tokens * self.shape.hidden + at_once * (self.shape.vocabulary + 2 * self.shape.hidden)
        return self.bytes_per_number * numbers

    def _seconds(self, tokens: int, num_micro_batches: int, num_kept: int, num_adapter: int) -> float:
        """Estimated time of a step: products at the GPU's usual rate, everything else at its bandwidth.

        The bytes per token of norms, rotations, SwiGLU and LoRA's small products were counted once, on Llama-2-7b.
        """
        shape, gpu, keeping = self.shape, self.gpu, set(keep_order(self.num_blocks)[:num_kept])
        flops: float = 2 * 2 * shape.num_linear_weights + 3 * 2 * num_adapter + 3 * 2 * shape.vocabulary * shape.hidden
        flops += 7 * 2 * shape.query * self.max_tokens / 4 * shape.num_layers  # attention over rows of half the longest
        for index in set(range(self.num_blocks)) - keeping:
            into = list(self._linears(index % 2).values())[:-1]
            flops += 2 * sum(rows * columns for rows, columns in into)
            flops += 0 if index % 2 else 2 * shape.query * self.max_tokens / 4 * 2
        traffic = self.bytes_per_number * (80 * shape.hidden + 20 * shape.intermediate) * shape.num_layers
        weights = 2 * shape.num_linear_weights * (self._bytes_per_weight + self.bytes_per_number)
        one_micro_batch = tokens * (flops / gpu.flops + traffic / gpu.bandwidth) + weights / gpu.bandwidth
        one_micro_batch = max(one_micro_batch, self.num_blocks * _HOST_SECONDS_PER_BLOCK)
        return num_micro_batches * one_micro_batch + 18 * num_adapter / gpu.bandwidth


def nearest(shape: ModelShape, recipe: Recipe, teacher: ModelShape | None = None) -> list[str]:
    """Single changes, each of which makes a recipe fit, as ``field value``; of each the one that changes least."""
    candidates: list[tuple[str, str, list[int]]] = [
        ("prepare", "max_tokens", list(range(ROUND_TOKENS, recipe.prepare.max_tokens, ROUND_TOKENS))),
        ("train", "rank", list(range(4, recipe.train.rank, 4))),
        ("train", "micro_batch", list(range(1, recipe.train.micro_batch))),
        ("quantize", "bits", [bits for bits in (4, 8) if bits < recipe.quantize.bits]),
    ]

    def unfits(step: str, name: str, value: int) -> bool:
        return not plan(shape, _with(recipe, step, name, value), teacher=teacher).fits

    found = []
    for step, name, values in candidates:
        unfit = bisect_left(values, True, key=partial(unfits, step, name))
        place = form_field(f"{step}.{name}")
        found += [f"{place} {values[unfit - 1]:,}"] if unfit else []
    return found


def _with(recipe: Recipe, step: str, name: str, value: int) -> Recipe:
    return recipe.model_copy(update={step: getattr(recipe, step).model_copy(update={name: value})})


def _plan_plain(shape: ModelShape, recipe: Recipe, available: int) -> MemoryPlan:
    """The plan of TRL and PEFT without the engine.

    Source of the activation figures: measurements on Llama-2-7b, of which a layer boundary costs 2 bytes x hidden per
    token and the one layer that is recomputed about four times its activations.
    """
    quantize, prepare, train = recipe.quantize, recipe.prepare, recipe.train
    linears = adapted_linears(shape, train.target_modules)
    num_adapter = shape.num_layers * train.rank * sum(rows + columns for rows, columns in linears.values())
    num_tokens = train.micro_batch * prepare.max_tokens
    layer_activations = 2 * num_tokens * (6 * shape.hidden + 2 * shape.intermediate)
    kept_layers = 0 if train.activation_checkpointing else shape.num_layers
    largest_linear = max(rows * columns for rows, columns in shape.linears.values())
    parts = {
        "frozen linears": shape.num_linear_weights * _BYTES_PER_WEIGHT[quantize.bits],
        "embedding and head": 2 * shape.num_embedding_weights,
        "adapter": 4 * num_adapter,
        "adapter gradients": 4 * num_adapter * (2 if train.num_processes > 1 else 1),  # added up in a flat copy
        "optimiser state": (8 if train.optimizer == "adamw" else 2) * num_adapter,
        "layer boundaries": 2 * num_tokens * shape.hidden * shape.num_layers,
        "activations": layer_activations * (kept_layers + 2),
        "attention mask": 2 * num_tokens**2 if train.packing else 0,
        "logits": 3 * 4 * min(num_tokens, _PLAIN_LOSS_CHUNK_TOKENS) * shape.vocabulary,
        "dequantised layer": 2 * 2 * largest_linear if quantize.bits < 16 else 0,
    }
    whole = {name: round(size) for name, size in parts.items()}
    return MemoryPlan(whole, available, num_tokens, train.gradient_accumulation)


def _plan_distillation(shape: ModelShape, teacher: ModelShape, recipe: Recipe, available: int) -> MemoryPlan:
    """The plan of TRL's DistillationTrainer: the student as on the plain path, and the teacher, forward only.

    TRL computes both models' logits in tiles of 32,768 tokens, which exist in float32 and once more in the
    computation's format during the backward. tests/bench/results/distillation.json has measured peaks beside these.
    """
    train = recipe.train
    num_tokens = train.micro_batch * recipe.prepare.max_tokens
    plain = _plan_plain(shape, recipe, available).parts
    look = 2 * num_tokens * (2 * teacher.hidden + 3 * teacher.intermediate) + 2 * teacher.hidden * teacher.intermediate
    loss = 2 * num_tokens * 2 * (shape.hidden + teacher.hidden) + 4 * num_tokens * shape.hidden
    loss += 10 * _TILE_WORDS * num_tokens
    step = plain["activations"] + plain["dequantised layer"]
    parts = {
        "frozen linears": plain["frozen linears"],
        "embedding and head": plain["embedding and head"],
        "teacher": round(teacher.num_linear_weights * _BYTES_PER_WEIGHT[4] + 2 * teacher.num_embedding_weights),
        **{name: plain[name] for name in ("adapter", "adapter gradients", "optimiser state", "layer boundaries")},
        "working memory": max(look, loss, step) + _LIBRARIES,
    }
    return MemoryPlan(parts, available, num_tokens, train.gradient_accumulation)


def _pinned(size: int) -> int:
    """Bytes that torch's allocator of pinned memory takes for a tensor: a power of two."""
    return int(2 ** ceil(log2(size)))
