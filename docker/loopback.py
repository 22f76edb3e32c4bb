"""A real Flower deployment on this machine's loopback: TLS, SuperNode authentication, one SuperNode a partition.

    python docker/loopback.py APP [--nodes 2] [--run-config 'key=value …'] [--work DIR]

starts a SuperLink and SuperNodes, each with a key of its own that the SuperLink was told, runs the app by ``flwr run``,
streams its log, and stops everything. Certificates and keys are made for the occasion and good for a day.

    python docker/loopback.py --keys DIR [--nodes 2]

only makes them, for the containers of ``docker/compose.yaml``.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

BIN = Path(sys.executable).parent
HOSTS = ("localhost", "superlink", "supernode-0", "supernode-1")
"""Names that the certificate is good for: this machine's, and the containers'."""
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an app; returns 0 if it came to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("app", type=Path, nargs="?", help="the app's folder")
    parser.add_argument("--keys", type=Path, help="only make certificates and keys, in this folder")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--run-config", default="")
    parser.add_argument("--work", type=Path, help="folder for keys and logs, kept; a temporary one if not named")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that the run may take")
    options = parser.parse_args(arguments)
    if options.keys is not None:
        options.keys.mkdir(parents=True, exist_ok=True)
        certificates(options.keys)
        for node in range(options.nodes):
            key_pair(options.keys, node)
        return 0
    if options.app is None:
        parser.error("name an app's folder, or --keys DIR")
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        return deploy(options.app, options.nodes, options.run_config, options.work.absolute(), options.timeout)
    with tempfile.TemporaryDirectory() as folder:
        return deploy(options.app, options.nodes, options.run_config, Path(folder), options.timeout)


def deploy(app: Path, nodes: int, run_config: str, work: Path, timeout: float = 600) -> int:
    """Start a federation, run `app` on it, stop it; logs and keys are in `work`."""
    certificates(work)
    keys = [key_pair(work, node) for node in range(nodes)]
    port = free_port()
    home = work / "home"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{work / "ca.pem"}"\n'
    )
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, *words: str) -> subprocess.Popen[bytes]:
        log = (work / f"{name}.log").open("wb")
        processes.append(
            subprocess.Popen([str(BIN / words[0]), *words[1:]], env=environment, stdout=log, stderr=log, cwd=work)
        )
        return processes[-1]

    tls = ["--ssl-ca-certfile", "ca.pem", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
    offline = "--disable-runtime-dependency-installation"
    try:
        link = start("superlink", "flower-superlink", *tls, "--enable-supernode-auth", "--port", str(port), offline)
        wait_for(port, link, work / "superlink.log")
        for public in keys:
            command = [str(BIN / "flwr"), "supernode", "register", f"{public}.pub", "loopback"]
            subprocess.run(command, env=environment, cwd=work, check=True, timeout=120)
        for node, private in enumerate(keys):
            start(
                f"supernode-{node}",
                *("flower-supernode", "--root-certificates", "ca.pem", "--superlink", f"127.0.0.1:{port}"),
                *("--auth-supernode-private-key", str(private), "--port", str(free_port()), *tls),
                *("--node-config", f"partition-id={node} num-partitions={nodes}"),
            )
        command = [str(BIN / "flwr"), "run", str(app.absolute()), "loopback", "--stream"]
        command += ["--run-config", run_config] if run_config else []
        done = subprocess.run(command, env=environment, cwd=work, timeout=timeout, capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="\n")
        (work / "run.log").write_text(done.stdout + done.stderr)
        failed = done.returncode != 0 or "Exit Code: 2" in done.stdout or "finished:failed" in done.stdout
        return 1 if failed else 0
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    """Until something listens on `port`.

    Raises:
        RuntimeError: the process ended, or took too long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"no SuperLink on port {port}:\n{log.read_text()[-2000:]}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def key_pair(work: Path, node: int) -> Path:
    """A SuperNode's key: the private one's path; the public one's ends in ``.pub``."""
    key = ec.generate_private_key(ec.SECP384R1())
    path = work / f"node-{node}"
    kind = serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
    path.chmod(0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    Path(f"{path}.pub").write_bytes(public + b"\n")
    return path


def certificates(work: Path) -> None:
    """A certificate authority and a certificate that it signed, of this machine and of a container, good for a day."""
    authority, server = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback authority")])
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    hosts = [x509.DNSName(host) for host in HOSTS]
    names: list[x509.GeneralName] = [*hosts, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.now(UTC)

    def signed(name: x509.Name, key: ec.EllipticCurvePrivateKey, is_authority: bool) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )
        if is_authority:
            builder = builder.add_extension(
                x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True
            )
        else:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    (work / "ca.pem").write_bytes(signed(issuer, authority, True))
    (work / "server.pem").write_bytes(signed(subject, server, False))
    kind = serialization.PrivateFormat.TraditionalOpenSSL
    key = server.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())
    (work / "server.key").write_bytes(key)
    (work / "server.key").chmod(0o600)


if __name__ == "__main__":
    sys.exit(main())
