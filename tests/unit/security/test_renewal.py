"""Whoever connects again proves itself with what its files hold by then, unless that is unusable."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from vmferry.errors import ConfigError
from vmferry.security.authority import init_authority, issue
from vmferry.security.identity import Identity, Kind
from vmferry.security.material import TlsFiles
from vmferry.security.renewal import CurrentMaterial

HOST = Identity("example.org", Kind.VMHOST, "a")


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """One that has issued a certificate for the host in the folder ``tls`` beside it."""
    init_authority(tmp_path / "ca", HOST.trust_domain)
    issue(tmp_path / "ca", HOST, tmp_path / "tls")
    return tmp_path / "ca"


def test_new_files_are_taken_up_as_soon_as_all_of_them_are_there(authority: Path, tmp_path: Path) -> None:
    """A new key beside the old certificate changes nothing; when the certificate follows, both are used."""
    current = CurrentMaterial(TlsFiles(tmp_path / "tls"))
    old = current.get()
    issue(authority, HOST, tmp_path / "next")
    for name, expected in (("tls.key", False), ("tls.crt", True)):
        (tmp_path / "next" / name).rename(tmp_path / "tls" / name)
        assert (current.get() is not old) == expected
    assert current.get().key_pem != old.key_pem
    assert current.get() is current.get()


def test_an_expired_certificate_is_not_taken_up(authority: Path, tmp_path: Path) -> None:
    """The one that works stays in use; without one, there is an error at once."""
    current = CurrentMaterial(TlsFiles(tmp_path / "tls"))
    old = current.get()
    past = datetime.now(UTC) - timedelta(seconds=1)
    issue(authority, HOST, tmp_path / "tls", force=True, not_after=past)
    assert current.get() is old
    with pytest.raises(ConfigError, match="expired"):
        CurrentMaterial(TlsFiles(tmp_path / "tls"))
    issue(authority, HOST, tmp_path / "tls", force=True)
    assert current.get() is not old
