"""A pipeline's artifacts where they already lie: in the connection's own storage, if the pipeline keeps them there.

The pipeline server uploads each step's output and downloads it for the next one. What is then to go into the
connection's bucket, or to other pods, need not be sent again if the same storage has it: it is copied there, by the
storage itself, or read from where it is.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from components.runtime.errors import Tune16Error
from components.storage import s3

_LARGEST_PROBE = 1 << 20  # bytes


@dataclass(frozen=True)
class Artifact:
    """A folder in the connection's storage: the bucket and the key without a slash at its end."""

    bucket: str
    key: str

    @property
    def address(self) -> str:
        """The folder's ``s3://`` address."""
        return f"s3://{self.bucket}/{self.key}"


def find_artifact(uri: str, folder: Path) -> Artifact | None:
    """Where the connection's storage has an artifact, with exactly the files that were downloaded into a folder.

    Args:
        uri: the artifact's, as the pipeline server gives it: ``s3://bucket/key``, ``minio://bucket/key``.
        folder: its copy on this disk.

    Returns:
        The place; None where the artifact lies elsewhere, or may not be seen with the connection's account.
    """
    parts = urlsplit(uri)
    if parts.scheme not in ("s3", "minio") or not parts.netloc or not parts.path.strip("/"):
        return None
    found = Artifact(parts.netloc, parts.path.strip("/"))
    here = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    try:
        objects = s3.list_objects(found.bucket, f"{found.key}/")
        stored = {one.key.removeprefix(f"{found.key}/"): one.size for one in objects}
        if not here or stored != here:
            return None
        smallest = min(objects, key=lambda one: one.size)  # who may list it need not be allowed to read it
        may_be_read = smallest.size <= _LARGEST_PROBE and s3.read(found.bucket, smallest.key) is not None
    except Tune16Error:
        return None
    return found if may_be_read else None


def copy_file(artifact: Artifact, name: str, bucket: str, key: str, sha256: str) -> bool:
    """Let the storage copy one file of an artifact; False where it cannot or may not."""
    try:
        s3.copy(artifact.bucket, f"{artifact.key}/{name}", bucket, key, sha256)
    except Tune16Error:
        return False
    return True
