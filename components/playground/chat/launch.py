"""What `chat` starts: the page, and servers for a model on this disk where no address is given."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

from components.playground.client import Endpoint
from components.playground.serve.server import check_port, running
from components.playground.serve.target import find_target, write_inverse
from components.runtime.errors import Tune16Error
from components.runtime.steps import say

TOKEN_VARIABLE = "TUNE16_CHAT_TOKEN"


def chat(place: Path, tuned: str, base: str, feedback: str, host: str, port: int, context: int) -> None:
    """Serve the chat page until the process is told to stop.

    Args:
        place: where a model is on this disk, as :mod:`components.playground.serve.target` looks for it; ignored
            with `tuned`.
        tuned: address of the tuned model's server, with ``#name`` where it serves several; empty starts one here.
        base: the same of the base model. Without it, the base model is the tuned GGUF file with its adapter taken away.
        feedback: where thumbs are saved, ``s3://…`` or a folder; empty: there are none.
        host: address to listen on.
        port: the page's port.
        context: longest conversation in tokens of the servers started here.

    Raises:
        Tune16Error: there is no model, or the packages are missing that run it.
    """
    try:
        from components.playground.chat.page import Column, serve_page
    except ModuleNotFoundError as error:
        raise Tune16Error(f"{error.name} is not installed: pip install 'tune16[chat]'.") from None
    check_port(host, port)
    columns: list[Column] = []
    with ExitStack() as stack:
        if tuned:
            titled = (("Base model", base), ("Tuned model", tuned))
            columns = [Column(title, *_remote(url, tuned)) for title, url in titled if url]
        else:
            target = find_target(place)
            say("chat", f"loading {target.model}")
            if base:
                columns.append(Column("Base model", *_remote(base, tuned)))
            elif target.adapter:
                inverse = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "inverse.gguf"
                write_inverse(target.adapter, inverse)
                columns.append(
                    Column("Base model", stack.enter_context(running(target, "base", context, inverse)), "base")
                )
            columns.append(Column("Tuned model", stack.enter_context(running(target, "tuned", context)), "tuned"))
        say("chat", f"http://{host}:{port}" + (f"; thumbs are saved to {feedback}" if feedback else ""))
        serve_page(columns, feedback, host, port)


def _remote(address: str, tuned: str) -> tuple[Endpoint, str]:
    """A server and a model's name there. The token is the tuned model's server's: no other host gets it."""
    url, model = urldefrag(address)
    token = os.environ.get(TOKEN_VARIABLE, "") if urlsplit(url).netloc == urlsplit(tuned).netloc else ""
    return Endpoint(url, token), model
