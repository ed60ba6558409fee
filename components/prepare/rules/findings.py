"""What is wrong with a data set: every fault with its place, collected while it is read and reported together."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from components.prepare.rules.table import RULES, SEVERITIES, Severity
from components.runtime.errors import Tune16Error

SHOWN = 20  # places per rule that are reported; all are counted

Place = tuple[str, int]  # the file's name, and the line (Parquet: the row) from 1; line 0 is the whole file


@dataclass(frozen=True)
class Finding:
    """One fault: where it is, which rule it breaks, and what is wrong."""

    file: str
    line: int
    path: str
    rule: str
    message: str

    @property
    def place(self) -> str:
        """``file:line: json.path``, as far as there is a line and a path."""
        return f"{self.file}{f':{self.line}' if self.line else ''}{f': {self.path}' if self.path else ''}"

    def __str__(self) -> str:
        return f"{self.place}: {self.message} [{self.rule}]"


class Findings:
    """Faults of a data set: of each rule the first ones in full, all of them counted.

    `notes` are sentences on what was not checked. `num_rows` are the rows that were checked.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []
        self.num_rows = 0
        self.num_shown = SHOWN
        self._shown: dict[str, list[Finding]] = {}

    def add(self, place: Place, rule: str, message: str, path: str = "") -> None:
        """Note one fault at `place`, and at the JSON path `path` there."""
        self.count(rule, 1)
        self.show(place, rule, message, path)

    def show(self, place: Place, rule: str, message: str, path: str = "") -> None:
        """Record the place of a fault that is counted elsewhere."""
        shown = self._shown.setdefault(rule, [])
        if len(shown) < self.num_shown:
            shown.append(Finding(*place, path, rule, message))

    def count(self, rule: str, more: int) -> None:
        """Count faults whose places are not reported."""
        if more:
            self.counts[rule] += more

    def note(self, sentence: str) -> None:
        """Add a note, if there is anything to say."""
        if sentence:
            self.notes.append(sentence)

    def rules(self, severity: Severity) -> list[str]:
        """The broken rules of one severity, as they stand in the table of rules."""
        return [name for name, rule in RULES.items() if rule.severity == severity and self.counts[name]]

    def shown(self, rule: str) -> list[Finding]:
        """The first faults of `rule`."""
        return self._shown.get(rule, [])

    def summary(self, rule: str) -> str:
        """One line on one broken rule: how often, where first, what to do."""
        first = f", first at {self.shown(rule)[0].place}" if self.shown(rule) else ""
        return f"{self.counts[rule]:,} x {rule}, {self.share(rule)} of the rows{first}. {RULES[rule].remedy}"

    def share(self, rule: str) -> str:
        """The share of all rows that break `rule`, in per cent; empty where no row was read."""
        return f"{self.counts[rule] / self.num_rows:.2%}" if self.num_rows else ""

    def refuse(self, name: str) -> None:
        """Refuse the data set where there is any error.

        Raises:
            Tune16Error: the errors, each with file, line and JSON path, and the remedy of each rule.
        """
        rules = self.rules("error")
        if not rules:
            return
        total = sum(self.counts[rule] for rule in rules)
        lines = [f"{name}: {total} fault{'s' if total > 1 else ''} in the data set."]
        lines += [str(finding) for rule in rules for finding in self.shown(rule)]
        for rule in rules:
            hidden = self.counts[rule] - len(self.shown(rule))
            more = f", {hidden:,} of them not shown" if hidden else ""
            lines.append(f"{self.counts[rule]} x {rule}{more}: {RULES[rule].remedy}")
        raise Tune16Error("\n  ".join(lines))

    def as_json(self) -> dict[str, Any]:
        """All findings, machine-readable."""
        rules = {
            rule: {
                "severity": severity,
                "count": self.counts[rule],
                "remedy": RULES[rule].remedy,
                "places": [asdict(finding) for finding in self.shown(rule)],
            }
            for severity in SEVERITIES
            for rule in self.rules(severity)
        }
        return {"rows": self.num_rows, "rules": rules, "notes": self.notes}
