"""Benchmarks' common part: a command's seconds and peak memory, and results as JSON with hardware and versions."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "tokenizers")


def run(code: str, *arguments: object) -> dict[str, float]:
    """Run Python code in a process of its own: its seconds and its peak resident memory in MiB."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, code
    return {"seconds": round(time.monotonic() - started, 2), "peak_mib": round(usage.ru_maxrss / 1024)}


def write(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and keep them beside the benchmarks."""
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    versions = {package: version(package) for package in _PACKAGES}
    RESULTS.mkdir(exist_ok=True)
    content = {"figures": figures, "hardware": hardware, "versions": versions}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
