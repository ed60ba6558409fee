"""Where a training run is: an event of its lines, and read back out of a pod's log, which is text for people."""

import re
from dataclasses import dataclass
from typing import Self

PROGRESS = "progress"  # the event
_LINE = re.compile(
    r"step (?P<step>[\d,]+)/(?P<num_steps>[\d,]+)"
    r"(?:  loss (?P<loss>\S+)  (?P<speed>[\d,]+) tokens/s  (?P<minutes>[\d.]+) min left  (?P<memory>[\d.]+) GiB)?"
    r"(?:  held-out loss (?P<held_out>\S+))?"
)


@dataclass(frozen=True)
class Progress:
    """Where training is: optimiser steps done and in all, and what was measured at this one.

    `speed` is in tokens per second, `minutes` are what is left, `memory` is the peak in GiB; those three come with
    `loss` (nats per token). What was not measured is None.
    """

    step: int
    num_steps: int
    loss: float | None = None
    speed: float = 0
    minutes: float | None = None
    memory: float = 0
    held_out: float | None = None

    def __str__(self) -> str:
        text = f"step {self.step:,}/{self.num_steps:,}"
        if self.loss is not None:
            text += f"  loss {self.loss:.4f}  {self.speed:,.0f} tokens/s"
            text += f"  {self.minutes:.1f} min left  {self.memory:.1f} GiB"
        return text if self.held_out is None else f"{text}  held-out loss {self.held_out:.4f}"

    @classmethod
    def parse(cls, line: str) -> Self | None:
        """Read a line back; None for any other line."""
        match = _LINE.fullmatch(line.strip())
        if match is None:
            return None
        found = {name: text.replace(",", "") for name, text in match.groupdict(default="").items()}
        measured = {
            name: float(found[name]) for name in ("loss", "speed", "minutes", "memory", "held_out") if found[name]
        }
        return cls(int(found["step"]), int(found["num_steps"]), **measured)
