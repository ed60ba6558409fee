"""The stand-ins, driven by the real clients of the pipeline server and of Kubernetes."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kfp
import kfp_server_api
import kubernetes
import pytest
import urllib3
from kfp_server_api import V2beta1PipelineVersionReference as Reference
from kubernetes.dynamic import DynamicClient

from tests.servers import KubernetesApi, PipelineApi, make_certificate

SPEC = """\
pipelineInfo: {name: demo}
root:
  inputDefinitions:
    parameters:
      rank: {parameterType: NUMBER_INTEGER, defaultValue: 16}
      model: {parameterType: STRING}
"""
PLATFORM = "---\nplatforms: {kubernetes: {}}\n"
STEPS = ("prepare", "train")
TRAINER = "trainer.kubeflow.org/v1alpha1"
JOB = {"apiVersion": TRAINER, "kind": "TrainJob", "metadata": {"name": "job"}, "spec": {"nodes": 2}}


def connect(api: PipelineApi, token: str = "good", ca: Path | None = None) -> SimpleNamespace:
    settings = kfp_server_api.Configuration(host=api.url)
    settings.api_key, settings.api_key_prefix = {"authorization": token}, {"authorization": "Bearer"}
    settings.ssl_ca_cert = ca and str(ca)
    client = kfp_server_api.ApiClient(settings)
    return SimpleNamespace(
        upload=kfp_server_api.PipelineUploadServiceApi(client),
        pipelines=kfp_server_api.PipelineServiceApi(client),
        experiments=kfp_server_api.ExperimentServiceApi(client),
        runs=kfp_server_api.RunServiceApi(client),
        recurring=kfp_server_api.RecurringRunServiceApi(client),
        health=kfp_server_api.HealthzServiceApi(client),
    )


def named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]})


def run_body(pipeline: str, version: str | None = None, **parameters: Any) -> kfp_server_api.V2beta1Run:
    return kfp_server_api.V2beta1Run(
        display_name="first",
        pipeline_version_reference=Reference(pipeline_id=pipeline, pipeline_version_id=version),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=parameters),
    )


def states(run: Any) -> dict[str, str]:
    """The states of the steps, without their drivers and executors."""
    return {task.display_name: task.state for task in run.run_details.task_details if task.display_name in STEPS}


def refused(status: int) -> Any:
    return pytest.raises(kfp_server_api.ApiException, check=lambda error: error.status == status)


@pytest.fixture
def api() -> Iterator[PipelineApi]:
    with PipelineApi() as server:
        yield server


@pytest.fixture
def package(tmp_path: Path) -> str:
    path = tmp_path / "demo.yaml"
    path.write_text(SPEC)
    return str(path)


@pytest.fixture
def pipeline(api: PipelineApi, package: str) -> str:
    return connect(api).upload.upload_pipeline(package, name="demo", display_name="Demo").pipeline_id


def test_pipelines_and_versions(api: PipelineApi, package: str, pipeline: str) -> None:
    client = connect(api)
    assert client.health.healthz_service_get_healthz().multi_user is False
    with refused(409) as taken:
        client.upload.upload_pipeline(package, name="demo")
    assert "error_message" in json.loads(taken.value.body)
    with refused(409) as taken:
        client.pipelines.pipeline_service_create_pipeline(kfp_server_api.V2beta1Pipeline(name="demo"))
    assert json.loads(taken.value.body)["code"] == 6
    Path(package).write_text(SPEC + PLATFORM)
    for name in ("v2", "v3"):
        client.upload.upload_pipeline_version(package, name=name, pipelineid=pipeline)
    page = client.pipelines.pipeline_service_list_pipeline_versions(pipeline, page_size=2, sort_by="created_at desc")
    assert [found.name for found in page.pipeline_versions] == ["v3", "v2"] and page.total_size == 3
    assert page.pipeline_versions[0].pipeline_spec["platform_spec"] == {"platforms": {"kubernetes": {}}}
    page = client.pipelines.pipeline_service_list_pipeline_versions(
        pipeline, page_size=2, sort_by="created_at desc", page_token=page.next_page_token
    )
    assert [found.name for found in page.pipeline_versions] == ["demo"] and page.next_page_token is None
    assert page.pipeline_versions[0].pipeline_spec["pipelineInfo"] == {"name": "demo"}
    assert client.pipelines.pipeline_service_list_pipelines(filter=named("Demo")).total_size == 1
    assert client.pipelines.pipeline_service_list_pipelines(filter=named("demo")).pipelines is None
    assert client.pipelines.pipeline_service_get_pipeline_by_name("demo").pipeline_id == pipeline
    with refused(400):
        client.pipelines.pipeline_service_delete_pipeline(pipeline)
    for version in list(api.versions):
        client.pipelines.pipeline_service_delete_pipeline_version(pipeline, version)
    client.pipelines.pipeline_service_delete_pipeline(pipeline)
    with refused(404) as missing:
        client.pipelines.pipeline_service_get_pipeline(pipeline)
    assert json.loads(missing.value.body)["code"] == 5 and api.pipelines == {}


def test_experiments(api: PipelineApi) -> None:
    experiments = connect(api).experiments
    body = kfp_server_api.V2beta1Experiment(display_name="Tuning")
    made = experiments.experiment_service_create_experiment(body)
    assert experiments.experiment_service_list_experiments(filter=named("Tuning")).experiments == [made]
    with refused(409):
        experiments.experiment_service_create_experiment(body)
    with refused(400) as namespaced:
        experiments.experiment_service_create_experiment(
            kfp_server_api.V2beta1Experiment(display_name="x", namespace="tune16")
        )
    assert "shouldn't contain namespace" in namespaced.value.body
    experiments.experiment_service_delete_experiment(made.experiment_id)
    assert [found["display_name"] for found in api.experiments.values()] == ["Default"]


def test_a_run_from_start_to_end(api: PipelineApi, pipeline: str) -> None:
    runs = connect(api).runs
    run = runs.run_service_create_run(run_body(pipeline, model="tiny"))
    assert run.state == "PENDING" and run.pipeline_version_reference.pipeline_version_id in api.versions
    api.script = [("RUNNING", {"prepare": "SUCCEEDED", "train": "RUNNING"}), ("FAILED", {"train": "FAILED"})]
    first = runs.run_service_get_run(run.run_id)
    assert first.state == "RUNNING" and states(first) == {"prepare": "SUCCEEDED", "train": "RUNNING"}
    last = runs.run_service_get_run(run.run_id)
    assert last.state == "FAILED" and states(last)["train"] == "FAILED"
    assert last.finished_at.year > 1970 and first.finished_at.year == 1970
    runs.run_service_retry_run(run.run_id)
    assert runs.run_service_get_run(run.run_id).state == "RUNNING"
    runs.run_service_terminate_run(run.run_id)
    assert api.runs[run.run_id]["state"] == "CANCELING"
    ended = runs.run_service_get_run(run.run_id)
    assert ended.state == "FAILED" and states(ended)["train"] == "FAILED"  # as the real server says of a stopped run
    with refused(400):
        runs.run_service_terminate_run(run.run_id)
    runs.run_service_archive_run(run.run_id)
    assert runs.run_service_list_runs(filter=named("first")).runs[0].storage_state == "ARCHIVED"
    assert runs.run_service_list_runs(experiment_id="another").runs is None
    runs.run_service_delete_run(run.run_id)
    assert api.runs == {}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "model is not optional"),
        ({"model": "tiny", "rnk": 3}, "not required by pipeline: rnk"),
        ({"model": "tiny", "rank": "3"}, "rank requires type NUMBER_INTEGER"),
    ],
)
def test_a_run_with_wrong_parameters(api: PipelineApi, pipeline: str, parameters: dict[str, Any], message: str) -> None:
    with refused(400) as wrong:
        connect(api).runs.run_service_create_run(run_body(pipeline, **parameters))
    assert message in wrong.value.body


def test_a_run_of_what_does_not_exist(api: PipelineApi, pipeline: str) -> None:
    with refused(500):  # as the real server says it
        connect(api).runs.run_service_create_run(run_body("none"))
    with refused(404):
        connect(api).runs.run_service_create_run(run_body(pipeline, "none", model="tiny"))


def test_recurring_runs(api: PipelineApi, pipeline: str) -> None:
    recurring = connect(api).recurring
    body = kfp_server_api.V2beta1RecurringRun(
        display_name="weekly",
        mode="ENABLE",
        max_concurrency="1",
        no_catchup=True,
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron="0 0 2 * * 1")),
        pipeline_version_reference=Reference(pipeline_id=pipeline),
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters={"model": "tiny"}),
    )
    made = recurring.recurring_run_service_create_recurring_run(body)
    assert (made.status, made.max_concurrency, made.trigger.cron_schedule.cron) == ("ENABLED", "1", "0 0 2 * * 1")
    recurring.recurring_run_service_disable_recurring_run(made.recurring_run_id)
    found = recurring.recurring_run_service_list_recurring_runs(filter=named("weekly")).recurring_runs
    assert [job.status for job in found] == ["DISABLED"]
    body.trigger.cron_schedule.cron = "weekly"
    with refused(400):
        recurring.recurring_run_service_create_recurring_run(body)
    recurring.recurring_run_service_delete_recurring_run(made.recurring_run_id)
    assert api.recurring_runs == {}


def test_the_sdks_client(api: PipelineApi, package: str) -> None:
    with pytest.warns(FutureWarning):
        client = kfp.Client(host=api.url, existing_token="good")
    made = client.upload_pipeline(package, pipeline_name="demo")
    assert client.get_pipeline_id("demo") == made.pipeline_id
    experiment = client.create_experiment("Tuning")
    assert client.get_experiment(experiment_name="Tuning") == experiment
    version = next(iter(api.versions))
    run = client.run_pipeline(experiment.experiment_id, "run", None, {"model": "m"}, made.pipeline_id, version)
    api.set_tasks(run.run_id, {"train": "SUCCEEDED"}, state="SUCCEEDED")
    assert client.wait_for_run_completion(run.run_id, 1).state == "SUCCEEDED"


def test_access_and_faults(api: PipelineApi, pipeline: str) -> None:
    with refused(401) as unknown:
        connect(api, token="old").pipelines.pipeline_service_list_pipelines()
    assert unknown.value.body == "Unauthorized\n"
    runs = connect(api).runs
    api.forbidden = True
    with refused(403):
        runs.run_service_list_runs()
    api.forbidden = False
    api.fail("GET", "/runs", 503)
    with refused(503) as failed:
        runs.run_service_list_runs()
    assert json.loads(failed.value.body)["code"] == 13
    api.drop("/runs", after=True)
    with pytest.raises(urllib3.exceptions.ProtocolError):
        runs.run_service_create_run(run_body(pipeline, model="tiny"))
    assert runs.run_service_list_runs().total_size == 1
    api.hang("/runs", 60, method="POST")
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        runs.run_service_create_run(run_body(pipeline, model="tiny"), _request_timeout=(1, 0.1))
    assert ("GET", "/apis/v2beta1/runs") in api.requests and len(api.runs) == 1


def test_tls_with_an_authority_of_its_own(tmp_path: Path) -> None:
    ca, *pair = make_certificate(tmp_path)
    with PipelineApi(tls=tuple(pair)) as api, KubernetesApi(tls=tuple(pair)) as cluster:
        assert api.url.startswith("https://127.0.0.1:")
        assert connect(api, ca=ca).health.healthz_service_get_healthz().multi_user is False
        with pytest.raises(urllib3.exceptions.MaxRetryError, match="CERTIFICATE_VERIFY_FAILED"):
            connect(api).health.healthz_service_get_healthz()
        client = load(cluster, tmp_path, ca_file=ca)
        assert kubernetes.client.VersionApi(client).get_code().git_version.startswith("v1.")


def load(cluster: KubernetesApi, folder: Path, ca_file: Path | None = None) -> kubernetes.client.ApiClient:
    path = cluster.kubeconfig(folder / "kubeconfig", ca_file=ca_file)
    return kubernetes.config.new_client_from_config(str(path))


@pytest.fixture
def cluster() -> Iterator[KubernetesApi]:
    with KubernetesApi() as server:
        yield server


@pytest.fixture
def client(cluster: KubernetesApi, tmp_path: Path) -> kubernetes.client.ApiClient:
    return load(cluster, tmp_path)


def denied(status: int) -> Any:
    return pytest.raises(kubernetes.client.ApiException, check=lambda error: error.status == status)


def test_core_objects(cluster: KubernetesApi, client: kubernetes.client.ApiClient) -> None:
    core = kubernetes.client.CoreV1Api(client)
    secret = kubernetes.client.V1Secret(
        metadata=kubernetes.client.V1ObjectMeta(name="s3", labels={"app": "tune16"}), string_data={"a": "b"}
    )
    made = core.create_namespaced_secret("tune16", secret)
    assert made.metadata.uid and made.metadata.namespace == "tune16" and made.kind == "Secret"
    with denied(409) as taken:
        core.create_namespaced_secret("tune16", secret)
    assert json.loads(taken.value.body)["reason"] == "AlreadyExists"
    core.patch_namespaced_secret("s3", "tune16", {"metadata": {"labels": {"app": None, "part": "x"}}})
    assert core.list_namespaced_secret("tune16", label_selector="app=tune16").items == []
    assert (
        len(core.list_secret_for_all_namespaces(label_selector="part=x", field_selector="metadata.name=s3").items) == 1
    )
    with denied(409):  # the patch came in between
        core.replace_namespaced_secret("s3", "tune16", made)
    core.delete_namespaced_secret("s3", "tune16")
    with denied(404) as missing:
        core.read_namespaced_secret("s3", "tune16")
    assert json.loads(missing.value.body)["message"] == 'secrets "s3" not found'
    cluster.add("v1", "namespaces", {"kind": "Namespace", "metadata": {"name": "tune16"}})
    assert core.read_namespace("tune16").kind == "Namespace"


def test_logs(cluster: KubernetesApi, client: kubernetes.client.ApiClient) -> None:
    core = kubernetes.client.CoreV1Api(client)
    pod = {"kind": "Pod", "metadata": {"name": "train", "namespace": "tune16"}}
    cluster.add("v1", "pods", {**pod, "spec": {"containers": [{"name": "main"}, {"name": "wait"}]}})
    cluster.logs["tune16", "train"] = "one\ntwo\nthree\n"
    assert core.read_namespaced_pod_log("train", "tune16", container="main", tail_lines=1) == "three\n"
    with denied(400):
        core.read_namespaced_pod_log("train", "tune16")
    stream = kubernetes.watch.Watch().stream(core.read_namespaced_pod_log, "train", "tune16", container="main")
    assert [next(stream), next(stream)] == ["one", "two"]
    stream.close()
    with denied(404):
        core.read_namespaced_pod_log("other", "tune16")


def test_custom_objects(cluster: KubernetesApi, client: kubernetes.client.ApiClient) -> None:
    custom = kubernetes.client.CustomObjectsApi(client)
    group = (*TRAINER.split("/"), "tune16", "trainjobs")
    with denied(404):
        custom.create_namespaced_custom_object(*group, JOB)
    cluster.served[TRAINER] = [("trainjobs", "TrainJob", True)]
    finished = threading.Event()

    def finish(job: dict[str, Any]) -> None:
        def work() -> None:
            job["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
            finished.set()

        threading.Thread(target=work).start()

    cluster.on_create["trainjobs"] = finish
    assert "status" not in custom.create_namespaced_custom_object(*group, JOB)
    assert finished.wait(1)
    assert custom.get_namespaced_custom_object(*group, "job")["status"]["conditions"][0]["type"] == "Complete"
    assert custom.delete_namespaced_custom_object(*group, "job")["status"] == "Success"


def test_server_side_apply(cluster: KubernetesApi, client: kubernetes.client.ApiClient, tmp_path: Path) -> None:
    cluster.served[TRAINER] = [("trainjobs", "TrainJob", True)]
    dynamic = DynamicClient(client, cache_file=str(tmp_path / "discovery.json"))
    jobs = dynamic.resources.get(api_version=TRAINER, kind="TrainJob")
    jobs.server_side_apply(JOB, namespace="tune16", field_manager="tune16", dry_run="All")
    assert cluster.objects == {}
    jobs.server_side_apply(JOB, namespace="tune16", field_manager="tune16")
    more = {"metadata": {"name": "job", "labels": {"a": "b"}}, "spec": {"gpus": 1}}
    made = jobs.server_side_apply(more, namespace="tune16", field_manager="other")
    assert made.spec.to_dict() == {"nodes": 2, "gpus": 1}
    stored = cluster.objects[TRAINER, "trainjobs", "tune16", "job"]
    with pytest.raises(kubernetes.dynamic.exceptions.ConflictError, match="conflict with .*other.*: .spec.gpus"):
        jobs.server_side_apply({**JOB, "spec": {"gpus": 2}}, namespace="tune16", field_manager="tune16")
    less = jobs.server_side_apply({"metadata": {"name": "job"}}, namespace="tune16", field_manager="other")
    assert less.spec.to_dict() == {"nodes": 2} and stored["spec"]["gpus"] == 1, "what a manager no longer names goes"


def test_discovery_and_reviews(cluster: KubernetesApi, client: kubernetes.client.ApiClient) -> None:
    groups = [group.name for group in kubernetes.client.ApisApi(client).get_api_versions().groups]
    assert "batch" in groups and "trainer.kubeflow.org" not in groups
    cluster.served[TRAINER], cluster.schemas[TRAINER] = [("trainjobs", "TrainJob", True)], {"TrainJob": {}}
    schemas, *_ = client.call_api(
        f"/openapi/v3/apis/{TRAINER}", "GET", auth_settings=["BearerToken"], response_type="object"
    )
    assert schemas["components"] == {"schemas": {"TrainJob": {}}}
    names = [found.name for found in kubernetes.client.CoreV1Api(client).get_api_resources().resources]
    assert "pods" in names
    models = kubernetes.client
    user = models.AuthenticationV1Api(client).create_self_subject_review({})
    assert user.status.user_info.username == "developer"
    cluster.allowed = lambda attributes: attributes["verb"] == "get" and attributes["user"] != "robot"
    access = models.AuthorizationV1Api(client)
    for verb, allowed in (("get", True), ("create", False)):
        attributes = {"namespace": "tune16", "verb": verb, "resource": "pods"}
        review = {"spec": {"resourceAttributes": attributes}}
        assert access.create_self_subject_access_review(review).status.allowed is allowed
    review = {"spec": {"user": "robot", "resourceAttributes": {"namespace": "tune16", "verb": "get"}}}
    assert access.create_namespaced_local_subject_access_review("tune16", review).status.allowed is False
    rules = access.create_self_subject_rules_review({"spec": {"namespace": "tune16"}}).status.resource_rules
    assert all(rule.verbs == ["get"] for rule in rules) and len(rules) > 3


def test_access_and_faults_of_the_cluster(cluster: KubernetesApi, client: kubernetes.client.ApiClient) -> None:
    core = kubernetes.client.CoreV1Api(client)
    cluster.forbid("GET", "/secrets")
    with denied(403) as forbidden:
        core.list_namespaced_secret("tune16")
    assert json.loads(forbidden.value.body)["reason"] == "Forbidden"
    cluster.fail("GET", "/pods", 500)
    with denied(500):
        core.list_namespaced_pod("tune16")
    assert core.list_namespaced_pod("tune16").items == []
    cluster.token = "new"
    with denied(401) as unknown:
        core.list_namespaced_pod("tune16")
    assert json.loads(unknown.value.body)["kind"] == "Status"
