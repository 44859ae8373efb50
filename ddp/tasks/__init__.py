"""What can be trained: each task brings a model, its data, a loss and metrics.

`load_task` turns the job's [task] table into one. A task's module is imported only when it is named, so
that one task's dependencies are no other's, and code from outside the project only when that is allowed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from ddp.errors import UsageError
from ddp.job import CustomSection, TaskSection, check_import, resolve_secrets

if TYPE_CHECKING:
    from ddp.tasks.base import Task

REGISTRY: Mapping[str, str] = {
    "digits": "ddp.tasks.digits:DigitsTask",
    "text": "ddp.tasks.text:TextTask",
    "quadratic": "ddp.tasks.synthetic:QuadraticTask",
    "images": "ddp.tasks.images:ImagesTask",
    "synthetic_images": "ddp.tasks.synthetic_images:SyntheticImagesTask",
}
METHODS = ("model", "datasets", "loss", "metrics")


def load_task(section: TaskSection, *, allow_import: Sequence[str] = ()) -> Task:
    """Build the task that the job's [task] table names.

    Args:
        section: a registered task's own table, or `module:attr` with options.
        allow_import: modules from which, and from below which, `module:attr` may be imported, which runs their code.

    Raises:
        UsageError: the import is not allowed, what it names is missing or is not a task, or a secret cannot be had.
    """
    if not isinstance(section, CustomSection):
        module, _, attribute = REGISTRY[section.name].partition(":")
        return cast("Task", getattr(importlib.import_module(module), attribute)(section))
    check_import(section, allow_import)
    factory = _find_attribute(section.name)
    task = _call(factory, section, allow_import)
    _check_protocol(task, section.name)
    return cast("Task", task)


def _find_attribute(name: str) -> Callable[..., Any]:
    """The callable that `module:attr` names; the working directory comes first, as with `python -m`."""
    module_name, _, attribute = name.partition(":")
    directory = os.getcwd()
    if directory not in sys.path and "" not in sys.path:
        sys.path.insert(0, directory)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module was found, and what it imports itself was not
        raise UsageError(f"task.name: there is no module {error.name!r} in {directory} or on Python's path") from None
    if not hasattr(module, attribute):
        raise UsageError(f"task.name: module {module_name!r} ({_origin(module)}) has no attribute {attribute!r}")
    found = getattr(module, attribute)
    if not callable(found):
        raise UsageError(f"task.name: {name!r} is a {type(found).__name__}; name a class or function that makes a task")
    return found


def _origin(module: object) -> str:
    return getattr(module, "__file__", None) or "no file"


def _call(factory: Callable[..., Any], section: CustomSection, allow_import: Sequence[str]) -> object:
    """Call with the options, after checking that they fit, so that a TypeError inside keeps its traceback.

    A factory with a true `loads_tasks` builds tasks itself, and is told which may be imported: no job file says that.
    """
    options = resolve_secrets(section.options, os.environ, "task.options")
    if getattr(factory, "loads_tasks", False):
        options = {**options, "allow_import": tuple(allow_import)}
    signature = inspect.signature(factory)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UsageError(f"task.options: {error}; {section.name} takes {signature}") from None
    return factory(**options)


def _check_protocol(task: object, name: str) -> None:
    if missing := [method for method in METHODS if not callable(getattr(task, method, None))]:
        raise UsageError(f"task.name: what {name!r} made ({type(task).__name__}) has no method {', '.join(missing)}")
    goals = getattr(task, "goals", None)
    if not isinstance(goals, Mapping) or not set(goals.values()) <= {"max", "min"}:
        raise UsageError(
            f"task.name: what {name!r} made ({type(task).__name__}) needs goals, a mapping from each of its "
            f'metrics to "max" or "min", not {goals!r}'
        )
