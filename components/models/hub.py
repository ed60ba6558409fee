"""Models and data sets of the Hugging Face Hub, of a mirror of it, and offline those in its cache."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx2 as httpx
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from components.models.references import Reference
from components.runtime.errors import Tune16Error
from components.runtime.timeouts import at_most

_UNKNOWN_QUESTION = {404, 405, 501}  # mirrors of the Hub support only a part of its API


def pin(reference: Reference) -> tuple[list[str], str]:
    """The files of a repository of the Hub, of a mirror, or, offline, of the cache; and the commit."""
    repo_type = _repo_type(reference)
    with _explained(reference):
        if constants.HF_HUB_OFFLINE:
            path = _cached(reference)
            return [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()], path.name
        api = HfApi()
        info = api.repo_info(
            reference.address, revision=reference.pin or None, repo_type=repo_type, timeout=at_most(30)
        )
        try:
            api.auth_check(reference.address, repo_type=repo_type)
        except GatedRepoError:
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in _UNKNOWN_QUESTION:
                raise
    return [sibling.rfilename for sibling in getattr(info, "siblings", None) or []], str(info.sha)


def _cached(reference: Reference) -> Path:
    """The snapshot of a repository in the Hub's cache: of its revision, or the only one that is there."""
    repo_type = _repo_type(reference)
    snapshots = Path(
        constants.HF_HUB_CACHE, repo_folder_name(repo_id=reference.address, repo_type=repo_type), "snapshots"
    )
    if not reference.pin and len(only := list(snapshots.glob("*"))) == 1:
        return only[0]
    return Path(
        snapshot_download(reference.address, repo_type=repo_type, revision=reference.pin or None, local_files_only=True)
    )


def fetch(reference: Reference, patterns: Iterable[str]) -> Path:
    """Bring the files that match `patterns` into the Hub's own cache; returns their folder there.

    Raises:
        Tune16Error: it is gated, not found, or the Hub cannot be reached.
    """
    with _explained(reference):
        return Path(
            snapshot_download(
                reference.address,
                repo_type=_repo_type(reference),
                revision=reference.pin or None,
                allow_patterns=list(patterns),
            )
        )


def _repo_type(reference: Reference) -> Literal["model", "dataset"]:
    return "dataset" if reference.kind == "data" else "model"


@contextmanager
def _explained(reference: Reference) -> Iterator[None]:
    """Turn the Hub's errors into messages that name the page to visit and the secret to set."""
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    page = f"{endpoint}/{'datasets/' if reference.kind == 'data' else ''}{reference.address}"
    secret = "put a token of that account into the key HF_TOKEN of the Secret that with_tokens_secret names"
    try:
        yield
    except GatedRepoError:
        raise Tune16Error(
            f"{reference}: is gated. Open {page}, accept its terms, and {secret} (on a laptop: export HF_TOKEN)."
        ) from None
    except RevisionNotFoundError:
        raise Tune16Error(f"{reference}: there is no such revision. See {page}/tree/main for what there is.") from None
    except RepositoryNotFoundError:
        raise Tune16Error(
            f"{reference}: not found. Check the spelling at {page}; if it is private, {secret} (on a laptop: export "
            "HF_TOKEN)."
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, HfHubHTTPError) as error:
        first = str(error).strip().partition("\n")[0]
        raise Tune16Error(
            f"{reference}: {endpoint} cannot be reached ({first}). Without internet, name an s3:// folder or a path, "
            "or set HF_ENDPOINT to a mirror."
        ) from None
