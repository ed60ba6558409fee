"""How many threads compute."""

import os


def num_threads() -> int:
    """OMP_NUM_THREADS, which a pod's manifest sets to its CPUs, else one for each processor at hand."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
