"""Sizes that the engine works with. No torch here: the memory plan reads them, too."""

from math import ceil

MLP_TOKENS = 8192  # the MLP takes this many tokens at once, so that its memory does not grow with long rows
ROUND_TOKENS = 64  # packed rows are padded to a multiple, so that allocations recur in the same sizes
_LOGITS_AT_ONCE, _LEAST_LOSS_TOKENS = 2**25, 256


def loss_tokens(vocabulary: int) -> int:
    """Tokens whose logits exist at once."""
    return max(_LEAST_LOSS_TOKENS, _LOGITS_AT_ONCE // vocabulary // _LEAST_LOSS_TOKENS * _LEAST_LOSS_TOKENS)


def keep_order(num_blocks: int) -> list[int]:
    """The order in which blocks may keep their activations: MLPs before attentions, late layers before early ones.

    MLPs save most time per byte, and what a late layer keeps is gone when the backward comes to the others.
    """
    return [*range(num_blocks - 1, 0, -2), *range(num_blocks - 2, -1, -2)]


def round_up(tokens: int) -> int:
    """The size of a micro-batch with room for so many tokens."""
    return ceil(tokens / ROUND_TOKENS) * ROUND_TOKENS
