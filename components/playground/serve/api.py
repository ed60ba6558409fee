"""The chat endpoint of the OpenAI API for a model on this disk: requests are answered or refused in its format.

`python -m components.playground.serve.api MODEL --alias NAME --host HOST --port PORT`.

A field that would change the answer and is not understood is refused; what means nothing here, or has its neutral
value, is ignored. Every refusal is ``{"error": {"message": …}}`` with a status of 400 or 404. One answer is written
at a time, in a thread; closing the connection ends it.
"""

import argparse
import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, field_validator, model_validator
from starlette.exceptions import HTTPException

from components.runtime.errors import user_errors
from components.runtime.proxies import spare_loopback

Messages = list[dict[str, str]]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields of the API that would change the answer, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    # Of other servers:
    "best_of": (1,),
    "grammar": ("",),
    "json_schema": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "stop_token_ids": ([],),
    "min_tokens": (0,),
    "ignore_eos": (False,),
}
_LOOK_SECONDS = 0.5  # between checks that the client is still there
_HELD_BACK = 64  # characters of a stop string at most


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; None leaves a figure to the model's own settings."""

    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


class Model(Protocol):
    """A model in memory, whatever runs it."""

    context: int  # tokens of its longest conversation, answer included

    def prompt(self, messages: Messages) -> list[int]:
        """The tokens of a conversation up to where the answer begins; ValueError where the template refuses it."""

    def answer(self, prompt: list[int], sampling: Sampling, writer: "Writer") -> None:
        """Write an answer until it ends, or the writer is stopped."""


class Writer:
    """Where a model writes its answer, from its own thread: text is passed on as it comes, up to a stop string.

    Attributes:
        num_tokens: written so far.
        reason: why the answer has ended, by the API's terms; None while it has not.
    """

    def __init__(self, stops: list[str], most_tokens: int) -> None:
        self._stops, self._most_tokens = stops, most_tokens
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[str | None]()
        self._waiting = ""
        self._is_cancelled = threading.Event()
        self.num_tokens = 0
        self.reason: str | None = None
        self.error = ""

    @property
    def is_done(self) -> bool:
        """Whether to stop writing."""
        return self.reason is not None or self._is_cancelled.is_set()

    def cancel(self) -> None:
        """The client has gone."""
        self._is_cancelled.set()

    def add(self, text: str) -> None:
        """Add one token's text, which may be empty."""
        self.num_tokens += 1
        self._waiting += text
        found = min((place for stop in self._stops if (place := self._waiting.find(stop)) >= 0), default=-1)
        if found >= 0:
            self._waiting = self._waiting[:found]
            self.end("stop")
            return
        keep = max((_overlap(self._waiting, stop) for stop in self._stops), default=0)
        self._send(self._waiting[: len(self._waiting) - keep])
        self._waiting = self._waiting[len(self._waiting) - keep :]
        if self.num_tokens >= self._most_tokens:
            self.end("length")

    def end(self, reason: str) -> None:
        """The answer is complete; the first reason counts."""
        if self.reason is None:
            self.reason = reason
            self._send(self._waiting)
            self._put(None)

    def fail(self, error: str) -> None:
        """The answer could not be completed."""
        self.error = error
        self.end("error")

    def _send(self, text: str) -> None:
        if text:
            self._put(text)

    def _put(self, piece: str | None) -> None:
        with suppress(RuntimeError):  # the server has ended, and its loop with it
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def pieces(self, request: Request) -> AsyncIterator[str]:
        """The text as it comes; ends at once where the client has gone."""
        asked = time.monotonic()
        try:
            while True:
                try:
                    piece = await asyncio.wait_for(self._queue.get(), timeout=_LOOK_SECONDS)
                except TimeoutError:
                    piece = ""
                if piece is None:
                    return
                if piece:
                    yield piece
                if time.monotonic() - asked > _LOOK_SECONDS:
                    asked = time.monotonic()
                    if await request.is_disconnected():
                        return
        finally:
            self.cancel()


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class ApiError(Exception):
    """A refusal: its status, its message, and the API's code and parameter."""

    def __init__(self, status: int, message: str, code: str | None = None, parameter: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.parameter = status, code, parameter

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "internal_server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code}}


class ChatRequest(BaseModel):
    """What is read of a request; null is the same as nothing."""

    model: str = ""
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool = False
    stream_options: dict[str, Any] = {}
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    repeat_penalty: float | None = Field(None, gt=0)  # llama.cpp's name of the same
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Drop nulls, and refuse what would change the answer and cannot be done."""
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name, neutral in _NEUTRAL.items():
            if name in given and given[name] not in neutral:
                raise ApiError(400, f"{name} is not supported by this server. Leave it out.", "unsupported", name)
        return given

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        return [text for text in texts if text != ""] if isinstance(texts, list) else texts

    @field_validator("stop")
    @classmethod
    def _is_short(cls, value: list[str]) -> list[str]:
        if any(len(text) > _HELD_BACK for text in value):
            raise ValueError(f"a stop string has at most {_HELD_BACK} characters")
        return value

    def conversation(self) -> Messages:
        """The messages with text for content and the roles that templates know."""
        return [_message(message, f"messages[{number}]") for number, message in enumerate(self.messages)]

    def sampling(self, room: int) -> Sampling:
        """How to draw the answer, for which there is room for so many tokens."""
        asked = self.max_completion_tokens or self.max_tokens or room
        penalty = self.repetition_penalty or self.repeat_penalty
        names = ("temperature", "top_p", "top_k", "min_p", "seed")
        return Sampling(min(asked, room), repetition_penalty=penalty, **{name: getattr(self, name) for name in names})


def _message(message: dict[str, Any], where: str) -> dict[str, str]:
    role = _ROLES.get(str(message.get("role")))
    if message.get("role") in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise ApiError(400, f"{where}: tool calls are not supported by this server.", "unsupported", "messages")
    if role is None:
        known = ", ".join(_ROLES)
        raise ApiError(400, f"{where}.role is {message.get('role')!r}; known: {known}.", None, "messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise ApiError(400, f"{where}.content: text is needed, or a list of text parts.", None, "messages")
    return {"role": role, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ApiError(400, f"{where} has the type {kind!r}; only text is supported.", "unsupported", "messages")


@dataclass(frozen=True)
class _Answer:
    """One answer in progress, and the response around it."""

    head: dict[str, Any]
    num_prompt: int
    writer: Writer
    start: Callable[[], None]

    @property
    def usage(self) -> dict[str, int]:
        written = self.writer.num_tokens
        return {"prompt_tokens": self.num_prompt, "completion_tokens": written,
                "total_tokens": self.num_prompt + written}  # fmt: skip


def build(model: Model, names: list[str]) -> FastAPI:
    """The server of one model, which goes by the first of `names` and answers to all of them."""
    app = FastAPI(title=names[0], openapi_url=None)
    turn = threading.Lock()

    def write(prompt: list[int], sampling: Sampling, writer: Writer) -> None:
        with turn:
            try:
                if not writer.is_done:
                    model.answer(prompt, sampling, writer)
                writer.end("stop")
            except Exception as error:  # reported to the client, and the next one is served
                writer.fail(f"{type(error).__name__}: {error}")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_entry(name) for name in names]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_name(name, names)
        return _entry(name)

    @app.get("/health")
    @app.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        if asked.model:
            _check_name(asked.model, names)
        try:
            prompt = await asyncio.to_thread(model.prompt, asked.conversation())
        except ValueError as error:
            raise ApiError(400, f"The model's chat template refuses the messages: {error}", None, "messages") from None
        room = model.context - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"The conversation has {len(prompt):,} tokens, and the model takes {model.context:,} with the answer.",
                "context_length_exceeded",
                "messages",
            )
        sampling = asked.sampling(room)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model or names[0]}
        writer = Writer(asked.stop, sampling.max_tokens)
        thread = threading.Thread(target=write, args=(prompt, sampling, writer), daemon=True)
        answer = _Answer(head, len(prompt), writer, thread.start)
        if asked.stream:
            with_usage = bool(asked.stream_options.get("include_usage"))
            return StreamingResponse(_events(answer, request, with_usage), media_type="text/event-stream")
        answer.start()
        text = "".join([piece async for piece in answer.writer.pieces(request)])
        if answer.writer.error:
            raise ApiError(500, answer.writer.error)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": answer.writer.reason, "logprobs": None}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": answer.usage})

    _add_refusals(app)
    return app


def _entry(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "tune16"}


def _check_name(name: str, names: list[str]) -> None:
    if name not in names:
        raise ApiError(404, f"There is no model {name!r} here; the model is {names[0]!r}.", "model_not_found", "model")


async def _events(answer: _Answer, request: Request, with_usage: bool) -> AsyncIterator[str]:
    """The server-sent events of a streamed answer."""

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        content = {**answer.head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(content)}\n\n"

    def delta(content: dict[str, str], reason: str | None = None) -> str:
        more = {"usage": None} if with_usage else {}
        return event([{"index": 0, "delta": content, "finish_reason": reason, "logprobs": None}], **more)

    answer.start()  # here, since nothing would end it for a client that left before
    yield delta({"role": "assistant", "content": ""})
    async for piece in answer.writer.pieces(request):
        yield delta({"content": piece})
    if answer.writer.error:
        yield f"data: {json.dumps(ApiError(500, answer.writer.error).content)}\n\n"
        return
    yield delta({}, answer.writer.reason)
    if with_usage:
        yield event([], usage=answer.usage)
    yield "data: [DONE]\n\n"


def _add_refusals(app: FastAPI) -> None:
    """Every refusal in the API's own form."""

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.content, error.status)

    @app.exception_handler(RequestValidationError)
    async def refuse_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            place, text = "", f"the body is not valid JSON: {first['ctx']['error']}."
        else:
            text = first["msg"].removeprefix("Value error, ")
        refusal = ApiError(400, f"{place}: {text}" if place else text, None, place.partition(".")[0] or None)
        return await refuse(request, refusal)

    @app.exception_handler(Exception)
    async def tell_fault(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, f"{type(error).__name__}: {error}").content, 500)

    @app.exception_handler(HTTPException)
    async def refuse_address(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {request.url.path}: {error.detail}. There are /v1/chat/completions and /v1/models."
        return await refuse(request, ApiError(error.status_code, text))


def load(place: Path, context: int, gpu: bool, adapter: Path | None) -> Model:
    """The model at `place`: a GGUF file, run by llama.cpp, or a folder of weights, by Transformers.

    Raises:
        Tune16Error: it cannot be loaded.
    """
    if place.is_file():
        from components.playground.serve.gguf import GgufModel

        return GgufModel(place, context, gpu, adapter)
    from components.playground.serve.weights import WeightsModel

    return WeightsModel(place)


def main() -> None:
    """Serve the model of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--adapter", type=Path)
    options = parser.parse_args()
    model = load(options.model, options.context, options.gpu, options.adapter)
    names = list(dict.fromkeys([options.alias, options.alias.partition("@")[0]]))
    uvicorn.run(
        build(model, names), host=options.host, port=options.port, log_level="warning", timeout_graceful_shutdown=2
    )


if __name__ == "__main__":
    spare_loopback()
    with user_errors():
        main()
