"""Pipeline wrapper of the step deploy."""

from typing import Any

from kfp import dsl

from components import images


@dsl.component(base_image=images.TOOLS, install_kfp_package=False)
def deploy(
    manifest: dsl.Input[dsl.Artifact],
    path: str,
    settings: dict[str, Any],
    connection: str,
    model_id: str,
    version_id: str,
    node_selector: dict[str, str],
    tolerations: list[dict[str, Any]],
) -> str:
    """Serve the published version, and return its endpoint's address; if it does not answer, the one before stays."""
    from pathlib import Path

    from components.config import DeployConfig
    from components.deploy.deployer import deploy
    from components.deploy.objects import Placing
    from components.runtime.outputs import read_json
    from components.runtime.steps import step
    from components.storage.versions import still_champion

    with step("deploy"):
        published = read_json(Path(manifest.path))
        if still_champion(path, published["version"], "deploy"):
            placing = Placing(connection, model_id, version_id, node_selector, tolerations)
            return deploy(published, path, placing, DeployConfig.load(settings))
    return ""
