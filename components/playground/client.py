"""A client of the OpenAI API's chat endpoint, which vLLM, llama.cpp and `tune16 serve` implement."""

import json
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from components.kubernetes.account import service_ca
from components.runtime.errors import Tune16Error

Messages = list[dict[str, str]]

_TIMEOUT = httpx.Timeout(120.0, connect=5.0)


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; at temperature 0 it is always the likeliest."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 512
    repetition_penalty: float = 1.0

    def as_request(self) -> dict[str, Any]:
        """The fields of a request.

        The penalty is not in OpenAI's own API, whose server refuses what it does not know: 1, which is none, is left
        out. vLLM knows it by our name, llama.cpp by another; each ignores the other's.
        """
        fields = asdict(self)
        penalty = fields.pop("repetition_penalty")
        return fields if penalty == 1 else {**fields, "repetition_penalty": penalty, "repeat_penalty": penalty}


@dataclass(frozen=True)
class Endpoint:
    """A server: its address, up to where ``/v1`` begins, and its bearer token (empty: none)."""

    url: str
    token: str = ""

    def candidates(self) -> "list[Endpoint]":
        """The address, and those where a KServe service without a port in its address may answer.

        Ordinary services answer at the address itself, headless ones at their pods' port 8080, and those that ask for
        tokens at 8443, over TLS; the token is sent there only.
        """
        parts = urlsplit(self.url)
        if parts.scheme != "http" or parts.port is not None or not parts.hostname:
            return [self]
        plain = [f"http://{parts.hostname}", f"http://{parts.hostname}:8080"]
        return [*map(Endpoint, plain), Endpoint(f"https://{parts.hostname}:8443", self.token)]

    def answering(self) -> "Endpoint":
        """The one of :meth:`candidates` that answers; the first where none does."""
        candidates = self.candidates()
        for candidate in candidates if len(candidates) > 1 else ():
            with suppress(Tune16Error):
                candidate.list_models()
                return candidate
        return candidates[0]

    def list_models(self) -> list[str]:
        """The names of the models that it serves.

        Raises:
            Tune16Error: it cannot be reached, or answers something else.
        """
        with self._explained(), httpx.Client(**self._settings()) as client:
            answer = client.get("/v1/models").raise_for_status().json()
            return [str(entry["id"]) for entry in answer["data"] or self._no_models()]

    def ask(self, model: str, messages: Messages, sampling: Sampling) -> str:
        """The whole answer to a conversation.

        Raises:
            Tune16Error: it cannot be reached, or answers something else.
        """
        body = {"model": model, "messages": messages, **sampling.as_request()}
        with self._explained(), httpx.Client(**self._settings()) as client:
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            return str(answer["choices"][0]["message"]["content"] or "")

    async def stream(self, model: str, messages: Messages, sampling: Sampling) -> AsyncIterator[str]:
        """The answer to a conversation, piece by piece; to stop it closes the connection.

        Raises:
            Tune16Error: it cannot be reached, or answers something else.
        """
        body = {"model": model, "messages": messages, "stream": True, **sampling.as_request()}
        with self._explained():
            async with (
                httpx.AsyncClient(**self._settings()) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as response,
            ):
                if response.is_error:
                    await response.aread()
                response.raise_for_status()
                async for line in response.aiter_lines():
                    for piece in self._pieces(line):
                        yield piece

    def _no_models(self) -> list[Any]:
        raise Tune16Error(f"{self.url}: serves no model.")

    def _pieces(self, line: str) -> list[str]:
        """The text in one line of a stream of server-sent events."""
        content = line.removeprefix("data:").strip()
        if not line.startswith("data:") or content == "[DONE]":
            return []
        event = json.loads(content)
        if "error" in event:
            raise Tune16Error(f"{self.url}: {_message(event)}")
        return [str(choice["delta"].get("content") or "") for choice in event["choices"]]

    def _settings(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        ca = service_ca(self.url)
        trust = ssl.create_default_context(cafile=ca) if ca else True
        url = self.url.rstrip("/").removesuffix("/v1")
        return {"base_url": url, "headers": headers, "timeout": _TIMEOUT, "verify": trust}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise Tune16Error(f"{self.url}: answers {error.response.status_code}: {_body(error.response)}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Tune16Error(f"{self.url}: cannot be reached ({error or type(error).__name__}).") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Tune16Error(f"{self.url}: does not answer as the OpenAI API ({error!r}).") from None


def _body(response: httpx.Response) -> str:
    try:
        return _message(response.json())
    except ValueError:
        return " ".join(response.text.split())[:300]


def _message(answer: Any) -> str:
    """The message of an error, which servers wrap in one of three ways."""
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
