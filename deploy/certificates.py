"""Makes a certificate authority, the SuperLink's certificate, and the keys that authenticate SuperNodes.

All keys are on the NIST curve P-384, the only kind that Flower takes for nodes. A folder of credentials holds

- ``ca.key``, ``ca.crt``: the authority. Its key signs further server certificates and is needed for nothing else.
- ``server.key``, ``server.pem``: the SuperLink's.
- ``nodes/<name>.key``, ``nodes/<name>.pub``: a SuperNode's, in OpenSSH's format.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_KEY, CA_CERTIFICATE, SERVER_KEY, SERVER_CERTIFICATE = "ca.key", "ca.crt", "server.key", "server.pem"
_BACKDATED = timedelta(hours=1)  # a machine whose clock is a little behind must not refuse a new certificate
_DAYS_OF_AUTHORITY = 3650
_DNS_NAME = re.compile(
    r"(?=.{1,253}$)(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*"
)
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def make_authority(folder: Path, *, overwrite: bool = False) -> Path:
    """Make a certificate authority and return the path of its certificate, which every machine gets.

    Raises ValueError if the folder is that of a Python project, or has an authority already and ``overwrite`` is not
    set.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cafe-flwr certificate authority")])
    certificate = (
        _certificate(name, name, key.public_key(), key.public_key(), _DAYS_OF_AUTHORITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_pair(folder / CA_KEY, _pem(key), folder / CA_CERTIFICATE, _pem(certificate), overwrite)
    return folder / CA_CERTIFICATE


def make_server_certificate(folder: Path, hosts: Sequence[str], *, days: int = 365, overwrite: bool = False) -> Path:
    """Make the SuperLink's certificate, signed by the folder's authority and valid for 1 to 825 days; return its path.

    ``hosts`` are the names and IP addresses by which nodes and users will call the SuperLink; they accept no others.

    Raises ValueError if there is no authority, a host is neither a name nor an address, or there is a certificate
    already and ``overwrite`` is not set.
    """
    if not hosts:
        raise ValueError("the SuperLink's certificate needs at least one host name or IP address: --host NAME")
    if not 1 <= days <= 825:
        raise ValueError(f"a server certificate is valid for 1 to 825 days, got {days}")
    try:
        authority = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
        signer = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
    except FileNotFoundError as error:
        raise ValueError(f"there is no certificate authority in {folder}: {error.filename} is missing") from error
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cafe-flwr SuperLink")])
    certificate = (
        _certificate(subject, authority.subject, key.public_key(), signer.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write_pair(folder / SERVER_KEY, _pem(key), folder / SERVER_CERTIFICATE, _pem(certificate), overwrite)
    return folder / SERVER_CERTIFICATE


def make_node_key(folder: Path, name: str, *, overwrite: bool = False) -> Path:
    """Make the key pair of a SuperNode and return the path of the private key; the public one is beside it, ``.pub``.

    Raises ValueError if the name cannot be a file's, or there is such a key already and ``overwrite`` is not set.
    """
    if not _NODE_NAME.fullmatch(name):
        raise ValueError(f"a node's name is up to 63 letters, digits, '.', '_' and '-', got {name!r}")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    paths = folder / "nodes" / f"{name}.key", folder / "nodes" / f"{name}.pub"
    _write_pair(paths[0], private, paths[1], public + f" {name}\n".encode(), overwrite)
    return paths[0]


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _DNS_NAME.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
            raise ValueError(f"{host!r} is neither a host name nor an IP address (and no port belongs here)") from None
        return x509.DNSName(host)


def _pem(part: ec.EllipticCurvePrivateKey | x509.Certificate) -> bytes:
    if isinstance(part, x509.Certificate):
        return part.public_bytes(serialization.Encoding.PEM)
    return part.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_pair(private: Path, secret: bytes, public: Path, content: bytes, overwrite: bool) -> None:
    """Write a private key, readable by its owner alone, and its public counterpart; neither if one exists already."""
    folder = private.parent.resolve()
    if project := next((f for f in (folder, *folder.parents) if (f / "pyproject.toml").exists()), None):
        raise ValueError(
            f"{folder} is inside the project {project}: keep private keys out of what is bundled or shared"
        )
    there = [path for path in (private, public) if path.exists()]
    if there and not overwrite:
        raise ValueError(f"{there[0]} is there already; to replace it: --overwrite")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path, data, mode in ((private, secret, 0o600), (public, content, 0o644)):
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
