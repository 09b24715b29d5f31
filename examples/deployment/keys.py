"""Certificates for the server and key pairs for the hospitals, as files that Flower accepts."""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Extension = tuple[x509.ExtensionType, bool]


def make_certificates(folder: Path) -> None:
    """Make a CA and a certificate for localhost and 127.0.0.1, unless they are there."""
    if (folder / "server.crt").exists():
        return
    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ca = certificate("ca", ca_key, ca_key, (x509.BasicConstraints(True, 0), True), (usage, True))
    server = certificate("server", key, ca_key, (x509.SubjectAlternativeName(hosts), False))
    for name, text, owner in (("ca", ca, ca_key), ("server", server, key)):
        write(folder / f"{name}.key", private_text(owner, ser.PrivateFormat.PKCS8))
        write(folder / f"{name}.crt", text, mode=0o644)


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    ca_key: ec.EllipticCurvePrivateKey,
    *extensions: Extension,
) -> str:
    """Return a certificate for `key`, valid for one year and signed by the CA's key."""
    public, today = key.public_key(), datetime.datetime.now(datetime.UTC)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = (
        x509.CertificateBuilder()
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")]))
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=365))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(issuer, critical=False)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(ca_key, hashes.SHA384()).public_bytes(ser.Encoding.PEM).decode()


def make_site_key(folder: Path) -> None:
    """Make one hospital's key pair, as `ssh-keygen -t ecdsa -b 384` does, unless it is there."""
    if (folder / "key.pub").exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(ser.Encoding.OpenSSH, ser.PublicFormat.OpenSSH)
    write(folder / "key", private_text(key, ser.PrivateFormat.OpenSSH))
    write(folder / "key.pub", public.decode() + "\n", mode=0o644)


def private_text(key: ec.EllipticCurvePrivateKey, layout: ser.PrivateFormat) -> str:
    """Return a private key as text."""
    return key.private_bytes(ser.Encoding.PEM, layout, ser.NoEncryption()).decode()


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file whole or not at all; nobody beyond `mode` can read it at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
