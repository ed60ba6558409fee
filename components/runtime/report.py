"""HTML reports that stand alone: one page, everything inline, readable without network."""

import base64
import io
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from components.runtime.redaction import redacted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2430; background: #fff; margin: 1rem auto; max-width: 60rem;
  padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.lead { color: #555c6b; margin-top: 0; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { border-bottom: 1px solid #dfe3ea; padding: .4rem .6rem; text-align: left; vertical-align: top; }
th { font-weight: 600; background: #f5f7fa; overflow-wrap: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.verdict { border-left: .4rem solid #b3261e; background: #fdf1f0; padding: .8rem 1rem; margin: 1rem 0; }
.verdict.open { border-color: #b26a00; background: #fff7e8; }
.verdict.plain { border-color: #9aa5b8; background: #f5f7fa; }
.verdict.good { border-color: #1a7f37; background: #eefaf1; }
pre { background: #f5f7fa; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font-size: .85rem; }
mark { background: #c9ecd2; color: inherit; } img { max-width: 100%; }
@media (max-width: 45rem) {  /* the panel in which pipeline pages show reports: a wide table's rows become cards */
  body { font-size: 15px; padding: 0 .5rem; }
  .wide thead { display: none; }
  .wide tr { display: block; border-bottom: 2px solid #c4cad6; padding: .4rem 0; }
  .wide td, .wide td.number { display: block; border: 0; padding: .15rem .3rem; text-align: left; }
  .wide td:before { content: attr(data-head) ": "; color: #555c6b; }
}
"""
_LEAST_GIB = 0.1  # less is shown in MiB
_WIDE = 3  # columns of a table that a narrow page shows as cards


def page(title: str, lead: str, *parts: str, result: str = "") -> str:
    """A whole page: `result` first, the title, one sentence, and parts; all but title and sentence are HTML already.

    Secrets are taken out.
    """
    body = "\n".join(parts)
    return redacted(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width">'
        f"<style>{_STYLE}</style></head>\n<body>{result}<h1>{escape(title)}</h1>"
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
    names = list(head)
    header = "".join(f"<th>{escape(cell)}</th>" for cell in names)
    lines = ["".join(_cell(name, cell) for name, cell in zip(names, row, strict=True)) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="wide"' if len(names) >= _WIDE else ""
    return f"<table{kind}><thead><tr>{header}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cell(name: str, value: Any) -> str:
    attributes = f'data-head="{escape(name)}"'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="number" {attributes}>{value:,}</td>'
    return f"<td {attributes}>{escape(str(value))}</td>"


Colour = Literal["good", "bad", "open", "plain"]


def verdict(colour: Colour, text: str) -> str:
    """The sentence that decides, in green, red, or amber where nothing is decided; plain where it only informs."""
    return f'<div class="verdict {colour}"><strong>{escape(text)}</strong></div>'


def picture(figure: "Figure", alternative: str) -> str:
    """A matplotlib figure as an inline PNG with its text alternative."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alternative)}">'


def size(num_bytes: float) -> str:
    """Bytes as text, in GiB, or in MiB for small sizes."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= _LEAST_GIB * 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def significant(value: float, digits: int = 4) -> float:
    """Round to significant digits: dashboards show metrics as raw doubles."""
    return float(f"{value:.{digits}g}")
