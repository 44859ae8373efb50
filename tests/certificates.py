"""Certificates made when a test asks for them, by the openssl program: self-signed ones, and a client's."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its key."""

    certificate: Path
    key: Path


def make_pair(folder: Path, name: str) -> Pair:
    """A certificate that signs itself, for 127.0.0.1 and localhost; the key is its owner's alone."""
    openssl = shutil.which("openssl")
    if openssl is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs openssl")
        pytest.skip("needs openssl")
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    command += ["-keyout", str(pair.key), "-out", str(pair.certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pair.key.chmod(0o600)
    return pair
