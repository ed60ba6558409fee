"""Compiles the pipeline: the Kubernetes form for `oc apply`, or the plain form for the dashboard's upload."""

import tempfile
from pathlib import Path

import yaml
from kfp.compiler import Compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from pipelines.finetune import finetune
from pipelines.naming import NAME, version_name

MANIFEST = Path("manifests/base/pipeline.yaml")


def compile_manifest(target: Path) -> None:
    """Write the objects Pipeline and PipelineVersion.

    The version's description ends in its name, by which `submit` recognises it: an overlay renames the version after
    its own patches.
    """
    name = version_name()
    pipeline, version = yaml.safe_load_all(_compiled(_options(name)))
    version["spec"]["description"] += f" [{name}]"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(yaml.safe_dump_all([pipeline, version]))


def compile_ir(target: Path) -> None:
    """Write the plain intermediate representation, one YAML file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_compiled(None))


def _options(version_name: str) -> KubernetesManifestOptions:
    return KubernetesManifestOptions(
        pipeline_name=NAME,
        pipeline_display_name="Tune16",
        pipeline_version_name=version_name,
        pipeline_version_display_name=version_name,
        include_pipeline_manifest=True,
    )


def _compiled(options: KubernetesManifestOptions | None) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(
            finetune,
            str(path),
            kubernetes_manifest_format=options is not None,
            kubernetes_manifest_options=options,
        )
        return path.read_bytes()
