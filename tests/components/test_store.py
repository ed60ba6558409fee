"""S3, versions and uploads against a real server."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config import (
    ConvertConfig,
    EvaluateConfig,
    PreflightConfig,
    Recipe,
    TrainConfig,
    UploadConfig,
)
from components.models.fetching import pin
from components.models.references import parse
from components.preflight.checks import check
from components.runtime.errors import Tune16Error
from components.runtime.outputs import write_record
from components.storage import lease, s3, versions
from components.storage.artifacts import find_artifact
from components.storage.files import describe_files
from components.upload import publisher
from components.upload.publisher import publish, remove_leftovers
from components.upload.retention import keep_versions, remove_old
from tests.faults.outputs import write_outputs

PATH = "prefix/model"


@pytest.fixture
def outputs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """What the steps merge, convert and evaluate leave, small."""
    return write_outputs(tmp_path / "out")


def test_published_versions_are_downloaded_whole(bucket: str, outputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    manifest = publish(*outputs, UploadConfig(path=PATH))
    assert versions.read_champion(PATH) == versions.Champion(1, manifest["version"])
    folder = versions.download(PATH, manifest["version"], tmp_path / "copy")
    assert describe_files(folder) == manifest["files"]
    part = versions.download(PATH, manifest["version"], tmp_path / "part", part="adapter")
    assert (part / "adapter_model.safetensors").read_bytes() == b"adapter"
    assert json.loads((folder / "config.json").read_text())["train"]["rank"] == 64
    names = {Path(file["path"]).parts[0] for file in manifest["files"]}
    assert names == {"merged", "gguf", "adapter", "report", "evaluation.json", "README.md", "config.json"}
    assert manifest["gguf"] == ["gguf/model-Q8_0.gguf", "gguf/model-Q4_K_M.gguf"], "in the order they were asked for"
    assert manifest["scores"]["gguf"] == {"Q8_0": {"loss": 1.5}} and manifest["adapter_rank"] == 64
    assert manifest["context"] == 64 and manifest["cache_bytes_per_token"] == 2 * 2 * 3 * 8


def test_weights_in_the_same_storage_are_copied_by_it(
    bucket: str, outputs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(publisher, "_LEAST_COPIED_BYTES", 10)
    for folder in outputs[:2]:
        s3.upload_folder(folder, bucket, f"pipelines/run/{folder.name}")
    upload, sent = s3.upload, []

    def noted(path: Path, bucket: str, key: str, *options: Any) -> None:
        sent.append(key.split("/", 3)[3])
        upload(path, bucket, key, *options)

    monkeypatch.setattr(s3, "upload", noted)
    uris = (f"minio://{bucket}/pipelines/run/merged", f"s3://{bucket}/pipelines/run/gguf")
    manifest = publish(*outputs, UploadConfig(path=PATH), uris)
    assert not [name for name in sent if name.startswith(("merged/", "gguf/"))] and "adapter/report.html" in sent
    assert "files, 0 MiB, copied within the storage" in capsys.readouterr().out
    versions.download(PATH, manifest["version"], outputs[0].parent / "copy")


@pytest.mark.parametrize("uri", ["", "s3://elsewhere/pipelines/run/merged", "/disk/merged", "gs://bucket/merged"])
def test_weights_that_lie_elsewhere_are_sent(bucket: str, outputs: tuple[Path, Path, Path], uri: str) -> None:
    assert find_artifact(uri, outputs[0]) is None
    manifest = publish(*outputs, UploadConfig(path=PATH), (uri, uri))
    versions.download(PATH, manifest["version"], outputs[0].parent / "copy")


def test_weights_that_were_damaged_on_their_way_are_not_published(
    bucket: str, outputs: tuple[Path, Path, Path]
) -> None:
    weights = outputs[0] / "merged" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(Tune16Error, match=r"model.safetensors: is not the file that the step merge wrote"):
        publish(*outputs, UploadConfig(path=PATH))
    assert versions.read_champion(PATH) is None


def left(bucket: str) -> list[str]:
    """What lies in the bucket, but for leases."""
    return [stored.key for stored in s3.list_objects(bucket, "") if "/lease/" not in stored.key]


def retrain(outputs: tuple[Path, Path, Path], data: str, champion: str) -> None:
    """Make the outputs those of a run on other data that was compared with `champion`."""
    facts = {
        "model": "m",
        "teacher": "",
        "data": data,
        "held_out_sha256": "h",
        "prepare": {"max_tokens": 32},
        "bits": 4,
    }
    write_record(outputs[0] / "adapter", "train", TrainConfig(), **facts)
    scores = {name: {} for name in ("base", "tuned", "loss_difference")} | {"champion": {"version": champion}}
    (outputs[2] / "evaluation.json").write_text(json.dumps(scores))


def test_the_next_version_is_the_next_champion(bucket: str, outputs: tuple[Path, Path, Path]) -> None:
    first = publish(*outputs, UploadConfig(path=PATH))
    retrain(outputs, "other data", first["version"])
    second = publish(*outputs, UploadConfig(path=PATH))
    assert versions.read_champion(PATH) == versions.Champion(2, second["version"])
    assert second["lineage"]["champion"] == first["version"]


def test_only_the_champion_is_registered_and_served(
    bucket: str, outputs: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = publish(*outputs, UploadConfig(path=PATH))["version"]
    assert versions.still_champion(PATH, first, "deploy")
    retrain(outputs, "other data", first)
    second = publish(*outputs, UploadConfig(path=PATH))["version"]
    assert not versions.still_champion(PATH, first, "deploy")
    assert f"deploy: {first} is no longer champion, {second} is: nothing done" in capsys.readouterr().out


def test_a_champion_that_came_in_between_is_not_replaced(bucket: str, outputs: tuple[Path, Path, Path]) -> None:
    first = publish(*outputs, UploadConfig(path=PATH))
    retrain(outputs, "other data", "20200101T000000Z-00000000")
    with pytest.raises(Tune16Error, match="became champion during this run"):
        publish(*outputs, UploadConfig(path=PATH))
    assert versions.read_champion(PATH) == versions.Champion(1, first["version"])
    folders = {stored.key.split("/")[2] for stored in s3.list_objects(bucket, PATH)}
    assert folders == {first["version"], "champions", "lease"}


def test_an_unchanged_run_asks_for_what_the_cache_has_and_publishes_nothing(
    bucket: str,
    outputs: tuple[Path, Path, Path],
    make_model: Callable[..., Path],
    orders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What preflight hands on is all that the cache of the later steps looks at, so it has to be the same."""
    place = PreflightConfig(model=str(make_model("llama")), data=str(orders))
    recipe = Recipe(preflight=place, train=TrainConfig(rank=8), convert=ConvertConfig(quantizations="Q8_0,Q4_K_M"))
    first = check(recipe, PATH)
    trained = outputs[0] / "adapter"
    facts = {"model": first.model, "teacher": "", "data": first.data, "held_out_sha256": "h", "bits": 4}
    write_record(trained, "train", recipe.train, prepare=recipe.prepare.model_dump(), **facts)
    published = publish(*outputs, UploadConfig(path=PATH))
    assert "nothing has changed" not in capsys.readouterr().out
    assert check(recipe, PATH) == first
    assert f"nothing has changed since {published['version']}" in capsys.readouterr().out
    assert publish(*outputs, UploadConfig(path=PATH)) == published
    assert versions.read_champion(PATH) == versions.Champion(1, published["version"])
    for changed in (
        recipe.model_copy(update={"train": TrainConfig(rank=4)}),
        recipe.model_copy(update={"evaluate": EvaluateConfig(num_rows=3)}),
        recipe.model_copy(update={"convert": ConvertConfig(quantizations="")}),
        recipe.model_copy(update={"preflight": PreflightConfig(model=place.model, data=str(orders.parent))}),
    ):
        assert check(changed, PATH).champion == published["version"]


def test_changed_and_missing_files_are_noticed(bucket: str, outputs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    version = publish(*outputs, UploadConfig(path=PATH))["version"]
    key = f"{PATH}/{version}/adapter/adapter_model.safetensors"
    s3.client().put_object(Bucket=bucket, Key=key, Body=b"adaptex")
    with pytest.raises(Tune16Error, match="is not the file that was published"):
        versions.download(PATH, version, tmp_path / "copy")
    s3.delete(bucket, key)
    with pytest.raises(Tune16Error, match="there is no such object"):
        versions.download(PATH, version, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_version_without_manifest_does_not_exist(bucket: str, tmp_path: Path) -> None:
    s3.create(bucket, f"{PATH}/20260101T000000Z-00000000/merged/a", b"x")
    with pytest.raises(Tune16Error, match="no such version, or its upload never ended"):
        versions.download(PATH, "20260101T000000Z-00000000", tmp_path / "copy")
    with pytest.raises(Tune16Error, match="no such version"):
        versions.append_champion(PATH, "20260101T000000Z-00000000")
    with pytest.raises(Tune16Error, match="has no champion yet"):
        versions.champion_version(PATH)


def test_a_manifest_that_points_outside_is_refused(bucket: str, tmp_path: Path) -> None:
    files = [{"path": "../../evil", "size": 1, "sha256": ""}]
    manifest = {"version": "v", "address": versions.address(PATH, "v"), "files": files}
    versions.write_manifest(PATH, "v", manifest)
    with pytest.raises(Tune16Error, match="outside the folder"):
        versions.download(PATH, "v", tmp_path / "copy")
    with pytest.raises(Tune16Error, match="has been published already"):
        versions.write_manifest(PATH, "v", manifest)


def test_leftovers_are_removed_and_versions_stay(bucket: str, outputs: tuple[Path, Path, Path]) -> None:
    version = publish(*outputs, UploadConfig(path=PATH))["version"]
    s3.create(bucket, f"{PATH}/20260101T000000Z-00000000/merged/a", b"x")
    s3.client().create_multipart_upload(Bucket=bucket, Key=f"{PATH}/20260101T000000Z-00000000/merged/b")
    assert remove_leftovers(PATH, but="20260101T000000Z-00000000") == 0
    assert remove_leftovers(PATH) == 2
    assert versions.read_manifest(PATH, version)["version"] == version
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket)


def test_what_was_not_promoted_is_not_published(bucket: str, outputs: tuple[Path, Path, Path]) -> None:
    write_record(outputs[2], "evaluate", EvaluateConfig(), verdict="kept")
    with pytest.raises(Tune16Error, match="was not promoted"):
        publish(*outputs, UploadConfig(path=PATH))
    assert s3.list_objects(bucket, "") == []


def test_a_failed_upload_takes_its_files_back(
    bucket: str, outputs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Callable[..., None] = s3.upload

    def breaks(path: Path, bucket: str, key: str, advance: Callable[[int], None], sha256: str) -> None:
        if key.endswith("model.safetensors") and "merged" in key:
            raise Tune16Error("the network is gone")
        real(path, bucket, key, advance, sha256)

    monkeypatch.setattr(s3, "upload", breaks)
    with pytest.raises(Tune16Error, match="the network is gone"):
        publish(*outputs, UploadConfig(path=PATH))
    assert left(bucket) == []


@pytest.mark.parametrize("moment", ["write_manifest", "append_champion"])
def test_a_killed_publication_is_gone_on_with(
    bucket: str, outputs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def killed(*_: object) -> None:
        raise SystemExit(143)

    with monkeypatch.context() as patched:
        patched.setattr(versions, moment, killed)
        with pytest.raises(SystemExit):
            publish(*outputs, UploadConfig(path=PATH))
    begun = {key.split("/")[2] for key in left(bucket)}
    assert len(begun) == 1 and versions.read_champion(PATH) is None
    version = publish(*outputs, UploadConfig(path=PATH))["version"]
    assert begun == {version} and versions.read_champion(PATH) == versions.Champion(1, version)


def test_a_second_publisher_is_refused_and_told_of_the_first(bucket: str, outputs: tuple[Path, Path, Path]) -> None:
    with (
        lease.held(PATH, "somebody"),
        pytest.raises(Tune16Error, match=f"publishing to s3://{bucket}/{PATH}: process .* is working on it"),
    ):
        publish(*outputs, UploadConfig(path=PATH))
    assert left(bucket) == []


def test_who_has_lost_the_lease_completes_nothing(
    bucket: str, outputs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_newest", lambda *_: 0)
    real = s3.upload

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(lease, "_newest", lambda *_: 9)
        real(*arguments)

    monkeypatch.setattr(lease, "_take", lambda *_: 0)
    monkeypatch.setattr(s3, "upload", overtaken)
    with pytest.raises(lease.TakenOverError):
        publish(*outputs, UploadConfig(path=PATH))
    assert not any(key.endswith(versions.MANIFEST) or "champions" in key for key in left(bucket))


def test_who_loses_the_number_says_who_has_won(bucket: str, outputs: tuple[Path, Path, Path]) -> None:
    first = publish(*outputs, UploadConfig(path=PATH))["version"]
    retrain(outputs, "other data", first)
    second = publish(*outputs, UploadConfig(path=PATH))["version"]
    with pytest.raises(Tune16Error, match=f"process .* has made {second} champion 2 first"):
        versions.append_champion(PATH, first, versions.Champion(1, first))


def test_old_versions_go_but_not_the_champion_and_the_one_before(
    bucket: str, outputs: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    published = [publish(*outputs, UploadConfig(path=PATH))["version"]]
    for number in range(3):
        if number == 2:
            keep_versions(PATH, 1)
        retrain(outputs, f"data {number}", published[-1])
        published.append(publish(*outputs, UploadConfig(path=PATH))["version"])
    kept = {key.split("/")[2] for key in left(bucket) if key.endswith(versions.MANIFEST)}
    assert kept == set(published[-2:])
    assert not any(published[0] in key for key in left(bucket) if "champions" not in key)
    s3.write(bucket, f"{PATH}/retention.json", b'{"keep_versions": "1"}')
    remove_old(PATH)
    assert "old versions were not removed: " in (said := capsys.readouterr().out) and "retention.json: is not" in said
    assert kept == {key.split("/")[2] for key in left(bucket) if key.endswith(versions.MANIFEST)}


def test_the_storage_is_probed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.check_writable(bucket, PATH)
    assert s3.list_objects(bucket, "") == []
    with pytest.raises(Tune16Error, match="there is no such bucket. Create it, or correct AWS_S3_BUCKET"):
        s3.check_writable("no-such-bucket", PATH)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(Tune16Error, match="the secret key is wrong. Check AWS_SECRET_ACCESS_KEY"):
        s3.check_writable(bucket, PATH)
    monkeypatch.setenv("AWS_S3_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Tune16Error, match="cannot be reached"):
        s3.check_writable(bucket, PATH)
    monkeypatch.delenv("AWS_S3_ENDPOINT")
    with pytest.raises(Tune16Error, match="AWS_S3_ENDPOINT not set"):
        s3.check_writable(bucket, PATH)


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
