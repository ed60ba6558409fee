"""CPU and memory that each step asks for; training and evaluation also take one GPU. Compiler and doctor read it."""

RESOURCES = {
    "preflight": ("500m", "1Gi"),
    "prepare": ("2", "4Gi"),
    "quantize": ("2", "4Gi"),
    "train": ("4", "24Gi"),
    "evaluate": ("2", "16Gi"),
    "merge": ("2", "4Gi"),
    "convert": ("4", "20Gi"),
    "upload": ("1", "2Gi"),
    "register": ("500m", "1Gi"),
    "deploy": ("500m", "1Gi"),
}
