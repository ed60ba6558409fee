"""Stand-ins for the pipeline server and the Kubernetes API: real HTTP on loopback, state in memory.

Routes are tables of (method, pattern, handler). A handler returns what becomes JSON, or a ``Reply``, and
raises ``ApiError`` for an error. All of it runs under ``lock``, so a handler sees one state.
"""

import base64
import binascii
import copy
import datetime
import email
import ipaddress
import json
import math
import re
import socket
import socketserver
import ssl
import threading
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import parse_qsl, unquote, unquote_plus, urlsplit

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Json = dict[str, Any]
USER = "developer"
JSON, TEXT = "application/json", "text/plain; charset=utf-8"


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes

    def json(self) -> Json:
        try:
            found = json.loads(self.body or b"{}")
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ApiError(400, "the body is no JSON object")
        return found


@dataclass
class Reply:
    status: int
    body: bytes | Iterator[bytes]
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, found: Any, status: int = 200) -> Self:
        return cls(status, json.dumps(found).encode())


class ApiError(Exception):
    """An error answer. A ``body`` replaces the one that the server makes of the message."""

    def __init__(self, status: int, message: str, reason: str = "", body: Reply | None = None, **details: str) -> None:
        super().__init__(message)
        self.status, self.message, self.reason, self.body, self.details = status, message, reason, body, details

    @classmethod
    def text(cls, status: int, message: str) -> Self:
        return cls(status, message, body=Reply(status, f"{message}\n".encode(), TEXT))


@dataclass
class Fault:
    kind: str
    method: str
    path_part: str
    times: float
    status: int = 500
    seconds: float = 0
    after: bool = False

    def hits(self, request: Request) -> bool:
        return self.times > 0 and self.method in ("*", request.method) and self.path_part in request.path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        reply = self.server.api.handle(Request(self.command, url.path, query, self.headers, body))
        if reply is None:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, text in {"Content-Type": reply.content_type, **reply.headers}.items():
            self.send_header(name, text)
        if isinstance(reply.body, bytes):
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)
        else:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in [*reply.body, b""]:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def log_message(self, format: str, *args: Any) -> None:
        pass


for verb in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
    setattr(Handler, f"do_{verb}", Handler.answer)


class Listener(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for the handlers

    def __init__(self, api: "Server", tls: tuple[str | Path, str | Path] | None) -> None:
        self.api = api
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            # The handshake belongs to the connection's own thread.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without HTTPServer's look-up of the host's name

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client went away, or did not trust the certificate."""

    def hang_up(self) -> None:
        for connection in list(self.connections):
            try:
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            except OSError:
                continue  # it has just ended by itself


class Server:
    """What both stand-ins share: the token, faults, TLS and the way from a request to its handler."""

    routes: ClassVar[list[tuple[str, str, str]]] = []

    def __init__(self, token: str = "good", tls: tuple[str | Path, str | Path] | None = None) -> None:
        self.token = token
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._tls = tls
        self._faults: list[Fault] = []
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        self._listener = Listener(self, self._tls)
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.shutdown()
        self._listener.hang_up()
        self._listener.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._listener.server_address[1]}"

    def fail(self, method: str, path_part: str, status: int, times: float = 1) -> None:
        """Answer the next matching requests with an error; the method may be ``*``."""
        self._faults.append(Fault("fail", method, path_part, times, status=status))

    def hang(self, path_part: str, seconds: float, times: float = 1, method: str = "*") -> None:
        """Do and answer the next matching requests only after some time."""
        self._faults.append(Fault("hang", method, path_part, times, seconds=seconds))

    def drop(self, path_part: str, times: float = 1, after: bool = False, method: str = "*") -> None:
        """Hang up on the next matching requests, before or after doing what they ask for."""
        self._faults.append(Fault("drop", method, path_part, times, after=after))

    def handle(self, request: Request) -> Reply | None:
        """Return the answer, or None to hang up."""
        with self.lock:
            self.requests.append((request.method, request.path))
            fault = next((fault for fault in self._faults if fault.hits(request)), None)
            if fault:
                fault.times -= 1
        if fault and fault.kind == "fail":
            return self._render(ApiError(fault.status, f"a fault of status {fault.status}"))
        if fault and fault.kind == "hang" and self._closing.wait(fault.seconds):
            return None
        if fault and fault.kind == "drop":
            if fault.after:
                self._answer(request)
            return None
        return self._answer(request)

    def _answer(self, request: Request) -> Reply:
        try:
            with self.lock:
                self._authorize(request)
                found = self._dispatch(request)
                return found if isinstance(found, Reply) else Reply.json(found)
        except ApiError as problem:
            return problem.body or self._render(problem)
        except Exception:  # a bug in a handler: the client shows it
            return Reply(500, traceback.format_exc().encode(), TEXT)

    def _dispatch(self, request: Request) -> Any:
        for method, pattern, handler in self.routes:
            match = re.fullmatch(pattern, request.path) if method in ("*", request.method) else None
            if match:
                groups = {name: unquote(text) for name, text in match.groupdict(default="").items()}
                return getattr(self, handler)(request, **groups)
        raise ApiError(404, "Not Found", "NotFound")

    def _trusts(self, request: Request) -> bool:
        scheme, _, token = (request.headers.get("Authorization") or "").partition(" ")
        return scheme.lower() == "bearer" and token == self.token

    def _authorize(self, request: Request) -> None:
        raise NotImplementedError

    def _render(self, problem: ApiError) -> Reply:
        raise NotImplementedError


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- The pipeline server -------------------------------------------------------------------------------------

EPOCH = "1970-01-01T00:00:00Z"  # what the real server says of a run that has not finished
NEVER = "0001-01-01T00:00:00Z"  # and of a task
FINISHED = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
RPC_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6}  # all else is 13, an internal error
OPERATIONS: dict[Any, Callable[[str, str], bool]]
OPERATIONS = {"EQUALS": str.__eq__, "NOT_EQUALS": str.__ne__, "IS_SUBSTRING": str.__contains__}
OPERATIONS |= {1: str.__eq__, 2: str.__ne__, 9: str.__contains__}  # numbers are what kfp.Client sends
FIELDS = {"name", "display_name", "description", "state", "storage_state", "status", "experiment_id", "pipeline_id"}
TYPES = {"STRING": (str,), "BOOLEAN": (bool,), "LIST": (list,), "STRUCT": (dict,)}
TYPES |= {"NUMBER_INTEGER": (int, float), "NUMBER_DOUBLE": (int, float)}
STORES = {  # by the path's part: the attribute, the list's name in JSON, what errors call one of them
    "pipelines": ("pipelines", "pipelines", "Pipeline"),
    "experiments": ("experiments", "experiments", "Experiment"),
    "runs": ("runs", "runs", "Run"),
    "recurringruns": ("recurring_runs", "recurringRuns", "Job"),
}
YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Step = tuple[str, Json] | Json | Callable[[Json], None]


class PipelineApi(Server):
    """The API v2beta1 of Kubeflow Pipelines for one user, behind a proxy that checks the token.

    It answers as Open Data Hub's server 2.16 does, or as upstream's 2.17 where ``is_2_17`` is set: there every node is
    wrapped by a retry, and artifacts are not listed. ``kept_logs`` are by (run, node), ``artifacts`` as they are told.
    Each GET of a run takes the next step of ``script``: (state, tasks), fields to set, or a function of the run.
    """

    routes: ClassVar[list[tuple[str, str, str]]] = [
        (method, f"/apis/v2beta1/{pattern}", handler)
        for method, pattern, handler in [
            ("GET", r"healthz", "_healthz"),
            ("POST", r"pipelines/upload", "_upload"),
            ("POST", r"pipelines/upload_version", "_upload_version"),
            ("POST", r"pipelines", "_create_pipeline"),
            ("POST", r"experiments", "_create_experiment"),
            ("POST", r"runs", "_create_run"),
            ("POST", r"recurringruns", "_create_recurring_run"),
            ("GET", r"pipelines/names/(?P<name>[^/]+)", "_get_pipeline_by_name"),
            ("GET", r"pipelines/(?P<pipeline>[^/]+)/versions", "_list_versions"),
            ("GET", r"pipelines/(?P<pipeline>[^/]+)/versions/(?P<version>[^/]+)", "_get_version"),
            ("DELETE", r"pipelines/(?P<pipeline>[^/]+)/versions/(?P<version>[^/]+)", "_delete_version"),
            ("DELETE", r"pipelines/(?P<pipeline>[^/]+)", "_delete_pipeline"),
            ("GET", r"runs/(?P<key>[^/:]+)", "_get_run"),
            ("POST", r"runs/(?P<key>[^/:]+):(?P<action>archive|unarchive)", "_archive_run"),
            ("POST", r"runs/(?P<key>[^/:]+):terminate", "_terminate_run"),
            ("POST", r"runs/(?P<key>[^/:]+):retry", "_retry_run"),
            ("GET", r"artifacts", "_list_artifacts"),
            ("POST", r"recurringruns/(?P<key>[^/:]+):(?P<action>enable|disable)", "_switch_recurring_run"),
            ("GET", r"(?P<kind>pipelines|experiments|runs|recurringruns)", "_list"),
            ("GET", r"(?P<kind>pipelines|experiments|recurringruns)/(?P<key>[^/:]+)", "_get"),
            ("DELETE", r"(?P<kind>experiments|runs|recurringruns)/(?P<key>[^/:]+)", "_delete"),
        ]
    ]
    routes.append(("GET", r"/apis/v1alpha1/runs/(?P<run>[^/]+)/nodes/(?P<node>[^/]+)/log", "_kept_log"))

    def __init__(self, token: str = "good", tls: tuple[str | Path, str | Path] | None = None) -> None:
        super().__init__(token, tls)
        self.forbidden = False
        self.pipeline_store = "kubernetes"
        self.pipelines: dict[str, Json] = {}
        self.versions: dict[str, Json] = {}
        self.experiments: dict[str, Json] = {}
        self.runs: dict[str, Json] = {}
        self.recurring_runs: dict[str, Json] = {}
        self.script: list[Step] = []
        self.is_2_17 = False
        self.kept_logs: dict[tuple[str, str], str] = {}
        self.artifacts: list[Json] = []
        self._add_experiment("Default")  # the real server makes it at its start

    def set_tasks(self, run_id: str, tasks: dict[str, str | Json], state: str = "", error: str = "") -> None:
        """Set the state, or several fields, of a run's tasks, and the state of the run itself."""
        with self.lock:
            run = self.runs[run_id]
            for name, fields in tasks.items():
                _set_task(run, name, {"state": fields} if isinstance(fields, str) else fields)
            if state:
                _set_state(run, state)
            if error:
                run["error"] = {"code": 13, "message": error}

    def _authorize(self, request: Request) -> None:
        if not self._trusts(request):
            raise ApiError.text(401, "Unauthorized")
        if self.forbidden:
            resource = "resource=datasciencepipelinesapplications, subresource=api"
            raise ApiError.text(403, f"Forbidden (user={USER}, verb=get, {resource})")

    def _render(self, problem: ApiError) -> Reply:
        code = 10 if problem.reason == "Aborted" else RPC_CODES.get(problem.status, 13)
        said = "Internal Server Error" if code == 13 else problem.message.rpartition("rror: ")[2]
        detail = {"@type": "type.googleapis.com/google.rpc.Status", "code": code, "message": said}
        return Reply.json({"code": code, "message": problem.message, "details": [detail]}, problem.status)

    def _healthz(self, request: Request) -> Json:
        tags = {"commit_sha": "unknown", "tag_name": "unknown"}
        return {**tags, "multi_user": False, "pipeline_store": self.pipeline_store}

    def _list(self, request: Request, kind: str) -> Json:
        attribute, field, _ = STORES[kind]
        if request.query.get("namespace"):
            raise _invalid(f"In single-user mode, List{kind} cannot filter by namespace.")
        experiment = request.query.get("experiment_id")
        rows = getattr(self, attribute).values()
        rows = [row for row in rows if not experiment or row.get("experiment_id") == experiment]
        without = [{name: value for name, value in row.items() if name != "run_details"} for row in rows]
        return _page(request, field, without if kind == "runs" else list(rows))

    def _get(self, request: Request, kind: str, key: str) -> Json:
        attribute, _, title = STORES[kind]
        return _find(getattr(self, attribute), title, key)

    def _delete(self, request: Request, kind: str, key: str) -> Json:
        self._get(request, kind, key)
        del getattr(self, STORES[kind][0])[key]
        if kind == "recurringruns" and request.query.get("propagation_policy") != "ORPHAN":
            for run in self.runs.values():  # its workflow goes, and the run reads running for ever
                run["is_destroyed"] = run.get("recurring_run_id") == key and run["state"] not in FINISHED
        return {}

    # Pipelines and their versions

    def _upload(self, request: Request) -> Json:
        name, display_name, spec = _uploaded(request)
        try:
            pipeline = self._add_pipeline(name, display_name, request.query.get("description"))
        except ApiError as problem:
            raise _upload_error(409, "Failed to create a pipeline and a pipeline version") from problem
        self._add_version(pipeline["pipeline_id"], name, display_name, request.query.get("description"), spec)
        return pipeline

    def _upload_version(self, request: Request) -> Json:
        name, display_name, spec = _uploaded(request)
        pipeline = request.query.get("pipelineid", "")
        if pipeline not in self.pipelines:  # the real server's answer is no 404 either
            raise _upload_error(400, "Failed to create a pipeline version")
        try:
            return self._add_version(pipeline, name, display_name, request.query.get("description"), spec)
        except ApiError as problem:
            raise _upload_error(409, "Failed to create a pipeline version") from problem

    def _add_pipeline(self, name: str, display_name: str, description: str | None) -> Json:
        if any(found["name"] == name for found in self.pipelines.values()):
            raise _taken("pipeline", name)
        fields = {"display_name": display_name, "name": name, "description": description, "created_at": now()}
        return _store(self.pipelines, "pipeline_id", fields)

    def _add_version(self, pipeline: str, name: str, display_name: str, description: str | None, spec: Json) -> Json:
        if any(found["name"] == name for found in self._versions_of(pipeline)):
            raise _taken("pipeline version", name)
        fields = {"pipeline_id": pipeline, "display_name": display_name, "name": name, "description": description}
        return _store(self.versions, "pipeline_version_id", {**fields, "created_at": now(), "pipeline_spec": spec})

    def _versions_of(self, pipeline: str) -> list[Json]:
        return [found for found in self.versions.values() if found["pipeline_id"] == pipeline]

    def _create_pipeline(self, request: Request) -> Json:
        body = request.json()
        name = body.get("name") or body.get("display_name")
        if not name:
            raise _invalid("pipeline's name cannot be empty")
        return self._add_pipeline(name, body.get("display_name") or name, body.get("description"))

    def _get_pipeline_by_name(self, request: Request, name: str) -> Json:
        by_name = {found["name"]: found for found in self.pipelines.values()}
        return _find(by_name, "Pipeline", name)

    def _delete_pipeline(self, request: Request, pipeline: str) -> Json:
        _find(self.pipelines, "Pipeline", pipeline)
        versions = [found["pipeline_version_id"] for found in self._versions_of(pipeline)]
        if versions and request.query.get("cascade", "").lower() != "true":
            reason = f"it has existing pipeline versions (e.g. {versions[-1]}). Set cascade=true to delete all versions"
            raise _invalid(f"Failed to delete pipeline with id {pipeline} as {reason}")
        for version in versions:
            del self.versions[version]
        del self.pipelines[pipeline]
        return {}

    def _list_versions(self, request: Request, pipeline: str) -> Json:
        _find(self.pipelines, "Pipeline", pipeline)
        return _page(request, "pipeline_versions", self._versions_of(pipeline))

    def _get_version(self, request: Request, pipeline: str, version: str) -> Json:
        mine = {found["pipeline_version_id"]: found for found in self._versions_of(pipeline)}
        return _find(mine, "PipelineVersion", version)

    def _delete_version(self, request: Request, pipeline: str, version: str) -> Json:
        self._get_version(request, pipeline, version)
        del self.versions[version]
        return {}

    # Experiments

    def _add_experiment(self, display_name: str, description: str | None = None) -> Json:
        fields = {"display_name": display_name, "description": description, "created_at": now()}
        return _store(self.experiments, "experiment_id", {**fields, "storage_state": "AVAILABLE"})

    def _create_experiment(self, request: Request) -> Json:
        body = request.json()
        if body.get("namespace"):
            raise _invalid("In single-user mode, CreateExperimentRequest shouldn't contain namespace.")
        name = _display_name(body, "experiment")
        if any(found["display_name"] == name for found in self.experiments.values()):
            raise _taken("experiment", name)
        return self._add_experiment(name, body.get("description"))

    # Runs and recurring runs

    def _job(self, body: Json, kind: str) -> Json:
        """Return the fields that runs and recurring runs share, after the checks that they share."""
        job = {"display_name": _display_name(body, kind), "description": body.get("description"), "created_at": now()}
        experiment = body.get("experiment_id") or next(iter(self.experiments), "")
        job["experiment_id"] = _find(self.experiments, "Experiment", experiment)["experiment_id"]
        job["runtime_config"] = body.get("runtime_config") or {}
        job["service_account"] = body.get("service_account") or "pipeline-runner"
        if body.get("pipeline_spec"):
            spec = job["pipeline_spec"] = body["pipeline_spec"]
        else:
            version = self._referenced(body.get("pipeline_version_reference") or {})
            job["pipeline_version_reference"] = dict(body["pipeline_version_reference"])
            spec = version["pipeline_spec"]
        _check_parameters(spec.get("pipeline_spec", spec), job["runtime_config"].get("parameters") or {})
        return job

    def _referenced(self, reference: Json) -> Json:
        """Return the version that a reference names, or its pipeline's newest."""
        if not reference.get("pipeline_id"):
            raise _invalid("Failed to fetch a template: neither a pipeline nor a pipeline spec")
        if reference["pipeline_id"] not in self.pipelines:
            why = f"pipeline was not found: ResourceNotFoundError: Pipeline {reference['pipeline_id']} not found"
            raise ApiError(500, f"Failed to create a new run: InternalServerError: {why}")
        mine = {found["pipeline_version_id"]: found for found in self._versions_of(reference["pipeline_id"])}
        return _find(mine, "PipelineVersion", reference.get("pipeline_version_id") or next(reversed(mine), ""))

    def _create_run(self, request: Request) -> Json:
        run = self._job(request.json(), "run")
        if "pipeline_version_reference" in run:
            version = self._referenced(run["pipeline_version_reference"])
            run["pipeline_version_reference"]["pipeline_version_id"] = version["pipeline_version_id"]
        run |= {"storage_state": "AVAILABLE", "scheduled_at": run["created_at"], "run_details": {"task_details": []}}
        _set_state(run, "PENDING")
        return _store(self.runs, "run_id", run)

    def _get_run(self, request: Request, key: str) -> Json:
        run = _find(self.runs, "Run", key)
        if run.get("is_destroyed"):
            return self._told(run)
        if run["state"] == "CANCELING":
            open_tasks = [task for task in run["run_details"]["task_details"] if task["state"] not in FINISHED]
            self.set_tasks(key, {task["display_name"]: "FAILED" for task in open_tasks}, state="FAILED")
            if not self.is_2_17:
                run["state_history"] = [entry for entry in run["state_history"] if entry["state"] != "CANCELING"]
        elif self.script:
            self._advance(run, self.script.pop(0))
        return self._told(run)

    def _told(self, run: Json) -> Json:
        """A run as it is told: its steps with their drivers and executors, under a retry strategy with attempts."""
        told = [entry for task in run["run_details"]["task_details"] for entry in _nodes_of(task, self.is_2_17)]
        return {**run, "run_details": {"task_details": told}}

    def _kept_log(self, request: Request, run: str, node: str) -> Reply:
        if (run, node) not in self.kept_logs:
            raise ApiError(500, f"failed to read the log of {node}")
        return Reply(200, self.kept_logs[run, node].encode(), TEXT)

    def _list_artifacts(self, request: Request) -> Json:
        if self.is_2_17:
            raise ApiError(404, "Not Found", body=Reply.json({"code": 5, "message": "Not Found"}, 404))
        return {"artifacts": self.artifacts}

    def _advance(self, run: Json, step: Step) -> None:
        if callable(step):
            step(run)
        elif isinstance(step, dict):
            run.update(step)
        else:
            self.set_tasks(run["run_id"], step[1], state=step[0])

    def _terminate_run(self, request: Request, key: str) -> Json:
        run = _find(self.runs, "Run", key)
        if run["state"] not in ("PENDING", "RUNNING", "PAUSED"):
            raise _invalid(f"Failed to terminate a run {key}. Row not found")
        _set_state(run, "CANCELING")
        return {}

    def _retry_run(self, request: Request, key: str) -> Json:
        run = _find(self.runs, "Run", key)
        if run["state"] not in ("FAILED", "CANCELED"):
            raise ApiError(409, "BadRequestError: Workflow must be Failed/Error to retry", "Aborted")
        run.pop("error", None)
        failed = [task for task in run["run_details"]["task_details"] if task["state"] == "FAILED"]
        self.set_tasks(key, {task["display_name"]: "PENDING" for task in failed}, state="RUNNING")
        return {}

    def _archive_run(self, request: Request, key: str, action: str) -> Json:
        _find(self.runs, "Run", key)["storage_state"] = "ARCHIVED" if action == "archive" else "AVAILABLE"
        return {}

    def _create_recurring_run(self, request: Request) -> Json:
        body = request.json()
        job = self._job(body, "recurring run")
        concurrency = int(body.get("max_concurrency") or 0)
        if not 1 <= concurrency <= 10:
            raise _invalid(f"The max concurrency of the recurring run must be within [1, 10]. Received {concurrency}")
        on = body.get("mode") == "ENABLE"
        job |= {"trigger": _checked_trigger(body.get("trigger") or {}), "no_catchup": bool(body.get("no_catchup"))}
        job |= {"max_concurrency": str(concurrency), "updated_at": job["created_at"]}
        job |= {"mode": "ENABLE" if on else "DISABLE", "status": "ENABLED" if on else "DISABLED"}
        return _store(self.recurring_runs, "recurring_run_id", job)

    def _switch_recurring_run(self, request: Request, key: str, action: str) -> Json:
        job = _find(self.recurring_runs, "Job", key)
        job.update(mode=action.upper(), status=f"{action.upper()}D", updated_at=now())
        return {}


def _invalid(message: str) -> ApiError:
    return ApiError(400, f"Invalid input error: {message}")


def _taken(kind: str, name: str) -> ApiError:
    reason = f"The name {name} already exists. Please specify a new name"
    return ApiError(409, f"Already exist error: Failed to create a new {kind}. {reason}")


def _store(kept: dict[str, Json], id_field: str, fields: Json) -> Json:
    row = {id_field: str(uuid.uuid4()), **{name: value for name, value in fields.items() if value is not None}}
    kept[row[id_field]] = row
    return row


def _find(kept: dict[str, Json], kind: str, key: str) -> Json:
    if key not in kept:
        raise ApiError(404, f"ResourceNotFoundError: {kind} {key} not found.")
    return kept[key]


def _display_name(body: Json, kind: str) -> str:
    if not body.get("display_name"):
        raise _invalid(f"The {kind} name is empty. Please specify a valid name")
    return body["display_name"]


def _page(request: Request, field: str, rows: Iterable[Json]) -> Json:
    """Filter, sort and cut a list as the query asks; what is empty is left out, as in all of the server's JSON."""
    found = [row for row in rows if all(_holds(row, predicate) for predicate in _predicates(request))]
    by, _, order = request.query.get("sort_by", "").partition(" ")
    if by not in {"", "created_at", *FIELDS} or order not in ("", "asc", "desc"):
        raise _invalid(f"Received invalid sort by format {by!r} {order!r}")
    if order == "desc":
        found.reverse()  # the newest first among equals: times are whole seconds
    if by:
        found.sort(key=lambda row: row.get(by, ""), reverse=order == "desc")
    try:
        size = int(request.query.get("page_size") or 0) or 20
        start = int(base64.b64decode(request.query.get("page_token", ""))[5:] or 0)
    except (ValueError, binascii.Error) as error:
        raise _invalid("Invalid package token or page size") from error
    page = {field: found[start : start + size], "total_size": len(found)}
    if start + size < len(found):
        page["next_page_token"] = base64.b64encode(b"skip:%d" % (start + size)).decode()
    return {name: value for name, value in page.items() if value}


def _predicates(request: Request) -> list[Json]:
    text = unquote_plus(request.query.get("filter", ""))  # the real server decodes once more, too
    try:
        return json.loads(text).get("predicates", []) if text else []
    except (ValueError, AttributeError) as error:
        raise _invalid(f"failed to parse valid filter from {text!r}") from error


def _holds(row: Json, predicate: Json) -> bool:
    key, asked = predicate.get("key"), predicate.get("string_value", predicate.get("stringValue"))
    operation = OPERATIONS.get(predicate.get("operation"))
    key = next(iter(row)) if key == "id" else key
    if operation is None or asked is None or key not in {*FIELDS, next(iter(row))}:
        raise _invalid(f"no support for the filter {predicate}")
    if key == "name" and "name" not in row:
        key = "display_name"
    return operation(row.get(key, ""), asked)


def _uploaded(request: Request) -> tuple[str, str, Json]:
    """Return the name, the displayed name and the specification of an uploaded pipeline or version."""
    head = f"Content-Type: {request.headers.get('Content-Type')}\r\n\r\n"
    parts = email.message_from_bytes(head.encode() + request.body).walk()
    file = next((part for part in parts if part.get_param("name", header="content-disposition") == "uploadfile"), None)
    if file is None:
        raise _upload_error(400, "Failed to read pipeline from file")
    display_name = request.query.get("display_name")
    name = request.query.get("name") or display_name or file.get_filename() or ""
    return name, display_name or name, _parse_spec(file.get_payload(decode=True))


def _parse_spec(text: bytes) -> Json:
    try:
        documents = [document for document in yaml.load_all(text, Loader=YamlLoader) if document]
    except yaml.YAMLError as error:
        raise _upload_error(400, f"Failed to read a pipeline spec file: {error}") from error
    if not documents or not isinstance(documents[0], dict) or "pipelineInfo" not in documents[0]:
        raise _upload_error(400, "unknown template format: pipeline spec is invalid")
    if len(documents) == 1:
        return documents[0]
    return {"pipeline_spec": documents[0], "platform_spec": documents[1]}


def _upload_error(status: int, message: str) -> ApiError:
    """Uploads do not go through the gateway, so their errors look different."""
    body = {"error_message": message, "error_details": message}
    return ApiError(status, message, body=Reply.json(body, status))


def _check_parameters(spec: Json, given: Json) -> None:
    known = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    for name, definition in known.items():
        kind = definition.get("parameterType")
        if name not in given and "defaultValue" not in definition and not definition.get("isOptional"):
            reason = "is not optional, yet has neither default value nor user provided value"
            raise _invalid(f"input parameter {name} {reason}")
        if name in given and not _fits(given[name], kind):
            reason = f"requires type {kind}, but the input parameter is not of {kind} value type"
            raise _invalid(f"input parameter {name} {reason}")
    extra = [name for name in given if name not in known]
    if extra:
        raise _invalid(f"parameter(s) provided are not required by pipeline: {', '.join(extra)}")


def _fits(value: Any, kind: str) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "BOOLEAN" or not isinstance(value, bool))


def _checked_trigger(trigger: Json) -> Json:
    cron = (trigger.get("cron_schedule") or {}).get("cron")
    if cron and len(cron.split()) not in (5, 6) and not cron.startswith("@"):
        raise _invalid(f"Schedule cron is not a supported format: {cron}")
    periodic = dict(trigger.get("periodic_schedule") or {})
    if periodic:
        return {"periodic_schedule": {**periodic, "interval_second": str(periodic.get("interval_second", 0))}}
    return trigger


def _set_state(run: Json, state: str) -> None:
    run["state"] = state
    run["finished_at"] = now() if state in FINISHED else EPOCH
    run.setdefault("state_history", []).append({"update_time": now(), "state": state})


def _set_task(run: Json, name: str, fields: Json) -> None:
    """Change a task of a run, or add it; of a step that came from the cache the state is CACHED."""
    tasks = run["run_details"]["task_details"]
    task = next((task for task in tasks if task["display_name"] == name), None)
    if task is None:
        task = {"run_id": run["run_id"], "task_id": str(uuid.uuid4()), "display_name": name, "create_time": now()}
        task |= {"start_time": now(), "end_time": NEVER, "state": "PENDING", "state_history": []}
        tasks.append(task)
    is_cached = fields.get("state") == "CACHED"
    task.update(fields, **({"state": "SUCCEEDED"} if is_cached else {}))
    if task["state"] in FINISHED and not task["state_history"] and not is_cached:
        task["state_history"].append({"update_time": now(), "state": "RUNNING"})
    task["state_history"].append({"update_time": now(), "state": task["state"]})
    if "end_time" not in fields:
        task["end_time"] = now() if task["state"] in FINISHED else NEVER


def _nodes_of(task: Json, is_2_17: bool) -> list[Json]:
    """What the server tells of a step beside its own task: its driver, its executor, and their attempts."""
    name, suffix = task["display_name"], "(0)" if is_2_17 else ""
    executor, pod = f"wf-{name}-executor", f"wf-{name}-executor-0" if is_2_17 else f"wf-{name}-executor"
    is_cached = [entry["state"] for entry in task["state_history"]] == ["SUCCEEDED"]
    driver = {
        **task,
        "display_name": f"{name}-driver",
        "state": "SUCCEEDED",
        "child_tasks": [{"pod_name": f"wf-{name}"}],
    }
    run = {**task, "display_name": "executor", "state": "SKIPPED" if is_cached else task["state"], "child_tasks": []}
    if not is_2_17:
        return [{**task, "child_tasks": [{"pod_name": executor}]}, driver, run]
    return [
        {**task, "display_name": f"{name}{suffix}", "child_tasks": [{"pod_name": executor}, {"pod_name": "wf-other"}]},
        {**task, "child_tasks": [{"pod_name": f"wf-{name}-0"}]},
        driver,
        {**driver, "display_name": f"{name}-driver{suffix}"},
        {**run, "child_tasks": [{"pod_name": pod}]},
        {**run, "display_name": f"executor{suffix}"},
    ]


# --- Kubernetes ----------------------------------------------------------------------------------------------

REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed"}
REASONS |= {409: "Conflict", 415: "UnsupportedMediaType", 422: "Invalid", 429: "TooManyRequests"}
REASONS |= {500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout"}
VERBS = ["create", "delete", "get", "list", "patch", "update"]
VERSION = {"major": "1", "minor": "32", "gitVersion": "v1.32.5", "gitCommit": "0" * 40, "gitTreeState": "clean"}
VERSION |= {"buildDate": EPOCH, "goVersion": "go1.23.8", "compiler": "gc", "platform": "linux/amd64"}
SERVED: dict[str, list[tuple[str, str, bool]]] = {
    "v1": [
        ("configmaps", "ConfigMap", True),
        ("events", "Event", True),
        ("namespaces", "Namespace", False),
        ("nodes", "Node", False),
        ("persistentvolumeclaims", "PersistentVolumeClaim", True),
        ("pods", "Pod", True),
        ("resourcequotas", "ResourceQuota", True),
        ("secrets", "Secret", True),
        ("serviceaccounts", "ServiceAccount", True),
        ("services", "Service", True),
    ],
    "batch/v1": [("jobs", "Job", True)],
    "networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy", True)],
    "rbac.authorization.k8s.io/v1": [("roles", "Role", True), ("rolebindings", "RoleBinding", True)],
}
IDENTITY = {"apiVersion", "kind", "name", "namespace"}
Key = tuple[str, str, str, str]
ROOT = r"/(?:api|apis)/(?P<group_version>(?<=/api/)v1|(?<=/apis/)[^/]+/[^/]+)"
REVIEW = r"/apis/authorization\.k8s\.io/v1"


class KubernetesApi(Server):
    """The API of a cluster with whatever resources ``served`` lists, asked by one user.

    ``objects`` is keyed by (group and version, plural, namespace or "", name). ``logs`` by (namespace, pod).
    """

    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", r"/version/?", "_version"),
        ("GET", r"/apis/?", "_groups"),
        ("GET", r"/apis/(?P<group>[^/]+)/?", "_group"),
        ("GET", ROOT + "/?", "_resources"),
        ("GET", "/openapi/v3" + ROOT, "_schemas"),
        ("POST", r"/apis/authentication\.k8s\.io/v1/selfsubjectreviews", "_who_am_i"),
        ("POST", REVIEW + r"/(?:selfsubject|subject)accessreviews", "_review_access"),
        ("POST", REVIEW + r"/namespaces/(?P<namespace>[^/]+)/localsubjectaccessreviews", "_review_access"),
        ("POST", REVIEW + r"/selfsubjectrulesreviews", "_review_rules"),
        ("GET", r"/api/v1/namespaces/(?P<namespace>[^/]+)/pods/(?P<pod>[^/]+)/log", "_log"),
        ("*", ROOT + r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)", "_collection"),
        (
            "*",
            ROOT + r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)/(?P<name>[^/]+)(?:/status)?",
            "_object",
        ),
    ]

    def __init__(self, token: str = "good", tls: tuple[str | Path, str | Path] | None = None) -> None:
        super().__init__(token, tls)
        self.objects: dict[Key, Json] = {}
        self.served = {group_version: list(resources) for group_version, resources in SERVED.items()}
        self.schemas: dict[str, Json] = {}  # by group and version: what OpenAPI calls components.schemas
        self.logs: dict[tuple[str, str], str] = {}
        self.allowed: Callable[[Json], bool] = lambda attributes: True
        self.on_create: dict[str, Callable[[Json], None]] = {}
        self.on_apply: dict[str, Callable[[Json], None]] = {}
        self._owners: dict[Key, dict[str, set[tuple[str, ...]]]] = {}  # by manager: the fields that it has set
        self._forbidden: list[Fault] = []
        self._writes = 0

    def add(self, api_version: str, plural: str, obj: Json) -> Json:
        """Store an object, and serve its resource if it is not served yet; return what is stored."""
        with self.lock:
            metadata = obj.get("metadata", {})
            resources = self.served.setdefault(api_version, [])
            if plural not in [resource[0] for resource in resources]:
                resources.append((plural, obj["kind"], "namespace" in metadata))
            return self._write((api_version, plural, metadata.get("namespace", ""), metadata["name"]), obj)

    def forbid(self, method: str, path_part: str) -> None:
        """Answer matching requests with 403 from now on; the method may be ``*``."""
        self._forbidden.append(Fault("forbid", method, path_part, math.inf))

    def kubeconfig(self, path: Path, namespace: str = "tune16", ca_file: str | Path | None = None) -> Path:
        """Write a kubeconfig with the token, and the certificate authority where there is one."""
        cluster = {"server": self.url} | ({"certificate-authority": str(ca_file)} if ca_file else {})
        context = {"cluster": "stand-in", "user": USER, "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stand-in", "cluster": cluster}],
            "users": [{"name": USER, "user": {"token": self.token}}],
            "contexts": [{"name": "stand-in", "context": context}],
            "current-context": "stand-in",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def _authorize(self, request: Request) -> None:
        if not self._trusts(request):
            raise ApiError(401, "Unauthorized")
        if any(rule.hits(request) for rule in self._forbidden):
            verb = {"POST": "create", "GET": "get"}.get(request.method, request.method.lower())
            resource = request.path.rstrip("/").rpartition("/")[2]
            raise ApiError(403, f'{resource} is forbidden: User "{USER}" cannot {verb} resource "{resource}"')

    def _render(self, problem: ApiError) -> Reply:
        body = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": problem.message}
        body |= {"reason": problem.reason or REASONS.get(problem.status, ""), "code": problem.status}
        if problem.details:
            body["details"] = problem.details
        return Reply.json(body, problem.status)

    # Discovery and reviews

    def _version(self, request: Request) -> Json:
        return VERSION

    def _groups(self, request: Request) -> Json:
        names = dict.fromkeys(found.split("/")[0] for found in self.served if "/" in found)
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [self._group(request, name) for name in names]}

    def _group(self, request: Request, group: str) -> Json:
        served = [found for found in self.served if found.startswith(f"{group}/")]
        if not served:
            raise ApiError.text(404, "404 page not found")
        versions = [{"groupVersion": found, "version": found.split("/")[1]} for found in served]
        fields = {"name": group, "versions": versions, "preferredVersion": versions[0]}
        return {"kind": "APIGroup", "apiVersion": "v1", **fields}

    def _resources(self, request: Request, group_version: str) -> Json:
        if group_version not in self.served:
            raise ApiError.text(404, "404 page not found")
        resources = [
            {"name": plural, "singularName": kind.lower(), "namespaced": namespaced, "kind": kind, "verbs": VERBS}
            for plural, kind, namespaced in self.served[group_version]
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}

    def _schemas(self, request: Request, group_version: str) -> Json:
        self._resources(request, group_version)
        return {"openapi": "3.0.0", "components": {"schemas": self.schemas.get(group_version, {})}}

    def _who_am_i(self, request: Request) -> Reply:
        user = {"username": USER, "groups": ["system:authenticated"]}
        return Reply.json({**request.json(), "status": {"userInfo": user}}, 201)

    def _review_access(self, request: Request, namespace: str = "") -> Reply:
        review = request.json()
        spec = review.get("spec", {})
        attributes = spec.get("resourceAttributes") or spec.get("nonResourceAttributes")
        if not attributes:
            raise ApiError(422, "spec: one of resourceAttributes and nonResourceAttributes must be specified")
        if namespace and attributes.get("namespace") != namespace:
            raise ApiError(400, f"spec.resourceAttributes.namespace must match namespace: {namespace}")
        allowed = bool(self.allowed({**attributes, "user": spec.get("user", USER)}))
        return Reply.json({**review, "status": {"allowed": allowed}}, 201)

    def _review_rules(self, request: Request) -> Reply:
        review = request.json()
        asked = {"namespace": review.get("spec", {}).get("namespace", ""), "user": USER}
        rules = []
        for group_version, resources in self.served.items():
            group = group_version.rpartition("/")[0]
            for plural, _, _ in resources:
                attributes = {**asked, "group": group, "resource": plural}
                verbs = [verb for verb in VERBS if self.allowed({**attributes, "verb": verb})]
                rules.append({"apiGroups": [group], "resources": [plural], "verbs": verbs})
        rules = [rule for rule in rules if rule["verbs"]]
        status = {"resourceRules": rules, "nonResourceRules": [], "incomplete": False}
        return Reply.json({**review, "status": status}, 201)

    # Objects

    def _log(self, request: Request, namespace: str, pod: str) -> Reply:
        obj = self.objects.get(("v1", "pods", namespace, pod))
        if obj is None and (namespace, pod) not in self.logs:
            raise _missing(("v1", "pods", namespace, pod))
        containers = [found["name"] for found in (obj or {}).get("spec", {}).get("containers", [])]
        container = request.query.get("container")
        if len(containers) > 1 and not container:
            choices = f"choose one of: [{' '.join(containers)}]"
            raise ApiError(400, f"a container name must be specified for pod {pod}, {choices}")
        if containers and container and container not in containers:
            raise ApiError(400, f"container {container} is not valid for pod {pod}")
        if (namespace, pod) not in self.logs:
            raise ApiError(400, f'container "{container}" in pod "{pod}" is waiting to start: ContainerCreating')
        lines = self.logs[namespace, pod].encode().splitlines(keepends=True)
        if request.query.get("tailLines"):
            lines = lines[max(0, len(lines) - int(request.query["tailLines"])) :]
        follow = request.query.get("follow", "").lower() == "true"
        return Reply(200, iter(lines) if follow else b"".join(lines), TEXT)

    def _collection(self, request: Request, group_version: str, plural: str, namespace: str) -> Any:
        kind = self._kind(group_version, plural)
        if request.method == "POST":
            return self._create(request, (group_version, plural, namespace, ""))
        if request.method != "GET" or request.query.get("watch", "").lower() == "true":
            raise ApiError(405, "the server does not allow this method on the requested resource")
        items = [
            obj
            for (found, resource, space, _), obj in self.objects.items()
            if (found, resource) == (group_version, plural) and namespace in ("", space) and _selected(request, obj)
        ]
        metadata = {"resourceVersion": str(self._writes)}
        return {"kind": f"{kind}List", "apiVersion": group_version, "metadata": metadata, "items": items}

    def _object(self, request: Request, group_version: str, plural: str, namespace: str, name: str) -> Any:
        self._kind(group_version, plural)
        key = (group_version, plural, namespace, name)
        applied = request.headers.get_content_type() == "application/apply-patch+yaml"
        if key not in self.objects and not (request.method == "PATCH" and applied):
            raise _missing(key)
        if request.method == "GET":
            return self.objects[key]
        if request.method == "DELETE":
            return self._delete(key)
        if request.method == "PUT":
            return self._stored(request, key, request.json())
        if request.method == "PATCH":
            return self._apply(request, key) if applied else self._patch(request, key)
        raise ApiError(405, "the server does not allow this method on the requested resource")

    def _kind(self, group_version: str, plural: str) -> str:
        for found, kind, _ in self.served.get(group_version, []):
            if found == plural:
                return kind
        raise ApiError.text(404, "404 page not found")

    def _create(self, request: Request, key: Key) -> Reply:
        obj = request.json()
        metadata = obj.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        if not metadata.get("name"):
            raise ApiError(422, f"{obj.get('kind')} is invalid: metadata.name: Required value: name is required")
        key = (*key[:3], metadata["name"])
        if key in self.objects:
            raise ApiError(409, f"{_title(key)} already exists", "AlreadyExists", name=key[3], kind=key[1])
        reply = Reply.json(self._stored(request, key, obj), 201)
        if key in self.objects and key[1] in self.on_create:
            self.on_create[key[1]](self.objects[key])
        return reply

    def _patch(self, request: Request, key: Key) -> Json:
        kind, group = request.headers.get_content_type(), key[0].rpartition("/")[0]
        built_in = "." not in group or (group.endswith(".k8s.io") and not group.endswith("x-k8s.io"))
        if kind != "application/merge-patch+json" and not (
            kind == "application/strategic-merge-patch+json" and built_in
        ):
            raise ApiError(415, f"the body of the request was in an unknown format: {kind}")
        return self._stored(request, key, _merged(self.objects[key], request.json()))

    def edit(self, key: Key, manager: str, path: tuple[str, ...], value: Any) -> None:
        """Let somebody else set a field, who owns it from now on."""
        with self.lock:
            patch: Any = value
            for name in reversed(path):
                patch = {name: patch}
            self._write(key, _merged(self.objects[key], patch))
            self._owners.setdefault(key, {}).setdefault(manager, set()).add(path)

    def _apply(self, request: Request, key: Key) -> Reply:
        """Server-side apply: a manager's fields are its own, conflicts are refused, what it no longer names goes.

        Lists are taken as a whole, as of kinds that do not say what their lists' keys are.
        """
        manager = request.query.get("fieldManager")
        if not manager:
            raise ApiError(422, "PatchOptions is invalid: fieldManager: Required value: is required for apply patch")
        body, old = yaml.safe_load(request.body), self.objects.get(key, {})
        wanted = {path for path in _leaves(body) if path[0] in ("spec", "metadata") and path[-1] not in IDENTITY}
        owners = self._owners.setdefault(key, {})
        taken = [
            (other, path)
            for other, paths in owners.items()
            for path in sorted(paths & wanted)
            if other != manager and _at(old, path) != _at(body, path)
        ]
        if taken and request.query.get("force") != "true":
            fields = "\n".join(f'conflict with "{other}": .{".".join(path)}' for other, path in taken)
            raise ApiError(409, f"Apply failed with {len(taken)} conflict{'s'[: len(taken) > 1]}: {fields}", "Conflict")
        obj = copy.deepcopy(_merged(old, body))
        for path in owners.get(manager, set()) - wanted:
            if not any(path in paths for other, paths in owners.items() if other != manager):
                _remove(obj, path)
        if request.query.get("dryRun") != "All":
            owners[manager] = wanted
        status = 200 if old else 201
        reply = Reply.json(self._stored(request, key, obj), status)
        if key[1] in self.on_apply:
            self.on_apply[key[1]](self.objects[key])
        return reply

    def _delete(self, key: Key) -> Json:
        obj = self.objects.pop(key)
        self._owners.pop(key, None)
        if key[1] == "pods":  # what ends gracefully is answered with the object itself
            return obj
        details = {"name": key[3], "kind": key[1], "uid": obj["metadata"]["uid"]}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def _stored(self, request: Request, key: Key, obj: Json) -> Json:
        """Store what was sent, unless it is a dry run or rests on a version that another write replaced."""
        old = self.objects.get(key, {}).get("metadata", {})
        seen = obj.get("metadata", {}).get("resourceVersion")
        if old and seen and seen != old["resourceVersion"]:
            message = "the object has been modified; please apply your changes to the latest version and try again"
            raise ApiError(409, f"Operation cannot be fulfilled on {_title(key)}: {message}")
        return self._write(key, obj, keep=request.query.get("dryRun") != "All")

    def _write(self, key: Key, obj: Json, keep: bool = True) -> Json:
        group_version, plural, namespace, name = key
        old = self.objects.get(key, {}).get("metadata", {})
        metadata = {**obj.get("metadata", {}), "name": name, **({"namespace": namespace} if namespace else {})}
        metadata["uid"] = old.get("uid") or str(uuid.uuid4())
        metadata["creationTimestamp"] = old.get("creationTimestamp") or metadata.get("creationTimestamp") or now()
        metadata["resourceVersion"] = str(self._writes + 1)
        obj = {**obj, "apiVersion": group_version, "kind": self._kind(group_version, plural), "metadata": metadata}
        if keep:
            self._writes += 1
            self.objects[key] = obj
        return obj


def _title(key: Key) -> str:
    group = key[0].rpartition("/")[0]
    return f'{key[1]}{"." if group else ""}{group} "{key[3]}"'


def _missing(key: Key) -> ApiError:
    return ApiError(404, f"{_title(key)} not found", name=key[3], kind=key[1], group=key[0].rpartition("/")[0])


def _selected(request: Request, obj: Json) -> bool:
    metadata = obj["metadata"]
    labels, fields = request.query.get("labelSelector"), request.query.get("fieldSelector")
    wanted = [("label", *term) for term in _terms(labels)] + [("field", *term) for term in _terms(fields)]
    for kind, name, value in wanted:
        if kind == "field" and name not in ("metadata.name", "involvedObject.name"):
            raise ApiError(400, f"field label not supported: {name}")
        found = _at(obj, tuple(name.split("."))) if kind == "field" else metadata.get("labels", {}).get(name)
        if found != value:
            return False
    return True


def _terms(selector: str | None) -> list[tuple[str, str]]:
    terms = [re.fullmatch(r"([^=!]+)==?([^=]*)", term.strip()) for term in selector.split(",")] if selector else []
    if not all(terms):
        raise ApiError(400, f"unable to parse requirement: {selector}")
    return [(term[1], term[2]) for term in terms if term]


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields that are no objects; an empty object counts as one."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*path, name))
    else:
        yield path


def _at(obj: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        obj = obj.get(name) if isinstance(obj, dict) else None
    return obj if obj is not None else {}


def _remove(obj: Json, path: tuple[str, ...]) -> None:
    """Remove a field, and the objects around it that are empty then."""
    inner = obj.get(path[0])
    if len(path) > 1 and isinstance(inner, dict):
        _remove(inner, path[1:])
    if len(path) == 1 or inner == {}:
        obj.pop(path[0], None)


def _merged(old: Any, patch: Any) -> Any:
    """Merge as RFC 7386 says: objects by their fields, null removes, all else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


# --- The model registry ---------------------------------------------------------------------------------------

REGISTRY = r"/api/model_registry/v1alpha3"
KINDS = "registered_models|model_versions|model_artifacts"


class ModelRegistryApi(Server):
    """The REST API of a model registry, as far as its Python client asks; ``stored`` has the objects by kind and id."""

    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", REGISTRY + rf"/(?P<kind>{KINDS})", "_list"),
        ("POST", REGISTRY + r"/(?P<kind>registered_models|model_versions)", "_create"),
        ("GET", REGISTRY + r"/(?P<kind>registered_model|model_version|model_artifact)", "_find_one"),
        ("*", REGISTRY + rf"/(?P<kind>{KINDS})/(?P<key>\d+)", "_one"),
        ("POST", REGISTRY + r"/model_versions/(?P<key>\d+)/artifacts", "_create_artifact"),
    ]

    def __init__(self, token: str = "good", tls: tuple[str | Path, str | Path] | None = None) -> None:
        super().__init__(token, tls)
        self.stored: dict[str, dict[str, Json]] = {kind: {} for kind in KINDS.split("|")}
        self._parents: dict[str, str] = {}  # of an artifact: its version
        self.ignores_case = False  # of names, as a registry on MySQL does

    def named(self, kind: str, name: str) -> Json:
        """The one object of this kind and name."""
        (found,) = (item for item in self.stored[kind].values() if item["name"] == name)
        return found

    def _authorize(self, request: Request) -> None:
        if self._tls and not self._trusts(request):
            raise ApiError(401, "Unauthorized")

    def _render(self, problem: ApiError) -> Reply:
        return Reply.json({"code": str(problem.status), "message": problem.message}, problem.status)

    def _list(self, request: Request, kind: str) -> Json:
        items = list(self.stored[kind].values())
        return {"items": items, "size": len(items), "pageSize": len(items), "nextPageToken": ""}

    def _find_one(self, request: Request, kind: str) -> Json:
        name, parent = request.query.get("name"), request.query.get("parentResourceId")
        for item in self.stored[f"{kind}s"].values():
            if self._is_named(item, str(name)) and self._parent(item) == parent:
                return item
        raise ApiError(404, f"no {kind} {name}")

    def _is_named(self, item: Json, name: str) -> bool:
        return item["name"] == name or (self.ignores_case and item["name"].lower() == name.lower())

    def _one(self, request: Request, kind: str, key: str) -> Json:
        if key not in self.stored[kind]:
            raise ApiError(404, f"no {kind} {key}")
        if request.method == "PATCH":
            self.stored[kind][key] |= request.json()
        return self.stored[kind][key]

    def _create_artifact(self, request: Request, key: str) -> Reply:
        return self._create(request, "model_artifacts", key)

    def _create(self, request: Request, kind: str, parent: str = "") -> Reply:
        body = request.json()
        parent = parent or body.get("registeredModelId", "")
        if any(
            item["name"] == body["name"] and self._parent(item) == (parent or None)
            for item in self.stored[kind].values()
        ):
            raise ApiError(409, f"{body['name']} already exists")
        key = str(1 + sum(map(len, self.stored.values())))
        if kind == "model_artifacts":
            self._parents[key] = parent
        self.stored[kind][key] = {"customProperties": {}, "state": "LIVE", **body, "id": key}
        return Reply.json(self.stored[kind][key], 201)

    def _parent(self, item: Json) -> str | None:
        return item.get("registeredModelId") or self._parents.get(item["id"])


# --- Certificates --------------------------------------------------------------------------------------------


def make_certificate(folder: Path) -> tuple[Path, Path, Path]:
    """Write a certificate authority, and a certificate of it with its key for loopback; return the three files."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tune16 tests")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    authority = _certificate(ca_name, ca_key, ca_name, ca_key, x509.BasicConstraints(ca=True, path_length=0))
    served = _certificate(name, key, ca_name, ca_key, x509.SubjectAlternativeName(addresses))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    contents = {
        "ca.crt": authority.public_bytes(serialization.Encoding.PEM),
        "tls.crt": served.public_bytes(serialization.Encoding.PEM),
        "tls.key": key.private_bytes(serialization.Encoding.PEM, *private),
    }
    for file, content in contents.items():
        (folder / file).write_bytes(content)
    return folder / "ca.crt", folder / "tls.crt", folder / "tls.key"


def _certificate(
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> x509.Certificate:
    today = datetime.datetime.now(datetime.UTC)
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder(issuer, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_id, critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
