"""Tools of the xLAM schema as the JSON-schema tools that chat templates read.

Invariant: total. A type that JSON schema cannot say allows any value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Types as xLAM writes them (Python's) and as JSON schema does.
_JSON_TYPES = {
    name: json_type
    for json_type, names in {
        "string": "str string",
        "integer": "int integer",
        "number": "float double number",
        "boolean": "bool boolean",
        "array": "list tuple set sequence array",
        "object": "dict mapping object",
        "null": "null",
    }.items()
    for name in names.split()
}


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The tools of one row as JSON-schema tools."""
    # xLAM marks nothing, so a bare parameter is required; ToolAlpaca marks the required ones, so a
    # bare parameter beside them is not.
    marked = any(
        "required" in spec for tool in tools for spec in (tool.get("parameters") or {}).values()
    )
    return tuple(_tool_schema(tool, marked) for tool in tools)


def type_schema(kind: str, depth: int = 8) -> dict[str, Any]:
    """JSON schema of a type as xLAM writes it: "int, optional", "List[int]", "Dict[str, float]"; {}
    (any value) if JSON schema cannot say it."""
    head, bracket, rest = (_split_commas(kind) or [""])[0].partition("[")
    head = head.strip().lower().removeprefix("typing.")
    inner = _split_commas(rest.rpartition("]")[0]) if bracket else []
    if depth == 0:
        return {}
    if head in ("optional", "union"):
        branches = [type_schema(item, depth - 1) for item in inner if item != "None"]
        if len(branches) == 1:
            return branches[0]
        return {"anyOf": branches} if branches and all(branches) else {}
    if head not in _JSON_TYPES:
        return {}
    schema: dict[str, Any] = {"type": _JSON_TYPES[head]}
    if schema["type"] == "array" and len({item for item in inner if item != "..."}) == 1:
        schema["items"] = type_schema(inner[0], depth - 1)
    if schema["type"] == "object" and len(inner) == 2:
        schema["additionalProperties"] = type_schema(inner[1], depth - 1)
    return schema


def _tool_schema(tool: Mapping[str, Any], marked: bool) -> dict[str, Any]:
    parameters = tool.get("parameters") or {}
    properties = {name: _property_schema(spec) for name, spec in parameters.items()}
    required = [name for name, spec in parameters.items() if not _is_optional(spec, marked)]
    body = {"type": "object", "properties": properties, "required": required}
    described = {"name": tool["name"], "description": tool.get("description") or ""}
    return {"type": "function", "function": described | {"parameters": body}}


def _property_schema(spec: Mapping[str, Any]) -> dict[str, Any]:
    kind = spec.get("type")
    extras = {key: spec[key] for key in ("description", "enum", "default") if key in spec}
    return type_schema(kind if isinstance(kind, str) else "") | extras


def _is_optional(spec: Mapping[str, Any], marked: bool) -> bool:
    """Whether a parameter may be left out: `required` decides where it stands, else a default or an
    "optional" in the type. marked: the row marks the required ones, so others are optional."""
    if isinstance(spec.get("required"), bool):
        return not spec["required"]
    kind = str(spec.get("type", "")).lower()
    says_so = kind.startswith("optional[") or "optional" in _split_commas(kind)
    return marked or "default" in spec or says_so


def _split_commas(text: str) -> list[str]:
    """`text` split at the commas outside brackets."""
    parts, level = [""], 0
    for char in text:
        level += (char == "[") - (char == "]")
        if char == "," and level == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]
