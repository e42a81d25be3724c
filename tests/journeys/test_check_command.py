"""`telemt.py check`: one deliberately broken configuration per finding, and a healthy one without any."""
from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from doubles import PROGRAM, Rig, clean_env, free_port, merged, run_program

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
    done = run_program("check", str(path), "--json", "--offline", *words, cwd=tmp_path, timeout=30, **options)
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

def online(tmp_path: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Problems around the mask host; the clock server is not to be had here and costs nothing."""
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(config))
    done = run_program("check", str(path), "--json", cwd=tmp_path, timeout=30)
    return [row for row in json.loads(done.stdout)["findings"] if row["problem"] and row["key"].startswith("censorship")]


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
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = healthy(tmp_path)
        config["censorship"] |= {"mask_host": "127.0.0.1", "mask_port": silent.getsockname()[1]}
        problems = online(tmp_path, config)
    assert problems[0]["key"] == "censorship.tls_domain" and "no TLS" in problems[0]["what"]
