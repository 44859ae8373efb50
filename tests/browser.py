"""A page as a real browser draws it: headless Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def drawn(page: Path, profile: Path, *options: str) -> str:
    """The document as it stands once the page has been drawn, which must not try anything that it forbids itself.

    Args:
        profile: a folder for the browser's own files.
        options: more of Chromium's own.
    """
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs chromium")
        pytest.skip("needs chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--disable-background-networking", "--disable-component-update", *options]
    done = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Content Security Policy" not in done.stderr
    return done.stdout
