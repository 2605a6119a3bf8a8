"""Test certificates for the two parties: an authority that signs once, and a certificate for each party.

Real deployments use their own authority: any PEM files work whose certificates name the hosts.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import os
import ssl
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.storage.files import replacing


@dataclass(frozen=True)
class TLS:
    """PEM files of one party: its certificate, its private key, and the authority that signed the peer's."""

    cert: Path
    key: Path
    ca: Path

    def check(self) -> None:
        """Raise ShoalError unless all three files can be read."""
        for role, path in (("certificate", self.cert), ("key", self.key), ("authority", self.ca)):
            if not os.access(path, os.R_OK):
                raise ShoalError(
                    f"found no readable TLS {role} at {path}; need a PEM file; "
                    "name the right file or make test certificates with shoal certs (make_certificates)"
                )


def fingerprint(certificate: bytes) -> str:
    """A name for a certificate in DER: 16 hex digits of its SHA-256."""
    return full_fingerprint(certificate)[:16]


def full_fingerprint(certificate: bytes) -> str:
    """The SHA-256 of a certificate in DER, in 64 hex digits."""
    return hashlib.sha256(certificate).hexdigest()


def fingerprint_of_file(path: Path) -> str:
    """The SHA-256 of the certificate in a PEM file. Raises ShoalError for a file without one."""
    try:
        return full_fingerprint(ssl.PEM_cert_to_DER_cert(path.read_text()))
    except (OSError, ValueError) as error:
        raise ShoalError(f"found no certificate at {path} ({error}); need a PEM file; make it again") from error


def make_certificates(
    folder: Path | str,
    names: tuple[str, ...] = ("localhost", "127.0.0.1"),
    days: int = 30,
    *,
    overwrite: bool = False,
) -> dict[str, TLS]:
    """Write `ca.pem` and `{server,client}.{pem,key}` into `folder`; return the TLS of "server" and "client".

    Both certificates are valid for the host names and IP addresses `names` and for `days` days. Key files are
    readable by their owner only. The authority's own key is never written, so nobody can sign another certificate
    later. Raises ShoalError when `cryptography` is not installed, when a file cannot be written, and when one exists
    already (unless `overwrite`). In each of these cases no file has changed.
    """
    x509, ec, _ = _crypto()
    folder = Path(folder)
    parties = {p: TLS(folder / f"{p}.pem", folder / f"{p}.key", folder / "ca.pem") for p in ("server", "client")}
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name(x509, "shoal test authority")
    ca = _sign(ca_name, ca_name, ca_key.public_key(), ca_key, _ca_extensions(x509), days)
    files = {folder / "ca.pem": (ca.public_bytes(_encoding().PEM), 0o644)}
    for party, tls in parties.items():
        key = ec.generate_private_key(ec.SECP256R1())
        extensions = _leaf_extensions(x509, names)
        leaf = _sign(_name(x509, f"shoal {party}"), ca_name, key.public_key(), ca_key, extensions, days)
        files |= {tls.cert: (leaf.public_bytes(_encoding().PEM), 0o644), tls.key: (_key_bytes(key), 0o600)}
    if not overwrite:
        _refuse_to_replace(files)
    _write(files)
    return parties


def _crypto() -> tuple[Any, Any, Any]:
    # `cryptography` belongs to an optional extra, so it is imported only when certificates are made.
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ShoalError(
            "found no `cryptography` package; need it to make test certificates; do pip install shoal[private]"
        ) from error
    return x509, ec, serialization


def _encoding() -> Any:
    return _crypto()[2].Encoding


def _key_bytes(key: Any) -> bytes:
    s = _crypto()[2]
    return bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))


def _name(x509: Any, common_name: str) -> Any:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def _ca_extensions(x509: Any) -> list[tuple[Any, bool]]:
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    return [(x509.BasicConstraints(ca=True, path_length=0), True), (usage, True)]


def _leaf_extensions(x509: Any, names: tuple[str, ...]) -> list[tuple[Any, bool]]:
    # Each certificate serves both roles, so that two machines can take turns as server and client.
    roles = [x509.ExtendedKeyUsageOID.SERVER_AUTH, x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    return [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (x509.SubjectAlternativeName([_general_name(x509, n) for n in names]), False),
        (x509.ExtendedKeyUsage(roles), False),
    ]


def _general_name(x509: Any, name: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise ShoalError(
            f"found host name {name!r} ({error}); need ASCII letters; write it as IDNA or give an address"
        ) from error


def _sign(
    subject: Any, issuer: Any, public_key: Any, issuer_key: Any, extensions: list[tuple[Any, bool]], days: int
) -> Any:
    from cryptography.hazmat.primitives import hashes

    x509, _, _ = _crypto()
    now = dt.datetime.now(dt.timezone.utc)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public_key)
    builder = builder.serial_number(x509.random_serial_number())
    # Valid from five minutes ago, in case the clocks of the two machines differ.
    builder = builder.not_valid_before(now - dt.timedelta(minutes=5)).not_valid_after(now + dt.timedelta(days=days))
    key_id = x509.SubjectKeyIdentifier.from_public_key(public_key)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    for extension, critical in [*extensions, (key_id, False), (authority, False)]:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())


def _refuse_to_replace(files: Iterable[Path]) -> None:
    there = [path for path in files if path.exists()]
    if there:
        raise ShoalError(
            f"found a certificate at {there[0]}; need a folder without; name another or pass --overwrite "
            "(overwrite=True), after which the parties that have the old ones are refused"
        )


def _write(files: dict[Path, tuple[bytes, int]]) -> None:
    """Write all files with their modes, or none of them."""
    with ExitStack() as stack:
        for path, (data, mode) in files.items():
            scratch = stack.enter_context(replacing(path))
            scratch.unlink(missing_ok=True)
            # The mode is set at creation, so a key is never readable by others, not even for a moment.
            with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
