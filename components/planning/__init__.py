"""What a run needs, known before anything runs.

memory      what a training step holds on the GPU, and how it is split
gpus        memory and speed of known GPUs
disk        what each step holds on its node's disk
"""
