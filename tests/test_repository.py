"""The repository keeps its own promises: packages, make targets, console scripts, examples, file sizes."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ddp.job import load_job

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MARKDOWN = sorted(ROOT.glob("*.md"))

# A module past 300 lines is a question; these have answered it.
LONGER_THAN_300_LINES = {
    "ddp/transport/chunks.py": "all that happens to one chunk, plain and encoded, is read together",
}


def _make(*arguments: str, directory: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *arguments], cwd=directory, capture_output=True, text=True, timeout=60, check=False)


def test_the_packages_listed_are_the_packages_there() -> None:
    found = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for package in ("ddp", "launch")
        for init in (ROOT / package).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for package in ("ddp", "launch") for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_launchers_are_kept_from_all_of_ddp_but_five_modules() -> None:
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    (forbidden,) = [each["forbidden_modules"] for each in contracts if each["name"].startswith("The launchers")]
    modules = {f"ddp.{path.stem}" for path in (ROOT / "ddp").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules - set(forbidden) - {"ddp.__init__", "ddp.__pycache__"} == {
        "ddp.board",
        "ddp.errors",
        "ddp.job",
        "ddp.outcome",
        "ddp.streams",
    }


def test_the_version_is_said_once() -> None:
    import ddp

    assert ddp.__version__ == PROJECT["project"]["version"] == importlib.metadata.version("ddp-noise-scale")
    assert f"[{ddp.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", PROJECT["project"]["scripts"])
def test_console_scripts_show_their_help(script: str) -> None:
    found = Path(sys.executable).with_name(script)
    shown = subprocess.run([found, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "Usage" in shown.stdout


def test_import_of_the_public_names_loads_no_torch() -> None:
    code = "import sys, ddp, ddp.job, launch.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


JOBS = [
    path for path in sorted((ROOT / "examples").glob("*.toml")) if "[sweep]" not in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("job_file", JOBS, ids=lambda path: path.name)
def test_example_jobs_are_valid(job_file: Path) -> None:
    job = load_job(job_file)
    assert job.batch.adapts or job.batch.examples_per_step(2) >= job.batch.examples_at_once(2)


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: path.name)
def test_commands_and_files_named_in_the_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"`[^`\n]+`|^(?: {4,}|\t)[^\n]*$|```.*?```", text, re.MULTILINE | re.DOTALL))
    targets = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert targets <= known
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    assert [link for link in links if link and not (ROOT / link).exists()] == []


def test_make_without_a_target_says_what_there_is() -> None:
    shown = _make()
    assert shown.returncode == 0
    for target in ("demo", "demo-text", "test", "check", "bench", "sweeps", "branches", "clean"):
        assert re.search(rf"^make {target} ", shown.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("exit 1", "fake is Python 3.10; torch and this project need 3.11 to 3.14"),
        ("ensurepip", r"cannot make environments: install the package python\d\.\d+-venv"),
        (None, "fake was not found: install Python 3.11 to 3.14"),
    ],
)
def test_make_says_what_is_missing(tmp_path: Path, python: str | None, message: str) -> None:
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    fake = tmp_path / "fake"
    before = {
        "exit 1": "import sys; sys.version_info = (3, 10, 1, 'final', 0)",
        "ensurepip": "import sys; sys.modules['ensurepip'] = None",
    }
    if python is not None:
        fake.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{before[python]}\n$2"\n', encoding="utf-8")
        fake.chmod(0o755)
    answer = _make(f"PYTHON={fake}", "demo", directory=tmp_path)
    assert answer.returncode == 2
    assert re.search(message, answer.stderr)
    assert not (tmp_path / ".venv").exists()


def test_long_modules_are_a_decision() -> None:
    sources = [path for package in ("ddp", "launch") for path in (ROOT / package).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {name for name, length in lengths.items() if length > 300} == set(LONGER_THAN_300_LINES)
