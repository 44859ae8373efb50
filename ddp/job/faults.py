"""What pydantic finds wrong with a job file, in the job file's own terms."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ddp.job.tasks import TASKS, CustomSection, name_in


def in_words(faults: Iterable[ErrorDetails], whole: type[BaseModel]) -> list[str]:
    """One line for each faulty value of a table of type `whole`."""
    return [_describe(fault, whole) for fault in _one_a_value(faults)]


def _one_a_value(faults: Iterable[ErrorDetails]) -> list[ErrorDetails]:
    """A value that may be a number or "auto" fails once for each: tell it once, by what a number would need."""
    told: dict[tuple[int | str, ...], ErrorDetails] = {}
    for fault in faults:
        *where, last = fault["loc"] or ("",)
        if last not in ("constrained-int", "literal['auto']"):
            told[fault["loc"]] = fault
        elif last == "constrained-int":
            told[tuple(where)] = {
                **fault,
                "loc": tuple(where),
                "msg": fault["msg"].replace("should be", 'should be "auto" or'),
            }
        else:
            told.setdefault(tuple(where), fault)  # keeps its place; every such union has a number too
    return list(told.values())


def _describe(fault: ErrorDetails, whole: type[BaseModel]) -> str:
    """One line for one pydantic error, in the job file's own terms."""
    section, path = _resolve(fault["loc"], whole)
    where = ".".join(path)
    match fault["type"]:
        case "extra_forbidden":
            valid = list(section.model_fields) if section else []
            hint = _did_you_mean(path[-1], valid) or _belongs_to(path[-1], whole)
            return f"{where}: unknown key{hint}; valid: {', '.join(valid)}"
        case "missing":
            return f"{where}: missing"
        case "union_tag_not_found":
            name = name_in(fault["input"])
            valid = f"valid: {', '.join(TASKS)} or module:attr"
            if name is None:
                return f"{where}.name: missing; {valid}"
            return f"{where}.name: unknown task {name!r}{_did_you_mean(str(name), TASKS)}; {valid}"
        case "literal_error":
            expected = fault["ctx"]["expected"] if "ctx" in fault else ""
            valid = [
                word.strip("'")
                for word in re.findall(
                    r"'[^']*'|true|false", expected.replace("True", "true").replace("False", "false")
                )
            ]
            return f"{where}: {fault['input']!r} is not valid{_did_you_mean(str(fault['input']), valid)}; valid: {', '.join(valid)}"
        case "value_error":
            message = fault["msg"].removeprefix("Value error, ")
            return f"{where}: {message}" if where else message
        case _:
            message = fault["msg"].removeprefix("Input should be ")
            hint = _did_you_mean(str(fault["input"]), ["auto"]) if message.startswith('"auto" or') else ""
            return f"{where}: should be {message}, not {_short(fault['input'])}{hint}"


def _resolve(loc: tuple[int | str, ...], whole: type[BaseModel]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section that holds the faulty key, and the field path without the union's tag."""
    section: type[BaseModel] | None = whole
    path: list[str] = []
    parts = [str(part) for part in loc]
    if len(parts) > 1 and parts[0] == "task" and parts[1] in {*TASKS, "custom"}:
        section = TASKS.get(parts.pop(1), CustomSection)
        return section, parts
    for part in parts:
        path.append(part)
        if len(path) < len(parts) and section is not None and not part.isdecimal():  # the place in a list of tables
            field = section.model_fields.get(part)
            section = _table_of(field.annotation) if field else None
    return section, path


def _table_of(annotation: object) -> type[BaseModel] | None:
    """The type of a field that is a table, or a list of tables."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def _did_you_mean(word: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _belongs_to(key: str, whole: type[BaseModel]) -> str:
    tables = {name: _table_of(field.annotation) for name, field in whole.model_fields.items()}
    homes = [f"{name}.{key}" for name, table in tables.items() if table is not None and key in table.model_fields]
    return f" (did you mean {homes[0]}?)" if len(homes) == 1 else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
