"""The text of a GGUF file's tokens."""

import ctypes
from typing import Any


def token_text(vocabulary: Any, token: int) -> bytes:
    """The bytes that a token stands for; empty for special ones.

    llama-cpp-python's own `detokenize` gives nothing for tokens of more than 32 bytes, such as the rule of a table.

    Args:
        vocabulary: llama.cpp's, of a loaded model.
        token: its id.
    """
    import llama_cpp

    size = 32
    while True:
        buffer = ctypes.create_string_buffer(size)
        count = llama_cpp.llama_token_to_piece(vocabulary, token, buffer, size, 0, False)
        if count >= 0:
            return buffer.raw[:count]
        size = -count
