"""Certificates for tests, as a CA would issue them."""

from __future__ import annotations

import ipaddress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from trainfleet.net.tls import Certificates


def issue(folder: Path, name: str, *, ca: str | None, days: tuple[int, int] = (-1, 30)) -> Certificates:
    """A certificate for localhost and 127.0.0.1, signed by the CA of that name in `folder`, or by itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    subject = issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    signer = key
    if ca is not None:
        issuer = x509.load_pem_x509_certificate((folder / f"{ca}.pem").read_bytes()).subject
        signer = serialization.load_pem_private_key((folder / f"{ca}.key").read_bytes(), None)
    usage = {"content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"}
    usages = dict.fromkeys(usage | {"decipher_only", "crl_sign"}, False)
    certificate = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=ca is None, **usages), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(private)
    return Certificates(ca=folder / f"{ca or name}.pem", certificate=folder / f"{name}.pem", key=folder / f"{name}.key")
