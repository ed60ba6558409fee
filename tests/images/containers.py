"""`make check-images`: the demo's real pipeline, each step in its own image, as a cluster would run it, and the
commands of all other pods.

Every step is a container of an arbitrary user with group 0, on a read-only file system with a writable /tmp, without
capabilities, in a network that has nothing but the S3 server. The adapter must be the one that the same run makes
outside, bit for bit. Runs as root, in a network namespace of its own (`unshare --net`).
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from kfp.local import status
from kfp.local.subprocess_task_handler import SubprocessTaskHandler, run_local_subprocess

from components import images
from components.config import CONNECTION_VARIABLES
from components.runtime.errors import USER_ERROR_EXIT_CODE
from components.storage.files import file_digest
from pipelines.local import LocalRun, run_locally
from pipelines.options import find_recipe

USER = "1000660000:0"  # as OpenShift's restricted-v2 chooses it
MANIFESTS = Path("manifests/components")
SECONDS = 30  # that a command may take to say what it lacks; who is still there then serves
_TIMED_OUT = 255  # of podman, when it has ended a container


def main(folder: Path) -> None:
    """Run the demo outside and inside, and compare."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    os.umask(0o002)  # what kfp lays out must be writable for group 0, as an emptyDir is
    outside = _run(folder / "outside")
    SubprocessTaskHandler.run = _run_in_container
    inside = _run(folder / "inside")
    hashes = {name: _adapter_hash(run) for name, run in (("outside", outside), ("inside", inside))}
    print(f"adapter {hashes}")
    print(f"seconds outside {outside.seconds:.0f}, inside {inside.seconds:.0f}; published {inside.address}")
    assert inside.address and inside.evaluation["verdict"] == outside.evaluation["verdict"] == "promoted"
    assert hashes["inside"] == hashes["outside"], "the images train another adapter than this environment"
    check_commands()
    _check_nothing_is_left()
    owners = {path.stat().st_uid for path in (folder / "inside" / "steps").rglob("adapter_model.safetensors")}
    assert owners == {int(USER.partition(":")[0])}


def _run(folder: Path) -> LocalRun:
    return run_locally(find_recipe("demo"), folder, lambda step, text: print(f"{step:>9} {text}", flush=True))


def _check_nothing_is_left() -> None:
    """See that builds left no folder below /tmp, which no other user could write to."""
    for image in (images.TOOLS, images.TRAINER, images.GGUF, f"{images.REGISTRY}/chat:{images.VERSION}"):
        command = ["podman", "run", "--rm", "--user", USER, *shlex.split(os.environ.get("PODMAN_FLAGS", ""))]
        done = subprocess.run([*command, image, "ls", "-A", "/tmp"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "", f"{image}: /tmp holds {done.stdout.split()}"


def check_commands() -> None:
    """Start what the manifests' pods and the steps' own jobs start, with nobody to talk to.

    Each serves, or says in one line what it lacks: the image has all that it loads on its way there.
    """
    for image, command, options in _commands():
        done = subprocess.run(
            [*_podman("--timeout", str(SECONDS), *options), image, *command], capture_output=True, text=True
        )
        said = (done.stdout + done.stderr).strip()
        serves = done.returncode == _TIMED_OUT
        print(f"{image}: {' '.join(command)}: {'serves' if serves else said.rpartition(chr(10))[2]}", flush=True)
        assert (serves or done.returncode == USER_ERROR_EXIT_CODE) and "Traceback" not in said, said


def _commands() -> Iterator[tuple[str, list[str], list[str]]]:
    """Image, command, and what podman is told of the folder of the manifest and of the variables in it."""
    for path in sorted(MANIFESTS.rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            for container in _containers(document):
                image = str(container.get("image", "")).rpartition("/")[2]
                if image.partition(":")[0] in ("tools", "trainer", "gguf", "chat") and "command" in container:
                    named = [entry for entry in container.get("env", []) if "value" in entry]
                    options = [part for entry in named for part in ("--env", f"{entry['name']}={entry['value']}")]
                    options += ["--volume", f"{path.parent.absolute()}:/recipe:ro"]
                    yield f"{images.REGISTRY}/{image}", [*container["command"], *container.get("args", [])], options
    download = ["download", "--path", "a/b", "--part", "adapter", "--output", "/tmp/adapter"]
    yield images.TOOLS, ["python", "-m", "components", *download], []
    yield images.TOOLS, ["python", "-m", "pipelines.cli", "doctor", "demo"], []
    yield images.TRAINER, ["python3", "-m", "components", "train-node", "--source", "s3://a/b"], []


def _containers(part: Any) -> Iterator[dict[str, Any]]:
    """Every entry of a list named `containers`, at any depth."""
    if isinstance(part, dict):
        yield from part.get("containers") or []
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _containers(inner)


def _podman(*options: str) -> list[str]:
    command = ["podman", "run", "--rm", "--user", USER, "--read-only", "--tmpfs", "/tmp:mode=1777"]
    command += ["--network", "host", "--cap-drop", "ALL"]  # this process's own: loopback and the S3 server on it
    command += ["--security-opt", "no-new-privileges", *options]
    return [*command, *shlex.split(os.environ.get("PODMAN_FLAGS", ""))]


def _run_in_container(self: SubprocessTaskHandler) -> status.Status:
    """Stands in for the handler's own `run`: the same command, in the image that the step names."""
    started = time.monotonic()
    root = str(Path(self.pipeline_root).parent)
    variables = [part for name in (*CONNECTION_VARIABLES, "OMP_WAIT_POLICY") for part in ("--env", name)]
    command = [*_podman("--volume", f"{root}:{root}", *variables), self.image, *self.full_command]
    code = run_local_subprocess(command, self.env_vars)
    print(f"container of {self.image} ended with {code} after {time.monotonic() - started:.1f} s")
    return status.Status.SUCCESS if code == 0 else status.Status.FAILURE


def _adapter_hash(run: LocalRun) -> str:
    (path,) = (run.folder / "steps").glob("*/train/adapter/adapter_model.safetensors")
    return file_digest(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
