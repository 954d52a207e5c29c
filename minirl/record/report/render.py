"""The templates of the report.

Invariant: every value that enters a page is escaped, for a model's output is hostile input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from minirl.record.report.evaluations import p_value


def render(template: str, **values: Any) -> str:
    """A template of the folder `templates` filled with these values."""
    return _ENVIRONMENT.get_template(template).render(values)


def _printable(value: Any) -> Any:
    """Text in which a character that UTF-8 or a page cannot show is a replacement mark."""
    if isinstance(value, Markup):  # a macro's result, escaped already
        return value
    text = str(value).encode("utf-8", "replace").decode()
    return "".join(c if c in "\n\t" or c.isprintable() or c.isspace() else "\ufffd" for c in text)


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    finalize=_printable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["p_value"] = p_value
