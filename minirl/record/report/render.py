"""The templates of the report.

Invariant: every value that enters a page is escaped, for a model's output is hostile input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minirl.record.report.evaluations import p_value


def render(template: str, **values: Any) -> str:
    """A template of the folder `templates` filled with these values."""
    return _ENVIRONMENT.get_template(template).render(values)


def _printable(value: Any) -> str:
    """Text in which a character that UTF-8 or a page cannot show is a replacement mark. The result
    of a macro stays markup, escaped once."""
    text = value if isinstance(value, str) else str(value)
    encodable = text.encode("utf-8", "replace").decode()
    shown = (c if c in "\n\t" or c.isprintable() or c.isspace() else "\ufffd" for c in encodable)
    return type(text)("".join(shown))


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    finalize=_printable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["p_value"] = p_value
