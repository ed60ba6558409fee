"""What is wrong with a data set: every fault with its place, gathered in one pass and told at once."""

from collections import Counter

from components.errors import Tune16Error

_SHOWN = 20


class Findings:
    """Faults of a data set: the first ones in full, all of them counted by rule."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._shown: list[str] = []

    def add(self, place: tuple[str, int], rule: str, message: str) -> None:
        """Note one fault at ``(file, line)``; line 0 stands for the whole file."""
        self.counts[rule] += 1
        if len(self._shown) < _SHOWN:
            file, line = place
            self._shown.append(f"{file}{f':{line}' if line else ''}: {message} [{rule}]")

    def refuse(self, name: str) -> None:
        """End the step where there is any fault.

        Raises:
            Tune16Error: the faults, each with file and line.
        """
        if not self.counts:
            return
        total = self.counts.total()
        lines = [f"{name}: {total} fault{'s' if total > 1 else ''} in the data set.", *self._shown]
        if total > len(self._shown):
            rules = ", ".join(f"{count} x {rule}" for rule, count in self.counts.most_common())
            lines.append(f"… and {total - len(self._shown)} more; all of them: {rules}.")
        raise Tune16Error("\n  ".join(lines))
