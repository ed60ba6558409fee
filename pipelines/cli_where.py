"""Shared by the commands of `tune16` that use a cluster: which cluster to use, and how to show a result."""

import functools
import inspect
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from components.runtime.errors import Tune16Error
from components.runtime.timeouts import limited
from pipelines.cluster import Cluster, find_cluster, find_dashboard, find_server, given_host
from pipelines.server import Json, PipelineServer

console = Console(highlight=False)
notes = Console(highlight=False, stderr=True)


class WithDefault(TyperGroup):
    """A group whose first command is the default: `schedule RECIPE` is `schedule set RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the first command's name if no command is named."""
        asks_for_help = args[:1] in (["--help"], ["-h"])
        if not asks_for_help and (not args or args[0] not in self.commands):
            args = [next(iter(self.commands)), *args]
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class Connected:
    """A pipeline server, and its cluster if there is a login."""

    server: PipelineServer
    cluster: Cluster | None

    def url(self, run: Json) -> str:
        """The page of a run."""
        dashboard = find_dashboard(self.cluster)
        if dashboard and self.cluster:
            return f"{dashboard}/experiments/{self.cluster.namespace}/{run['experiment_id']}/runs/{run['run_id']}"
        return f"{self.server.url}/#/runs/details/{run['run_id']}"


@dataclass(frozen=True)
class Where:
    """Which cluster to use: the options that all its commands share."""

    namespace: Annotated[str, typer.Option(help="Namespace (default: the login's). Or TUNE16_NAMESPACE.")] = ""
    host: Annotated[str, typer.Option(help="URL of a pipeline server elsewhere. Or TUNE16_HOST.")] = ""
    ca: Annotated[str, typer.Option(help="File with the CA of the cluster's certificates. Or TUNE16_CA.")] = ""
    timeout: Annotated[
        float, typer.Option(help="Time limit of one request to the cluster, S3 or the Hub, in seconds.", min=0.1)
    ] = 30

    def connect(self) -> Connected:
        """Find the pipeline server and check that it answers.

        Raises:
            Tune16Error: there is no login or no server, or it does not accept the token.
        """
        cluster: Cluster | None = None
        with suppress(Tune16Error) if self.host or given_host() else nullcontext():
            cluster = find_cluster(self.namespace, self.ca)
        server = PipelineServer(find_server(cluster, self.host, self.ca), self.timeout)
        server.check()
        return Connected(server, cluster)


def somewhere(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes `where` the options of :class:`Where` instead."""
    own = [entry for entry in inspect.signature(command).parameters.values() if entry.name != "where"]
    fields = list(inspect.signature(Where).parameters.values())

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        where = Where(**{entry.name: values.pop(entry.name) for entry in fields})
        with limited(where.timeout):
            command(where=where, **values)

    parameters = [entry.replace(kind=inspect.Parameter.KEYWORD_ONLY) for entry in (*own, *fields)]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return with_options


def show_result(content: Any, as_json: bool, text: Any) -> None:
    """Print a result: as JSON for machines, else its text or table."""
    if as_json:
        print(json.dumps(content, indent=2))
    else:
        console.print(text, soft_wrap=isinstance(text, str))
    sys.stdout.flush()
