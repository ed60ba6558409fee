"""S3, versions and uploads against a real server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config import (
    EvaluateConfig,
    UploadConfig,
)
from components.runtime.errors import Tune16Error
from components.runtime.outputs import write_record
from components.storage import lease, s3, versions
from components.storage.artifacts import find_artifact
from components.upload import publisher
from components.upload.publisher import publish, remove_leftovers
from components.upload.retention import keep_versions, remove_old
from tests.faults.outputs import left, retrain

PATH = "prefix/model"


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


def test_a_champion_that_came_in_between_is_not_replaced(bucket: str, outputs: tuple[Path, Path, Path]) -> None:
    first = publish(*outputs, UploadConfig(path=PATH))
    retrain(outputs, "other data", "20200101T000000Z-00000000")
    with pytest.raises(Tune16Error, match="became champion during this run"):
        publish(*outputs, UploadConfig(path=PATH))
    assert versions.read_champion(PATH) == versions.Champion(1, first["version"])
    folders = {stored.key.split("/")[2] for stored in s3.list_objects(bucket, PATH)}
    assert folders == {first["version"], "champions", "lease"}


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
