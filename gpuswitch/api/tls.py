"""The certificate, the key and the authorities that metrics are served with over HTTPS."""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

from gpuswitch.config.schema import Metrics
from gpuswitch.errors import ConfigError


def server_context(settings: Metrics) -> ssl.SSLContext | None:
    """What these files say, read now: TLS 1.2 or newer, and where there is a `client_ca`, for its clients alone.

    None: no certificate is configured, so that it is plain HTTP, or nothing is served at all.

    Raises:
        ConfigError: one of them cannot be used; the sentence names it.
    """
    if not (settings.enabled and settings.address and settings.certificate):
        return None
    certificate, key = Path(settings.certificate), Path(settings.key)
    _check(certificate, "certificate", "CERTIFICATE-----")
    _check(key, "key", "PRIVATE KEY-----", secret=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def password() -> str:
        raise ConfigError(f"cannot use metrics.key: {key} is encrypted, and nobody is there to type its password")

    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"cannot use metrics.key: {key} is not the key of {certificate}") from error
        raise ConfigError(f"cannot use metrics.certificate: {certificate} with {key}: {_said(error)}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {certificate} or {key}: {error.strerror}") from error
    if settings.client_ca:
        authorities = Path(settings.client_ca)
        _check(authorities, "client_ca", "CERTIFICATE-----")
        try:
            context.load_verify_locations(authorities)
        except OSError as error:  # SSLError is one
            raise ConfigError(f"cannot use metrics.client_ca: {authorities}: {_said(error)}") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check(path: Path, name: str, begins: str, *, secret: bool = False) -> None:
    """See that it is a file of PEM, and where it is secret, that not everybody may read it.

    OpenSSL would say `PEM lib` of the first, and would wait for the writer of a pipe.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            text = stream.read() if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise ConfigError(f"cannot use metrics.{name}: cannot read {path}: {error.strerror}") from error
    if secret and status.st_mode & stat.S_IROTH:
        raise ConfigError(f"cannot use metrics.{name}: everybody may read {path}; run: chmod o-r {path}")
    if begins.encode() not in text:
        what = "key" if secret else "certificate"
        raise ConfigError(f"cannot use metrics.{name}: {path} has no {what} in PEM (-----BEGIN ...{begins})")


def _said(error: OSError) -> str:
    """What the library says of it, without the place in its sources."""
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error).replace("_", " ").lower()
    return str(error.strerror)
