"""The chat endpoint of the OpenAI API on weights, through Transformers: for where no GGUF file was made.

`python -m components.serve.weights FOLDER --alias NAME --host HOST --port PORT`. One answer at a time.
"""

import argparse
import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from components.errors import user_errors
from components.models import choose_dtype, device


class Request(BaseModel):
    """What is read of a request; other fields of the API are refused, because ignoring them would change answers."""

    model_config = {"extra": "forbid"}

    model: str = ""
    messages: list[dict[str, str]] = Field(min_length=1)
    stream: bool = False
    max_tokens: int = Field(512, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    repeat_penalty: float | None = None  # llama.cpp's name of the same


class _Stopped(StoppingCriteria):
    """Ends a generation that nobody waits for any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class Model:
    """A model folder in memory."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=choose_dtype("auto"), device_map={"": device()}, trust_remote_code=False, use_safetensors=True
        )
        self._lock = threading.Lock()

    def answer(self, request: Request) -> Iterator[str]:
        """The answer, piece by piece; closing the iterator ends the generation."""
        inputs = self._tokenizer.apply_chat_template(
            request.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device())
        streamer = TextIteratorStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = _Stopped()
        drawn = {"temperature": request.temperature, "top_p": request.top_p} if request.temperature else {}
        options = {
            **inputs,
            **drawn,
            "do_sample": bool(request.temperature),
            "max_new_tokens": request.max_tokens,
            "repetition_penalty": request.repetition_penalty,
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([stopped]),
            "pad_token_id": self._tokenizer.eos_token_id,
        }
        with self._lock:
            generation = _Generation(self._model, options, streamer)
            try:
                yield from streamer
            finally:
                stopped.event.set()
                generation.join()
            if generation.error:
                raise generation.error


class _Generation(threading.Thread):
    """A generation on its way; whatever becomes of it, its reader is told that it has ended."""

    def __init__(self, model: Any, options: dict[str, Any], streamer: TextIteratorStreamer) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._model, self._options, self._streamer = model, options, streamer
        self.start()

    def run(self) -> None:
        try:
            self._model.generate(**self._options)
        except Exception as error:
            self.error = error
            self._streamer.end()


def build(model: Model, alias: str) -> FastAPI:
    """The server."""
    app = FastAPI(title=alias, openapi_url=None)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": alias, "object": "model", "owned_by": "tune16"}]}

    @app.post("/v1/chat/completions", response_model=None)
    def chat(request: Request) -> JSONResponse | StreamingResponse:
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": alias}
        if request.stream:
            return StreamingResponse(_events(model.answer(request), head), media_type="text/event-stream")
        message = {"role": "assistant", "content": "".join(model.answer(request))}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice]})

    return app


def _events(pieces: Iterator[str], head: dict[str, Any]) -> Iterator[str]:
    def event(delta: dict[str, str], reason: str | None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"

    for piece in pieces:
        yield event({"content": piece}, None)
    yield event({}, "stop")
    yield "data: [DONE]\n\n"


def main() -> None:
    """Serve the folder of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    app = build(Model(arguments.folder), arguments.alias)
    uvicorn.run(app, host=arguments.host, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    with user_errors():
        main()
