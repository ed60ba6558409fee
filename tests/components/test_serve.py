"""What real clients of the OpenAI API send, against both kinds of server: answered, or refused in its own words."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.convert import llamacpp
from components.convert.tokenizer import stage
from components.models.pieces import token_text
from components.playground.client import Endpoint, Sampling
from components.playground.serve.api import Writer, _overlap
from components.playground.serve.server import check_port, running
from components.playground.serve.target import find_target
from components.runtime.errors import Tune16Error

pytestmark = pytest.mark.slow
ASK = [{"role": "user", "content": "two red lamps"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' and loop.first %}"
    "{{ raise_exception('the user begins') }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, which goes on for ever: no answer ends by itself."""
    folder = tmp_path_factory.mktemp("served") / "model"
    base = make_model("llama", dtype=torch.float32, initializer_range=0.2, max_position_embeddings=96)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_client_that_is_gone_is_missed_while_the_answer_goes_on() -> None:
    class Gone:
        async def is_disconnected(self) -> bool:
            return True

    async def read() -> int:
        writer = Writer([], 10_000)

        async def write() -> None:
            while not writer.is_done:
                writer.add("x")
                await asyncio.sleep(0.01)

        writing = asyncio.create_task(write())
        text = "".join([piece async for piece in writer.pieces(Gone())])  # type: ignore[arg-type]
        await writing
        return len(text)

    assert 0 < asyncio.run(read()) < 10_000


def test_a_token_of_any_length_has_its_text() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    file = Path(llama_cpp.__file__).parent / "converter" / "models" / "ggml-vocab-qwen2.gguf"
    if not file.is_file():
        pytest.skip("the converter's vocabularies are not here")
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    for text in ("-" * 64, "=" * 80, " " * 40 + "x = 1", "plain"):
        tokens = model.tokenize(text.encode(), add_bos=False)
        assert b"".join(token_text(vocabulary, token) for token in tokens) == text.encode()


@pytest.fixture(scope="module", params=["weights", "gguf"])
def server(folder: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = folder
    if request.param == "gguf":
        tools = llamacpp.converter()
        if tools is None:
            pytest.skip("llama.cpp is not built here: `make llama`")
        place = tmp_path_factory.mktemp("gguf") / "model-F16.gguf"
        llamacpp.convert_weights(tools, stage(folder, place.parent / "staged"), place, "tiny")
    with running(find_target(place), "tiny", 256) as endpoint:
        yield endpoint.url


def post(url: str, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": ASK, "temperature": 0, "max_tokens": 6, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def answer(url: str, **fields: Any) -> tuple[str, str, dict[str, int]]:
    content = post(url, **fields).raise_for_status().json()
    (choice,) = content["choices"]
    assert content["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    return choice["message"]["content"], choice["finish_reason"], content["usage"]


def events(url: str, **fields: Any) -> list[dict[str, Any]]:
    lines = post(url, stream=True, **fields).raise_for_status().text.strip().split("\n\n")
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_an_answer_says_how_it_ended_and_what_it_took(server: str) -> None:
    text, reason, usage = answer(server)
    assert reason == "length" and usage["completion_tokens"] == 6
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert answer(server, max_tokens=None, max_completion_tokens=6) == (text, reason, usage)
    stop = text[len(text) // 2 :][:3]
    cut, reason, _ = answer(server, stop=stop)
    assert reason == "stop" and cut == text[: text.index(stop)]
    assert answer(server, stop=["never", stop])[:2] == (cut, "stop")
    assert answer(server, max_tokens=1000)[1] == "length", "the model's own context ends it"


def test_a_stream_has_role_pieces_reason_and_usage(server: str) -> None:
    text, _, usage = answer(server)
    first, *rest = events(server, stream_options={"include_usage": True})
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert rest.pop()["usage"] == usage
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in rest) == text
    assert all("usage" not in event for event in events(server))


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "top_p": 1, "user": "anna", "logit_bias": {}},
        {"store": False, "metadata": {"a": "b"}, "parallel_tool_calls": False, "service_tier": "auto", "chat_id": "x"},
        dict.fromkeys(("stop", "stream", "top_p", "tools", "n", "seed", "max_completion_tokens")),
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "logprobs": False},
        {"messages": [{"role": "user", "name": "anna", "content": "two red lamps"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("two ", "red lamps")]}]},
        {"model": ""},
    ],
)  # fmt: skip
def test_what_means_nothing_changes_nothing(server: str, fields: dict[str, Any]) -> None:
    assert answer(server, **fields) == answer(server)


def test_a_developer_is_the_system(server: str) -> None:
    texts = [answer(server, messages=[{"role": role, "content": "Be kind."}, *ASK]) for role in ("system", "developer")]
    assert texts[0] == texts[1] != answer(server)


@pytest.mark.parametrize(
    ("fields", "status", "told"),
    [
        ({"n": 2}, 400, "n is not supported"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"stop": 5}, 400, "stop: "),
        ({"stop": {"a": 1}}, 400, "stop: "),
        ({"seed": 2**70}, 400, "seed: "),
        ({"grammar": "root ::= [0-9]"}, 400, "grammar is not supported"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 400, "chat_template_kwargs is not supported"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"messages": []}, 400, "messages: "),
        ({"messages": "hello"}, 400, "messages: "),
        ({"messages": [{"role": "alien", "content": "x"}]}, 400, "messages[0].role is 'alien'"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content: text is needed"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "has the type 'image_url'"),
        ({"messages": [*ASK, {"role": "tool", "content": "3"}]}, 400, "tool calls are not supported"),
        ({"messages": [{"role": "assistant", "content": "Hi"}, *ASK]}, 400, "the user begins"),
        ({"messages": [{"role": "user", "content": "lamps " * 200}]}, 400, "and the model takes 96"),
        ({"messages": [{"role": "user", "content": "lamps " * 200}], "stream": True}, 400, "and the model takes 96"),
        ({"model": "gpt-4o"}, 404, "There is no model 'gpt-4o' here; the model is 'tiny'"),
        ({"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"logprobs": True}, 400, "logprobs is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
        ({"stop": "x" * 100}, 400, "a stop string has at most 64"),
    ],
)
def test_a_mistake_is_told_in_the_apis_words(server: str, fields: dict[str, Any], status: int, told: str) -> None:
    refusal = post(server, **fields)
    assert refusal.status_code == status and told in refusal.json()["error"]["message"]


def test_addresses_and_bodies_that_are_none(server: str) -> None:
    broken = httpx.post(
        f"{server}/v1/chat/completions", content=b'{"model": ', headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400 and "not valid JSON" in broken.json()["error"]["message"]
    for address in ("/v1/nothing", "/v1/models/gpt-4o"):
        found = httpx.get(server + address)
        assert found.status_code == 404 and found.json()["error"]["message"]
    assert httpx.post(f"{server}/v1/embeddings", json={}).json()["error"]
    assert httpx.get(f"{server}/v1/models/tiny").json()["id"] == "tiny"


def test_after_a_stop_and_beside_an_answer_the_server_answers_at_once(server: str) -> None:
    endpoint = Endpoint(server)

    async def stop() -> None:
        stream = endpoint.stream("tiny", ASK, Sampling(temperature=1.0, max_tokens=80))
        async for piece in stream:
            if piece:
                break
        await stream.aclose()

    wanted = answer(server)
    for _ in range(4):
        asyncio.run(stop())
        assert answer(server) == wanted
    found: list[str] = []
    askers = [threading.Thread(target=lambda: found.append(answer(server)[0])) for _ in range(4)]
    for asker in askers:
        asker.start()
    started = time.monotonic()
    assert httpx.get(f"{server}/v1/models").status_code == 200 and time.monotonic() - started < 30
    for asker in askers:
        asker.join()
    assert found == [wanted[0]] * 4


def test_a_stop_string_is_found_across_tokens_and_nothing_after_it_goes_out() -> None:
    async def write() -> tuple[str, str | None]:
        writer = Writer(["END"], 100)
        for text in ("a E", "N", "x E", "ND", "more"):
            if not writer.is_done:
                writer.add(text)
        writer.end("length")
        return "".join([piece async for piece in writer.pieces(None)]), writer.reason  # type: ignore[arg-type]

    assert asyncio.run(write()) == ("a ENx ", "stop")
    assert [_overlap(text, "END") for text in ("x", "xE", "xEN", "xEND", "")] == [0, 1, 2, 0, 0]


def test_what_is_no_model_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(Tune16Error, match="is not a GGUF file"):
        find_target(tmp_path / "notes.txt")
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF" + b"adapter.lora.alpha\x06\x00\x00\x00")
    with pytest.raises(Tune16Error, match="is an adapter, not a model"):
        find_target(tmp_path / "adapter.gguf")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(Tune16Error, match="has an adapter only"):
        find_target(tmp_path / "peft")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Tune16Error, match="Choose another with --port"):
            check_port("127.0.0.1", taken.getsockname()[1])


def test_a_model_with_a_weight_missing_is_not_served(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(Tune16Error, match="its server ended with exit code 2"),
        running(find_target(tmp_path / "model"), "tiny", 64),
    ):
        pass
