"""An OpenAI-compatible server for a model on this disk, as a process of its own.

The process runs :mod:`components.playground.serve.api`. GGUF files are run by llama.cpp, weights by Transformers.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.playground.client import Endpoint
from components.playground.serve.target import Target
from components.runtime.errors import Tune16Error

_START_SECONDS = 600.0  # a large file from a slow disk
_STOP_SECONDS = 10.0


def command(
    target: Target, alias: str, host: str, port: int, context: int, gpu: bool = False, adapter: Path | None = None
) -> list[str]:
    """The command line of the server: `alias` is the model's name in answers, `context` its longest conversation.

    Raises:
        Tune16Error: what it needs is not installed.
    """
    if target.is_gguf:
        _require("llama_cpp", "GGUF files need llama.cpp: `make llama` builds it, with a C++ compiler")
    else:
        _require("torch", "weights need the trainer's packages: pip install 'tune16[trainer,serve]'")
    options = ["--alias", alias, "--host", host, "--port", str(port), "--context", str(context)]
    options += ["--gpu"] if gpu else []
    options += ["--adapter", str(adapter)] if adapter else []
    return [sys.executable, "-m", "components.playground.serve.api", str(target.model), *options]


def _require(package: str, remedy: str) -> None:
    for name in (package, "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise Tune16Error(f"{name} is not installed. {remedy[0].upper()}{remedy[1:]}.")


@contextmanager
def running(target: Target, alias: str, context: int, adapter: Path | None = None) -> Iterator[Endpoint]:
    """The server on a free port of this machine while the block runs.

    Raises:
        Tune16Error: it did not start.
    """
    port = _free_port()
    process = subprocess.Popen(command(target, alias, "127.0.0.1", port, context, adapter=adapter))
    endpoint = Endpoint(f"http://127.0.0.1:{port}")
    try:
        _wait(process, endpoint, target)
        yield endpoint
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Check that the port is free before loading a model, which takes minutes.

    Raises:
        Tune16Error: it is taken, or this machine does not have the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Tune16Error(
                f"{host}:{port}: cannot listen there ({error.strerror}). Choose another with --port or --host."
            ) from None


def _wait(process: "subprocess.Popen[bytes]", endpoint: Endpoint, target: Target) -> None:
    limit = time.monotonic() + _START_SECONDS
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise Tune16Error(f"{target.model}: its server ended with exit code {process.returncode}; see its output.")
        try:
            endpoint.list_models()
            return
        except Tune16Error:
            time.sleep(0.2)
    raise Tune16Error(f"{target.model}: its server did not answer within {_START_SECONDS / 60:.0f} minutes.")


def serve(target: Target, alias: str, host: str, port: int, context: int, gpu: bool = False) -> None:
    """Become the server: it replaces this process, so that signals reach it. Does not return.

    Raises:
        Tune16Error: what it needs is not installed, or the port is taken.
    """
    arguments = command(target, alias, host, port, context, gpu)
    check_port(host, port)
    sys.stdout.flush()
    os.execv(arguments[0], arguments)
