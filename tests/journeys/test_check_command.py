"""`telemt.py check`: one deliberately broken configuration per finding, and a healthy one without any."""
from __future__ import annotations

import email.utils
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from doubles import PROGRAM, Rig, clean_env, free_port, merged, run_program
from sites import Host, make_certificate, says

SECRET = "0123456789abcdef0123456789abcdef"
PAST = "2020-01-01T00:00:00Z"


def healthy(tmp_path: Path) -> dict[str, Any]:
    return {"server": {"port": free_port(), "listeners": [{"ip": "127.0.0.1"}]}, "general": {"use_middle_proxy": False},
            "censorship": {"tls_domain": "www.example.com"}, "access": {"users": {"alice": SECRET}},
            "upstreams": [{"type": "direct"}]}


def check(tmp_path: Path, config: dict[str, Any] | str, *words: str, **options: Any) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """(exit code, problems, whole report) of an offline check."""
    path = tmp_path / "config.toml"
    path.write_text(config if isinstance(config, str) else tomli_w.dumps(config))
    path.chmod(0o600)
    done = run_program("check", str(path), "--json", "--offline", *words, cwd=tmp_path, timeout=60, **options)
    assert not done.stderr, done.stderr
    report = json.loads(done.stdout)
    return done.returncode, [row for row in report["findings"] if row["problem"]], report


def test_a_healthy_configuration_has_no_finding(tmp_path: Path) -> None:
    code, problems, report = check(tmp_path, healthy(tmp_path))
    assert (code, problems, report["ok"], report["loads"]) == (0, [], True, True)
    assert any("direct mode" in row["what"] for row in report["findings"])      # a note


BROKEN: list[tuple[str, dict[str, Any], str, str]] = [
    ("unknown key", {"censorship": {"tls_domian": "x"}}, "censorship.tls_domian", "write censorship.tls_domain"),
    ("key of another table", {"server": {"tls_domain": "x"}}, "server.tls_domain", "write censorship.tls_domain"),
    ("unknown table", {"servre": {"port": 1}}, "servre", ""),
    ("clamp", {"timeouts": {"client_handshake": 0}}, "config", ""),
    ("all-zero secret", {"access": {"users": {"bob": "0" * 32}}}, "access.users", "openssl rand -hex 16"),
    ("one secret twice", {"access": {"users": {"bob": SECRET.upper()}}}, "access.users", "secret of its own"),
    ("switched off", {"access": {"users": {"bob": "1" * 32}, "user_enabled": {"bob": False}}}, "access.user_enabled", "write true"),
    ("expired", {"access": {"users": {"bob": "1" * 32}, "user_expirations": {"bob": PAST}}}, "access.user_expirations", "later date"),
    ("connections 0", {"access": {"users": {"bob": "1" * 32}, "user_max_tcp_conns": {"bob": 0}}}, "access.user_max_tcp_conns", "remove"),
    ("quota 0", {"access": {"users": {"bob": "1" * 32}, "user_data_quota": {"bob": 0}}}, "access.user_data_quota", "remove"),
    ("addresses 0", {"access": {"users": {"bob": "1" * 32}, "user_max_unique_ips": {"bob": 0}}}, "access.user_max_unique_ips", "remove"),
    ("nobody usable", {"access": {"user_enabled": {"alice": False}}}, "access.users", ""),
    ("ad tag in direct mode", {"general": {"ad_tag": "a" * 32}}, "general.ad_tag", "use_middle_proxy = true"),
    ("ad tag of a user", {"access": {"user_ad_tags": {"alice": "a" * 32}}}, "general.ad_tag", "use_middle_proxy = true"),
    ("no upstream", {"upstreams": [{"type": "direct", "enabled": False}]}, "upstreams", "[[upstreams]]"),
    ("open API", {"server": {"api": {"enabled": True, "listen": "0.0.0.0:0", "whitelist": []}}}, "", ""),
    ("open metrics", {"server": {"metrics_port": 1, "metrics_whitelist": []}}, "server.metrics_whitelist", "metrics_whitelist ="),
    ("no mask socket", {"censorship": {"mask_unix_sock": "/nowhere/sock"}}, "censorship.mask_unix_sock", "start the web server"),
    ("foreign address", {"server": {"listeners": [{"ip": "192.0.2.1"}]}}, "server.port", ""),
]


@pytest.mark.parametrize(("change", "key", "cure"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_every_finding(tmp_path: Path, change: dict[str, Any], key: str, cure: str) -> None:
    if key == "":
        change["server"]["api"]["listen"], key, cure = f"0.0.0.0:{free_port()}", "server.api.whitelist", "auth_header"
    code, problems, _ = check(tmp_path, merged(healthy(tmp_path), change))
    assert code == 1
    mine = [row for row in problems if row["key"] == key]
    assert mine and cure in (mine[0]["cure"] or ""), problems
    assert all(SECRET not in str(row) for row in problems)


def test_unreadable_and_invalid_configurations(tmp_path: Path) -> None:
    done = run_program("check", "nowhere.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "nowhere.toml: No such file" in done.stderr
    code, problems, report = check(tmp_path, "[server]\nport = 70000\n")
    assert (code, problems, report["loads"]) == (2, [], False) and "port" in report["error"]
    assert not (tmp_path / "nowhere.toml").exists()


def test_a_port_in_use_names_its_owner_and_a_running_proxy_is_no_problem(rig: Rig, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = merged(healthy(tmp_path), {"server": {"port": other.getsockname()[1]}})
        code, problems, _ = check(tmp_path, config)
    assert code == 1 and f"(pid {os.getpid()})" in problems[0]["what"]
    proxy = rig.proxy()
    code, problems, report = check(tmp_path, merged(healthy(tmp_path), {"server": {"port": proxy.port}}))
    assert (code, problems) == (0, [])
    assert any(f"telemt (pid {proxy.pid}): the proxy is running" in row["what"] for row in report["findings"])


def test_few_descriptors_and_slow_cryptography(tmp_path: Path) -> None:
    code, problems, _ = check(tmp_path, healthy(tmp_path), env={"TELEMT_CRYPTO": "python"})
    assert code == 1 and "no AES library" in problems[0]["what"]
    path = tmp_path / "config.toml"
    done = subprocess.run([sys.executable, "-B", str(PROGRAM), "check", str(path), "--offline"], cwd=tmp_path, env=clean_env(), check=False,
                          capture_output=True, text=True, timeout=30,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512)))
    assert done.returncode == 1 and "PROBLEM process: at most 512 open files" in done.stdout and "LimitNOFILE" in done.stdout


def test_a_directory_that_the_api_cannot_write(tmp_path: Path) -> None:
    config = merged(healthy(tmp_path), {"server": {"api": {"enabled": True, "listen": f"127.0.0.1:{free_port()}"}}})
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(config))
    read_only = ["unshare", "-m", "sh", "-c", 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 77; shift; exec "$@"', "sh",
                 str(tmp_path)]
    done = subprocess.run([*read_only, sys.executable, "-B", str(PROGRAM), "check", str(path), "--offline"], cwd="/", env=clean_env(),
                          check=False, capture_output=True, text=True, timeout=30)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount")
    assert done.returncode == 1 and f"{tmp_path} is not writable" in done.stdout, done.stdout + done.stderr
    assert f"ReadWritePaths={tmp_path}" in done.stdout


# -- with the network: everything on loopback

def online(tmp_path: Path, config: dict[str, Any], about: str = "censorship", **env: str) -> list[dict[str, Any]]:
    """Problems whose key begins with `about`; the public clock server is not to be had here and costs nothing."""
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(config))
    done = run_program("check", str(path), "--json", cwd=tmp_path, timeout=60, env=env)
    return [row for row in json.loads(done.stdout)["findings"] if row["problem"] and row["key"].startswith(about)]


class MaskHost(Host):
    """A TLS 1.3 server whose clock is `off_s` ahead."""

    def __init__(self, folder: Path, names: Sequence[str], off_s: float = 0.0) -> None:
        self.certificate, private = make_certificate(folder, names=names)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, private)
        self.off_s = off_s

        def serve(sock: socket.socket) -> None:
            with context.wrap_socket(sock, server_side=True) as tls:
                if tls.recv(4096).startswith(b"HEAD / HTTP/1.1\r\n"):
                    date = email.utils.formatdate(time.time() + off_s, usegmt=True)
                    tls.sendall(f"HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 5\r\n\r\n".encode())
        super().__init__(serve)


def masked_by(host: MaskHost, tmp_path: Path, domain: str) -> dict[str, Any]:
    config = healthy(tmp_path)
    config["censorship"] |= {"tls_domain": domain, "mask_host": "127.0.0.1", "mask_port": host.port}
    return config


def test_certificate_of_the_mask_host(tmp_path: Path) -> None:
    """Valid for one name and not for the other; unknown authorities are told apart."""
    with MaskHost(tmp_path, ["www.example.com"]) as host:
        fitting, other = (masked_by(host, tmp_path, domain) for domain in ("www.example.com", "www.example.org"))
        trusted = str(host.certificate)
        assert online(tmp_path, fitting, SSL_CERT_FILE=trusted) == []
        problems = online(tmp_path, other, SSL_CERT_FILE=trusted)
        assert [row["key"] for row in problems] == ["censorship.tls_domain"]
        assert "certificate not valid: Hostname mismatch" in problems[0]["what"] and "www.example.org" in problems[0]["what"]
        strangers = online(tmp_path, fitting, SSL_CERT_FILE=os.devnull)
        assert "certificate not valid: self-signed certificate" in strangers[0]["what"]


@pytest.mark.parametrize(("off_s", "text"), [(0, ""), (300, "s behind that of 127.0.0.1"), (-7200, "s ahead of that of 127.0.0.1")])
def test_clock_of_the_mask_host(tmp_path: Path, off_s: float, text: str) -> None:
    with MaskHost(tmp_path, ["www.example.com"], off_s) as host:
        found = online(tmp_path, masked_by(host, tmp_path, "www.example.com"), "process")
    clocks = [row["what"] for row in found if "the clock is" in row["what"]]
    assert len(clocks) == bool(text) and all(text in what for what in clocks)


def test_without_a_secret_the_middle_end_stays_away(tmp_path: Path) -> None:
    """config.md 6.5, the last row: a secret on disk, one that a server has, a server that has none."""
    config = merged(healthy(tmp_path), {"general": {"use_middle_proxy": True, "proxy_secret_path": str(tmp_path / "proxy-secret")}})
    config["censorship"] |= {"mask": False}
    with Host(says(b"HTTP/1.1 503 Busy\r\nContent-Length: 40\r\n\r\n" + b"x" * 40, hang_up=True)) as busy:
        config["general"]["proxy_secret_url"] = f"http://127.0.0.1:{busy.port}/secret"
        problems = online(tmp_path, config, "general")
    assert [row["key"] for row in problems] == ["general.proxy_secret_path"]
    assert "none to be had: proxy-secret download HTTP 503" in problems[0]["what"] and "keep the middle end unusable" in problems[0]["why"]
    with Host(says(b"HTTP/1.1 200 OK\r\nContent-Length: 128\r\n\r\n" + b"x" * 128, hang_up=True)) as good:
        config["general"]["proxy_secret_url"] = f"http://127.0.0.1:{good.port}/secret"
        assert online(tmp_path, config, "general") == []
    assert "Connection refused" in online(tmp_path, config, "general")[0]["what"]
    (tmp_path / "proxy-secret").write_bytes(b"x" * 128)
    assert online(tmp_path, config, "general") == []


def test_mask_host_that_is_this_proxy(tmp_path: Path) -> None:
    config = healthy(tmp_path)
    config["censorship"] |= {"mask_host": "localhost", "mask_port": config["server"]["port"]}
    problems = online(tmp_path, config)
    assert [row["key"] for row in problems] == ["censorship.mask_host"] and "is this proxy itself" in problems[0]["what"]


def test_mask_host_that_is_not_there(tmp_path: Path) -> None:
    config = healthy(tmp_path)
    config["censorship"] |= {"mask_host": "127.0.0.1", "mask_port": free_port()}
    assert "is unreachable: Connection refused" in online(tmp_path, config)[0]["what"]


def test_mask_host_without_tls(tmp_path: Path) -> None:
    config = healthy(tmp_path)
    with Host(says(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", hang_up=True)) as plain:
        config["censorship"] |= {"mask_host": "127.0.0.1", "mask_port": plain.port}
        problems = online(tmp_path, config)
    assert problems[0]["key"] == "censorship.tls_domain" and "no TLS" in problems[0]["what"]


def test_mask_host_that_says_nothing(tmp_path: Path) -> None:
    """Its handshake is given up after 3 s; on a busy machine the whole probe is, a second later."""
    config = healthy(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config["censorship"] |= {"mask_host": "127.0.0.1", "mask_port": silent.getsockname()[1]}
        problems = online(tmp_path, config, "")
    assert any("no TLS" in row["what"] or "mask host: no answer in 3 s" in row["what"] for row in problems), problems
