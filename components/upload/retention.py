"""How many versions of a model are kept: a file beside them sets it, so that it holds wherever a run publishes.

    <path>/retention.json      {"keep_versions": 5}

No file, or 0: all are kept. The champion and the one before it, which a roll-back needs, are never removed.
"""

import json

from components.runtime.errors import Tune16Error
from components.runtime.steps import say
from components.storage import s3, versions

_FILE = "retention.json"


def keep_versions(path: str, number: int) -> None:
    """Let publishers keep only the newest `number` versions under `path`; 0 keeps all."""
    content = json.dumps({"keep_versions": number}).encode() + b"\n"
    s3.write(s3.default_bucket(), f"{path}/{_FILE}", content)
    say(
        "upload", f"s3://{s3.default_bucket()}/{path}: {number or 'all'} versions are kept from the next publication on"
    )


def remove_old(path: str) -> None:
    """Remove the versions beyond the number to keep, the oldest first; called with the lease held.

    The publication is done by then, so that errors here are reported and do not fail the step.
    """
    try:
        _remove_old(path, _read(path))
    except Tune16Error as error:
        say("upload", f"old versions were not removed: {error}")


def _remove_old(path: str, number: int) -> None:
    if not number:
        return
    bucket = s3.default_bucket()
    keys = [stored.key.removeprefix(f"{path}/").split("/") for stored in s3.list_objects(bucket, f"{path}/")]
    complete = sorted(name for name, *rest in keys if rest == [versions.MANIFEST] and versions.is_version(name))
    needed = {champion.version for champion in versions.read_log(path, newest=2)}
    for version in complete[:-number]:
        if version not in needed:
            versions.remove(path, version)
            say("upload", f"removed {version}, since {number} versions are kept")


def _read(path: str) -> int:
    content = s3.read(s3.default_bucket(), f"{path}/{_FILE}")
    if content is None:
        return 0
    try:
        number = json.loads(content)["keep_versions"]
    except (ValueError, KeyError, TypeError):
        number = None
    if type(number) is not int or number < 0:
        raise Tune16Error(
            f"s3://{s3.default_bucket()}/{path}/{_FILE}: is not what `python -m components keep` writes there."
        )
    return number
