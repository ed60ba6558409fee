"""Signatures: made with a key, demanded with the other half, and refused with a reason."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from components.runtime.errors import Tune16Error
from components.storage import signing


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    private = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "private.pem").write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(public)
    monkeypatch.setenv(signing.SIGNING_VARIABLE, str(tmp_path / "private.pem"))
    monkeypatch.setenv(signing.VERIFY_VARIABLE, str(tmp_path / "public.pem"))
    return tmp_path


def test_what_was_signed_is_accepted_and_nothing_else(keys: Path) -> None:
    signature = signing.sign(b"manifest")
    assert signature is not None and signing.is_demanded()
    signing.verify(b"manifest", signature, "s3://b/m")
    for content, other in ((b"Manifest", signature), (b"manifest", signature[:-3]), (b"manifest", b"{}")):
        with pytest.raises(Tune16Error, match="s3://b/m: its signature is not valid for this manifest"):
            signing.verify(content, other, "s3://b/m")
    with pytest.raises(Tune16Error, match="has no signature, and TUNE16_VERIFY_KEY requires one"):
        signing.verify(b"manifest", None, "s3://b/m")


def test_without_keys_nothing_is_signed_or_demanded() -> None:
    assert signing.sign(b"manifest") is None and not signing.is_demanded()


def test_keys_that_cannot_be_used_are_named_and_not_shown(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = signing.sign(b"manifest")
    (keys / "private.pem").write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    with pytest.raises(Tune16Error, match="TUNE16_SIGNING_KEY: .*private.pem is not a usable private key") as caught:
        signing.sign(b"manifest")
    assert "c2VjcmV0" not in str(caught.value)
    monkeypatch.setenv(signing.VERIFY_VARIABLE, str(keys / "absent.pem"))
    with pytest.raises(Tune16Error, match="absent.pem is not a usable public key .No such file"):
        signing.verify(b"manifest", signature, "s3://b/m")


def test_a_missing_library_is_named(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "model_signing", None)
    with pytest.raises(Tune16Error, match=r"pip install tune16\[signing\]"):
        signing.sign(b"manifest")
