"""TLS for the metrics endpoint, from the files that the job names."""

from __future__ import annotations

import ssl
from typing import NoReturn

from ddp.errors import UsageError
from ddp.job import MetricsSection, read_plain_file, read_private_file

MOST_BYTES = 1 << 24  # a file of all known authorities has a few hundred KiB


def tls_context(section: MetricsSection) -> ssl.SSLContext | None:
    """What the endpoint speaks TLS with; None where the job names no certificate.

    With `client_certificates` only clients are answered whose certificate one of those has signed.

    Raises:
        UsageError: a file cannot be read, is not what it should be, or the key is open to others.
    """
    if section.certificate is None or section.private_key is None:
        return None
    read_private_file(section.private_key, "metrics.private_key")
    for name in ("certificate", "client_certificates"):
        _check_readable(getattr(section, name), f"metrics.{name}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # a scrape does not come back on the same connection
    _load_pair(context, section.certificate, section.private_key)
    if section.client_certificates is not None:
        _load_clients(context, section.client_certificates)
    return context


def _check_readable(path: str | None, where: str) -> None:
    """OpenSSL opens the file by itself, and would wait at a pipe or read a device without end."""
    try:
        if path is not None:
            read_plain_file(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}: cannot read {path}: {_reason(error)}") from None


def _load_pair(context: ssl.SSLContext, certificate: str, private_key: str) -> None:
    try:
        context.load_cert_chain(certificate, private_key, _no_password)
    except ssl.SSLError as error:
        raise UsageError(
            f"metrics.certificate, metrics.private_key: {certificate} and {private_key} are no PEM certificate with its "
            f"key: {error.reason or error}"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"metrics.certificate: cannot read {certificate}: {_reason(error)}") from None


def _load_clients(context: ssl.SSLContext, authorities: str) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(authorities)
    except ssl.SSLError as error:
        raise UsageError(
            f"metrics.client_certificates: {authorities} holds no PEM certificates: {error.reason or error}"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"metrics.client_certificates: cannot read {authorities}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _no_password() -> NoReturn:
    """Nobody is there to type one, on a hundred ranks least of all."""
    raise UsageError("metrics.private_key: it is encrypted; name one without a password, readable by you alone")
