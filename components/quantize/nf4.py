"""NF4 with double quantisation on a CPU, several times faster than bitsandbytes and equal to the bit.

NF4 (QLoRA, https://arxiv.org/abs/2305.14314) scales each block of 64 weights by its largest magnitude and rounds to
the nearest of 16 levels. bitsandbytes finds the level with a binary search per weight. Here a table finds it: the
scaled weight falls into one of 32,768 cells of [-1, 1], and almost every cell belongs to one level. The few weights
in a cell beside a boundary between two levels are compared exactly.

Double quantisation stores the blocks' scales, less their mean, as 8-bit numbers with a dynamic exponent (8-bit
Approximations for Parallelism in Deep Learning, https://arxiv.org/abs/1511.04561), one float32 scale for 256 of them.
"""

import json
from dataclasses import dataclass
from functools import cached_property

import torch

BLOCK = 64
_NESTED_BLOCK = 256
_CELLS = 1 << 15
_NESTED_CELLS = 1 << 16
_CHUNK = 1 << 19  # weights at once: the work on them stays in the processor's cache
_UNDECIDED = 0xFF
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # for a block of zeros

# The 16 levels of the paper's appendix E, as float32.
_LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)

# A weight belongs to the level whose number is the count of boundaries, the levels' midpoints, below it.
_BOUNDARIES = (_LEVELS[1:] + _LEVELS[:-1]) / 2


def _level_of_cell() -> torch.Tensor:
    """Level of each cell; cells that hold a boundary or lie next to one are undecided."""
    centres = (torch.arange(_CELLS + 1, dtype=torch.float64) + 0.5) / (_CELLS / 2) - 1
    table = torch.bucketize(centres, _BOUNDARIES.double()).to(torch.uint8)
    boundary_cells = ((_BOUNDARIES.double() + 1) * (_CELLS / 2)).long()
    for neighbour in (-1, 0, 1):
        table[boundary_cells + neighbour] = _UNDECIDED
    return table


def _dynamic_map() -> torch.Tensor:
    """The 256 numbers that 8 bits with a dynamic exponent stand for, in order: seven decades, each twice as fine."""
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive.append(10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2))
    magnitudes = torch.cat(positive)
    return torch.cat([-magnitudes, torch.zeros(1), magnitudes, torch.ones(1)]).sort().values


def _code_of_cell() -> torch.Tensor:
    """Nearest number of the dynamic map for each of 65,536 points of [-1, 1]; bitsandbytes rounds to them first."""
    points = 2 * torch.arange(_NESTED_CELLS, dtype=torch.float32) / (_NESTED_CELLS - 1) - 1
    return torch.bucketize(points, (_DYNAMIC_MAP[1:] + _DYNAMIC_MAP[:-1]) / 2).to(torch.uint8)


_LEVEL_OF_CELL = _level_of_cell()
_DYNAMIC_MAP = _dynamic_map()
_CODE_OF_CELL = _code_of_cell()


@dataclass(frozen=True)
class Nf4:
    """A quantised weight: `packed` levels, uint8 of shape [ceil(weights / 2), 1], and what undoes them."""

    packed: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: torch.Tensor
    nested_scales: torch.Tensor
    offset: float

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        """Bitsandbytes' quantisation state as it stands in a checkpoint, by the suffix of the tensor's name."""
        facts = {
            "quant_type": "nf4",
            "blocksize": BLOCK,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.shape,
            "nested_blocksize": _NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": self.offset,
        }
        return {
            "absmax": self.scales,
            "quant_map": _LEVELS,
            "nested_absmax": self.nested_scales,
            "nested_quant_map": _DYNAMIC_MAP,
            "quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8),
        }


class _Workspace:
    """Memory for the intermediate values of one chunk; fresh memory for each would cost more than the arithmetic."""

    def __init__(self, size: int) -> None:
        self.scaled = torch.empty(size)
        self.positions = torch.empty(size)
        self.cells = torch.empty(size, dtype=torch.int32)
        self.levels = torch.empty(size, dtype=torch.uint8)


def quantize_nf4(weight: torch.Tensor) -> Nf4:
    """Quantise a weight matrix to NF4 with double quantisation.

    Args:
        weight: float16, bfloat16 or float32, of any shape.

    Returns:
        The same bits as ``bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)``.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    flat = weight.reshape(-1)
    if missing := -flat.numel() % BLOCK:
        flat = torch.nn.functional.pad(flat, (0, missing))
    packed = torch.empty(flat.numel() // 2, dtype=torch.uint8)
    scales = torch.empty(flat.numel() // BLOCK, dtype=torch.float32)
    workspace = _Workspace(min(_CHUNK, flat.numel()))
    for start in range(0, flat.numel(), _CHUNK):
        end = min(start + _CHUNK, flat.numel())
        _quantize_chunk(
            flat[start:end], packed[start // 2 : end // 2], scales[start // BLOCK : end // BLOCK], workspace
        )
    offset = scales.mean()
    codes, nested_scales = _quantize_scales(scales - offset)
    packed = packed[: (weight.numel() + 1) // 2].unsqueeze(1)
    return Nf4(packed, tuple(weight.shape), weight.dtype, codes, nested_scales, offset.item())


def _quantize_chunk(weights: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, workspace: _Workspace) -> None:
    """Quantise whole blocks into `packed` and `scales`, views of the results."""
    size = weights.numel()
    scaled, positions = workspace.scaled[:size], workspace.positions[:size]
    cells, levels = workspace.cells[:size], workspace.levels[:size]
    scales.copy_(_largest_magnitudes(weights.view(-1, BLOCK)))
    if not scales.isfinite().all():
        raise ValueError("it holds NaN or infinite values")
    scaled.copy_(weights)
    scaled.view(-1, BLOCK).mul_(scales.clamp(min=_SMALLEST_SCALE).reciprocal().unsqueeze(1))
    torch.add(_HALF_CELLS, scaled, alpha=_CELLS / 2, out=positions)
    cells.copy_(positions)
    torch.index_select(_LEVEL_OF_CELL, 0, cells, out=levels)
    _decide(levels, scaled)
    pairs = levels.view(torch.int16)  # little-endian: the first weight of a pair is the low byte
    packed.copy_((pairs << 4) | (pairs >> 8))


_HALF_CELLS = torch.tensor(_CELLS / 2)


def _largest_magnitudes(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row, found on the bits without the sign: they order as the numbers, NaN on top."""
    bits = blocks.view(torch.int32 if blocks.dtype == torch.float32 else torch.int16)
    return (bits & torch.iinfo(bits.dtype).max).amax(dim=-1).view(blocks.dtype)


def _decide(levels: torch.Tensor, scaled: torch.Tensor) -> None:
    """Settle the undecided levels, found eight at a time by the high bit that no level has."""
    high_bits = torch.tensor(-0x7F7F7F7F7F7F7F80, dtype=torch.int64)
    groups = (levels.view(torch.int64) & high_bits).nonzero()
    places = (groups * 8 + torch.arange(8)).view(-1)
    levels[places] = torch.bucketize(scaled[places], _BOUNDARIES, out_int32=True).to(torch.uint8)


def _quantize_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The second quantisation: 8-bit codes of `scales`, and one scale for every 256 of them."""
    blocks = torch.nn.functional.pad(scales, (0, -scales.numel() % _NESTED_BLOCK)).view(-1, _NESTED_BLOCK)
    largest = blocks.abs().amax(dim=-1)
    normal = (blocks * largest.reciprocal().unsqueeze(1)).nan_to_num(nan=-1.0).clamp(-1, 1)
    cells = ((normal + 1) * 0.5 * (_NESTED_CELLS - 1) + 0.5).int()
    codes = torch.index_select(_CODE_OF_CELL, 0, cells.view(-1))
    return codes[: scales.numel()], largest
