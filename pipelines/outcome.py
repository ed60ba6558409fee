"""How a run ended: its verdict with the figures, what it published, and what to do next.

It is read from the connection's bucket (:mod:`components.storage.records`), or where that cannot be reached, from the
steps' logs.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from components.config import CONNECTION_VARIABLES, PROMOTED, SESSION_TOKEN
from components.kubernetes.account import is_inside_only
from components.runtime.errors import Tune16Error
from components.storage import s3
from components.storage.records import Outcome, read_outcome, read_report
from pipelines.cluster import Cluster
from pipelines.runs import has_ended
from pipelines.server import Json, PipelineServer
from pipelines.steplogs import StepLog
from pipelines.submission import pipeline_spec

_VERDICT = re.compile(r"evaluate: (?P<verdict>promoted|kept|inconclusive): (?P<reason>.+)")
_PUBLISHED = re.compile(r"upload: (?P<address>s3://\S+) is champion")
_SCORES = ("loss", "exact_match", "chrf")


@dataclass(frozen=True)
class Ending:
    """What is known about how a run ended; unknown fields are empty, and `remark` says why."""

    verdict: str = ""
    reason: str = ""
    address: str = ""
    scores: dict[str, tuple[float, float]] | None = None  # by name: the base model's and the tuned one's
    remark: str = ""

    def lines(self, run: str) -> list[str]:
        """The ending as lines to print; `run` is the run's name."""
        lines = [f"{self.verdict}: {self.reason}"] if self.verdict else []
        if self.address:
            lines += [f"published {self.address}"]
        elif self.verdict and self.verdict != PROMOTED:
            lines += ["nothing was published: the champion, if any, stays"]
        lines += [self.remark] if self.remark else []
        return [*lines, f"next: {self._next(run)}"] if self.verdict else lines

    def _next(self, run: str) -> str:
        report = f"tune16 runs report {run}"
        if not self.address:
            return report
        path = self.address.split("/", 3)[3].rpartition("/")[0]
        return f"{report}, or fetch the model: python -m components download --path {path} --output model"

    def as_dict(self) -> Json:
        """The ending as JSON."""
        scores = {name: {"base": base, "tuned": tuned} for name, (base, tuned) in (self.scores or {}).items()}
        fields = {"verdict": self.verdict, "reason": self.reason, "address": self.address, "scores": scores}
        return {**fields, "remark": self.remark}


def connection_values(cluster: Cluster, name: str) -> dict[str, str]:
    """The variables of the connection's Secret.

    Raises:
        NotFoundError: there is no such Secret.
        ForbiddenError: this account may not read it.
        Tune16Error: it lacks a key, or the API does not answer.
    """
    values = cluster.read_secret(name, {*CONNECTION_VARIABLES, SESSION_TOKEN})
    missing = [key for key in CONNECTION_VARIABLES if not values.get(key)]
    if missing:
        raise Tune16Error(f"the Secret {name} has no {', '.join(missing)}. Add it: oc set data secret/{name} KEY=value")
    return {SESSION_TOKEN: "", **values}


class Bucket:
    """The bucket in which runs leave their records, read from here.

    Args:
        server: knows the settings of runs.
        cluster: has the connection's Secret; None if there is no login.
    """

    def __init__(self, server: PipelineServer, cluster: Cluster | None) -> None:
        self._server = server
        self._cluster = cluster
        self._values: dict[str, dict[str, str]] = {}
        self._away: dict[str, str] = {}  # by the connection's name: why its bucket cannot be read

    def outcome(self, run: Json) -> Outcome | None:
        """The records that a run has left; None if there are none.

        Raises:
            Tune16Error: the bucket cannot be read from here, and why.
        """
        path = _parameter(run, "destination_path")
        if not path:
            return None  # of a release that kept no records
        with self._reached(run):
            return read_outcome(path, run["run_id"], run.get("finished_at", "") if has_ended(run) else "")

    def report(self, run: Json) -> bytes:
        """The report of a run's evaluation.

        Raises:
            Tune16Error: there is none, or the bucket cannot be read from here, and why.
        """
        found = self.outcome(run)
        if found is None:
            raise Tune16Error(f"{run['display_name']} has no report: it did not get past its first step.")
        with self._reached(run):
            return read_report(found)

    @contextmanager
    def _reached(self, run: Json) -> Iterator[None]:
        name = self._connection(run)
        values = self._read_values(name)
        endpoint = values.get("AWS_S3_ENDPOINT", "")
        if is_inside_only(endpoint) and not (self._cluster and self._cluster.inside):
            raise Tune16Error(f"the bucket's endpoint {endpoint} is reachable only inside the cluster.")
        if name in self._away:
            raise Tune16Error(self._away[name])
        try:
            with s3.environment(values):
                yield
        except Tune16Error as error:
            self._away[name] = str(error)  # kept, because finding out takes time
            raise

    def _connection(self, run: Json) -> str:
        """The name of the connection's Secret: the run's own setting, else the default in its version's form."""
        named = _parameter(run, "with_connection_secret")
        reference = run.get("pipeline_version_reference") or {}
        if named or not reference.get("pipeline_version_id"):
            return named
        version = self._server.read_version(reference["pipeline_id"], reference["pipeline_version_id"])
        fields = pipeline_spec(version)["root"]["inputDefinitions"]["parameters"]
        return str(fields.get("with_connection_secret", {}).get("defaultValue", ""))

    def _read_values(self, name: str) -> dict[str, str]:
        if self._cluster is None:
            raise Tune16Error("the bucket's connection is stored in the cluster. Log in with `oc login`.")
        if name not in self._values:
            self._values[name] = connection_values(self._cluster, name)
        return self._values[name]


def find_ending(bucket: Bucket, run: Json, read_log: Callable[[str], StepLog]) -> Ending:
    """How a run ended, from the bucket, else from the logs of its steps.

    Args:
        bucket: where runs leave it.
        run: the run as the API describes it.
        read_log: gives the log of a step.
    """
    try:
        outcome = bucket.outcome(run)
    except Tune16Error as error:
        return _from_logs(read_log("evaluate"), read_log("upload"), str(error))
    if outcome is None or outcome.evaluation is None:
        return _from_logs(read_log("evaluate"), read_log("upload"), "")
    evaluation = outcome.evaluation
    scores = {name: (evaluation["base"][name]["value"], evaluation["tuned"][name]["value"]) for name in _SCORES}
    address = outcome.published["address"] if outcome.published else ""
    return Ending(evaluation["verdict"], evaluation["reason"], address, scores)


def _from_logs(evaluate: StepLog, upload: StepLog, why: str) -> Ending:
    verdict = next((found for line in reversed(evaluate.lines) if (found := _VERDICT.fullmatch(line))), None)
    published = next((found for line in reversed(upload.lines) if (found := _PUBLISHED.match(line))), None)
    address = published["address"] if published else ""
    unknown = "the scores are" if verdict else "the verdict is"
    remark = f"{unknown} not available: {why or 'the run left no record in its bucket, and its log is gone.'}"
    if verdict is None:
        return Ending(address=address, remark=remark)
    return Ending(verdict["verdict"], verdict["reason"], address, None, remark)


def _parameter(run: Json, name: str) -> str:
    return str(((run.get("runtime_config") or {}).get("parameters") or {}).get(name) or "")
