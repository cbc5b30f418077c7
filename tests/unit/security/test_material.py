"""Folders of certificates: what is accepted, and that each fault names its file."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.unit.security.crafting import (
    CONTROLLER,
    HOST_A,
    HOST_B,
    AnyKey,
    Authority,
    key_pem,
    key_usage,
    pem,
    write_folder,
)
from vmferry.errors import ConfigError
from vmferry.security.material import TlsFiles

AUTHORITY = Authority()
KEY = ec.generate_private_key(ec.SECP256R1())
DAY = timedelta(days=1)


def folder(
    directory: Path, *, key: AnyKey = KEY, ca_pem: bytes = AUTHORITY.pem, **changes: object
) -> TlsFiles:
    """The folder of host b as it should be, but for ``changes`` to its certificate."""
    return TlsFiles(write_folder(directory, ca_pem, AUTHORITY.host(HOST_B, key=key, **changes), key))


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()])
def test_good_files_are_loaded(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    """Material is what the files hold, with the identity and the end of the certificate."""
    key = ec.generate_private_key(curve)
    files = folder(tmp_path, key=key)
    material = files.load()
    certificate = x509.load_pem_x509_certificate(material.cert_pem)
    assert material.identity == HOST_B
    assert material.not_after == certificate.not_valid_after_utc
    assert (material.ca_pem, material.key_pem) == (AUTHORITY.pem, key_pem(key))
    assert len(material.key_sha256) == 32
    assert "PRIVATE" not in repr(material)


def test_material_ends_with_the_first_of_its_path(tmp_path: Path) -> None:
    """A certificate is no longer good than the authority that issued it."""
    short = Authority(end=timedelta(hours=1))
    files = TlsFiles(write_folder(tmp_path, short.pem, short.host(HOST_B, key=KEY), KEY))
    assert files.load().not_after == short.certificate.not_valid_after_utc


def test_a_callers_certificate_needs_no_dns_name(tmp_path: Path) -> None:
    """Nobody connects to a controller."""
    certificate = AUTHORITY.leaf(uris=[CONTROLLER.uri], key=KEY)
    assert TlsFiles(write_folder(tmp_path, AUTHORITY.pem, certificate, KEY)).load().identity == CONTROLLER


def test_one_of_several_authorities(tmp_path: Path) -> None:
    """While an authority is being replaced both are trusted, and an expired one does no harm."""
    files = folder(tmp_path, ca_pem=Authority().pem + Authority(end=-DAY).pem + AUTHORITY.pem)
    assert files.load().identity == HOST_B


def test_an_intermediate_authority(tmp_path: Path) -> None:
    """A certificate may come from an intermediate authority whose certificate follows it in the file."""
    between = Authority()
    between.certificate = AUTHORITY.leaf(
        key=between.key,
        usage=key_usage(sign=False, authority=True),
        constraints=x509.BasicConstraints(ca=True, path_length=0),
        end=timedelta(hours=2),
    )
    between.name = between.certificate.subject
    files = TlsFiles(write_folder(tmp_path, AUTHORITY.pem, between.host(HOST_B, key=KEY), KEY))
    with pytest.raises(ConfigError, match=r"not issued by a valid authority of .*ca\.pem"):
        files.load()
    with files.cert.open("ab") as file:
        file.write(pem(between.certificate))
    assert files.load().not_after == between.certificate.not_valid_after_utc


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"end": -DAY / 2}, "expired at"),
        ({"start": DAY / 2}, "not valid before"),
        ({"uris": []}, "exactly one URI"),
        ({"uris": [HOST_A.uri]}, "other than a.vmhost.example.org"),
        ({"uris": ["spiffe://example.org/pod/b"]}, "none of vmhost, controller, admin"),
        ({"dns": []}, "must also have the DNS name b.vmhost.example.org"),
        ({"dns": ["*.vmhost.example.org"]}, "other than b.vmhost.example.org"),
        ({"usage": key_usage(sign=False)}, "digitalSignature"),
        ({"constraints": x509.BasicConstraints(ca=True, path_length=None)}, "CA's"),
        ({"key": rsa.generate_private_key(65537, 2048)}, "ECDSA P-256 or P-384"),
        ({"key": ed25519.Ed25519PrivateKey.generate()}, "ECDSA P-256 or P-384"),
        ({"key": ec.generate_private_key(ec.SECP521R1())}, "ECDSA P-256 or P-384"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_unfit_certificates(tmp_path: Path, changes: dict[str, object], because: str) -> None:
    """A certificate that would fail later, or would let TLS 1.2 in, is refused at once, naming its file."""
    files = folder(tmp_path, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=because) as caught:
        files.load()
    assert caught.value.field == "tls.crt"
    assert str(files.cert) in str(caught.value)


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "named", "because"),
    [
        (lambda directory: (directory / "ca.pem").unlink(), "ca.pem", "No such file"),
        (lambda directory: (directory / "tls.crt").unlink(), "tls.crt", "No such file"),
        (lambda directory: (directory / "tls.key").unlink(), "tls.key", "No such file"),
        (_write("ca.pem", b""), "ca.pem", "holds no PEM certificate"),
        (_write("ca.pem", AUTHORITY.pem[:-100]), "ca.pem", "holds no PEM certificate"),
        (_write("tls.crt", b"nothing"), "tls.crt", "holds no PEM certificate"),
        (_write("tls.key", b"nothing"), "tls.key", "not an unencrypted PEM key"),
        (_write("tls.key", key_pem(ec.generate_private_key(ec.SECP256R1()))), "tls.key", "not the key of"),
        (_write("ca.pem", Authority().pem), "ca.pem", "not issued by a valid authority"),
        (_write("ca.pem", Authority(is_ca=False).pem), "ca.pem", "not issued by a valid authority"),
        (_write("ca.pem", b"x" * 2_000_000), "ca.pem", "at most 1 MiB"),
        (lambda directory: (directory / "tls.key").chmod(0o640), "tls.key", "mode 0640"),
        (lambda directory: (directory / "tls.key").chmod(0o604), "tls.key", "mode 0604"),
        (
            lambda directory: (
                (directory / "tls.key").replace(directory / "x") and os.mkfifo(directory / "tls.key", 0o600)
            ),
            "tls.key",
            "not a regular file",
        ),
        (
            lambda directory: (directory / "tls.crt").unlink() or (directory / "tls.crt").mkdir(),
            "tls.crt",
            "Is a directory",
        ),
    ],
)
def test_broken_folders(tmp_path: Path, damage: Callable[[Path], object], named: str, because: str) -> None:
    """Each fault of a file is a ConfigError that names it, and none hangs."""
    files = folder(tmp_path)
    files.load()
    damage(tmp_path)
    with pytest.raises(ConfigError, match=because) as caught:
        files.load()
    assert caught.value.field == named
    assert str(tmp_path / named) in str(caught.value)


def test_the_remedy_for_an_open_key_is_a_command(tmp_path: Path) -> None:
    """Who is told about a mode is told what to type, and that is enough."""
    files = folder(tmp_path)
    files.key.chmod(0o644)
    with pytest.raises(ConfigError) as caught:
        files.load()
    assert caught.value.instance_remedy == f"Run: chmod 600 {files.key}"
    files.key.chmod(0o400)
    files.load()


def test_the_fingerprint_shows_every_change(tmp_path: Path) -> None:
    """Replacing, rewriting, removing or re-moding any file changes the fingerprint; looking does not."""
    files = folder(tmp_path)
    seen = {files.fingerprint()}
    files.load()
    assert files.fingerprint() in seen
    for path in (files.ca, files.cert, files.key):
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
        assert files.fingerprint() not in seen
        seen.add(files.fingerprint())
        path.unlink()
        assert files.fingerprint() not in seen
        seen.add(files.fingerprint())
