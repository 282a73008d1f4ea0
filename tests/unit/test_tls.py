"""The files of HTTPS: each that cannot be used is named in one sentence."""

from __future__ import annotations

import os
import ssl
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpuswitch.api.tls import server_context
from gpuswitch.config.schema import Metrics
from gpuswitch.errors import ConfigError
from tests.harness.certificates import Authority, Signed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Authority, Signed, Signed]:
    authority = Authority(tmp_path_factory.mktemp("made"))
    return authority, authority.signs("server"), authority.signs("other")


@pytest.fixture
def settings(tmp_path: Path, made: tuple[Authority, Signed, Signed]) -> Metrics:
    """Copies of good files, for a test to spoil."""
    authority, server, _ = made
    for name, source in (("ca", authority.certificate), ("pem", server.certificate), ("key", server.key)):
        (tmp_path / name).write_bytes(source.read_bytes())
        (tmp_path / name).chmod(0o640)
    return Metrics(certificate=f"{tmp_path}/pem", key=f"{tmp_path}/key", client_ca=f"{tmp_path}/ca")


def test_good_files_make_a_context_that_asks_clients_who_they_are(settings: Metrics) -> None:
    context = server_context(settings)
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_without_authorities_nobody_is_asked(settings: Metrics) -> None:
    context = server_context(replace(settings, client_ca=""))
    assert context is not None
    assert context.verify_mode is ssl.CERT_NONE


def test_without_a_certificate_there_is_none() -> None:
    assert server_context(Metrics()) is None


def remove(name: str) -> Callable[[Path, Signed], None]:
    return lambda folder, _: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path, Signed], None]:
    def spoil(folder: Path, _: Signed) -> None:
        (folder / name).write_text(text)

    return spoil


def pipe(folder: Path, _: Signed) -> None:
    (folder / "pem").unlink()
    os.mkfifo(folder / "pem")


def everybodys(folder: Path, _: Signed) -> None:
    (folder / "key").chmod(0o644)


def anothers(folder: Path, other: Signed) -> None:
    (folder / "key").write_bytes(other.key.read_bytes())


def encrypted(folder: Path, other: Signed) -> None:
    into = ("-aes256", "-passout", "pass:secret", "-out", folder / "key")
    subprocess.run(["openssl", "pkey", "-in", other.key, *into], check=True)


BROKEN = "-----BEGIN {0}-----\nAAAA\n-----END {0}-----\n"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (remove("pem"), "cannot use metrics.certificate: cannot read {}/pem: No such file or directory"),
        (remove("key"), "cannot use metrics.key: cannot read {}/key: No such file or directory"),
        (remove("ca"), "cannot use metrics.client_ca: cannot read {}/ca: No such file or directory"),
        (
            write("pem", ""),
            "cannot use metrics.certificate: {}/pem has no certificate in PEM (-----BEGIN ...CERTIFICATE",
        ),
        (pipe, "cannot use metrics.certificate: {}/pem has no certificate in PEM"),
        (write("key", "secret"), "cannot use metrics.key: {}/key has no key in PEM (-----BEGIN ...PRIVATE KEY-----)"),
        (write("pem", BROKEN.format("CERTIFICATE")), "cannot use metrics.certificate: {}/pem with {}/key: "),
        (write("ca", BROKEN.format("CERTIFICATE")), "cannot use metrics.client_ca: {}/ca: "),
        (everybodys, "cannot use metrics.key: everybody may read {}/key; run: chmod o-r {}/key"),
        (anothers, "cannot use metrics.key: {}/key is not the key of {}/pem"),
        (encrypted, "cannot use metrics.key: {}/key is encrypted, and nobody is there to type its password"),
    ],
)
def test_what_cannot_be_used_is_named(
    settings: Metrics,
    tmp_path: Path,
    made: tuple[Authority, Signed, Signed],
    spoil: Callable[[Path, Signed], None],
    sentence: str,
) -> None:
    spoil(tmp_path, made[2])
    with pytest.raises(ConfigError) as error:
        server_context(settings)
    assert str(error.value).startswith(sentence.replace("{}", str(tmp_path)))
    assert "\n" not in str(error.value)
