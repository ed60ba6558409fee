"""How many threads compute: libraries count a node's processors, of which a container may use a few only."""

import math
import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def num_threads() -> int:
    """OMP_NUM_THREADS if it is set, else one for each processor that this process may use."""
    own = os.environ.get("OMP_NUM_THREADS")
    return int(own) if own else min(len(os.sched_getaffinity(0)), _limit() or 1 << 20)


def limit_threads() -> None:
    """Let libraries that are imported from now on start no more threads than the container has processors."""
    if _limit():
        os.environ.setdefault("OMP_NUM_THREADS", str(num_threads()))


def _limit() -> int | None:
    """Processors that the control group may use, versions 2 and 1 of the kernel's interface; None without a limit."""
    try:
        if (_GROUP / "cpu.max").is_file():
            quota, period = (_GROUP / "cpu.max").read_text().split()
        else:
            quota, period = ((_GROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return math.ceil(int(quota) / int(period)) if int(quota) > 0 else None
    except (OSError, ValueError):  # without control groups, or with "max"
        return None
