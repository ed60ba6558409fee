"""The step register, with the registry's own client over HTTP."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.config import RegisterConfig, UploadConfig
from components.kubernetes import account
from components.register import registrar
from components.register.registrar import Source, register, register_patiently
from components.runtime.errors import Tune16Error
from tests.servers import ApiError, ModelRegistryApi, Reply, make_certificate

PATH = "tune16/Demo"
SOURCE = Source("run-1", "nightly", "tune16-connection")


def manifest(version: str = "20260101T000000Z-aaaaaaaa", content: str = "c1") -> dict[str, Any]:
    scores = {"loss": {"value": 0.5}, "exact_match": {"value": 1}, "chrf": {"value": 0.9}, "perplexity": 1.6}
    return {
        "version": version,
        "address": f"s3://bucket/{PATH}/{version}",
        "content_sha256": content,
        "lineage": {"model": "hf://org/base@1", "data": "hf://datasets/org/data@2", "champion": "", "tune16": "0.1.0"},
        "scores": {"base": {**scores, "loss": {"value": 2.0}}, "tuned": scores, "gguf": {"Q8_0": {"loss": 0.51}}},
    }


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelRegistryApi]:
    monkeypatch.setenv("AWS_S3_BUCKET", "bucket")
    monkeypatch.setenv("AWS_S3_ENDPOINT", "https://s3.example.com")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with ModelRegistryApi() as api:
        yield api


def text(item: dict[str, Any], name: str) -> str:
    value: str = item["customProperties"][name]["string_value"]
    return value


def test_model_version_artifact_and_champion(registry: ModelRegistryApi) -> None:
    config = RegisterConfig(server=registry.url)
    registered = register(manifest(), PATH, SOURCE, config)
    model, version = (
        registry.named("registered_models", "Demo"),
        registry.named("model_versions", manifest()["version"]),
    )
    artifact = registry.named("model_artifacts", "Demo")
    assert (registered.model_id, registered.version_id) == (model["id"], version["id"])
    assert registered.as_metadata() == {
        "modelRegistryName": "127",
        "registeredModelName": "Demo",
        "registeredModelId": model["id"],
        "modelVersionName": version["name"],
        "modelVersionId": version["id"],
    }
    query = "endpoint=https%3A%2F%2Fs3.example.com&defaultRegion=us-east-1"
    assert artifact["uri"] == f"{manifest()['address']}/merged?{query}"
    assert artifact["storageKey"] == "tune16-connection"
    assert artifact["storagePath"] == f"{PATH}/{version['name']}/merged"
    assert [artifact[f"modelSource{part}"] for part in ("Kind", "Class", "Id", "Name")] == [
        "kfp",
        "pipelinerun",
        "run-1",
        "nightly",
    ]
    assert (text(version, "tuned_loss"), text(version, "base_loss")) == ("0.5", "2.0")
    assert text(version, "gguf_Q8_0_loss") == "0.51" and text(version, "lineage_model") == "hf://org/base@1"
    assert text(version, "champion") == "" and text(model, "champion") == version["name"]


def test_the_same_again_changes_nothing(registry: ModelRegistryApi) -> None:
    first = register(manifest(), PATH, SOURCE, RegisterConfig(server=registry.url))
    writes = [request for request in registry.requests if request[0] != "GET"]
    assert register(manifest(), PATH, SOURCE, RegisterConfig(server=registry.url)) == first
    assert [request for request in registry.requests if request[0] != "GET"] == writes


def test_a_new_version_takes_the_crown(registry: ModelRegistryApi) -> None:
    config = RegisterConfig(server=registry.url)
    register(manifest(), PATH, SOURCE, config)
    newer = manifest("20260201T000000Z-bbbbbbbb", "c2")
    register(newer, PATH, SOURCE, config)
    before, now = (registry.named("model_versions", m["version"]) for m in (manifest(), newer))
    assert "champion" not in before["customProperties"] and text(before, "tuned_loss") == "0.5"
    assert text(now, "champion") == "" and text(registry.named("registered_models", "Demo"), "champion") == now["name"]


def test_a_version_that_a_killed_run_left_without_artifact_is_completed(registry: ModelRegistryApi) -> None:
    config = RegisterConfig(server=registry.url)
    registry.fail("POST", "/artifacts", 500)
    with pytest.raises(Tune16Error, match="the registry answers 500"):
        register(manifest(), PATH, SOURCE, config)
    assert registry.stored["model_versions"] and not registry.stored["model_artifacts"]
    register(manifest(), PATH, SOURCE, config)
    assert registry.named("model_artifacts", "Demo")["uri"].startswith(manifest()["address"])
    assert registry.named("registered_models", "Demo")["owner"] == f"Tune16, s3://bucket/{PATH}"


def test_names_that_are_taken_by_others_are_left_alone(registry: ModelRegistryApi) -> None:
    config = RegisterConfig(server=registry.url)
    register(manifest(), PATH, SOURCE, config)
    with pytest.raises(Tune16Error, match="a version 20260101T000000Z-aaaaaaaa of Demo already, with other content"):
        register(manifest(content="other"), PATH, SOURCE, config)
    with pytest.raises(
        Tune16Error, match="a model named Demo already, which belongs to Tune16, s3://bucket/tune16/Demo"
    ):
        register(manifest("20260301T000000Z-cccccccc"), "elsewhere/Demo", SOURCE, config)
    registry.named("registered_models", "Demo")["owner"] = "somebody"
    with pytest.raises(Tune16Error, match="which belongs to somebody. Choose another last part for destination_path"):
        register(manifest(), PATH, SOURCE, config)
    assert len(registry.stored["model_versions"]) == 1


def test_no_registry_registers_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert register(manifest(), PATH, SOURCE, RegisterConfig()).model_id == ""
    assert "nothing registered" in capsys.readouterr().out


def test_over_tls_with_the_accounts_token_and_ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ca, certificate, key = make_certificate(tmp_path)
    for name in ("AWS_S3_BUCKET", "AWS_S3_ENDPOINT"):
        monkeypatch.setenv(name, "bucket")
    monkeypatch.setattr(account, "FOLDER", tmp_path)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with ModelRegistryApi(tls=(certificate, key)) as registry:
        config = RegisterConfig(server=registry.url)
        with pytest.raises(Tune16Error, match="needs a token.*TUNE16_TOKEN"):
            register(manifest(), PATH, SOURCE, config)
        (tmp_path / "token").write_text("good\n")
        with pytest.raises(Tune16Error, match="certificate is not trusted.*SSL_CERT_FILE"):
            register(manifest(), PATH, SOURCE, config)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca))
        (tmp_path / "namespace").write_text("project")
        register(manifest(), PATH, SOURCE, config)
        assert registry.named("model_artifacts", "Demo")["modelSourceGroup"] == "project"
        (tmp_path / "token").write_text("stolen")
        with pytest.raises(Tune16Error, match=r"refuses this account \(401\). Bind it to the registry's role") as error:
            register(manifest(), PATH, SOURCE, config)
        assert "stolen" not in str(error.value)


def test_a_server_that_is_no_registry_or_not_there_is_one_line(registry: ModelRegistryApi) -> None:
    registry.fail("GET", "registered_models", 404)
    with pytest.raises(Tune16Error, match="no model registry with the API v1alpha3 answers there"):
        register(manifest(), PATH, SOURCE, RegisterConfig(server=registry.url))
    with pytest.raises(Tune16Error, match="cannot be reached"):
        register(manifest(), PATH, SOURCE, RegisterConfig(server="http://127.0.0.1:9"))
    with pytest.raises(Tune16Error, match="register: 'server' is 'registry.example.com'"):
        RegisterConfig.load(server="registry.example.com")


def test_a_registry_that_is_away_is_waited_for(
    registry: ModelRegistryApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registrar, "POLL_SECONDS", 0.01)
    config = RegisterConfig(server=registry.url)
    for status in (500, 503):
        registry.fail("GET", "registered_models", status)
    registry.drop("model_versions")
    assert register_patiently(manifest(), PATH, SOURCE, config).model_id
    assert capsys.readouterr().out.count("register: waiting: ") == 1
    registry.fail("GET", "registered_models", 403, times=9)
    with pytest.raises(Tune16Error, match="refuses this account"):  # that does not pass
        register_patiently(manifest("20260201T000000Z-bbbbbbbb", "c2"), PATH, SOURCE, config)


def test_a_registry_that_accepts_and_is_silent(registry: ModelRegistryApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrar, "_TIMEOUT_SECONDS", 0.2)
    registry.hang("registered_models", 20)
    with pytest.raises(registrar.UnavailableError, match="does not answer within 0 s. Check registry_url"):
        register(manifest(), PATH, SOURCE, RegisterConfig(server=registry.url))


def test_the_address_of_the_object_storage_is_told_for_what_it_is(
    registry: ModelRegistryApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_s3(problem: ApiError) -> Reply:
        return Reply(
            problem.status, b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "application/xml"
        )

    monkeypatch.setattr(registry, "_render", as_s3)
    registry.fail("GET", "registered_models", 403)
    with pytest.raises(Tune16Error, match="answers 403, but not as a model registry: with XML or a web page"):
        register(manifest(), PATH, SOURCE, RegisterConfig(server=registry.url))


def test_what_was_archived_is_live_again_and_that_is_said(
    registry: ModelRegistryApi, capsys: pytest.CaptureFixture[str]
) -> None:
    config = RegisterConfig(server=registry.url)
    register(manifest(), PATH, SOURCE, config)
    model, version = (
        registry.named("registered_models", "Demo"),
        registry.named("model_versions", manifest()["version"]),
    )
    model["state"] = version["state"] = "ARCHIVED"
    register(manifest(), PATH, SOURCE, config)
    assert registry.named("registered_models", "Demo")["state"] == "LIVE"
    assert registry.named("model_versions", manifest()["version"])["state"] == "LIVE"
    assert "Demo was archived in the registry; it is live again" in capsys.readouterr().out


def test_names_that_differ_in_case_only_are_the_same_to_some_registries(registry: ModelRegistryApi) -> None:
    config = RegisterConfig(server=registry.url)
    register(manifest(), PATH, SOURCE, config)
    registry.named("registered_models", "Demo")["owner"] = "Tune16, s3://bucket/tune16/demo"
    registry.ignores_case = True  # as MySQL does
    with pytest.raises(Tune16Error, match="a model named Demo already.*may ignore case"):
        register(manifest("20260201T000000Z-bbbbbbbb", "c2"), "tune16/demo", SOURCE, config)


def test_a_name_that_the_registry_would_cut_is_refused_before() -> None:
    with pytest.raises(Tune16Error, match="its last part has 101 characters; the limit is 100"):
        UploadConfig.load(path=f"team/{'x' * 101}")


def test_by_hand(
    registry: ModelRegistryApi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from components.__main__ import app

    monkeypatch.setattr("components.storage.versions.read_manifest", lambda path, version: manifest(version))
    monkeypatch.setattr("components.storage.versions.champion_version", lambda path: manifest()["version"])
    done = CliRunner().invoke(app, ["register", "--path", PATH, "--server", registry.url])
    assert done.exit_code == 0, done.output
    assert registry.named("model_artifacts", "Demo")["storageKey"] == "tune16-connection"
    for name in ("KFP_POD_NAME", "KFP_NAMESPACE", "HOSTNAME", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(app, ["deploy", "--path", PATH, "--runtime", "llama.cpp"])
    assert done.exit_code == 2 and "endpoints need a cluster" in done.output + capsys.readouterr().err
