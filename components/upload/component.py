"""Pipeline wrapper of the step upload."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.TOOLS, install_kfp_package=False)
def upload(
    merged: dsl.Input[dsl.Model],
    gguf: dsl.Input[dsl.Model],
    evaluation: dsl.Input[dsl.Artifact],
    path: str,
    run_id: str,
    manifest: dsl.Output[dsl.Artifact],
) -> str:
    """Publish the model as a new version in S3 and make it the champion; returns its address."""
    from pathlib import Path

    from components.config import UploadConfig
    from components.runtime.outputs import write_json
    from components.runtime.steps import step
    from components.storage.records import keep_publication
    from components.upload.publisher import publish

    with step("upload"):
        folders = (Path(merged.path), Path(gguf.path), Path(evaluation.path))
        published = publish(*folders, UploadConfig.load(path=path), (merged.uri, gguf.uri))
        keep_publication(path, run_id, published)
        write_json(Path(manifest.path), published)
        manifest.metadata.update(version=published["version"], address=published["address"])
    address: str = published["address"]
    return address
