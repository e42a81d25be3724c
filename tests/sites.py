"""Mask hosts to be measured: certificates of many sizes, a real nginx, a real OpenSSL with post-quantum groups, a scripted host.

Nothing here imports telemt.py.  Everything listens on loopback and has time limits.
"""
from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from doubles import free_port
from programs import SEARCH, Program, path_of

NGINX = shutil.which("nginx", path=SEARCH)
NGINX_MISSING = "nginx is not installed: make deps-test"


# -- certificates ------------------------------------------------------------------------------------------------------------------

def make_key(kind: str) -> Any:
    """A private key: `ec`, or `rsa` with the number of bits behind it."""
    return ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65_537, int(kind.removeprefix("rsa")))


def make_certificate(folder: Path, kind: str = "ec", chain: int = 0, names: Sequence[str] = ("example.com",)) -> tuple[Path, Path]:
    """(certificate file, key file) of a self-made certificate behind `chain` authorities of the same kind."""
    now = datetime.datetime.now(datetime.UTC)
    issuer_key, issuer, found = None, None, []
    for level in range(chain, -1, -1):
        key = make_key(kind)
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0] if level == 0 else f"Test authority {level}")])
        builder = (x509.CertificateBuilder().subject_name(name).issuer_name(issuer or name).public_key(key.public_key())
                   .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
                   .not_valid_after(now + datetime.timedelta(days=30)))
        if level == 0:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(one) for one in names]), critical=False)
        else:
            builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        found.append(builder.sign(issuer_key or key, hashes.SHA256()))
        issuer_key, issuer = key, name
    folder.mkdir(parents=True, exist_ok=True)
    certificate, private = folder / f"{kind}-{chain}.crt", folder / f"{kind}-{chain}.key"
    # the leaf first; an authority that signs itself stays at home, as on real hosts
    certificate.write_bytes(b"".join(one.public_bytes(serialization.Encoding.PEM) for one in reversed(found[1:] if chain else found)))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    private.write_bytes(issuer_key.private_bytes(serialization.Encoding.PEM, *plain))
    return certificate, private


# -- what was measured earlier -----------------------------------------------------------------------------------------------------

def write_profile(folder: Path, domain: str = "example.com", *, group: int = 29, suite: int = 0x1302, order: Sequence[int] = (43, 51),
                  flights: Sequence[int] = (2604,), age_s: float = 60.0) -> None:
    """A cache file as the proxy writes it (tls-front.md 9.5): fresh, so that it does not ask the host again."""
    folder.mkdir(parents=True, exist_ok=True)
    share = [*group.to_bytes(2, "big"), 0, 32, *bytes(32)] if group == 29 else [*group.to_bytes(2, "big"), 4, 96, *bytes(1120)]
    data = {43: [3, 4], 51: share}
    (folder / f"{domain}.json").write_text(json.dumps({
        "server_hello_template": {"version": [3, 3], "random": [0] * 32, "session_id": [], "cipher_suite": [suite >> 8, suite & 255],
                                  "compression": 0, "extensions": [{"ext_type": kind, "data": data[kind]} for kind in order]},
        "cert_info": None, "cert_payload": None, "app_data_records_sizes": [max(flights)], "total_app_data_len": max(1024, *flights),
        "domain": domain, "profile": {"v": 1, "suite": suite, "group": group, "order": list(order), "flights": list(flights),
                                      "fetched_at": int(time.time() - age_s)}}))


# -- a real nginx ------------------------------------------------------------------------------------------------------------------

class Nginx(Program):
    """nginx on a loopback port (`port`) and a unix socket (`path`); `ssl` are lines for its server block."""

    def __init__(self, folder: Path, certificate: tuple[Path, Path], ssl: Sequence[str] = (), *, proxy_protocol: bool = False) -> None:
        folder.mkdir(parents=True)
        self.path = folder / "nginx.sock"
        port = free_port()
        options = "ssl http2" + " proxy_protocol" * proxy_protocol
        lines = [f"ssl_certificate {certificate[0]};", f"ssl_certificate_key {certificate[1]};",
                 *(ssl or ["ssl_protocols TLSv1.2 TLSv1.3;"])]
        (folder / "nginx.conf").write_text(f"""
daemon off; master_process off; pid nginx.pid; error_log error.log info; events {{ worker_connections 512; }}
http {{
  access_log off; client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
  server {{ listen 127.0.0.1:{port} {options}; listen unix:{self.path} {options}; root .; {" ".join(lines)} }}
}}
""")
        super().__init__(folder, [path_of("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"], port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- hosts in this process ---------------------------------------------------------------------------------------------------------

class Host:
    """A listener whose connections are served by `serve(socket)` in threads; `count` connections so far, `openings` their first bytes."""

    def __init__(self, serve: Callable[[socket.socket], None], port: int = 0) -> None:
        self._serve = serve
        self.listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self.port: int = self.listener.getsockname()[1]
        self.count = 0
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.settimeout(30)
            self.count += 1
            self._open.append(sock)
            threading.Thread(target=self._attend, args=(sock,), daemon=True).start()

    def _attend(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            self._serve(sock)
        with contextlib.suppress(OSError):
            sock.close()

    def close(self) -> None:
        """Hang up everywhere."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def says(data: bytes, hang_up: bool = False) -> Callable[[socket.socket], None]:
    """A host that reads something, answers `data`, and waits for the end or hangs up."""
    def serve(sock: socket.socket) -> None:
        sock.recv(65_536)
        sock.sendall(data)
        while not hang_up and sock.recv(65_536):
            pass
    return serve


def stays_silent(sock: socket.socket) -> None:
    """A host that reads and never answers."""
    while sock.recv(65_536):
        pass


def openssl_host(certificate: tuple[Path, Path], groups: bytes = b"X25519MLKEM768:X25519", page: bytes = b"<h1>real</h1>",
                 port: int = 0, delay_s: float = 0.0) -> Host:
    """A TLS 1.3 server of a current OpenSSL (that of `cryptography`), which knows X25519MLKEM768.  ImportError without pyOpenSSL."""
    from OpenSSL import SSL
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_options(1 << 7)                  # SSL_OP_IGNORE_UNEXPECTED_EOF, as nginx does: no alert when the client just leaves
    context.use_certificate_chain_file(str(certificate[0]))
    context.use_privatekey_file(str(certificate[1]))
    context.set_alpn_select_callback(lambda _connection, offered: b"http/1.1" if b"http/1.1" in offered else SSL.NO_OVERLAPPING_PROTOCOLS)
    set_groups(context, groups)

    def serve(sock: socket.socket) -> None:
        time.sleep(delay_s)
        sock.settimeout(None)                    # pyOpenSSL takes a socket with a time limit for a non-blocking one
        connection = SSL.Connection(context, sock)
        connection.set_accept_state()
        try:
            connection.do_handshake()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(page) + page)
            connection.shutdown()
        except SSL.Error:
            with contextlib.suppress(OSError):   # nginx reads ahead: nothing unread turns its end into a reset
                while sock.recv(65_536, socket.MSG_DONTWAIT):
                    pass
    return Host(serve, port)


def set_groups(context: Any, groups: bytes) -> None:
    """Restrict an OpenSSL context to these key-share groups, best first."""
    from OpenSSL._util import lib
    assert lib.SSL_CTX_set1_curves_list(context._context, groups) == 1, "this OpenSSL does not know such a group"


def knows_mlkem() -> bool:
    """Whether this Python can run a TLS server with X25519MLKEM768."""
    try:
        from OpenSSL import SSL
        set_groups(SSL.Context(SSL.TLS_SERVER_METHOD), b"X25519MLKEM768")
    except Exception:
        return False
    return True


if __name__ == "__main__":                       # a host to try things by hand: python tests/sites.py ec
    folder = Path(f"/tmp/site-{os.getpid()}")
    with openssl_host(make_certificate(folder, sys.argv[1] if len(sys.argv) > 1 else "ec")) as host:
        print(host.port, flush=True)
        time.sleep(3600)
