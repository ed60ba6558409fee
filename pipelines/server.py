"""The pipeline server's API (Kubeflow Pipelines, v2beta1), with retries that never do anything twice.

Every request has a time limit. Reads are simply repeated after a fault. A creation is repeated only after checking,
by a unique name, whether the first attempt succeeded.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3
from kfp_server_api import (
    ApiClient,
    ApiException,
    Configuration,
    ExperimentServiceApi,
    HealthzServiceApi,
    PipelineServiceApi,
    PipelineUploadServiceApi,
    RecurringRunServiceApi,
    RunServiceApi,
)

from components.kubernetes import api as kubeapi
from components.runtime.errors import Tune16Error
from components.runtime.retry import Answer, retry
from pipelines.cluster import ServerAddress, unreachable

Json = dict[str, Any]

_log = logging.getLogger(__name__)
_LOOKS = 5  # for an object that may exist although the answer was lost
_TRY_SECONDS = 60.0  # also where --timeout is short: it is of one request
PAUSE_SECONDS = 0.5  # before the second look; it doubles with each further one
_PAGE_SIZE = 100
_MAX_PAGES = 20  # of artifacts; more would take too long


class UnavailableError(Tune16Error):
    """The server does not answer, or with a fault that may be temporary."""


class PipelineServer:
    """A pipeline server.

    Args:
        address: where it is, the token and the CA.
        timeout: seconds that one request may take.
    """

    def __init__(self, address: ServerAddress, timeout: float = 30) -> None:
        settings = Configuration(host=address.url)
        settings.ssl_ca_cert = address.ca or None
        settings.retries = False
        if address.token:
            settings.api_key = {"authorization": address.token}
            settings.api_key_prefix = {"authorization": "Bearer"}
        self.url = address.url
        self._client = ApiClient(settings)
        self._timeout = timeout
        self._artifacts: list[Json] | None = None
        self._pipelines = PipelineServiceApi(self._client)
        self._uploads = PipelineUploadServiceApi(self._client)
        self._experiments = ExperimentServiceApi(self._client)
        self._runs = RunServiceApi(self._client)
        self._schedules = RecurringRunServiceApi(self._client)

    def check(self) -> None:
        """Check that the server answers and accepts the token.

        Raises:
            Tune16Error: it does not; every method here may raise this.
        """
        self._read(HealthzServiceApi(self._client).healthz_service_get_healthz)
        self._read(self._pipelines.pipeline_service_list_pipelines, page_size=1)

    def describe(self) -> Json:
        """The server's description of itself."""
        return self._read(HealthzServiceApi(self._client).healthz_service_get_healthz)

    def find_pipeline(self, name: str) -> Json | None:
        """The pipeline of that name."""
        found = self._list(self._pipelines.pipeline_service_list_pipelines, "pipelines")
        return next((entry for entry in found if _is_named(entry, name)), None)

    def list_versions(self, pipeline_id: str) -> list[Json]:
        """The versions of a pipeline, newest first."""
        return self._list(
            self._pipelines.pipeline_service_list_pipeline_versions,
            "pipeline_versions",
            pipeline_id,
            sort_by="created_at desc",
        )

    def list_all_versions(self) -> list[Json]:
        """The versions of all pipelines."""
        pipelines = self._list(self._pipelines.pipeline_service_list_pipelines, "pipelines")
        return [version for pipeline in pipelines for version in self.list_versions(pipeline["pipeline_id"])]

    def find_version(self, pipeline_id: str, name: str) -> Json | None:
        """The version of that name."""
        return next((entry for entry in self.list_versions(pipeline_id) if _is_named(entry, name)), None)

    def read_version(self, pipeline_id: str, version_id: str) -> Json:
        """One version with its spec."""
        return self._read(self._pipelines.pipeline_service_get_pipeline_version, pipeline_id, version_id)

    def create_pipeline(self, name: str, display_name: str) -> Json:
        """Create a pipeline without versions."""
        pipeline = {"name": name, "display_name": display_name}
        return self._create(
            lambda: self._call(self._pipelines.pipeline_service_create_pipeline, pipeline),
            lambda: self.find_pipeline(name),
        )

    def upload_version(self, file: Path, name: str, pipeline_id: str) -> Json:
        """Upload a compiled pipeline as a further version."""
        return self._create(
            lambda: self._call(self._uploads.upload_pipeline_version, str(file), name=name, pipelineid=pipeline_id),
            lambda: self.find_version(pipeline_id, name),
        )

    def delete_version(self, pipeline_id: str, version_id: str) -> None:
        """Delete one version."""
        self._act(self._pipelines.pipeline_service_delete_pipeline_version, pipeline_id, version_id)

    def delete_pipeline(self, pipeline_id: str) -> None:
        """Delete a pipeline with all its versions."""
        for version in self.list_versions(pipeline_id):
            self.delete_version(pipeline_id, version["pipeline_version_id"])
        self._act(self._pipelines.pipeline_service_delete_pipeline, pipeline_id)

    def find_experiment(self, name: str) -> Json | None:
        """The experiment of that name."""
        found = self._list(
            self._experiments.experiment_service_list_experiments, "experiments", filter=_equals("display_name", name)
        )
        return found[0] if found else None

    def create_experiment(self, name: str) -> Json:
        """Create an experiment."""
        return self._create(
            lambda: self._call(self._experiments.experiment_service_create_experiment, {"display_name": name}),
            lambda: self.find_experiment(name),
        )

    def delete_experiment(self, experiment_id: str) -> None:
        """Delete an experiment."""
        self._act(self._experiments.experiment_service_delete_experiment, experiment_id)

    def create_run(self, run: Json) -> Json:
        """Start a run; its display name has to be new."""
        return self._create(
            lambda: self._call(self._runs.run_service_create_run, run),
            lambda: next(iter(self.list_runs(filter=_equals("display_name", run["display_name"]))), None),
        )

    def find_run(self, name: str) -> Json | None:
        """The newest run of that name, without its steps."""
        return next(iter(self.list_runs(1, filter=_equals("display_name", name))), None)

    def list_runs(self, limit: int = _PAGE_SIZE, **query: Any) -> list[Json]:
        """The newest runs first."""
        return self._list(self._runs.run_service_list_runs, "runs", sort_by="created_at desc", limit=limit, **query)

    def read_run(self, run_id: str) -> Json:
        """One run with its steps."""
        return self._read(self._runs.run_service_get_run, run_id)

    def delete_run(self, run_id: str) -> None:
        """Delete a run with its workflow and pods."""
        self._act(self._runs.run_service_delete_run, run_id)

    def stop_run(self, run_id: str) -> None:
        """Stop a run."""
        self._act(self._runs.run_service_terminate_run, run_id)

    def retry_run(self, run_id: str) -> None:
        """Start the failed steps of a run again."""
        self._act(self._runs.run_service_retry_run, run_id)

    def list_schedules(self) -> list[Json]:
        """All recurring runs, newest first."""
        return self._list(
            self._schedules.recurring_run_service_list_recurring_runs, "recurringRuns", sort_by="created_at desc"
        )

    def create_schedule(self, schedule: Json, find: Callable[[], Json | None]) -> Json:
        """Create a recurring run; `find` looks it up, should the first answer get lost."""
        return self._create(
            lambda: self._call(self._schedules.recurring_run_service_create_recurring_run, schedule), find
        )

    def delete_schedule(self, schedule_id: str) -> None:
        """Delete a recurring run and leave its runs alone: by default the server destroys those still running."""
        method = self._schedules.recurring_run_service_delete_recurring_run
        self._act(functools.partial(method, propagation_policy="ORPHAN"), schedule_id)

    def read_archived_log(self, run_id: str, node: str) -> str | None:
        """What a node of a run's workflow has printed, from where the server keeps logs; None where it has none."""
        try:
            with self._explained():  # only once: it answers 500 for a missing log
                return self._get_text(f"/apis/v1alpha1/runs/{run_id}/nodes/{node}/log")
        except Tune16Error:
            return None

    def list_artifacts(self, namespace: str) -> list[Json]:
        """The artifacts of all runs with addresses from where they can be fetched; none where the server lists none.

        Only Open Data Hub's pipeline server has such a list. It is read once.
        """
        if self._artifacts is None:
            self._artifacts = self._read_artifacts(namespace)
        return self._artifacts

    def _read_artifacts(self, namespace: str) -> list[Json]:
        entries: list[Json] = []
        token = ""
        for _ in range(_MAX_PAGES):
            query = {"namespace": namespace, "view": "DOWNLOAD", "page_size": _PAGE_SIZE, "page_token": token}
            try:
                with self._explained():
                    page = json.loads(self._get_text(f"/apis/v2beta1/artifacts?{urlencode(query)}"))
            except Tune16Error:
                return entries
            entries += page.get("artifacts") or []
            token = page.get("next_page_token") or ""
            if not token:
                break
        return entries

    def set_schedule_enabled(self, schedule_id: str, enabled: bool) -> None:
        """Pause a recurring run, or resume it."""
        schedules = self._schedules
        self._act(
            schedules.recurring_run_service_enable_recurring_run
            if enabled
            else schedules.recurring_run_service_disable_recurring_run,
            schedule_id,
        )

    def _get_text(self, path: str) -> str:
        """GET a path that the client has no method for, once."""
        answer = self._client.call_api(
            path,
            "GET",
            header_params={"Accept": "*/*"},
            auth_settings=["Bearer"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=(self._timeout, self._timeout),
        )
        return str(answer.data.decode(errors="replace"))

    def _list(
        self, method: Callable[..., Any], key: str, *arguments: Any, limit: int = 10_000, **query: Any
    ) -> list[Json]:
        """All pages of a listing, `limit` entries at most."""
        entries: list[Json] = []
        token = ""
        while len(entries) < limit:
            size = min(_PAGE_SIZE, limit - len(entries))
            page = self._read(method, *arguments, page_token=token, page_size=size, **query)
            entries += page.get(key) or []
            token = page.get("next_page_token") or ""
            if not token:
                break
        return entries

    def _read(self, method: Callable[..., Any], *arguments: Any, **query: Any) -> Json:
        """A request that may be repeated as it is."""
        return self._repeat(lambda: self._call(method, *arguments, **query))

    def _create(self, create: Callable[[], Json], find: Callable[[], Json | None]) -> Json:
        """A request that must not be repeated before checking whether it succeeded."""
        failed = False

        def attempt() -> Json:
            nonlocal failed
            found = self._look(find) if failed else None
            failed = True
            return found or create()

        try:
            return self._repeat(attempt)
        except UnavailableError:
            found = self._look(find)
            if found is None:
                raise
            return found

    def _look(self, find: Callable[[], Json | None]) -> Json | None:
        """Check more than once: after a time-out the server may still be working on it."""
        for number in range(_LOOKS):
            found = find()
            if found is not None:
                return found
            time.sleep(PAUSE_SECONDS * 2**number)
        return None

    def _act(self, method: Callable[..., Any], *ids: str) -> None:
        """A request that changes something: if its repetition is refused, the first attempt had succeeded."""
        tries = 0

        def attempt() -> None:
            nonlocal tries
            tries += 1
            try:
                self._call(method, *ids)
            except ApiException as error:
                if tries == 1 or error.status not in (400, 404, 409):
                    raise

        self._repeat(attempt)

    def _repeat(self, request: Callable[[], Answer]) -> Answer:
        with self._explained():
            return retry(
                request,
                _passes,
                seconds=_TRY_SECONDS,
                before_pause=lambda fault: _log.info("%s: again after %r", self.url, fault),
            )

    def _call(self, method: Callable[..., Any], *arguments: Any, **query: Any) -> Json:
        try:
            answer = method(*arguments, **query, _request_timeout=(self._timeout, self._timeout))
        except AttributeError as error:  # the client fails on a certificate error, which has no body
            if not isinstance(error.__context__, ApiException):
                raise
            raise urllib3.exceptions.SSLError(str(error.__context__.reason)) from None
        except ApiException as error:
            kubeapi.refuse_certificate(error)
            raise
        content: Json = self._client.sanitize_for_serialization(answer) or {}
        return content

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            kind = UnavailableError if _passes(error) else Tune16Error
            raise kind(f"{self.url}: {_remedy(error)}") from None
        except urllib3.exceptions.HTTPError as error:
            raise UnavailableError(str(unreachable(self.url, error))) from None
        except ValueError as error:  # not JSON: a login page, or some other server
            raise Tune16Error(f"{self.url}: answers, but not as a pipeline server ({error}). Correct --host.") from None


def _passes(error: BaseException) -> bool:
    """Whether a fault may be temporary."""
    if isinstance(error, ApiException):
        return error.status in kubeapi.PASSING_FAULTS
    return isinstance(error, urllib3.exceptions.HTTPError) and not isinstance(error, urllib3.exceptions.SSLError)


def _remedy(error: ApiException) -> str:
    if error.status == 401:
        return "the token is wrong or has expired. Log in again (oc login), or set TUNE16_TOKEN."
    if error.status == 403:
        return (
            "this account may not use the pipeline server. Ask the namespace's owner for the Role "
            "ds-pipeline-user-access-dspa, or use another --namespace."
        )
    text = _message(error)
    if error.status == 404:
        return f"not found ({text}). Check the name or id; if nothing is ever found, correct --host."
    return f"{error.status} {error.reason}: {text}"


def _message(error: ApiException) -> str:
    """The server's message, extracted from its JSON."""
    try:
        content = json.loads(error.body or "")
    except ValueError:
        content = str(error.body or error.reason)
    text = content.get("message") or content.get("error") or "" if isinstance(content, dict) else str(content)
    return " ".join(str(text).split())[:500]


def _is_named(entry: Json, name: str) -> bool:
    return name in (entry.get("name"), entry.get("display_name"))


def _equals(key: str, value: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "stringValue": value}]})
