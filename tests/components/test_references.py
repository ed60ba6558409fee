"""Names of models and data sets, with a web server that speaks the Hub's API as far as the client asks."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from components.config import PreflightConfig, Recipe, TrainConfig
from components.errors import Tune16Error
from components.preflight.checks import as_markdown, check
from components.references import DATA_FILES, MODEL_FILES, Reference, fetch, parse, pin

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("org/name", "model", Reference("model", "hf", "org/name")),
        ("org/name@v1", "model", Reference("model", "hf", "org/name", "v1")),
        ("hf://datasets/org/name@abc", "data", Reference("data", "hf", "org/name", "abc")),
        ("s3://bucket/a/b/", "model", Reference("model", "s3", "bucket/a/b")),
        ("s3://bucket/a#123", "model", Reference("model", "s3", "bucket/a", "123")),
        ("https://host/x.jsonl", "data", Reference("data", "https", "host/x.jsonl")),
        ("/tmp/x", "data", Reference("data", "file", "/tmp/x")),
    ],
)
def test_names_are_parsed_and_printed(name: str, kind: str, expected: Reference) -> None:
    reference = parse(name, kind)  # type: ignore[arg-type]
    assert reference == expected
    assert parse(str(reference), kind) == reference  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("oci://registry/model", "models in OCI images .* cannot be read yet. Copy the model to S3"),
        ("ftp://host/model", "'ftp://' is not supported"),
        ("what is this", "use a Hugging Face id"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(Tune16Error, match=message):
        parse(name, "model")


def test_local_files_are_fixed_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    reference = pin(parse(str(path), "data"))
    assert fetch(reference, tmp_path / "x", DATA_FILES) == path
    path.write_text("two")
    with pytest.raises(Tune16Error, match="its content changed"):
        fetch(reference, tmp_path / "x", DATA_FILES)


class Hub(BaseHTTPRequestHandler):
    """Model org/open, gated org/gated, data set org/rows; anything else is not found. Plain files below /files/."""

    folder: Path

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "files":
            path = self.folder.joinpath(*parts[1:])
            if path.is_file():
                self._send(200, path.read_bytes(), ETag=f'"{path.name}-{path.stat().st_size}"')
            else:
                self._send(404)
        elif parts[:2] == ["api", "models"] or parts[:2] == ["api", "datasets"]:
            self._api("/".join(parts[2:4]), parts[4:], parts[1])
        elif "resolve" in parts:
            at = parts.index("resolve")
            path = self.folder.joinpath(*parts[at + 2 :])
            if path.is_file():
                self._send(200, path.read_bytes(), ETag=f'"{path.name}"', X_Repo_Commit=COMMIT)
            else:
                self._send(404, X_Error_Code="EntryNotFound")
        else:
            self._send(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _api(self, name: str, rest: list[str], kind: str) -> None:
        if name == "org/gated":
            self._send(403, X_Error_Code="GatedRepo")
        elif name not in ("org/open", "org/rows", "org/pickle"):
            self._send(404, X_Error_Code="RepoNotFound")
        elif rest[:1] == ["auth-check"]:
            self._send(200, b"{}")
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._send(404, X_Error_Code="RevisionNotFound")
        elif rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"} for p in self._files(name)
            ]
            self._send(200, json.dumps(entries).encode(), Content_Type="application/json")
        else:
            siblings = [{"rfilename": path.name} for path in self._files(name)]
            content = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self._send(200, json.dumps(content).encode(), Content_Type="application/json")

    def _files(self, name: str) -> list[Path]:
        if name == "org/pickle":
            return [Path(__file__).parent / "pytorch_model.bin"]
        return [path for path in sorted(self.folder.iterdir()) if (path.suffix == ".jsonl") == (name == "org/rows")]

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(
    make_model: Callable[..., Path], orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    import shutil

    import huggingface_hub
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    shutil.copytree(make_model("llama"), folder)
    shutil.copyfile(orders, folder / "rows.jsonl")
    handler = type("Handler", (Hub,), {"folder": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api, "ENDPOINT", address, raising=False)
    huggingface_hub.close_session()  # the client of an earlier test may be an offline one
    yield address
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


def test_hub_names_become_commits(hub: str) -> None:
    assert str(pin(parse("org/open", "model"))) == f"hf://org/open@{COMMIT}"
    assert str(pin(parse("org/rows", "data"))) == f"hf://datasets/org/rows@{COMMIT}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/gated", r"is gated. Open http.*/org/gated, accept its terms, and put a token .* HF_TOKEN"),
        ("org/nothing", r"not found. Check the spelling at http.*/org/nothing; if it is private"),
        ("org/open@v9", r"there is no such revision. See http.*/org/open/tree/main"),
        ("org/pickle", r"as pickle only \(pytorch_model.bin\)"),
    ],
)
def test_the_hubs_refusals_say_what_to_do(hub: str, name: str, message: str) -> None:
    with pytest.raises(Tune16Error, match=message):
        pin(parse(name, "model"))


def test_an_unreachable_hub(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()
    with pytest.raises(Tune16Error, match=r"http://127.0.0.1:9 cannot be reached .* name an s3:// folder or a path"):
        pin(parse("org/open", "model"))


def test_https_data_and_models(hub: str, tmp_path: Path) -> None:
    data = pin(parse(f"{hub}/files/rows.jsonl", "data"))
    path = fetch(data, tmp_path / "data", DATA_FILES)
    assert path.name == "rows.jsonl" and path.stat().st_size > 1000
    model = pin(parse(f"{hub}/files", "model"))
    folder = fetch(model, tmp_path / "model", MODEL_FILES)
    assert (folder / "config.json").is_file() and list(folder.glob("*.safetensors"))
    with pytest.raises(Tune16Error, match="the server answers 404"):
        pin(parse(f"{hub}/files/none.jsonl", "data"))


def test_preflight(hub: str, orders: Path, make_model: Callable[..., Path]) -> None:
    place = PreflightConfig(model=f"{hub}/files", data=str(orders))
    fixed = check(Recipe(preflight=place))
    assert fixed.champion == "" and fixed.plan.fits
    assert "| **together**" in as_markdown(fixed.plan)
    small = place.model_copy(update={"gpu_memory": 0.01})
    with pytest.raises(Tune16Error, match="does not fit the GPU: it needs 0.* GiB more than preflight_gpu_memory"):
        check(Recipe(preflight=small))
    with pytest.raises(Tune16Error, match="LlamaForCausalLM has no linear layer 'qkv'"):
        check(Recipe(preflight=place, train=TrainConfig(target_modules="qkv")))
