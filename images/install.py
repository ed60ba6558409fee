"""`python install.py INDEX LOCK… [--without PACKAGE]`: installs locks into the environment that runs this.

pip asks every index for every package. So torch is installed by itself where the lock has its CPU build, which only
torch's own INDEX has, and before all else: where that index cannot be reached, it is known at once.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_PIP = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes"]


def main(index: str, locks: list[Path], without: str) -> None:
    """Install `locks` but for the package `without`."""
    for lock in locks:
        text = lock.read_text()
        torch = entry(text, r"torch==\S*\+cpu")
        if torch:
            _install(torch, "--extra-index-url", index)
        left_out = entry(text, rf"{re.escape(without)}==\S*") if without else ""
        _install(text.replace(torch, "").replace(left_out, ""))


def entry(lock: str, requirement: str) -> str:
    """A package's lines in a lock, its version and hashes; empty where it is not there."""
    found = re.search(rf"^{requirement}.*\n(?:[ \t]+--hash=.*\n?)*", lock, re.MULTILINE)
    return found[0] if found else ""


def _install(requirements: str, *options: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        code = subprocess.run([*_PIP, *options, "--requirement", file.name]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("index")
    parser.add_argument("locks", type=Path, nargs="+")
    parser.add_argument("--without", default="")
    given = parser.parse_args()
    main(given.index, given.locks, given.without)
