"""Real programs for the journeys: nginx as the mask site, HAProxy in front, SOCKS servers; from Debian, on loopback, stopped by pid.

Nothing is installed here: `make deps-test` does that, and `needs("nginx")` skips a test where a program is missing.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from doubles import free_port, patient

SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
BIG = 50 << 20                                  # bytes of /big


def needs(*programs: str) -> None:
    """Skip the test where a program is missing."""
    missing = [name for name in programs if shutil.which(name, path=SEARCH) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (make deps-test)")


def path_of(program: str) -> str:
    """Where it is."""
    found = shutil.which(program, path=SEARCH)
    assert found, program
    return found


class Program:
    """A process in a folder of its own that listens on a port when the constructor has returned."""

    def __init__(self, folder: Path, command: list[str], port: int) -> None:
        self.folder, self.port = folder, port
        self.output = (folder / "output").open("wb")
        self.process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output)
        end = time.monotonic() + patient(15)
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            assert self.process.poll() is None and time.monotonic() < end, (folder / "output").read_text()
            time.sleep(0.02)

    def close(self) -> None:
        """End it and what it started."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(patient(5))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(patient(5))
        self.output.close()


NGINX = """
daemon off; master_process off; pid nginx.pid; error_log error.log; worker_rlimit_nofile 20000;
events {{ worker_connections 8000; }}
http {{
  types {{ text/plain txt; }} default_type text/plain; server_tokens off; keepalive_timeout {keepalive}s; client_header_timeout {header}s;
  client_body_temp_path tmp; proxy_temp_path tmp; fastcgi_temp_path tmp; uwsgi_temp_path tmp; scgi_temp_path tmp;
  sendfile on; tcp_nopush on;
  log_format who "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $remote_addr $request";
  access_log access.log who;
  ssl_certificate site.crt; ssl_certificate_key site.key; ssl_protocols TLSv1.2 TLSv1.3; ssl_session_tickets off;
  server {{ listen 127.0.0.1:{port} ssl http2{proxy}; listen unix:{folder}/site.sock ssl http2{proxy}; server_name example.com; root www; }}
  server {{ listen 127.0.0.1:{plain}; server_name example.com; root www; }}
}}
"""


class Nginx(Program):
    """A web server with a self-made certificate: TLS 1.2, 1.3, h2, /index.txt and 50 MB at /big."""

    def __init__(self, folder: Path, *, proxy_protocol: bool = False, keepalive: int = 75, header: int = 60) -> None:
        folder.mkdir(parents=True)
        make_site(folder)
        self.plain = free_port()                # the same site without TLS: what port 80 would say
        port = free_port()
        (folder / "nginx.conf").write_text(NGINX.format(port=port, plain=self.plain, folder=folder, keepalive=keepalive, header=header,
                                                        proxy=" proxy_protocol" if proxy_protocol else ""))
        super().__init__(folder, [path_of("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"], port)

    def log(self) -> list[str]:
        """Lines of the access log: address, port and target of the PROXY header, peer, request."""
        return (self.folder / "access.log").read_text().splitlines()


@functools.cache
def certificate() -> tuple[bytes, bytes]:
    """(certificate, key) in PEM, self-signed, RSA for TLS 1.2 clients of any age."""
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([path_of("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=example.com",
                        "-addext", "subjectAltName=DNS:example.com", "-keyout", "key", "-out", "crt"], cwd=folder, check=True,
                       capture_output=True, timeout=60)
        return Path(folder, "crt").read_bytes(), Path(folder, "key").read_bytes()


@functools.cache
def big_file() -> tuple[bytes, str]:
    """(content of /big, its SHA-256)."""
    content = hashlib.shake_128(b"big").digest(BIG)
    return content, hashlib.sha256(content).hexdigest()


def make_site(folder: Path) -> None:
    """Certificate, key and files."""
    crt, key = certificate()
    (folder / "site.crt").write_bytes(crt)
    (folder / "site.key").write_bytes(key)
    (folder / "tmp").mkdir()
    (folder / "www").mkdir()
    (folder / "www" / "index.txt").write_text("the real site\n")
    (folder / "www" / "big").write_bytes(big_file()[0])


HAPROXY = """
global
  maxconn 2000
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend front
  bind 127.0.0.1:{port}
  default_backend telemt
backend telemt
  server telemt {target} {how}{check}
"""


class Haproxy(Program):
    """HAProxy in TCP mode in front of a target; how: send-proxy or send-proxy-v2."""

    def __init__(self, folder: Path, target: str, how: str, *, check: bool = False) -> None:
        folder.mkdir(parents=True)
        port = free_port()
        (folder / "haproxy.cfg").write_text(HAPROXY.format(port=port, target=target, how=how, check=" check inter 200ms" if check else ""))
        super().__init__(folder, [path_of("haproxy"), "-db", "-f", "haproxy.cfg"], port)


def curl(port: int, path: str, *words: str, timeout: float = 60) -> dict[str, Any]:
    """What curl gets from https://example.com:PORT/PATH on loopback: {"status", "version", "body"}."""
    run = subprocess.run([path_of("curl"), "--silent", "--show-error", "--insecure", "--noproxy", "*", "--resolve",
                          f"example.com:{port}:127.0.0.1", "--write-out", "\n%{http_code} %{http_version}", *words,
                          f"https://example.com:{port}/{path}"],
                         check=False, capture_output=True, timeout=timeout)
    assert run.returncode == 0, run.stderr.decode()
    body, _, facts = run.stdout.rpartition(b"\n")
    status, version = facts.decode().split()
    return {"status": int(status), "version": version, "body": body}


# -- SOCKS servers; none of them can reach more than loopback

class Microsocks(Program):
    """SOCKS5, with a login if one is given."""

    def __init__(self, folder: Path, login: tuple[str, str] | None = None, port: int = 0) -> None:
        folder.mkdir(parents=True)
        port = port or free_port()
        words = ["-u", login[0], "-P", login[1]] if login else []
        super().__init__(folder, [path_of("microsocks"), "-i", "127.0.0.1", "-p", str(port), "-b", "127.0.0.1", *words], port)


DANTE = """
logoutput: stderr
internal: 127.0.0.1 port = {port}
external: lo
clientmethod: none
socksmethod: {method}
user.privileged: root
user.notprivileged: {user}
client pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 }}
socks pass {{ from: 127.0.0.0/8 to: 127.0.0.0/8 protocol: tcp }}
socks pass {{ from: 127.0.0.0/8 to: ::1/128 protocol: tcp }}
"""


class Dante(Program):
    """SOCKS4 and SOCKS5 without login, or SOCKS5 with that of a SystemUser; towards IPv4 and IPv6."""

    def __init__(self, folder: Path, login: bool = False) -> None:
        folder.mkdir(parents=True)
        port = free_port()
        user = pwd.getpwuid(os.getuid()).pw_name
        text = DANTE.format(port=port, user=user, method="username" if login else "none")
        (folder / "danted.conf").write_text(text if os.getuid() == 0 else text.replace("user.privileged: root\n", ""))
        super().__init__(folder, [path_of("danted"), "-f", "danted.conf", "-p", str(folder / "danted.pid")], port)


@contextlib.contextmanager
def system_user(name: str, password: str) -> Iterator[tuple[str, str]]:
    """A user of this system who may log in with a password and has neither shell nor home: what dante checks.  Skips without root."""
    if os.getuid() != 0:
        pytest.skip("dante knows users of the system only, and only root can make one")
    needs("useradd", "userdel", "chpasswd")
    subprocess.run([path_of("useradd"), "-M", "-N", "-s", "/usr/sbin/nologin", name], check=True, capture_output=True)
    try:
        subprocess.run([path_of("chpasswd")], input=f"{name}:{password}", text=True, check=True, capture_output=True)
        yield name, password
    finally:
        subprocess.run([path_of("userdel"), name], check=False, capture_output=True)


SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
"""


def start_sshd(folder: Path, more: str) -> tuple[Program, int, list[str]]:
    """An sshd of the test's own with throw-away keys: (server, port, words for ssh and scp).  more: further lines of its configuration."""
    for name in ("host", "user"):
        subprocess.run([path_of("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(SSHD.format(port=port, folder=folder) + more)
    with contextlib.suppress(OSError):
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)     # where sshd locks itself in; its package makes it at boot
    server = Program(folder / "sshd", [path_of("sshd"), "-D", "-e", "-f", str(folder / "sshd_config")], port)
    return server, port, ["-F", "none", "-i", str(folder / "user"), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
                          "-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={folder}/known"]


class SshSocks(Program):
    """`ssh -D`: SOCKS4 and SOCKS5, through an sshd of the test's own with keys of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.server, far, options = start_sshd(folder, "AllowTcpForwarding local\nPermitOpen 127.0.0.1:* [::1]:*\n")
        port = free_port()
        try:
            super().__init__(folder, [
                path_of("ssh"), *options, "-N", "-D", f"127.0.0.1:{port}", "-p", str(far), "-o", "ExitOnForwardFailure=yes",
                f"{pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1"], port)
        except BaseException:
            self.server.close()
            raise

    def close(self) -> None:
        super().close()
        self.server.close()
