"""HTML reports that stand alone: one page, everything inline, readable without network."""

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from components.redaction import redacted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.lead { color: #555c6b; margin-top: 0; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { border-bottom: 1px solid #dfe3ea; padding: .4rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; background: #f5f7fa; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.verdict { border-left: .4rem solid #b3261e; background: #fdf1f0; padding: .8rem 1rem; margin: 1rem 0; }
.verdict.open { border-color: #b26a00; background: #fff7e8; }
.verdict.good { border-color: #1a7f37; background: #eefaf1; }
pre { background: #f5f7fa; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font-size: .85rem; }
mark { background: #c9ecd2; color: inherit; } img { max-width: 100%; }
"""


def page(title: str, lead: str, *parts: str) -> str:
    """A whole page from its title, one sentence, and parts that are HTML already; without secrets."""
    body = "\n".join(parts)
    return redacted(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(lead)}</p>\n{body}\n</body></html>\n'
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def paragraph(text: str) -> str:
    """One paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table; numbers are set right-aligned, text is escaped."""
    header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ["".join(_cell(cell) for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{escape(str(value))}</td>"


Colour = Literal["good", "bad", "open"]


def verdict(colour: Colour, text: str) -> str:
    """The sentence that decides, in green, red, or amber where nothing is decided."""
    return f'<div class="verdict {colour}"><strong>{escape(text)}</strong></div>'


def picture(figure: "Figure", alternative: str) -> str:
    """A matplotlib figure as an inline PNG with its text alternative."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alternative)}">'


def size(num_bytes: float) -> str:
    """Bytes for people, in GiB, or in MiB where that says more."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def significant(value: float, digits: int = 4) -> float:
    """Round to significant digits: dashboards show metrics as raw doubles."""
    return float(f"{value:.{digits}g}")
