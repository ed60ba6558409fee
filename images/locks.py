"""`make locks`: resolves each image's packages, with hashes, from pyproject.toml within constraints.txt.

uv resolves, because it only reads metadata; pip installs. The CPU build of torch has its own version ("+cpu"), from
torch's index or from TORCH_LINKS, a folder of wheels.
"""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

FOLDER = Path("images/locks")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

_UV = [
    str(Path(sys.executable).with_name("uv")),
    *("pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate", "--upgrade"),
    *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--constraint", "constraints.txt"),
]


def main() -> None:
    """Write all locks."""
    _resolve("tools", "pyproject.toml", "--extra", "signing")
    trainer = ("pyproject.toml", "--extra", "trainer", "--extra", "signing")
    _resolve("trainer-cuda", *trainer)
    _resolve("trainer-cpu", *trainer, torch_on_cpu=True)
    _resolve("gguf", "pyproject.toml", "--extra", "gguf", torch_on_cpu=True)
    _resolve("chat", "-", requirements=_chat_requirements())
    _resolve("kfp", "-", "--no-deps", requirements=f"kfp=={version('kfp')}")


def _chat_requirements() -> str:
    """The few common packages that the chat page needs, and its own."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    names = ("boto3", "httpx2", "pydantic", "pyyaml", "tenacity", "typer")
    shared = [line for line in project["dependencies"] if line.startswith(names)]
    assert len(shared) == len(names)
    return "\n".join([*shared, *project["optional-dependencies"]["chat"]])


def _resolve(name: str, *arguments: str, torch_on_cpu: bool = False, requirements: str = "") -> None:
    environment = dict(os.environ)
    target = FOLDER / f"{name}.txt"
    if torch_on_cpu:
        override = FOLDER / "override.in"
        override.write_text(f"torch=={version('torch').partition('+')[0]}+cpu\n")
        arguments += ("--override", str(override))
        links = os.environ.get("TORCH_LINKS", "")
        environment |= {"UV_FIND_LINKS": links} if links else {"UV_EXTRA_INDEX_URL": TORCH_INDEX}
    command = [*_UV, *arguments, "--output-file", str(target)]
    subprocess.run(command, input=requirements, text=True, check=True, env=environment)
    (FOLDER / "override.in").unlink(missing_ok=True)
    print(f"{target}: {target.read_text().count('==')} packages")


if __name__ == "__main__":
    main()
