"""Whether an image registry has an image, queried with a pull secret's credentials if there are any."""

import re
from typing import Any

import httpx2 as httpx

from components.runtime.timeouts import at_most

_MANIFEST_TYPES = (
    "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
    "application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json"
)
_TIMEOUT_SECONDS = 20

Credentials = tuple[str, str]  # user and password


def image_status(registry: str, repository: str, tag: str, credentials: Credentials | None = None) -> int:
    """The HTTP status of a registry's answer for an image: 200 if it has it, 401 or 403 if it is private.

    Raises:
        OSError: it cannot be reached, or does not follow the registry protocol.
    """
    url = f"https://{registry}/v2/{repository}/manifests/{tag}"
    headers = {"Accept": _MANIFEST_TYPES}
    try:
        with httpx.Client(timeout=at_most(_TIMEOUT_SECONDS), follow_redirects=True) as client:
            answer = client.head(url, headers=headers)
            challenge = answer.headers.get("www-authenticate", "")
            if answer.status_code == 401 and challenge.startswith("Basic ") and credentials:
                answer = client.head(url, headers=headers, auth=credentials)
            if answer.status_code == 401 and challenge.startswith("Bearer "):
                asked = _token_request(challenge)
                is_private = asked["url"].startswith("https://")  # a password goes over TLS only
                content = client.get(**asked, auth=credentials if is_private else None).json()
                token = content.get("token") or content.get("access_token", "")
                answer = client.head(url, headers={**headers, "Authorization": f"Bearer {token}"})
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, AttributeError) as error:
        raise OSError(str(error) or type(error).__name__) from None
    return answer.status_code


def _token_request(challenge: str) -> dict[str, Any]:
    """The request for a token, from a registry's WWW-Authenticate header."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    return {"url": fields.pop("realm"), "params": fields}
