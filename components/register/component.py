"""Pipeline wrapper of the step register."""

from typing import Any, NamedTuple

from kfp import dsl

from components import images


@dsl.component(base_image=images.TOOLS, install_kfp_package=False)
def register(
    manifest: dsl.Input[dsl.Artifact],
    path: str,
    settings: dict[str, Any],
    connection: str,
    run_id: str,
    run_name: str,
    registered: dsl.Output[dsl.Model],
) -> NamedTuple("Ids", [("model_id", str), ("version_id", str)]):  # type: ignore[valid-type]
    """Enter the published version into the model registry, as its model's champion."""
    from pathlib import Path

    from components.config import RegisterConfig
    from components.register.registrar import Registered, Source, register_patiently
    from components.runtime.outputs import read_json, write_json
    from components.runtime.steps import step
    from components.storage.versions import still_champion

    with step("register"):
        published, entry = read_json(Path(manifest.path)), Registered()
        if still_champion(path, published["version"], "register"):
            source = Source(run_id, run_name, connection)
            entry = register_patiently(published, path, source, RegisterConfig.load(settings))
        write_json(Path(registered.path), entry.as_metadata())
        registered.metadata.update(entry.as_metadata())
    return entry.model_id, entry.version_id
