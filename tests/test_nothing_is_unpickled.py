"""Nothing that the program reads from a file or a socket can run code: the sources are searched for what could."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for package in ("ddp", "launch") for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "yaml",
    "runpy",
    "code",
}
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load", "torch.package"),
    # c10d's collectives of objects, and mpi4py's lower-case ones, are pickle from a socket
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "isend_object", "monitored_barrier_object"),
}
# Pipes between a process and its own children are pickle, in both directions from code that already runs as this user.
PIPES = {
    *("ddp/search/workers.py", "ddp/sweep/fork_server.py", "ddp/sweep/launching.py", "ddp/training/workers.py"),
}
# Batches from a rank's own forks, through a socket pair without a name: SECURITY.md says so.
BETWEEN_FORKS = {("ddp/training/parcels.py", "pickle")}


def calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            yield node.lineno, name
            yield node.lineno, name.rpartition(".")[2] if name.endswith(("_object", "_object_list")) else name


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_way_to_run_what_was_read(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    name = str(path.relative_to(ROOT))
    found = [f"{name}:{line} {call}" for line, call in calls(tree) if call in CALLS]
    found += [
        f"{name}:{line} {module}"
        for line, module in imports(tree)
        if module.partition(".")[0] in MODULES and (name, module) not in BETWEEN_FORKS
    ]
    assert found == []


def test_pipes_are_where_they_are_known_to_be() -> None:
    with_pipes = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(
            module.startswith("multiprocessing") for _, module in imports(ast.parse(path.read_text(encoding="utf-8")))
        )
    }
    assert with_pipes <= PIPES


def test_the_search_finds_what_it_looks_for() -> None:
    tree = ast.parse("import pickle.x\ndist.all_gather_object(a)\ntorch.load(f)\nmodel.eval()\nre.compile('x')")
    assert {call for _, call in calls(tree)} & CALLS == {"all_gather_object", "torch.load"}
    assert [module for _, module in imports(tree)] == ["pickle.x"]
