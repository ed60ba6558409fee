"""One request to the Kubernetes API as plain JSON, for kinds that the client has no classes for."""

from typing import Any

from kubernetes import client


def send(
    api: client.ApiClient,
    method: str,
    path: str,
    body: Any = None,
    query: dict[str, Any] | None = None,
    answer: str = "object",
    timeout: tuple[float, float] = (10, 30),
) -> Any:
    """Send one request with a JSON body, and read the answer: JSON, or text where `answer` is ``str``.

    `timeout` is in seconds, to connect and to read.

    Raises:
        kubernetes.client.rest.ApiException: the API refuses.
        urllib3.exceptions.HTTPError: it gives no answer.
    """
    return api.call_api(
        path,
        method,
        query_params=list((query or {}).items()),
        header_params={"Accept": "*/*", "Content-Type": "application/json"},
        body=body,
        auth_settings=["BearerToken"],
        response_type=answer,
        _return_http_data_only=True,
        _request_timeout=timeout,
    )
