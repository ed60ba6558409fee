"""`python install.py INDEX LOCK… [--without PACKAGE]`: installs locks into the current environment.

pip queries every index for every package. So the CPU build of torch, which only torch's own INDEX has, is installed
separately, and first: an index that cannot be reached is noticed at once.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

_PIP = [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes"]


def main(index: str, locks: list[Path], without: str) -> None:
    """Install `locks`, except for the package `without`."""
    for lock in locks:
        text = lock.read_text()
        torch = entry(text, r"torch==\S*\+cpu")
        if torch:
            _install(torch, "--extra-index-url", index)
        left_out = entry(text, rf"{re.escape(without)}==\S*") if without else ""
        _install(text.replace(torch, "").replace(left_out, ""))


def entry(lock: str, requirement: str) -> str:
    """A package's lines in a lock, its version and hashes; empty if the lock does not have it."""
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
