"""The 16 GB training engine: what plain Transformers and PEFT do, with less memory and less memory traffic.

    kernels            norms, rotary positions, SwiGLU, dropout, cross-entropy, NF4: one pass over memory each
    triton_kernels     the same on a GPU
    linear             frozen linear layers that share an input, with their adapters
    attention          attention row by row over packed rows
    blocks             the two halves of a decoder layer, forward and backward, and what is kept in between
    loss               cross-entropy over the frozen head in parts
    packing            rows into micro-batches of a fixed number of tokens
    limits             sizes that the memory plan shares
    engine             a PEFT model's forward and backward from these parts

The model stays PEFT's and Transformers': the engine reads its layers and owns none. `engine: trl` trains without it.
"""
