"""Certificates for tests, by openssl: an authority of its own, and what it signs."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2")


class Signed(NamedTuple):
    """A certificate and its key, files in PEM."""

    certificate: Path
    key: Path


class Authority:
    """An authority with files in this folder; `certificate` is its own."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self.certificate, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        self._openssl(
            "req", "-x509", *_KEY, "-subj", f"/CN={name}", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
            "-keyout", self._key, "-out", self.certificate,
        )  # fmt: skip  # what it is, then where to

    def signs(self, name: str) -> Signed:
        """A certificate for 127.0.0.1, or for a client, that goes by this name."""
        signed = Signed(self._folder / f"{name}.pem", self._folder / f"{name}.key")
        by = ("-CA", self.certificate, "-CAkey", self._key, "-addext", "subjectAltName=IP:127.0.0.1")
        self._openssl(
            "req", "-x509", *_KEY, *by, "-subj", f"/CN={name}", "-addext", "basicConstraints=critical,CA:FALSE",
            "-keyout", signed.key, "-out", signed.certificate,
        )  # fmt: skip  # what it is, then where to
        signed.key.chmod(0o600)
        return signed

    def client(self, *, shows: Signed | None = None) -> ssl.SSLContext:
        """A client that trusts this authority, with a certificate of its own or without."""
        context = ssl.create_default_context(cafile=self.certificate)
        if shows is not None:
            context.load_cert_chain(*shows)
        return context

    @staticmethod
    def _openssl(*words: str | Path) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True)
