"""What a run leaves to show later how it ended: its verdict with the scores, its report, what it published.

It lies beside the models' folders, at ``<prefix>/records/<model name>/``, and nothing there depends on the pipeline
server:

- ``runs/<run id>.json``: which evaluation a run asked for; written by the step preflight, which every run does.
- ``runs/<run id>-published.json``: the version that it published, or found published.
- ``evaluations/<key>/<time>.json`` and ``.html``: verdict and scores, and the report.

The key stands for everything that decides an evaluation. So a run whose evaluation came from the pipeline's cache finds
the one that was made before.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.runtime.errors import Tune16Error
from components.runtime.outputs import EVALUATION, REPORT, read_json
from components.storage import s3

Json = dict[str, Any]

_KEY_DIGITS = 16
_KEPT = ("verdict", "reason", "base", "tuned", "loss_difference", "champion")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run so far: its evaluation, that one's report, and what was published."""

    evaluation: Json | None
    report: str  # the key of the report in the bucket; empty where there is none
    published: Json | None


def evaluation_key(**inputs: Any) -> str:
    """The name of an evaluation, from everything that decides it."""
    content = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:_KEY_DIGITS]


def begin(path: str, run_id: str, key: str) -> None:
    """Note which evaluation a run asks for."""
    _write(f"{_place(path)}/runs/{run_id}.json", {"evaluation": key, "begun": _now()})


def keep_evaluation(path: str, key: str, evaluation: Path) -> None:
    """Keep the verdict, the scores and the report of the step evaluate's output."""
    name = f"{_place(path)}/evaluations/{key}/{_now()}"
    content = read_json(evaluation / EVALUATION)
    s3.write(s3.default_bucket(), f"{name}.html", (evaluation / REPORT).read_bytes())
    _write(f"{name}.json", {field: content[field] for field in _KEPT})


def keep_publication(path: str, run_id: str, manifest: Json) -> None:
    """Note which version a run published."""
    _write(f"{_place(path)}/runs/{run_id}-published.json", {name: manifest[name] for name in ("version", "address")})


def read_outcome(path: str, run_id: str, ended: str = "") -> Outcome | None:
    """How a run ended.

    Args:
        path: ``prefix/model-name`` in the connection's bucket.
        run_id: the run.
        ended: when (ISO 8601); a later evaluation of the same inputs is another run's. Empty while it runs.

    Returns:
        What is known; None where the run has left nothing there.

    Raises:
        Tune16Error: the storage does not answer or refuses.
    """
    begun = _read(f"{_place(path)}/runs/{run_id}.json")
    if begun is None:
        return None
    folder = f"{_place(path)}/evaluations/{begun['evaluation']}/"
    limit = f"{folder}{_compact(ended)}" if ended else ""
    names = sorted(found.key for found in s3.list_objects(s3.default_bucket(), folder) if found.key.endswith(".json"))
    made = [name for name in names if not limit or name <= f"{limit}.json"]
    evaluation = _read(made[-1]) if made else None
    report = f"{made[-1].removesuffix('.json')}.html" if made else ""
    return Outcome(evaluation, report, _read(f"{_place(path)}/runs/{run_id}-published.json"))


def read_report(outcome: Outcome) -> bytes:
    """The report of a run's evaluation, one HTML page.

    Raises:
        Tune16Error: there is none, or the storage does not answer or refuses.
    """
    content = s3.read(s3.default_bucket(), outcome.report) if outcome.report else None
    if content is None:
        raise Tune16Error("This run has no report: it did not reach its evaluation.")
    return content


def _place(path: str) -> str:
    prefix, _, model = path.rpartition("/")
    return f"{prefix}/records/{model}"


def _write(key: str, content: Json) -> None:
    s3.write(s3.default_bucket(), key, json.dumps(content, indent=2).encode())


def _read(key: str) -> Json | None:
    content = s3.read(s3.default_bucket(), key)
    return json.loads(content) if content else None


def _now() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%fZ}"


def _compact(text: str) -> str:
    """A time of the API as the names here have it, at the end of its second."""
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y%m%dT%H%M%S}999999Z"
