"""HTML of a report: text and tables.

Invariant: what comes from a run is escaped by `text`, and only that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def text(value: Any) -> str:
    """Escaped for HTML text and attributes; what cannot be written as UTF-8 or shown becomes a
    replacement mark."""
    plain = str(value).encode("utf-8", "replace").decode()
    return escape(
        "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "\ufffd" for c in plain)
    )


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table of ready-made cells; the first of each row is its heading. `head` may be empty."""
    lines = [
        "<tr><th>" + row[0] + "</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in body
    ]
    titles = (
        f"<thead><tr>{''.join(f'<th>{title}</th>' for title in head)}</tr></thead>" if head else ""
    )
    return f'<div class="table"><table>{titles}<tbody>{"".join(lines)}</tbody></table></div>'
