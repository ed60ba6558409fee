"""The chat page in a real browser, the servers behind it, and the votes that become a data set."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.config import PrepareConfig
from components.convert import llamacpp
from components.convert.tokenizer import stage
from components.playground.chat.votes import record_vote
from components.playground.client import Endpoint, Sampling
from components.playground.serve.server import running
from components.playground.serve.target import Target, find_target
from components.prepare.dataset import prepare_dataset
from components.runtime.errors import Tune16Error
from components.storage import s3
from tests.browser import CHROMIUM, Page

SCREENSHOTS = os.environ.get("TUNE16_SCREENSHOTS")
GREEDY = Sampling(temperature=0, max_tokens=12)


class FakeModel(ThreadingHTTPServer):
    """An endpoint that answers with words of its choice, slowly, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, words: list[str], pause: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.words, self.pause = words, pause
        self.asked: list[dict[str, Any]] = []
        self.raw: bytes | None = None  # what it answers instead
        self.hung_up = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "FakeModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: FakeModel

    def do_GET(self) -> None:
        self._say(json.dumps({"data": [{"id": "fake"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if self.server.raw is not None:
            self._say(self.server.raw)
            return
        self.send_response(200)
        self.end_headers()
        try:
            for word in self.server.words:
                event = {"choices": [{"index": 0, "delta": {"content": word}}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                time.sleep(self.server.pause)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.hung_up.set()

    def _say(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def open_page() -> Iterator[Callable[..., Page]]:
    """`python -m components chat` as a process, and a browser on it."""
    processes, pages = [], []

    def open_(tuned: str, base: str, feedback: str) -> Page:
        port = free_port()
        command = [sys.executable, "-m", "components", "chat", "--port", str(port), "--tuned", tuned, "--base", base]
        processes.append(subprocess.Popen([*command, "--feedback", feedback]))
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        page = Page(url)
        pages.append(page)
        page.wait("document.querySelector('#question textarea') && document.querySelector('#chat-1')")
        return page

    yield open_
    for page in pages:
        page.__exit__()
    for process in processes:
        process.terminate()
        assert process.wait(10) in (0, -15), "a page that is told to stop does so by itself"


def show(page: Page, name: str) -> None:
    if SCREENSHOTS:
        time.sleep(0.5)
        page.screenshot(Path(SCREENSHOTS) / f"{name}.png")


needs_browser = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium")


@pytest.mark.slow
@needs_browser
def test_a_question_streams_two_answers_and_sliders_and_votes_arrive(
    open_page: Callable[..., Page], bucket: str
) -> None:
    with FakeModel(["I ", "am ", "the ", "base."], 0.3) as base, FakeModel([" I ", "am ", "tuned."], 0.3) as tuned:
        page = open_page(tuned.url, f"{base.url}/v1#foundation", f"s3://{bucket}/tune16/demo/feedback")
        page.fill("#system textarea", "Be brief.")
        for name, value in (
            ("temperature", "0.3"),
            ("max-tokens", "77"),
            ("top-p", "0.5"),
            ("repetition-penalty", "1.3"),
        ):
            page.fill(f"#{name} input[type=number]", value)
        page.fill("#question textarea", "Who are you?")
        page.click("#send")
        page.wait_for_text("#chat-0", "I am")
        assert "base." not in page.text("#chat-0"), "the answer grows while it is read"
        page.wait_for_text("#chat-0", "I am the base.")
        page.wait_for_text("#chat-1", "I am tuned.")
        wanted = {"temperature": 0.3, "max_tokens": 77, "top_p": 0.5, "repetition_penalty": 1.3, "repeat_penalty": 1.3}
        conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
        for model, name in ((base, "foundation"), (tuned, "fake")):
            assert model.asked == [{"model": name, "messages": conversation, "stream": True, **wanted}]
        page.fill("#system textarea", "Be long.")  # too late for what was asked
        page.click("#chat-1 button[title=Like]")
        page.click("#chat-0 button[title=Dislike]")
        show(page, "chat-votes")
        places = wait_for_objects(bucket, "tune16/demo/feedback/", 2)
        up, down = sorted(places, key=lambda key: "/down/" in key)
        row = json.loads(s3.read(bucket, up) or b"")
        assert row == {
            "messages": [*conversation, {"role": "assistant", "content": "I am tuned."}],
            "model": "Tuned model",
        }
        assert "/down/" in down
        hosts = {url.split("/")[2] for url in page.requests if url.startswith("http")}
        assert all(host.startswith("127.0.0.1") for host in hosts), "the page asks no other host for anything"


def wait_for_objects(bucket: str, prefix: str, count: int) -> list[str]:
    for _ in range(100):
        keys = [stored.key for stored in s3.list_objects(bucket, prefix)]
        if len(keys) >= count:
            return keys
        time.sleep(0.1)
    raise AssertionError(f"{keys} under {prefix}")


@pytest.mark.slow
@needs_browser
def test_stop_clear_and_a_dead_endpoint(open_page: Callable[..., Page]) -> None:
    with FakeModel([f"word{n} " for n in range(1000)], 0.1) as tuned:
        page = open_page(tuned.url, f"http://127.0.0.1:{free_port()}", "")
        page.fill("#question textarea", "Tell me a story.")
        page.click("#send")
        page.wait_for_text("#chat-0", "cannot be reached")
        page.wait_for_text("#chat-1", "word3")
        assert "Warning" in page.js("document.body.innerText") and "Base model gave no answer" in page.js(
            "document.body.innerText"
        )
        show(page, "chat-dead-endpoint")
        page.click("#stop")
        assert tuned.hung_up.wait(10), "stopping closes the connection to the server"
        stopped = page.text("#chat-1")
        time.sleep(0.5)
        assert page.text("#chat-1") == stopped
        assert not page.js("!!document.querySelector('#chat-1 button[title=Like]')"), (
            "no thumbs without a place for them"
        )
        page.click("#clear")
        page.wait("!document.querySelector('#chat-1').innerText.includes('word3')")
        assert "story" not in page.text("#chat-0")


def test_votes_move_and_go_and_the_next_fine_tune_reads_them(
    bucket: str, tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    place = f"s3://{bucket}/votes"
    asked = [{"role": "user", "content": "Two lamps?"}, {"role": "assistant", "content": "count: two; item: lamps"}]
    record_vote(place, asked, "tuned", "down")
    record_vote(place, asked, "tuned", "up")
    keys = [stored.key for stored in s3.list_objects(bucket, "votes/")]
    assert len(keys) == 1 and keys[0].startswith("votes/up/")
    record_vote(place, asked, "tuned", "")
    assert not s3.list_objects(bucket, "votes/")
    for number in range(12):
        question = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Lamps for room {number}?"},
        ]
        record_vote(place, [*question, {"role": "assistant", "content": f"room: {number}"}], "tuned", "up")
    config = PrepareConfig(held_out_share=0.2)
    prepare_dataset(f"{place}/up", str(make_model("llama")), tmp_path / "rows", config)
    record_vote(str(tmp_path / "local"), asked, "tuned", "up")
    assert len(list((tmp_path / "local" / "up").glob("*.jsonl"))) == 1


def stream(url: str) -> str:
    async def collect() -> str:
        pieces = [piece async for piece in Endpoint(url).stream("fake", [{"role": "user", "content": "?"}], GREEDY)]
        return "".join(pieces)

    return asyncio.run(collect())


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b"[]", b'{"choices": []}', b'{"data": 3}', b""])
def test_nonsense_from_an_endpoint_is_one_line(answer: bytes) -> None:
    with FakeModel([]) as model:
        model.raw = answer
        with pytest.raises(Tune16Error, match="does not answer as the OpenAI API") as error:
            Endpoint(model.url).ask("fake", [{"role": "user", "content": "?"}], GREEDY)
        assert "\n" not in str(error.value)
        model.raw = b"data: " + answer + b"\n\n"
        if answer.strip(b'{}"choices: []'):
            with pytest.raises(Tune16Error, match="does not answer as the OpenAI API"):
                stream(model.url)
    with pytest.raises(Tune16Error, match="cannot be reached"):
        Endpoint(f"http://127.0.0.1:{free_port()}").list_models()


def test_an_error_in_a_stream_is_told() -> None:
    with FakeModel([]) as model:
        model.raw = b'data: {"error": {"message": "out of memory"}}\n\n'
        with pytest.raises(Tune16Error, match="out of memory"):
            stream(model.url)


@pytest.mark.slow
def test_weights_and_gguf_files_answer_through_their_servers(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """`serve` on weights answers as Transformers, and llama.cpp's on the GGUF file as well."""
    folder = tmp_path / "model"
    base = make_model("llama", dtype=torch.float32, initializer_range=0.2)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for question in ("two red lamps", "a cup", "green chairs", "Anna", "three", "to Oslo", "please", "mirrors"):
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        wanted = model.generate(**inputs, do_sample=False, max_new_tokens=12, pad_token_id=2)
        text = tokenizer.decode(wanted[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if text.isascii() and text.isprintable():  # of bytes that are no text, each server makes something else
            break
    with running(find_target(folder), "tiny", 256) as endpoint:
        assert endpoint.list_models() == ["tiny"]
        assert endpoint.ask("tiny", messages, GREEDY) == text
        streamed = asyncio.run(collect_from(endpoint, messages))
        assert "".join(streamed) == text and len(streamed) > 1
        with pytest.raises(Tune16Error, match="answers 400"):
            endpoint.ask("tiny", [], GREEDY)
    tools = llamacpp.converter()
    if tools is None:
        pytest.skip("llama.cpp is not built here: `make llama`")
    llamacpp.convert_weights(tools, stage(folder, tmp_path / "staged"), tmp_path / "model-F16.gguf", "tiny")
    with running(find_target(tmp_path), "tiny", 256) as endpoint:
        assert endpoint.list_models() == ["tiny"]
        assert endpoint.ask("tiny", messages, GREEDY).strip() == text.strip()


async def collect_from(endpoint: Endpoint, messages: list[dict[str, str]]) -> list[str]:
    return [piece async for piece in endpoint.stream("tiny", messages, GREEDY)]


def test_what_is_served_is_found_in_every_kind_of_folder(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo-2"
    gguf = run / "steps" / "tune16-x" / "convert" / "gguf"
    gguf.mkdir(parents=True)
    for name, size in (("model-Q4_K_M.gguf", 10), ("model-Q8_0.gguf", 20), ("adapter.gguf", 99)):
        (gguf / name).write_bytes(b"GGUF" + b"x" * size)
    os.utime(run)
    weights = tmp_path / "runs" / "zebra-1" / "steps" / "tune16-x" / "merge" / "merged" / "merged"
    weights.mkdir(parents=True)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"")
    os.utime(tmp_path / "runs" / "zebra-1", (0, 0))
    newest = Target(gguf / "model-Q8_0.gguf", gguf / "adapter.gguf")
    assert find_target(tmp_path / "runs") == find_target(run) == find_target(gguf) == newest
    assert find_target(gguf / "model-Q4_K_M.gguf").model.name == "model-Q4_K_M.gguf"
    assert find_target(tmp_path / "runs" / "zebra-1") == find_target(weights) == Target(weights)
    with pytest.raises(Tune16Error, match="no model found"):
        find_target(tmp_path / "nothing")
