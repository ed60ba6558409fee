"""Whether an image registry has an image, asked as a stranger: without a password."""

from typing import Any

import httpx2 as httpx

from components.timeouts import at_most

_MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json"
)
_TIMEOUT_SECONDS = 20


def image_status(registry: str, repository: str, tag: str) -> int:
    """The HTTP status that a registry answers when it is asked for an image: 200 has it, 401 and 403 hide it.

    Raises:
        OSError: it cannot be reached, or does not speak the registry's protocol.
    """
    url = f"https://{registry}/v2/{repository}/manifests/{tag}"
    headers = {"Accept": _MANIFEST_TYPES}
    try:
        with httpx.Client(timeout=at_most(_TIMEOUT_SECONDS), follow_redirects=True) as client:
            answer = client.head(url, headers=headers)
            challenge = answer.headers.get("www-authenticate", "")
            if answer.status_code == 401 and challenge.startswith("Bearer "):
                token = client.get(**_token_request(challenge)).json().get("token", "")
                answer = client.head(url, headers={**headers, "Authorization": f"Bearer {token}"})
    except (httpx.HTTPError, ValueError) as error:
        raise OSError(str(error)) from None
    return answer.status_code


def _token_request(challenge: str) -> dict[str, Any]:
    """The request for an anonymous token, from a registry's WWW-Authenticate header."""
    fields = dict(part.strip().split("=", 1) for part in challenge.removeprefix("Bearer ").split(","))
    plain = {name: value.strip('"') for name, value in fields.items()}
    return {"url": plain.pop("realm"), "params": plain}
