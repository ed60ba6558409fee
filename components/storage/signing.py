"""Signatures of manifests, by the library model-signing: who holds the private key has published this very version.

A manifest has every file's SHA-256, so that its signature is the model's, also of a part of it.

``TUNE16_SIGNING_KEY``    file with the private key (PEM, elliptic curve), from a mounted Secret: the step upload signs
``TUNE16_VERIFY_KEY``     file with the public key: every reader of a version then requires a valid signature
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from components.runtime.errors import Tune16Error

SIGNING_VARIABLE = "TUNE16_SIGNING_KEY"
VERIFY_VARIABLE = "TUNE16_VERIFY_KEY"
_NAME = "manifest.json"  # of the one file in the model that the library sees


def sign(manifest: bytes) -> bytes | None:
    """The manifest's signature (a Sigstore bundle, JSON); None where no key is set.

    Raises:
        Tune16Error: the key cannot be used, or the library is not installed.
    """
    key = os.environ.get(SIGNING_VARIABLE)
    if not key:
        return None
    signer = _library("signing").Config()
    try:
        signer.use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise _unusable(SIGNING_VARIABLE, "private", error) from None
    with tempfile.TemporaryDirectory() as scratch:
        signer.sign(_model(Path(scratch), manifest), Path(scratch) / "signature")
        return (Path(scratch) / "signature").read_bytes()


def is_demanded() -> bool:
    """Whether a key is set that every manifest must have been signed with."""
    return bool(os.environ.get(VERIFY_VARIABLE))


def verify(manifest: bytes, signature: bytes | None, address: str) -> None:
    """Check that a manifest was signed with the key's other half.

    Raises:
        Tune16Error: it was not, the key cannot be used, or the library is not installed.
    """
    if signature is None:
        raise Tune16Error(
            f"{address}: has no signature, and {VERIFY_VARIABLE} requires one. Publish it with {SIGNING_VARIABLE} set."
        )
    verifier = _library("verifying").Config()
    try:
        verifier.use_elliptic_key_verifier(public_key=os.environ[VERIFY_VARIABLE])
    except (OSError, ValueError, TypeError) as error:
        raise _unusable(VERIFY_VARIABLE, "public", error) from None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "signature"
        file.write_bytes(signature)
        try:
            verifier.verify(_model(Path(scratch), manifest), file)
        except Exception as error:  # a forged signature may break the library anywhere: whatever it is, it is refused
            raise Tune16Error(
                f"{address}: its signature is not valid for this manifest and the key of {VERIFY_VARIABLE} "
                f"({type(error).__name__}). Do not use it; find out who wrote there."
            ) from None


def _model(folder: Path, manifest: bytes) -> Path:
    model = folder / "model"
    model.mkdir()
    (model / _NAME).write_bytes(manifest)
    return model


def _library(module: str) -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise Tune16Error(
            f"Signatures need the library model-signing ({error}). Install the extra: pip install tune16[signing]."
        ) from None
    return getattr(model_signing, module)


def _unusable(variable: str, kind: str, error: Exception) -> Tune16Error:
    """The error, without anything of the key itself."""
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    return Tune16Error(
        f"{variable}: {os.environ[variable]} is not a usable {kind} key ({reason}). It takes a PEM file with an "
        "unencrypted elliptic-curve key: openssl ecparam -name prime256v1 -genkey -noout."
    )
