"""`tune16 doctor --run`: acceptance checks of an installation, with the demo's tiny model.

An administrator runs them after installing or upgrading. Everything that they create has a unique name and is removed
at the end: runs, schedules, uploads, their folder in the bucket, and what their runs left in the pipeline server's part
of it.
"""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import urllib3
from kubernetes.client.rest import ApiException

from components import images
from components.config import PROMOTED, Recipe, override
from components.deploy.objects import API as SERVING
from components.deploy.objects import SERVED_BY
from components.kubernetes.api import service_name
from components.kubernetes.pods import duration
from components.runtime.errors import Tune16Error
from components.storage import s3
from components.storage.records import read_outcome
from components.train.distributed.jobs import PYTORCH_JOB, TRAIN_JOB, Kind
from pipelines.cli_where import Connected
from pipelines.cluster import Cluster
from pipelines.following import Watch
from pipelines.pods import list_pods, newest
from pipelines.runs import SUCCEEDED, has_ended, steps_of, took
from pipelines.schedules import find_schedule, read_interval, schedule
from pipelines.server import Json
from pipelines.submission import ensure_version, submit

POLL_SECONDS = 5.0
STUCK_SECONDS = 900.0  # that a step may wait for the same reason
_ROOT = "tune16-check"
_STEPS_BEFORE_KILL = 4
_KILLED_EPOCHS, _KILLED_CHECKPOINT_MINUTES = 20, 0.05


@dataclass(frozen=True)
class Result:
    """How one check ended: its name, ok, failed or skipped, its duration, and one line of text."""

    check: str
    outcome: Literal["ok", "failed", "skipped"]
    seconds: float
    text: str


class SkippedError(Tune16Error):
    """A check does not apply to this cluster."""


@dataclass
class Acceptance:
    """The checks, in the order in which they are made.

    Args:
        connected: the pipeline server and its cluster.
        recipe: the demo's recipe, with what the namespace needs changed.
        bucket: variables of the connection's bucket.
        show: called with lines on the progress.
    """

    connected: Connected
    recipe: Recipe
    bucket: dict[str, str]
    show: Callable[[str], None]
    name: str = field(default_factory=lambda: f"check-{uuid.uuid4().hex[:8]}")
    _runs: list[Json] = field(default_factory=list)
    _made: ExitStack = field(default_factory=ExitStack)  # what the removal undoes

    @property
    def folder(self) -> str:
        """The folder in the bucket for this check alone, with models, checkpoints and records."""
        return f"{_ROOT}/{self.name}"

    @property
    def path(self) -> str:
        """The model's path, whose last part names its endpoint and its entry in the registry."""
        return f"{self.folder}/{self.name}"

    def make(self) -> Iterator[Result]:
        """Run all checks; whatever happens, what they created is removed."""
        checks: tuple[tuple[str, Callable[[], str]], ...] = (
            ("pipeline", self._pipeline),
            ("first run", self._first_run),
            ("second run from the cache", self._second_run),
            ("failing step", self._failing_step),
            ("killed pod and retry", self._killed_pod),
            ("schedule", self._schedule),
            ("two nodes", self._two_nodes),
            ("endpoint", self._endpoint),
            ("model registry", self._registry),
        )
        with s3.environment(self.bucket):
            try:
                for name, check in checks:
                    yield self._tried(name, check)
            finally:
                removal = self._tried("removal", self._remove)
            yield removal

    def _tried(self, name: str, check: Callable[[], str]) -> Result:
        self.show(f"{name}: started")
        started = time.monotonic()
        outcome: Literal["ok", "failed", "skipped"] = "ok"
        try:
            text = check()
        except SkippedError as error:
            outcome, text = "skipped", str(error)
        except Tune16Error as error:
            outcome, text = "failed", str(error)
        return Result(name, outcome, round(time.monotonic() - started, 1), text)

    @property
    def _cluster(self) -> Cluster:
        if self.connected.cluster is None:
            raise SkippedError("not logged in to the cluster.")
        return self.connected.cluster

    def _pipeline(self) -> str:
        server = self.connected.server
        before = {entry["pipeline_version_id"] for entry in server.list_all_versions()}
        version = ensure_version(server, self.connected.cluster, self._made, uploaded=False)  # a new one is undone
        is_ours = version["pipeline_version_id"] not in before
        with TemporaryDirectory() as folder:
            from pipelines.local import put_demo

            put_demo(Path(folder) / "demo", self.folder)
        return f"{version['display_name']} was {'uploaded' if is_ours else 'on the server already'}"

    def _first_run(self) -> str:
        run = self._run_to_its_end()
        return f"{self._verdict(run)} in {duration(took(run) or 0)}"

    def _second_run(self) -> str:
        run = self._run_to_its_end()
        states = {step.name: step.state for step in steps_of(run)}
        anew = [name for name in ("prepare", "quantize", "train", "evaluate") if states.get(name) != "from the cache"]
        if anew:
            raise Tune16Error(f"not taken from the cache: {', '.join(anew)}. Is the server's cache enabled?")
        return f"{self._verdict(run)} in {duration(took(run) or 0)}, without training"

    def _failing_step(self) -> str:
        watch, run = self._run(f"preflight.data=s3:///{self.folder}/nothing-here.jsonl")
        lines = [line for _, line in watch.failures(run)]
        if run["state"] == SUCCEEDED or not lines or not lines[-1].startswith("error: "):
            raise Tune16Error(f"a run on missing data ended as {watch.state(run)}, and reported: {lines[-1:]}")
        return f"it reported: {lines[-1].removeprefix('error: ')}"

    def _killed_pod(self) -> str:
        longer = (f"train.epochs={_KILLED_EPOCHS}", f"train.checkpoint_minutes={_KILLED_CHECKPOINT_MINUTES}")
        started = self._submit(*longer, self._place("killed"))
        watch = self._watch(started)
        self._kill_in_the_middle(watch)
        run = self._to_the_end(watch)
        by_itself = run["state"] == SUCCEEDED
        if not by_itself:
            told = [line for step, line in watch.failures(run) if step == "train"]
            if not told or "retry" not in told[-1]:
                raise Tune16Error(f"the step's pod was killed, but the run does not report it: {told[-1:]}")
            self.connected.server.retry_run(run["run_id"])
            run = self._to_the_end(watch)
        if run["state"] != SUCCEEDED:
            raise Tune16Error(f"after the retry: {self._why(watch, run)}")
        if not any("continuing from the checkpoint" in line for line in watch.log(run, "train").own("train")):
            raise Tune16Error("training started from scratch: it did not find its checkpoint.")
        return f"training resumed from its checkpoint{' by itself' if by_itself else ' after the retry'}"

    def _kill_in_the_middle(self, watch: Watch) -> None:
        """Delete the pod of train as soon as it has run some steps and kept a checkpoint."""
        for run in watch.follow(POLL_SECONDS):
            self._refuse_stuck(watch, run)
            row = next((row for row in watch.rows(run) if row.step == "train"), None)
            if row and row.progress and row.progress.step >= _STEPS_BEFORE_KILL:
                lines = watch.log(run, "train").own("train")
                if not any("checkpoint of step" in line for line in lines):
                    continue
                pod = newest(list_pods(self._cluster, run["run_id"]), "train")
                if pod:
                    self._delete(f"/api/v1/namespaces/{self._cluster.namespace}/pods/{pod.name}", gracePeriodSeconds=0)
                    return
        raise Tune16Error("training ended before its pod could be killed.")

    def _schedule(self) -> str:
        server = self.connected.server
        made, _ = schedule(server, self.connected.cluster, self._recipe(), self.name, read_interval("7d"))
        self._made.callback(self._forget_schedule)
        server.set_schedule_enabled(made["recurring_run_id"], False)
        if find_schedule(server, self.name).get("status") != "DISABLED":
            raise Tune16Error("the schedule is still enabled although it was paused.")
        server.set_schedule_enabled(made["recurring_run_id"], True)
        server.delete_schedule(made["recurring_run_id"])
        if any(entry["display_name"] == self.name for entry in server.list_schedules()):
            raise Tune16Error("the schedule is still there although it was deleted.")
        return "created, paused, resumed and deleted"

    def _forget_schedule(self) -> None:
        for entry in self.connected.server.list_schedules():
            if entry["display_name"] == self.name:
                self.connected.server.delete_schedule(entry["recurring_run_id"])

    def _two_nodes(self) -> str:
        served = [kind for kind in (TRAIN_JOB, PYTORCH_JOB) if self._is_served(kind)]
        if not served:
            raise SkippedError("the cluster has neither TrainJob nor PyTorchJob.")
        run = self._run_to_its_end("train.num_nodes=2", self._place("two-nodes"))
        return f"{served[0].name}: {self._verdict(run)} in {duration(took(run) or 0)}"

    def _is_served(self, kind: Kind) -> bool:
        found = self._cluster.look(f"/apis/{kind.group}/{kind.version}") or {}
        return any(entry["name"] == kind.plural for entry in found.get("resources", []))

    def _endpoint(self) -> str:
        runtime = SERVED_BY["llama.cpp"]
        path = f"/apis/serving.kserve.io/v1alpha1/namespaces/{self._cluster.namespace}/servingruntimes/{runtime}"
        if self._cluster.look(path) is None:
            raise SkippedError(f"the namespace has no ServingRuntime {runtime}.")
        service = f"/apis/{SERVING}/namespaces/{self._cluster.namespace}/inferenceservices/{service_name(self.path)}"
        self._made.callback(self._delete, service)
        run = self._run_to_its_end("deploy.runtime=llama.cpp")
        said = self._watch(run).log(run, "deploy").own("deploy")
        answer = next((line for line in said if "it says:" in line), "")
        if not answer:
            raise Tune16Error("the step deploy succeeded, but its log has no answer from the endpoint.")
        return answer.removeprefix("deploy: ")

    def _registry(self) -> str:
        server = self.recipe.register.server
        if not server:
            raise SkippedError("no registry is set: use --set register.server=https://…")
        self._made.callback(self._archive_registered, server)
        run = self._run_to_its_end(f"register.server={server}")
        said = self._watch(run).log(run, "register").own("register")
        entry = next((line for line in said if "is champion" in line), "")
        if not entry:
            raise Tune16Error("the step register succeeded, but its log names no entry.")
        return entry.removeprefix("register: ")

    def _archive_registered(self, server: str) -> None:
        from components.register.registrar import archive

        archive(server, self.path)

    def _place(self, name: str) -> str:
        """A path for another model, which has no champion there."""
        return f"upload.path={self.folder}/{name}"

    def _recipe(self, *settings: str) -> Recipe:
        return override(
            self.recipe,
            [
                f"preflight.model=s3:///{self.folder}/model",
                f"preflight.data=s3:///{self.folder}/orders.jsonl",
                f"upload.path={self.path}",
                *settings,
            ],
        )

    def _submit(self, *settings: str) -> Json:
        run = submit(self.connected.server, self.connected.cluster, self._recipe(*settings), self.name)
        self._runs.append(run)
        return run

    def _watch(self, run: Json) -> Watch:
        return Watch(self.connected.server, self.connected.cluster, run["run_id"])

    def _run(self, *settings: str) -> tuple[Watch, Json]:
        watch = self._watch(self._submit(*settings))
        return watch, self._to_the_end(watch)

    def _run_to_its_end(self, *settings: str) -> Json:
        """A run that has to succeed.

        Raises:
            Tune16Error: it did not, and why.
        """
        watch, run = self._run(*settings)
        if run["state"] != SUCCEEDED:
            raise Tune16Error(self._why(watch, run))
        return run

    def _to_the_end(self, watch: Watch) -> Json:
        said: dict[str, str] = {}
        run: Json = {}
        for run in watch.follow(POLL_SECONDS):
            for row in watch.rows(run):
                if said.get(row.step) != row.state:
                    said[row.step] = row.state
                    self.show(f"{row.step} {row.state}{f': {row.note}' if row.note else ''}")
            self._refuse_stuck(watch, run)
        return run

    def _refuse_stuck(self, watch: Watch, run: Json) -> None:
        """Stop a run in which a step waits too long.

        Raises:
            Tune16Error: one does.
        """
        stuck = watch.stuck(STUCK_SECONDS)
        if stuck and not has_ended(run):
            self.connected.server.stop_run(run["run_id"])
            raise Tune16Error(f"{stuck}. The run was stopped.")

    def _why(self, watch: Watch, run: Json) -> str:
        lines = [f"{step}: {line}" for step, line in watch.failures(run)]
        return f"the run ended as {watch.state(run)}. {lines[-1] if lines else ''}".rstrip()

    def _verdict(self, run: Json) -> str:
        path = run["runtime_config"]["parameters"]["destination_path"]
        outcome = read_outcome(path, run["run_id"], run["finished_at"])
        if outcome is None or outcome.evaluation is None:
            raise Tune16Error(f"the run left no verdict in s3://{s3.default_bucket()}/{self.folder}/.")
        verdict, reason = outcome.evaluation["verdict"], outcome.evaluation["reason"]
        if verdict != PROMOTED:
            raise Tune16Error(f"the demo's model was not promoted: {verdict}: {reason}")
        return str(verdict)

    def _delete(self, path: str, **options: Any) -> None:
        try:
            self._cluster.send("DELETE", path, options or None)
        except ApiException as error:
            if error.status == 403:
                raise SkippedError(
                    f"this account may not delete {path.rpartition('/')[0].rpartition('/')[2]}."
                ) from None
            if error.status != 404:
                raise Tune16Error(f"{path}: cannot be deleted: {error.status}") from None
        except urllib3.exceptions.HTTPError as error:
            raise Tune16Error(f"{path}: cannot be deleted: {error}") from None

    def _remove(self) -> str:
        """Remove everything that was created; report what cannot be removed."""
        left: list[str] = []

        @contextmanager
        def told(what: str) -> Iterator[None]:
            try:
                yield
            except Tune16Error as error:
                left.append(f"{what} ({error})")

        with told("what the checks made"):
            self._made.close()
        for run in self._runs:
            with told(f"the run {run['display_name']}"):
                self._remove_run(run)
        with told(f"s3://{s3.default_bucket()}/{self.folder}/"):
            s3.delete_folder(s3.default_bucket(), f"{self.folder}/", first="")
        if left:
            raise Tune16Error(f"left behind: {'; '.join(left)}")
        return f"{len(self._runs)} runs and s3://{s3.default_bucket()}/{self.folder}/ were removed"

    def _remove_run(self, run: Json) -> None:
        server = self.connected.server
        with suppress(Tune16Error):
            if not has_ended(server.read_run(run["run_id"])):
                server.stop_run(run["run_id"])
        server.delete_run(run["run_id"])
        s3.delete_folder(s3.default_bucket(), f"tune16/{run['run_id']}/", first="")


def as_json(results: list[Result], connected: Connected) -> Json:
    """The results with the versions of what was checked."""
    version = connected.cluster.look("/version") if connected.cluster else None
    return {
        "tune16": images.VERSION,
        "kubernetes": (version or {}).get("gitVersion", ""),
        "pipeline_server": connected.server.describe(),
        "results": [asdict(result) for result in results],
    }
