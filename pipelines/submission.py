"""Runs on a cluster: submissions that leave nothing behind when they fail."""

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from components.config import FORM, Recipe, form_values
from components.runtime.errors import Tune16Error
from pipelines import applied
from pipelines.cluster import Cluster
from pipelines.naming import version_name
from pipelines.server import Json, PipelineServer

PIPELINE = "tune16"
EXPERIMENT = "tune16"


def submit(server: PipelineServer, cluster: Cluster | None, recipe: Recipe, name: str, uploaded: bool = False) -> Json:
    """Start a run of `recipe`.

    Args:
        server: where.
        cluster: where versions of the pipeline may have been applied; None if there is no login.
        recipe: every setting.
        name: the run's name, to which the time is added.
        uploaded: take the newest version that the server has instead of this installation's own.

    Returns:
        The run as the API describes it.

    Raises:
        Tune16Error: it could not be started; whatever was created on the way has been removed.
    """
    with ExitStack() as undo:
        version = ensure_version(server, cluster, undo, uploaded)
        experiment = ensure_experiment(server, undo)
        run = server.create_run(
            {
                "display_name": f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}",
                "experiment_id": experiment["experiment_id"],
                "pipeline_version_reference": {
                    "pipeline_id": version["pipeline_id"],
                    "pipeline_version_id": version["pipeline_version_id"],
                },
                "runtime_config": {"parameters": parameters(recipe, version)},
            }
        )
        undo.pop_all()
    return run


def newest_version(server: PipelineServer) -> Json | None:
    """The newest version of the pipeline on the server, with its spec; None where there is none."""
    pipeline = server.find_pipeline(PIPELINE)
    versions = server.list_versions(pipeline["pipeline_id"]) if pipeline else []
    return _read_version(server, versions[0]) if versions else None


def pipeline_spec(version: Json) -> Json:
    """A version's spec, which the server wraps where the pipeline has a part for Kubernetes."""
    spec: Json = version["pipeline_spec"]
    return dict(spec.get("pipeline_spec", spec))


def ensure_version(server: PipelineServer, cluster: Cluster | None, undo: ExitStack, uploaded: bool) -> Json:
    """The version to run, with its spec; uploaded where the server does not have this content yet.

    A version applied from an overlay is named after all of its patches; its description contains this name.

    Raises:
        Tune16Error: `uploaded` is set but the server has no version; or the server refuses.
    """
    name = version_name()

    def is_wanted(version: Json) -> bool:
        return uploaded or name == version.get("name") or f"[{name}]" in str(version.get("description"))

    pipeline = server.find_pipeline(PIPELINE)
    found = _newest(server, pipeline, is_wanted)
    keeps_objects = found is None and server.describe().get("pipeline_store") == "kubernetes"
    if keeps_objects and cluster is not None and applied.heal(cluster, is_wanted):
        pipeline = server.find_pipeline(PIPELINE)
        found = _newest(server, pipeline, is_wanted)
    if found is None and uploaded:
        raise Tune16Error(f"{server.url}: has no pipeline '{PIPELINE}' yet. Apply an overlay of manifests/ first.")
    if found is None:
        found = _upload(server, undo, pipeline, name)
    return _read_version(server, found)


def _newest(server: PipelineServer, pipeline: Json | None, is_wanted: Callable[[Json], bool]) -> Json | None:
    versions = server.list_versions(pipeline["pipeline_id"]) if pipeline else []
    return next(filter(is_wanted, versions), None)


def _upload(server: PipelineServer, undo: ExitStack, pipeline: Json | None, name: str) -> Json:
    """Compile the pipeline and upload it, as a version of the pipeline that is there or of a new one."""
    from pipelines.compile import compile_ir  # the compiler takes seconds to import

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{PIPELINE}.yaml"
        compile_ir(file)
        if pipeline is None:
            pipeline = server.create_pipeline(PIPELINE, "Tune16")
            undo.callback(_remove, server.delete_pipeline, pipeline["pipeline_id"])
        version = server.upload_version(file, name, pipeline["pipeline_id"])
        undo.callback(_remove, server.delete_version, pipeline["pipeline_id"], version["pipeline_version_id"])
    return version


def _read_version(server: PipelineServer, version: Json) -> Json:
    return server.read_version(version["pipeline_id"], version["pipeline_version_id"])


def ensure_experiment(server: PipelineServer, undo: ExitStack) -> Json:
    """The experiment that all runs belong to, created if it does not exist."""
    experiment = server.find_experiment(EXPERIMENT)
    if experiment is None:
        experiment = server.create_experiment(EXPERIMENT)
        undo.callback(_remove, server.delete_experiment, experiment["experiment_id"])
    return experiment


def _remove(delete: Callable[..., None], *ids: str) -> None:
    """Remove what a failed submission created; if that fails too, report it and let the first error through."""
    try:
        delete(*ids)
    except Tune16Error as error:
        print(f"left behind on the server: {' '.join(ids)} ({error})", file=sys.stderr)


def parameters(recipe: Recipe, version: Json) -> Json:
    """The form filled in from the recipe; what the recipe leaves to the cluster keeps the version's own default.

    Raises:
        Tune16Error: the version is from another release, whose form has other fields.
    """
    if set(FORM) != set(pipeline_spec(version)["root"]["inputDefinitions"]["parameters"]):
        raise Tune16Error(
            f"The version {version.get('display_name')} on the server is from another release: its form has other "
            "fields. Apply this release's manifests, or leave out --uploaded."
        )
    default = Recipe().cluster
    return {
        name: value
        for name, value in form_values(recipe).items()
        if not (FORM[name].startswith("cluster.") and value == getattr(default, FORM[name].partition(".")[2]))
    }
