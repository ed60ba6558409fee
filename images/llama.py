"""`make llama`: builds llama.cpp from llama-cpp-python's source archive, and adds llama.cpp's converter.

The archive is the one with the hash in images/locks/gguf.txt. What pip builds from it lacks the converter, a set of
scripts and modules; they go into the installed package's folder ``converter``, where the step convert finds them.
"""

import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from install import entry  # beside this script, in the repository and in the images

PACKAGE = "llama-cpp-python"
# Below vendor/llama.cpp in the archive: the two scripts, what they import, and vocabularies for the tests.
WANTED = (
    "LICENSE",
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "conversion/*.py",
    "gguf-py/gguf/*.py",
    "models/ggml-vocab-llama-bpe.gguf",
    "models/ggml-vocab-llama-spm.gguf",
    "models/ggml-vocab-phi-3.gguf",
    "models/ggml-vocab-qwen2.gguf",
)

_TAIL = 60  # lines of a build that failed
_PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def main(lock: Path) -> None:
    """Install llama-cpp-python as pinned in `lock`, with the converter; its dependencies are installed already."""
    with tempfile.TemporaryDirectory() as scratch:
        requirement = Path(scratch) / "llama.txt"
        requirement.write_text(_wanted(lock))
        source = ["--no-deps", "--no-binary", PACKAGE, "--require-hashes", "--requirement", str(requirement)]
        _build(source)
        subprocess.run([*_PIP, "download", *source, "--dest", scratch], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        _extract(archive, Path(sysconfig.get_path("platlib")) / "llama_cpp" / "converter")


def _build(source: list[str]) -> None:
    """Compile and install, with progress lines: it takes many minutes, and pip alone prints nothing."""
    command = [*(part for part in _PIP if part != "--quiet"), "--verbose", "install", *source]
    last: list[str] = []
    said = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            last = [*last[-_TAIL:], line]
            count = re.search(r"\[(\d+)/(\d+)\]", line)
            percent = 100 * int(count[1]) // int(count[2]) if count else 0
            if percent >= said + 10:
                said = percent - percent % 10
                print(f"llama.cpp: {said}% compiled", flush=True)
    if process.returncode:
        sys.exit("".join(last))


def _wanted(lock: Path) -> str:
    """The package's lines in the lock: its version and hashes."""
    found = entry(lock.read_text(), f"{PACKAGE}==")
    assert "--hash=" in found, f"{lock} lacks {PACKAGE} or its hashes"
    return found


def _extract(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as content:
        for member in content:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            if member.isfile() and any(fnmatch(name, wanted) for wanted in WANTED):
                source = content.extractfile(member)
                assert source
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
