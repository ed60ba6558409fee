"""`make check-images`: the demo's real pipeline, each step in its own image, as a cluster would run it.

Every step is a container of an arbitrary user with group 0, on a read-only file system with a writable /tmp, without
capabilities, in a network that has nothing but the S3 server. The adapter must be the one that the same run makes
outside, bit for bit. Runs as root, in a network namespace of its own (`unshare --net`).
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from kfp.local import status
from kfp.local.subprocess_task_handler import SubprocessTaskHandler, run_local_subprocess

from components.config import CONNECTION_VARIABLES
from components.references import file_digest
from pipelines.local import LocalRun, run_locally
from pipelines.options import find_recipe

USER = "1000660000:0"  # as OpenShift's restricted-v2 chooses it


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
    owners = {path.stat().st_uid for path in (folder / "inside" / "steps").rglob("adapter_model.safetensors")}
    assert owners == {int(USER.partition(":")[0])}


def _run(folder: Path) -> LocalRun:
    return run_locally(find_recipe("demo"), folder, lambda step, text: print(f"{step:>9} {text}", flush=True))


def _run_in_container(self: SubprocessTaskHandler) -> status.Status:
    """Stands in for the handler's own `run`: the same command, in the image that the step names."""
    started = time.monotonic()
    root = str(Path(self.pipeline_root).parent)
    command = ["podman", "run", "--rm", "--user", USER, "--read-only", "--tmpfs", "/tmp:mode=1777"]
    command += ["--network", "host", "--cap-drop", "ALL"]  # this process's own: loopback and the S3 server on it
    command += ["--security-opt", "no-new-privileges", "--volume", f"{root}:{root}"]
    command += [part for name in (*CONNECTION_VARIABLES, "OMP_WAIT_POLICY") for part in ("--env", name)]
    command += [*shlex.split(os.environ.get("PODMAN_FLAGS", "")), self.image, *self.full_command]
    code = run_local_subprocess(command, self.env_vars)
    print(f"container of {self.image} ended with {code} after {time.monotonic() - started:.1f} s")
    return status.Status.SUCCESS if code == 0 else status.Status.FAILURE


def _adapter_hash(run: LocalRun) -> str:
    (path,) = (run.folder / "steps").glob("*/train/adapter/adapter_model.safetensors")
    return file_digest(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
