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


_TEMPLATE = """
import json, sys, time
from pathlib import Path
started = time.monotonic()
{imports}
imported = time.monotonic()
{work}
ended = time.monotonic()
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print()
print(json.dumps({{"imports_s": imported - started, "work_s": ended - imported, "peak_mib": round(peak / 1024)}}))
"""


def run(imports: str, work: str, *arguments: object) -> dict[str, float]:
    """Run Python code in a process of its own, `imports` first.

    Returns:
        ``seconds`` of the whole process, of which ``imports_s`` and ``work_s``, and ``peak_mib``, its peak resident
        memory. (The kernel's `ru_maxrss` would count the parent's memory too.)
    """
    started = time.monotonic()
    code = _TEMPLATE.format(imports=imports, work=work)
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": round(time.monotonic() - started, 2)} | {name: round(x, 2) for name, x in figures.items()}


def write(name: str, figures: dict[str, Any]) -> None:
    """Print the figures and keep them beside the benchmarks."""
    hardware = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    versions = {package: version(package) for package in _PACKAGES}
    RESULTS.mkdir(exist_ok=True)
    content = {"figures": figures, "hardware": hardware, "versions": versions}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
