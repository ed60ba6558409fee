"""Names of models and data sets, with a web server that speaks the Hub's API as far as the client asks."""

import json
import os
import pickle
import random
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from components.models.fetching import _inside, fetch, pin, read_config
from components.models.loading import load_base
from components.models.references import DATA_FILES, Reference, parse
from components.models.tensors import fetch_model, weight_files
from components.prepare.dataset import load_tokenizer
from components.runtime import retry
from components.runtime.errors import Tune16Error
from components.storage import s3
from tests.servers import make_certificate

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PIN = 32 * "1"
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("org/name", "model", Reference("model", "hf", "org/name")),
        ("org/name@v1", "model", Reference("model", "hf", "org/name", "v1")),
        ("hf://datasets/org/name@abc", "data", Reference("data", "hf", "org/name", "abc")),
        ("s3://bucket/a/b/", "model", Reference("model", "s3", "bucket/a/b")),
        (f"s3://bucket/a#{PIN}", "model", Reference("model", "s3", "bucket/a", PIN)),
        ("s3://bucket/a#1/b.jsonl", "data", Reference("data", "s3", "bucket/a#1/b.jsonl")),
        (f"file:///tmp/a #2.csv#{PIN}", "data", Reference("data", "file", "/tmp/a #2.csv", PIN)),
        ("https://host/a#b.jsonl", "data", Reference("data", "https", "host/a%23b.jsonl")),
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

    auth_check: tuple[int, bytes] = (200, b"{}")
    do_HEAD = do_GET  # noqa: N815

    def _api(self, name: str, rest: list[str], kind: str) -> None:
        if name == "org/gated":
            self._send(403, X_Error_Code="GatedRepo")
        elif name not in ("org/open", "org/rows", "org/pickle"):
            self._send(404, X_Error_Code="RepoNotFound")
        elif rest[:1] == ["auth-check"]:
            self._send(*self.auth_check)
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


# Hostile models


@pytest.fixture
def model(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a model folder, to spoil."""
    return shutil.copytree(make_model("llama"), tmp_path / "spoilt")


NAMES = ("../out.json", "/etc/out.json", "a/../../out.json", "..\\out.json", "a\0.json")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_outside_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(Tune16Error, match="outside its folder"):
        _inside(tmp_path, name)


@pytest.mark.parametrize("name", ["../out.json", "..\\out.json"])
def test_such_names_in_a_bucket_are_refused(name: str, bucket: str, tmp_path: Path) -> None:
    s3.write(bucket, f"models/evil/{name}", b"{}")
    for act in (pin, lambda reference: fetch(reference, tmp_path / "x", MODEL_FILES)):
        with pytest.raises(Tune16Error, match="outside its folder"):
            act(parse(f"s3://{bucket}/models/evil", "model"))
    assert not (tmp_path / "out.json").exists() and not list(tmp_path.rglob("*out.json"))


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/out.safetensors"])
def test_such_names_in_an_index_on_the_web_are_refused(name: str, hub: str, tmp_path: Path) -> None:
    index = {"weight_map": {"a": name}}
    (tmp_path / "hub" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Tune16Error, match="outside its folder"):
        fetch(parse(f"{hub}/files", "model"), tmp_path / "model", MODEL_FILES)
    (tmp_path / "hub" / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(Tune16Error, match="is not an index of safetensors files"):
        fetch(parse(f"{hub}/files", "model"), tmp_path / "model", MODEL_FILES)


def test_a_link_out_of_a_model_folder_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("private")
    (model / "notes.txt").symlink_to(tmp_path / "key")
    for act in (pin, lambda reference: fetch(reference, tmp_path / "x", MODEL_FILES)):
        with pytest.raises(Tune16Error, match=r"notes.txt: is a link to .*/key, outside the folder"):
            act(parse(str(model), "model"))


def test_a_snapshot_in_the_hubs_cache_links_to_its_blobs(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs = shutil.copytree(model, tmp_path / "models--org--name" / "blobs")
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    assert pin(parse(str(snapshot), "model")) and read_config(parse(str(snapshot), "model"), tmp_path / "x")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is nested too deeply"),
        ('{"a":' * 100_000, "is nested too deeply"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("\xff", "is not valid JSON"),
    ],
)
def test_documents_that_are_none_are_refused(
    name: str, content: str, message: str, model: Path, tmp_path: Path
) -> None:
    (model / name).write_text(content, encoding="latin-1")
    with pytest.raises(Tune16Error, match=message):
        read_config(parse(str(model), "model"), tmp_path / "x")


def test_a_document_without_end_is_refused_unread(model: Path, tmp_path: Path) -> None:
    with (model / "config.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(Tune16Error, match=r"is 1,024 MiB, far too large for a model's config.json"):
        read_config(parse(str(model), "model"), tmp_path / "x")


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_of_pickle_and_safetensors_only_safetensors_are_read(model: Path, tmp_path: Path) -> None:
    wanted = load_base(model, torch.float32).state_dict()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    found = load_base(model, torch.float32).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    for weights in model.glob("*.safetensors*"):
        weights.unlink()
    with pytest.raises(Tune16Error, match="the model cannot be loaded"):
        load_base(model, torch.float32)
    with pytest.raises(Tune16Error, match=r"as pickle only"):
        pin(parse(str(model), "model"))
    assert not (tmp_path / "exploded").exists()


def test_code_that_comes_with_a_model_does_not_run(model: Path, tmp_path: Path) -> None:
    code = f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    own = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    _change(model / "config.json", auto_map=own)
    _change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil"] * 2})
    load_tokenizer(str(model), "auto", tmp_path / "x")
    load_base(model, torch.float32)
    _change(model / "config.json", model_type="evil", architectures=["Evil"])
    with pytest.raises(Tune16Error, match="the model cannot be loaded"):
        load_base(model, torch.float32)
    with pytest.raises(Tune16Error):
        load_tokenizer(str(model), "auto", tmp_path / "x")
    assert not (tmp_path / "ran").exists()


def _change(document: Path, **changes: object) -> None:
    document.write_text(json.dumps(json.loads(document.read_text()) | changes))


# Hostile servers


class Turncoat(BaseHTTPRequestHandler):
    """Sends on to where `leads` says, or breaks off in the middle of what it has announced."""

    leads = ""

    def do_GET(self) -> None:
        self.send_response(302 if self.leads else 200)
        if self.leads:
            self.send_header("Location", self.leads)
        self.send_header("Content-Length", "0" if self.leads else "1000")
        self.end_headers()
        if not self.leads and self.command == "GET":
            self.wfile.write(b"{}\n")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _serving(
    context: ssl.SSLContext | None = None, handler: type[Turncoat] = Turncoat, **attributes: object
) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), attributes))
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"{'https' if context else 'http'}://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_download_that_ends_early_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.01)
    with _serving() as address, pytest.raises(Tune16Error, match=r"cannot be reached \(.*incomplete|without sending"):
        fetch(parse(f"{address}/rows.jsonl", "data"), tmp_path / "x", DATA_FILES)


def test_a_server_that_sends_another_part_than_was_asked_for_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers a question for the rest with the rest of a file that has changed meanwhile."""
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.01)
    old, new = bytes(3 << 20), b"x" * (3 << 20)
    asked: list[str] = []

    class Changing(Turncoat):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Range", ""))
            start = int(asked[-1].removeprefix("bytes=").removesuffix("-") or 0)
            self.send_response(206 if start else 200)
            self.send_header("ETag", '"old"' if len(asked) == 1 else '"new"')
            self.send_header("Content-Range", f"bytes {start}-{len(new) - 1}/{len(new)}")
            self.send_header("Content-Length", str(len(new) - start))
            self.end_headers()
            self.wfile.write(old[: 5 << 19] if len(asked) == 1 else new[start:])
            self.close_connection = len(asked) == 1

    with _serving(handler=Changing) as address:
        path = fetch(parse(f"{address}/rows.jsonl", "data"), tmp_path / "x", DATA_FILES)
    assert path.read_bytes() == new and asked == ["", f"bytes={2 << 20}-", ""]


@pytest.mark.parametrize("fault", ["a broken connection", "503"])
def test_a_download_goes_on_where_it_was_broken_off(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.01)
    content, asked = random.Random(1).randbytes(3 << 20), []

    class Breaking(Turncoat):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Range", ""))
            if fault == "503" and len(asked) == 1:
                self.send_error(503)
                return
            start = int(asked[-1].removeprefix("bytes=").removesuffix("-") or 0)
            self.send_response(206 if start else 200)
            self.send_header("ETag", '"one"')
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:] if len(asked) > 1 else content[: 5 << 19])
            if len(asked) == 1:
                self.close_connection = True

    with _serving(handler=Breaking) as address:
        path = fetch(parse(f"{address}/rows.jsonl", "data"), tmp_path / "x", DATA_FILES)
    assert path.read_bytes() == content
    assert asked == ["", "" if fault == "503" else f"bytes={2 << 20}-"]


def test_https_does_not_lead_to_http(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with _serving(context, leads=f"{hub}/files/rows.jsonl") as address:
        for act in (pin, lambda reference: fetch(reference, tmp_path / "x", DATA_FILES)):
            with pytest.raises(Tune16Error, match=r"redirects to http://.*, without encryption"):
                act(parse(f"{address}/rows.jsonl", "data"))


def test_an_address_with_a_password_is_refused() -> None:
    with pytest.raises(Tune16Error, match=r"https://host: an address with a password") as refused:
        parse("https://me:pa55word@host/rows.jsonl", "data")
    assert "pa55word" not in str(refused.value)
    with pytest.raises(Tune16Error, match="https:// address is not valid") as refused:
        parse("https://me:pa55/word@host/rows.jsonl", "data")
    assert "pa55" not in str(refused.value)


@pytest.mark.parametrize("status", [404, 405])
def test_a_mirror_of_the_hub_that_does_not_know_every_question(
    hub: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(Hub, "auth_check", (status, b"{}"))
    assert pin(parse("org/open", "model")).pin == COMMIT


def test_offline_what_lies_in_the_cache_is_fixed_and_found(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    reference = pin(parse("org/open", "model"))
    fetched = fetch_model(reference, tmp_path / "x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert pin(parse("org/open", "model")) == reference
    assert fetch_model(reference, tmp_path / "y") == fetched
    with pytest.raises(Tune16Error, match="org/rows"):
        pin(parse("org/rows", "data"))
    huggingface_hub.close_session()


def test_of_weights_that_are_there_twice_only_those_of_the_index_are_fetched(
    make_model: Callable[..., Path], bucket: str, tmp_path: Path
) -> None:
    for file in make_model("llama").iterdir():
        s3.upload(file, bucket, f"models/llama/{file.name}")
    s3.write(bucket, "models/llama/consolidated.safetensors", b"the same again, in another form")
    folder = fetch_model(pin(parse("s3:///models/llama", "model")), tmp_path / "model")
    assert not (folder / "consolidated.safetensors").exists() and weight_files(folder)


def test_a_pointer_of_git_lfs_is_no_file(make_model: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(make_model("llama"), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(Tune16Error, match=r"tokenizer.json: is a Git LFS pointer, .* Run `git lfs pull`"):
        load_tokenizer(str(tmp_path / "model"), "auto", tmp_path / "x")


def test_vocabulary_and_merges_are_fetched_over_https(
    hub: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = json.loads((tmp_path / "hub" / "tokenizer.json").read_text())
    (tmp_path / "hub" / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (tmp_path / "hub" / "merges.txt").write_text("#version: 0.2\n")
    folder = fetch(parse(f"{hub}/files", "model"), tmp_path / "model", ["*.json", "*.txt"])
    assert (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


def test_s3_references_are_fixed_by_content(bucket: str, make_model: Callable[..., Path]) -> None:
    folder = make_model("llama")
    for path in folder.iterdir():
        s3.upload(path, bucket, f"models/tiny/{path.name}")
    s3.create(bucket, "models/tiny2/other", b"x")  # shares the beginning of the name, but is another folder
    reference = pin(parse("s3:///models/tiny", "model"))
    assert str(reference).startswith(f"s3://{bucket}/models/tiny#")
    assert pin(parse(f"s3://{bucket}/models/tiny/", "model")) == reference
    from components.models.fetching import fetch

    got = fetch(parse(str(reference), "model"), folder.parent / "fetched", ["*"])
    assert (got / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    s3.client().put_object(Bucket=bucket, Key="models/tiny/config.json", Body=b"{}")
    with pytest.raises(Tune16Error, match="its content changed since the run began"):
        fetch(reference, folder.parent / "fetched2", ["*"])
    with pytest.raises(Tune16Error, match="nothing is there"):
        pin(parse(f"s3://{bucket}/nothing", "model"))
