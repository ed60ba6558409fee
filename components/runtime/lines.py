"""What a step says, one line at a time: text for people, and JSON where another process of ours reads it.

A pod prints text, as its log is for people. A run on this machine and a training job on several nodes set
:data:`VARIABLE` for the processes that they start, so that what libraries print is never taken for a step's own line.
"""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from components.runtime.redaction import redacted

VARIABLE = "TUNE16_LINES"
JSON = "json"  # its value where a program reads the output
STARTED, FINISHED, ERROR, CHECKPOINT = "started", "finished", "error", "checkpoint"
_MARK = "tune16"  # the one key of a line


@dataclass(frozen=True)
class Line:
    """One line: the step, the text, which event it is (empty: none that programs care for), and the event's data."""

    step: str
    text: str
    event: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{ERROR if self.event == ERROR else self.step}: {self.text}"

    def as_json(self) -> str:
        """The line as programs read it."""
        return json.dumps({_MARK: asdict(self)})

    def write(self) -> None:
        """Print the line, at once and without secrets, for whoever reads this process's output."""
        line = replace(self, text=redacted(self.text))  # before JSON writes it in another way
        print(redacted(line.as_json() if os.environ.get(VARIABLE) == JSON else str(line)), flush=True)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Read a line back; None where it is something else, such as what a library prints."""
        if not text.startswith(f'{{"{_MARK}": '):
            return None
        try:
            return cls(**json.loads(text)[_MARK])
        except (ValueError, TypeError, KeyError):
            return None
