"""The chat page: one question, the answers of base and tuned model side by side, and thumbs that become a data set.

Gradio under uvicorn, mounted in FastAPI: so it stops when a pod is told to, has an address for probes, and asks no
other host for anything.
"""

import asyncio
import html
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

# Before Gradio is imported: no usage data is sent, nor summed up with pandas, which warns.
os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_ANALYTICS_CACHE_FREQUENCY=str(10**9), HF_HUB_OFFLINE="1")

import gradio as gr
import uvicorn
from fastapi import FastAPI

from components.playground.chat.votes import Vote, record_vote
from components.playground.client import Endpoint, Messages, Sampling
from components.runtime.errors import Tune16Error

Turn = dict[str, Any]

_UPDATE_SECONDS = 0.1
_PAGE: dict[str, Any] = {
    "theme": gr.themes.Base(
        primary_hue="green", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ),
    # Answers may hold links to pictures: the browser fetches none from other hosts.
    "head": "<meta http-equiv=Content-Security-Policy content=\"img-src 'self' data:; connect-src 'self'\">",
    "css": ".icon-button[title=Clear] {display: none} footer {display: none !important}",  # it empties one column only
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "ssr_mode": False,
    "max_file_size": "1kb",
}


@dataclass(frozen=True)
class Column:
    """One model of the page: its title, its server, and its name there (empty: the first that the server names)."""

    title: str
    endpoint: Endpoint
    model: str


def serve_page(columns: list[Column], feedback: str, host: str, port: int) -> None:
    """Serve the page until the process is told to stop."""
    uvicorn.run(build_app(columns, feedback), host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)


def build_app(columns: list[Column], feedback: str) -> FastAPI:
    """The page at ``/`` and a probe at ``/healthz``; with an empty `feedback` there are no thumbs."""
    app = FastAPI(openapi_url=None)
    app.get("/healthz")(lambda: "ok")
    mounted: FastAPI = gr.mount_gradio_app(app, build_page(columns, feedback), "/", **_PAGE)
    return mounted


def build_page(columns: list[Column], feedback: str) -> gr.Blocks:
    """The page itself. One event drives all columns: while it runs, Send and Enter are ignored."""

    async def converse(
        question: str,
        systems: list[str],
        earlier: list[list[Turn]],
        system: str,
        temperature: float,
        max_tokens: int,
        top_p: float,
        penalty: float,
    ) -> AsyncIterator[Any]:
        if not question.strip():
            return
        histories = [[*history, {"role": "user", "content": question}] for history in earlier]
        yield "", [*systems, system], histories, *histories
        sampling = Sampling(temperature, top_p, int(max_tokens), penalty)
        tasks = [
            asyncio.create_task(_answer(column, system, history, sampling))
            for column, history in zip(columns, histories, strict=True)
        ]
        try:  # Stop, Clear and a closed tab end this at a yield or a wait, and with it the requests
            while (await asyncio.wait(tasks, timeout=_UPDATE_SECONDS))[1]:
                yield gr.skip(), gr.skip(), gr.skip(), *histories
            await asyncio.gather(*tasks)
            yield gr.skip(), gr.skip(), gr.skip(), *histories
        finally:
            for task in tasks:
                task.cancel()

    with gr.Blocks(title="Base and tuned model", analytics_enabled=False, fill_height=True) as page:
        gr.Markdown("# Base and tuned model" if len(columns) > 1 else f"# {columns[0].title}")
        system = gr.Textbox(label="System prompt", lines=1, elem_id="system")
        with gr.Row():
            chats = [
                gr.Chatbot(label=column.title, elem_id=f"chat-{number}", buttons=["copy"], height=420)
                for number, column in enumerate(columns)
            ]
        with gr.Row():
            box = gr.Textbox(show_label=False, placeholder="Your question", elem_id="question", scale=8)
            send = gr.Button("Send", elem_id="send", variant="primary")
            stop, clear = gr.Button("Stop", elem_id="stop"), gr.Button("Clear", elem_id="clear")
        with gr.Row():
            sliders = [
                gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", elem_id="temperature"),
                gr.Slider(1, 4096, 512, step=1, label="Tokens at most", elem_id="max-tokens"),
                gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p", elem_id="top-p"),
                gr.Slider(0.8, 2, 1, step=0.05, label="Repetition penalty", elem_id="repetition-penalty"),
            ]
        # Kept here and not in the browser, which could say anything: the system prompt of every question, and what was
        # asked and answered. A vote is on that.
        systems, histories = gr.State([]), gr.State([[] for _ in columns])
        run = gr.on(
            [send.click, box.submit],
            converse,
            [box, systems, histories, system, *sliders],
            [box, systems, histories, *chats],
        )
        stop.click(None, cancels=run)
        clear.click(None, cancels=run).then(
            lambda: [[], [[] for _ in columns], *([] for _ in columns)], None, [systems, histories, *chats]
        )
        for number, (chat, column) in enumerate(zip(chats, columns, strict=True)):
            if feedback:
                chat.like(_voter(number, column, feedback), [histories, systems], None)
    queued: gr.Blocks = page.queue(default_concurrency_limit=16, max_size=64)  # the default is one visitor at a time
    return queued


async def _answer(column: Column, system: str, history: list[Turn], sampling: Sampling) -> None:
    """Stream an answer into `history`; errors become a notice there and at the top of the page."""
    turn: Turn = {"role": "assistant", "content": ""}
    try:
        endpoint = await asyncio.to_thread(column.endpoint.answering)
        model = column.model or (await asyncio.to_thread(endpoint.list_models))[0]
        async for piece in endpoint.stream(model, to_messages(system, history), sampling):
            if not turn["content"]:
                piece = piece.lstrip()
                if piece:
                    history.append(turn)
            turn["content"] += piece
        if not turn["content"]:
            raise Tune16Error("it ended its answer at once.")
    except Tune16Error as error:
        why = html.escape(str(error))
        gr.Warning(f"{html.escape(column.title)} gave no answer: {why}", duration=20)
        history.append({"role": "assistant", "content": why, "metadata": {"title": "⚠ No answer"}})


def to_messages(system: str, history: list[Turn]) -> Messages:
    """A column's history as a conversation, without notices and the questions that got them: roles alternate."""
    messages: Messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    question = ""
    for turn in history:
        text = _text(turn).strip()
        if turn["role"] == "user":
            question = text
        elif text and not (turn.get("metadata") or {}).get("title"):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    if history and history[-1]["role"] == "user":
        messages.append({"role": "user", "content": question})
    return messages


def _text(turn: Turn) -> str:
    """A turn's text; what comes back from the page is a list of parts."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _voter(number: int, column: Column, feedback: str) -> Callable[..., None]:
    def vote(event: gr.LikeData, histories: list[list[Turn]], systems: list[str]) -> None:
        names: dict[Any, Vote] = {True: "up", False: "down"}
        given = names.get(event.liked, "")
        turns = histories[number][: event.index + 1]  # type: ignore[operator]
        if not turns or turns[-1]["role"] != "assistant":
            return  # of an answer that is not there
        system = systems[sum(turn["role"] == "user" for turn in turns) - 1]
        messages = to_messages(system, turns)
        try:
            record_vote(feedback, messages, column.model or column.title, given)
        except (Tune16Error, OSError) as error:
            gr.Warning(f"Your vote could not be saved: {html.escape(str(error))}", duration=20)
            return
        gr.Info(f"{html.escape(column.title)}: thumbs {given}" if given else "Your vote was withdrawn")

    return vote
