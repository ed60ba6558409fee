"""Versions of a model: what a manifest stands for, and the champion log."""

import json
from pathlib import Path

import pytest

from components.config import (
    UploadConfig,
)
from components.runtime.errors import Tune16Error
from components.storage import s3, versions
from components.storage.files import describe_files
from components.upload.publisher import publish
from tests.faults.outputs import retrain

PATH = "prefix/model"


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


def test_who_loses_the_number_says_who_has_won(bucket: str, outputs: tuple[Path, Path, Path]) -> None:
    first = publish(*outputs, UploadConfig(path=PATH))["version"]
    retrain(outputs, "other data", first)
    second = publish(*outputs, UploadConfig(path=PATH))["version"]
    with pytest.raises(Tune16Error, match=f"process .* has made {second} champion 2 first"):
        versions.append_champion(PATH, first, versions.Champion(1, first))
