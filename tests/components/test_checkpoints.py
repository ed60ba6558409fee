"""A run that was stopped and started again: the same adapter, from the newest whole checkpoint, by one process."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config import PrepareConfig, QuantizeConfig, TrainConfig
from components.prepare.dataset import prepare_dataset
from components.quantize.checkpoint import quantize_checkpoint
from components.runtime.errors import Tune16Error
from components.runtime.outputs import read_record
from components.runtime.steps import TERMINATED_EXIT_CODE
from components.storage import s3
from components.storage.files import file_digest
from components.train.checkpoints.record import RECORD
from components.train.checkpoints.store import FOLDER_VARIABLE, Checkpoints, Place
from components.train.launch import train
from components.train.loop import Loop
from components.train.progress import ProgressLines

training = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Could not find a config file"),  # PEFT looks on the Hub for a local base
]
PATH = "team/model"
FACTS = {"model": "a", "data": "b"}
SETTINGS: dict[str, Any] = {"epochs": 2, "rank": 8, "micro_batch": 2, "num_evaluations": 3}


@pytest.fixture(scope="module")
def made(make_model: Callable[..., Path], orders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows, weights, and a teacher's weights of the same family."""
    folder = tmp_path_factory.mktemp("made")
    models = {"weights": make_model("llama"), "teacher": make_model("llama", hidden_size=128)}
    for name, model in models.items():
        quantize_checkpoint(str(model), folder / name, QuantizeConfig())
    data = folder / "orders.jsonl"
    data.write_text("".join(orders.read_text().splitlines(keepends=True)[:60]))
    prepare_dataset(
        str(data), str(models["weights"]), folder / "rows", PrepareConfig(max_tokens=128, held_out_share=0.1)
    )
    return {name: folder / name for name in ("weights", "teacher", "rows")}


def _train(made: dict[str, Path], output: Path, path: str = "", **settings: Any) -> tuple[str, Any]:
    """Train; returns the adapter's SHA-256 and all logged losses."""
    config = TrainConfig(**{**SETTINGS, **settings})
    teacher = made["teacher"] if config.teacher else None
    train(made["weights"], made["rows"], output, config, teacher=teacher, path=path)
    return file_digest(output / "adapter_model.safetensors"), read_record(output, "train")["losses"]


def _ask_to_end_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM once this step has been logged."""
    log = ProgressLines.log

    def logged(self: ProgressLines, entry: dict[str, Any]) -> None:
        log(self, entry)
        if entry["step"] == step and "loss" in entry:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ProgressLines, "log", logged)


class TestTraining:
    pytestmark = training

    @pytest.mark.parametrize(
        ("share", "settings"),
        [
            (0.7, {"gradient_accumulation": 2}),
            (0.3, {"engine": "trl", "gradient_accumulation": 2}),
            (0.7, {"engine": "trl", "packing": False}),
            (0.7, {"method": "distill", "teacher": "the teacher"}),
            (1.0, {"epochs": 1.5}),
        ],
        ids=["engine", "plain", "plain, not packed", "distillation", "after the last step of half an epoch"],
    )
    def test_stopped_and_started_again_it_ends_with_the_same_adapter(
        self,
        made: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        settings: dict[str, Any],
        share: float,
    ) -> None:
        wanted = _train(made, tmp_path / "undisturbed", **settings)
        steps = wanted[1][-1]["step"]
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            _ask_to_end_at(round(steps * share), patch)
            _train(made, tmp_path / "adapter", **settings)
        assert ended.value.code == TERMINATED_EXIT_CODE
        assert not (tmp_path / "adapter").exists()
        capsys.readouterr()
        assert _train(made, tmp_path / "adapter", **settings) == wanted
        assert "continuing from the checkpoint of step" in capsys.readouterr().out
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("engine", ["tune16", "trl"])
    def test_a_loss_that_is_no_number_ends_the_run_with_its_step(
        self, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
    ) -> None:
        take_step = Loop._take_step

        def spoil(self: Loop) -> None:
            take_step(self)
            if self.step == 3:
                for parameter in self.learner.parameters:
                    parameter.data.fill_(float("nan"))

        monkeypatch.setattr(Loop, "_take_step", spoil)
        with pytest.raises(Tune16Error, match=r"the loss became NaN or infinite at step 4. Lower train.learning_rate"):
            _train(made, tmp_path / "adapter", engine=engine)
        assert not (tmp_path / "adapter").exists()

    def test_two_processes_go_on_together(
        self, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str
    ) -> None:
        wanted = _train(made, tmp_path / "undisturbed", num_gpus=2)

        def end() -> None:
            while not list(tmp_path.glob(".adapter.checkpoints/*/step-*")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        watching = threading.Thread(target=end)
        watching.start()
        with pytest.raises(SystemExit) as ended:
            _train(made, tmp_path / "adapter", PATH, num_gpus=2, checkpoint_minutes=0.001)
        watching.join()
        assert ended.value.code == TERMINATED_EXIT_CODE
        assert _train(made, tmp_path / "adapter", PATH, num_gpus=2) == wanted


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    """Checkpoints of the steps 1 to 3, of which two stay."""
    checkpoints = Checkpoints(FACTS, Place(tmp_path / "kept"))
    with checkpoints.held():
        for step in (1, 2, 3):
            checkpoints.save(step, lambda folder: _write(folder, 1000))
            checkpoints.wait()
    return checkpoints


def _write(folder: Path, size: int) -> None:
    for name in ("state.safetensors", "state.json"):
        (folder / name).write_bytes(os.urandom(size))


def test_the_newest_is_taken_and_old_ones_go(kept: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert [path.name for path in sorted(kept.folder.glob("step-*"))] == ["step-00000002", "step-00000003"]
    assert kept.newest() == kept.folder / "step-00000003"
    assert "train: continuing from the checkpoint of step 3 on this disk" in capsys.readouterr().out
    assert Checkpoints({**FACTS, "data": "c"}, Place(kept.folder.parent)).newest() is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: os.truncate(path / "state.safetensors", 500), "its file state.safetensors is damaged"),
        (lambda path: (path / "state.safetensors").write_bytes(bytes(1000)), "state.safetensors is damaged"),
        (lambda path: (path / "state.json").unlink(), "its file state.json is missing"),
        (lambda path: (path / RECORD).unlink(), "its checkpoint.json cannot be read"),
        (lambda path: os.truncate(path / RECORD, 20), "its checkpoint.json cannot be read"),
        (lambda path: _change(path / RECORD, made_of={**FACTS, "model": "other"}), "another run, with other model"),
        (lambda path: _change(path / RECORD, made_of={**FACTS, "data": "other"}), "another run, with other data"),
        (lambda path: _change(path / RECORD, step=2), "it is of step 2"),
        (lambda path: _change(path / RECORD, step=None), "its checkpoint.json cannot be read"),
        (lambda path: _change(path / RECORD, made_of=3), "its checkpoint.json cannot be read"),
        (lambda path: _change(path / RECORD, files=["state.json"]), "its checkpoint.json cannot be read"),
    ],
)
def test_a_damaged_one_is_passed_over_and_said(
    kept: Checkpoints, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], reason: str
) -> None:
    damage(kept.folder / "step-00000003")
    assert kept.newest() == kept.folder / "step-00000002"
    out = capsys.readouterr().out
    assert "train: skipped the checkpoint of step 3 on this disk: " in out and reason in out
    assert [path.name for path in kept.folder.glob("step-*")] == ["step-00000002"]


def test_damaged_ones_do_not_stand_before_new_ones(kept: Checkpoints) -> None:
    for path in kept.folder.glob("step-*"):
        (path / "state.json").unlink()
    with kept.held():
        assert kept.newest() is None
        for step in (1, 2):
            kept.save(step, lambda folder: _write(folder, 1000))
        kept.wait()
    assert sorted(path.name for path in kept.folder.glob("step-*")) == ["step-00000001", "step-00000002"]


def test_only_runs_of_long_ago_are_removed(kept: Checkpoints, bucket: str) -> None:
    runs = kept.folder.parent
    for name in ("datasets", "0123456789abcdef", "fedcba9876543210"):
        (runs / name).mkdir()
        (runs / name / ("rows" if name == "datasets" else ".lock")).touch()
        os.utime(runs / name, (0, 0))
    os.utime(runs / "fedcba9876543210")
    with kept.held():
        pass
    assert {path.name for path in runs.iterdir()} == {"datasets", "fedcba9876543210", kept.key}


def _change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_disk_that_is_gone_is_made_up_for_from_s3(
    bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Checkpoints(FACTS, Place(tmp_path / "one", "team"))
    with first.held():
        first.save(7, lambda folder: _write(folder, 1000))
        first.wait()
    keys = [stored.key for stored in s3.list_objects(bucket, "team/checkpoints/")]
    assert f"team/checkpoints/{first.key}/step-00000007/{RECORD}" in keys
    other_node = Checkpoints(FACTS, Place(tmp_path / "node", "team"))
    assert (other_node.fetch(7) / "state.json").is_file()
    second = Checkpoints(FACTS, Place(tmp_path / "two", "team"))
    with second.held():
        newest = second.newest()
    assert newest is not None
    assert (newest / "state.json").read_bytes() == (
        tmp_path / "one" / first.key / newest.name / "state.json"
    ).read_bytes()
    assert "continuing from the checkpoint of step 7 on S3" in capsys.readouterr().out
    s3.write(bucket, f"team/checkpoints/{first.key}/step-00000007/state.json", b"{}")
    shutil.rmtree(tmp_path / "two")
    with second.held():
        assert second.newest() is None
    assert "skipped the checkpoint of step 7 on S3: its file state.json is damaged" in capsys.readouterr().out
    assert not s3.list_objects(bucket, f"team/checkpoints/{first.key}/step-")


def test_one_process_works_on_a_run(bucket: str, tmp_path: Path) -> None:
    with Checkpoints(FACTS, Place(tmp_path / "one", "team")).held():
        with (
            pytest.raises(Tune16Error, match="another process on this disk is working on it"),
            Checkpoints(FACTS, Place(tmp_path / "one")).held(),
        ):
            pass
        with (
            pytest.raises(Tune16Error, match="train: the run .* is working on it. Wait until it ends, or stop it"),
            Checkpoints(FACTS, Place(tmp_path / "two", "team")).held(),
        ):
            pass
        with Checkpoints({**FACTS, "data": "c"}, Place(tmp_path / "one", "team")).held():
            pass


def test_a_run_that_was_taken_over_ends(bucket: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(FACTS, Place(tmp_path / "one", "team"))
    with checkpoints.held():
        s3.create(bucket, f"{checkpoints.prefix}/lease/000009.json", b'{"holder": "the other pod"}')
        checkpoints.save(1, lambda folder: _write(folder, 1000))
        with pytest.raises(Tune16Error, match="the other pod has taken over"):
            checkpoints.save(2, lambda folder: _write(folder, 1000))
    assert not s3.list_objects(bucket, f"{checkpoints.prefix}/step-")


def test_a_disk_without_room_ends_no_training(kept: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(folder: Path) -> None:
        (folder / "state.json").write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    with kept.held():
        kept.save(4, fails)
        kept.wait()
    assert "the checkpoint of step 4 could not be kept" in capsys.readouterr().out
    assert kept.newest() == kept.folder / "step-00000003"


def test_a_finished_run_leaves_nothing_beside_its_output_but_a_volume_keeps_the_last(
    kept: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))
    assert Place.of(tmp_path / "adapter", PATH) == Place(tmp_path / "kept", "team")
    kept.finish()
    assert kept.newest()
    monkeypatch.delenv(FOLDER_VARIABLE)
    kept.finish()
    assert not (tmp_path / "kept").exists()
