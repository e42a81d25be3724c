"""From the command line to the first listener: arguments, broken files, the missing file, links, log."""
from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from doubles import LOG_LINE, PROGRAM, USERS, Proxy, Rig, base_config, clean_env, free_port, merged, patient, poll, run_program

VERSION = r"telemt\.py \d+\.\d+\.\d+ \(telemt 3\.2\.1 config and API\)"
ISOLATED = ["unshare", "--net", "--map-root-user"]              # a network without anything, loopback included


# -- command line ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("option", ["--version", "-V"])
def test_version(tmp_path: Path, option: str) -> None:
    run = run_program(option, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(VERSION + "\n", run.stdout)


def test_version_that_cannot_be_written(tmp_path: Path) -> None:
    """Found from outside: a traceback, and Python's exit code 120."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        run = subprocess.run([sys.executable, "-B", str(PROGRAM), "-V"], cwd=tmp_path, env=clean_env(), timeout=60, check=False,
                             stdout=full, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (1, "telemt.py: cannot write to stdout: No space left on device\n")


def test_a_log_on_a_full_disk_costs_nothing_else(rig: Rig) -> None:
    """Nor does the end: exit 0, not Python's 120 for what it could not flush."""
    full = ["sh", "-c", 'exec "$@" > /dev/full', "sh", sys.executable, "-B", str(PROGRAM)]
    proxy = rig.proxy(command=full, ready="")
    poll(lambda: proxy.fds()["listen"], "the listener", 20.0)
    proxy.quiet_fds = proxy.fds()
    rig.client().req_pq()
    rig.close_clients()
    proxy.settle()
    proxy.process.send_signal(signal.SIGTERM)
    assert (proxy.wait_exit(), proxy.lines, proxy.errors) == (0, [], [])


@pytest.mark.parametrize("flags", [["-mcProfile"], ["-m", "cProfile"], ["-Bu", "-X", "dev", "-Wignore"]], ids=str)
def test_started_through_python_options(tmp_path: Path, flags: list[str]) -> None:
    """Found from outside: `-mcProfile` with its name joined led into a wrong command line after the change of images."""
    run = subprocess.run([sys.executable, *flags, str(PROGRAM), "--version"], cwd=tmp_path, env=clean_env(), timeout=60, check=False,
                         capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert re.match(VERSION, run.stdout), run.stdout


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="only where malloc is glibc's")
@pytest.mark.parametrize("given", [{}, {"PYTHONMALLOC": "pymalloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_max=128"}],
                         ids=["ours", "given"])
def test_every_object_comes_from_malloc(rig: Rig, given: dict[str, str]) -> None:
    """So that memory goes back after a crowd; who has chosen an allocator keeps it."""
    proxy = rig.proxy(env=given)
    entries = (Path("/proc") / str(proxy.process.pid) / "environ").read_text().split("\0")
    chosen = dict(entry.split("=", 1) for entry in entries if entry.startswith(("PYTHONMALLOC=", "GLIBC_TUNABLES=")))
    free_threaded = "t" in sys.abiflags
    assert chosen == (given or ({} if free_threaded else {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_max=64"}))
    rig.client().req_pq()


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(tmp_path: Path, option: str) -> None:
    run = run_program(option, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "")
    assert "usage" in run.stderr.lower() and "--log-level" in run.stderr
    assert not list(tmp_path.iterdir())


def test_unknown_option_is_named_and_ignored(rig: Rig) -> None:
    proxy = rig.proxy(args=["--frobnicate", "-x"])
    rig.client().req_pq()
    assert proxy.errors == ["Unknown option: --frobnicate", "Unknown option: -x"]
    proxy.errors.clear()


@pytest.mark.parametrize(("args", "env", "least"), [
    ([], {}, "DEBUG"), (["--log-level=VERBOSE"], {}, "DEBUG"), (["--log-level", "normal"], {}, "INFO"),
    (["--log-level", "silent", "--log-level", "info"], {}, "INFO"), (["--silent"], {}, "WARN"),
    (["-s", "--log-level", "debug"], {}, "WARN"),
    (["--log-level=debug"], {"RUST_LOG": "warn"}, "WARN"), ([], {"RUST_LOG": "telemt=info"}, "INFO"),
    (["--silent"], {"RUST_LOG": "info,telemt=warn"}, "INFO"),
], ids=str)
def test_log_level(rig: Rig, args: list[str], env: dict[str, str], least: str) -> None:
    """config.md 6.3: RUST_LOG, then the command line, then the file; info until the listeners are open; links always."""
    proxy = rig.proxy({"general": {"links": {"show": "*"}}}, args=args, env=env)
    proxy.wait_log("telemt::links: -{24}$")
    rig.client("bob", dc=-2).req_pq()
    rig.client("bob", dc=77).expect_closed()
    proxy.wait_log("WARN .*Requested non-standard DC")
    rig.close_clients()
    proxy.settle()
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.wait_exit() == 0
    proxy.check_output()
    assert bool(proxy.log("MTProto handshake successful")) is (least != "WARN")
    assert bool(proxy.log("Relay finished")) is (least == "DEBUG")


# -- broken files ------------------------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, str]] = {          # lines of a config -> the one line on stderr, without "Error: Config error: "
    "syntax": ("general = [", "."),
    "duplicate": ("[general]\nfast_mode = true\nfast_mode = false", "."),
    "bool": ("[general]\nfast_mode = 1", ".*general.fast_mode"),
    "port": ("[server]\nport = 70000", ".*server.port"),
    "float": ("[timeouts]\nclient_handshake = 10.0", ".*timeouts.client_handshake"),
    "enum": ('[general]\nlog_level = "Debug"', ".*general.log_level"),
    "section": ("censorship = 5", ".*censorship"),
    "ip": ('[[server.listeners]]\nip = "localhost"', ".*server.listeners"),
    "no-ip": ("[[server.listeners]]\nreuse_allow = true", ".*ip"),
    "secret": ('[access.users]\ncarol = "12"', "Error: Invalid secret for user carol: Must be 32 hex characters$"),
    "secret-type": ("[access.users]\ncarol = 5", ".*access.users.*carol"),
    "expiration": ('[access.user_expirations]\nalice = "tomorrow"', ".*alice"),
    "upstream": ('[[upstreams]]\ntype = "http"', ".*upstreams"),
    "override": ("[dc_overrides]\n2 = 443", ".*dc_overrides"),
    "include": ('include = "missing.toml"', r"Error: .*(No such file|missing\.toml)"),
    "F1": ("[general]\nupdate_every = 0", r"general\.update_every must be > 0$"),
    "F3": ("[general]\nupstream_connect_retry_attempts = 0", r"general\.upstream_connect_retry_attempts must be > 0$"),
    "F5": ("[general]\nrpc_proxy_req_every = 9", r"general\.rpc_proxy_req_every must be 0 or within \[10, 300\]$"),
    "F14": ('[general]\nbeobachten_file = " "', r"general\.beobachten_file cannot be empty$"),
    "F24": ("[general]\nme_pool_min_fresh_ratio = 1.5", r"general\.me_pool_min_fresh_ratio must be within \[0\.0, 1\.0\]$"),
    "F30": ('[server.api]\nlisten = "9091"', r"server\.api\.listen must be in IP:PORT format$"),
    "F32": ('[censorship]\ntls_domain = ""', "tls_domain cannot be empty$"),
    "F35": ('[censorship]\nmask_host = "a"\nmask_unix_sock = "/b"', "mask_unix_sock and mask_host are mutually exclusive$"),
    "F36": ("[network]\nipv4 = false\nipv6 = false", r"Both ipv4 and ipv6 are disabled in \[network\]$"),
    "F37": ("[network]\nprefer = 5", r"network\.prefer must be 4 or 6$"),
    "F38": ('[network]\ndns_overrides = ["a:b:1.2.3.4"]', r"network\.dns_overrides port is invalid: 'a:b:1\.2\.3\.4'$"),
    "F39": ("[access.users]", "Invalid config: .*No users configured$"),
    "F40": ("[general.modes]\ntls = false", "Invalid config: .*No modes enabled$"),
    "F41": ('[censorship]\ntls_domain = "a/b"', r"Invalid config: .*Invalid tls_domain: 'a/b'\. Must be a valid domain name$"),
    "F42": ('[access.user_ad_tags]\nalice = "12"', r"Invalid config: .*access\.user_ad_tags\['alice'\] must be exactly 32 hex characters$"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_config(tmp_path: Path, case: str) -> None:
    text, wanted = BROKEN[case]
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    run = run_program("config.toml", cwd=tmp_path)
    lines = run.stderr.splitlines()
    assert run.returncode == 1 and len(lines) == 1, run
    prefix = "" if wanted.startswith(("Error: ", "Invalid config: ")) else "Error: Config error: "
    assert re.search(rf"^\[telemt\] {prefix}{wanted}", lines[0]), lines[0]
    assert (tmp_path / "config.toml").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("what", ["directory", "not-utf-8", "unreadable"])
def test_unreadable_config(tmp_path: Path, what: str) -> None:
    path = tmp_path / "config.toml"
    if what == "directory":
        path.mkdir()
    else:
        path.write_bytes(b'tls_domain = "\xff"\n')
    if what == "unreadable":
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads everything")
    run = run_program("config.toml", cwd=tmp_path)
    assert run.returncode == 1 and re.fullmatch(r"\[telemt\] Error: .+\n", run.stderr), run


def test_byte_order_mark_and_includes(rig: Rig) -> None:
    """1.1: a BOM is stripped, include lines are replaced by the file."""
    port = free_port()
    config = tomli_w.dumps(base_config(port, rig.dc.address))
    head, _, users = config.partition("[access.users]")
    body, _, rest = users.partition("\n\n")
    folder = rig.folder / "proxy0"
    folder.mkdir()
    (folder / "users.inc").write_text(f"[access.users]{body}\n", encoding="utf-8")
    proxy = Proxy(folder, f'\ufeff{head}include = "users.inc"\n\n{rest}', port=port)
    rig.proxies.append(proxy)
    rig.client("bob").req_pq()


# -- the missing file --------------------------------------------------------------------------------------------------------------

@pytest.fixture
def lonely() -> list[str]:
    """Command words for a process without network: the default configuration is made for the real one."""
    if not shutil.which("unshare") or subprocess.run([*ISOLATED, "true"], check=False, capture_output=True).returncode:
        pytest.skip("cannot make a network namespace here")
    return [*ISOLATED, sys.executable, "-B", str(PROGRAM)]


def test_missing_config_is_made_and_used(tmp_path: Path, lonely: list[str]) -> None:
    """config.md section 8 item 15."""
    secrets = set()
    for name in ("one.toml", "two.toml"):
        path = tmp_path / name
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*lonely, name], cwd=tmp_path, env=clean_env(), **pipes) as process:
            try:
                assert process.stderr and process.stdout
                said = process.stderr.readline()
                assert said in [f"[telemt] Created default config at {at}\n" for at in (name, path)]
                heard = []
                for line in process.stdout:
                    heard.append(line)
                    if "Listening on 0.0.0.0:443" in line or "Failed to bind" in line:
                        break
                assert heard and "Listening on 0.0.0.0:443" in heard[-1], heard
                process.send_signal(signal.SIGTERM)
                assert process.wait(patient(4)) == 0
                assert not process.stderr.read()
            finally:
                process.kill()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        text = path.read_text(encoding="utf-8")
        users = tomllib.loads(text)["access"]["users"]
        assert list(users) == ["default"] and re.fullmatch(r"[0-9a-f]{32}", users["default"])
        assert any(line.startswith("#") for line in text.splitlines())
        secrets.add(users["default"])
    assert len(secrets) == 2


def test_missing_config_that_cannot_be_written(tmp_path: Path) -> None:
    run = run_program("nowhere/config.toml", cwd=tmp_path)
    assert run.returncode == 1 and run.stderr.startswith("[telemt] ") and "nowhere/config.toml" in run.stderr, run
    assert "Traceback" not in run.stderr


def test_starts_without_proc(rig: Rig) -> None:
    """A chroot or a small container may have no /proc; nothing that the proxy must do needs it."""
    without = ["unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*without, "true"], check=False, capture_output=True).returncode:
        pytest.skip("cannot take /proc away here")
    rig.proxy(command=[*without, sys.executable, "-B", str(PROGRAM)])
    rig.client().req_pq()


# -- listeners ---------------------------------------------------------------------------------------------------------------------

def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        (tmp_path / "config.toml").write_text(tomli_w.dumps(base_config(port, "127.0.0.1:9")), encoding="utf-8")
        run = run_program("config.toml", cwd=tmp_path)
    lines = run.stdout.splitlines()
    errors = [line for line in lines if re.search(r"Z ERROR ", line)]
    assert (run.returncode, run.stderr) == (1, ""), run
    assert all(LOG_LINE.fullmatch(line) for line in lines)
    assert "Failed to bind: address already in use" in errors[0], errors
    assert f"pid={os.getpid()}" in errors[0] or "(owner process unresolved)" in errors[0], errors
    assert "reuse_allow=false; set [[server.listeners]].reuse_allow=true to allow multi-instance listening" in errors[-2], errors
    assert errors[-1].endswith("No listeners. Exiting."), errors


def test_one_listener_of_two_is_enough(rig: Rig) -> None:
    port = free_port()
    with socket.create_server(("127.0.0.2", port)):
        proxy = rig.proxy({"server": {"listeners": [{"ip": "127.0.0.2"}, {"ip": "127.0.0.1"}]}}, port=port)
        rig.client().req_pq()
        proxy.wait_log("ERROR .*Failed to bind: address already in use")


def test_listener_families(rig: Rig) -> None:
    """client-protocol D1: only network.ipv4 / ipv6 decide."""
    proxy = rig.proxy({"server": {"listeners": [{"ip": "::1"}, {"ip": "127.0.0.1"}, {"ip": "127.0.0.2"}]}})
    assert proxy.log(r"WARN .*Skipping IPv6 listener: IPv6 disabled by \[network\]")
    rig.client().req_pq()
    rig.client("bob", host="127.0.0.2").req_pq()


def test_ipv6_listener(rig: Rig) -> None:
    port = free_port()
    try:
        socket.create_server(("::1", port), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    config = {"network": {"ipv6": True}, "server": {"listeners": [{"ip": "::1"}, {"ip": "127.0.0.1"}]}}
    proxy = rig.proxy(config, port=port, ready=rf"Listening on 127.0.0.1:{port}")
    assert proxy.log(rf"Listening on \[::1\]:{port}")
    rig.client(host="::1").req_pq()
    rig.client("bob").req_pq()


def test_two_processes_share_a_port(rig: Rig) -> None:
    first = rig.proxy({"server": {"listeners": [{"ip": "127.0.0.1", "reuse_allow": True}]}})
    rig.proxy({"server": {"listeners": [{"ip": "127.0.0.1", "reuse_allow": True}]}}, port=first.port)
    for n in range(10):
        rig.client(("alice", "bob")[n & 1]).req_pq()


# -- links and log -----------------------------------------------------------------------------------------------------------------

SECRETS = {"zoe": "0123456789ABCDEF0123456789abcdef", "adam": "00112233445566778899aabbccddeeff"}


def link_lines(proxy: Proxy) -> list[str]:
    """The block of config.md 5.4; the browser's form of the same links stands behind it."""
    return [found.group(1) for found in proxy.log(r"Z  INFO telemt::links: (?!Web link)(.*)")]


def web_links(proxy: Proxy) -> list[str]:
    return [found.group(1) for found in proxy.log(r"Z  INFO telemt::links: Web link of \S+ \(\S+\): https://t\.me/proxy(\?.*)")]


def block(host: str, port: int, users: list[str], modes: str, domains: list[str]) -> list[str]:
    """config.md 5.4."""
    def link(secret: str) -> str:
        return f"tg://proxy?server={host}&port={port}&secret={secret}"
    lines = [f"--- Proxy Links ({host}) ---"]
    for user in users:
        secret = SECRETS[user]
        lines.append(f"User: {user}")
        if "classic" in modes:
            lines.append(f"  Classic: {link(secret)}")
        if "secure" in modes:
            lines.append(f"  DD:      {link('dd' + secret)}")
        if "tls" in modes:
            lines += [f"  EE-TLS:  {link('ee' + secret + domain.encode().hex())}" for domain in domains]
    return [*lines, "------------------------"]


@pytest.mark.parametrize("modes", ["tls", "classic", "secure+tls", "classic+secure+tls"])
@pytest.mark.parametrize(("show", "users"), [("*", ["adam", "zoe"]), (["zoe", "adam"], ["zoe", "adam"]), (["zoe"], ["zoe"]), ([], [])],
                         ids=["all", "list", "one", "none"])
def test_link_block(rig: Rig, modes: str, show: Any, users: list[str]) -> None:
    config = {"general": {"modes": {mode: mode in modes for mode in ("classic", "secure", "tls")}, "links": {"show": show}},
              "censorship": {"tls_domain": "example.com", "tls_domains": ["b.example.org", "example.com"]},
              "access": {"users": {**SECRETS, "alice": None, "bob": None}}}
    proxy = rig.proxy(config)
    wanted = block("127.0.0.1", proxy.port, users, modes, ["example.com", "b.example.org"]) if users else []
    poll(lambda: len(link_lines(proxy)) >= len(wanted), "the link block")
    rig.close_clients()
    proxy.settle()
    proxy.stop()
    assert link_lines(proxy) == wanted
    assert web_links(proxy) == [line.partition("tg://proxy")[2] for line in wanted if "tg://proxy" in line]


@pytest.mark.parametrize(("links", "listeners", "hosts"), [
    ({"public_host": "proxy.example.net", "public_port": 8443}, [{}, {}], [("proxy.example.net", 8443)]),
    ({"public_port": 443}, [{}], [("127.0.0.1", 443)]),
    ({}, [{"announce": "a.example"}, {"announce_ip": "192.0.2.7"}], [("a.example", 0), ("192.0.2.7", 0)]),
    ({}, [{"announce": "b.example", "announce_ip": "192.0.2.7"}], [("b.example", 0)]),
], ids=["public-host", "public-port", "announce", "announce-wins"])
def test_hosts_and_ports_of_links(rig: Rig, links: dict[str, Any], listeners: list[dict[str, Any]], hosts: list[tuple[str, int]]) -> None:
    places = [{"ip": f"127.0.0.{n}", **listener} for n, listener in enumerate(listeners, 1)]
    proxy = rig.proxy({"general": {"links": {"show": "*", **links}}, "server": {"listeners": places},
                       "access": {"users": {**SECRETS, "alice": None, "bob": None}}})
    wanted = []
    for host, port in hosts:
        wanted += block(host, port or proxy.port, ["adam", "zoe"], "classic+secure+tls", ["example.com"])
    poll(lambda: len(link_lines(proxy)) >= len(wanted), "the link blocks")
    assert link_lines(proxy) == wanted


def test_listed_user_without_secret(rig: Rig) -> None:
    proxy = rig.proxy({"general": {"links": {"show": ["ghost", "zoe"]}}, "access": {"users": {"zoe": SECRETS["zoe"]}}})
    proxy.wait_log(r"WARN telemt::links: User 'ghost' in show_link not found")
    poll(lambda: link_lines(proxy)[-1:] == ["-" * 24], "the link block")
    assert link_lines(proxy) == block("127.0.0.1", proxy.port, ["zoe"], "classic+secure+tls", ["example.com"])


def test_old_show_link(rig: Rig) -> None:
    """config.md section 8 item 10: honoured when general.links.show is not written."""
    proxy = rig.proxy({"show_link": ["zoe"], "general": {"links": None}, "access": {"users": {**SECRETS, "alice": None, "bob": None}}})
    poll(lambda: link_lines(proxy)[-1:] == ["-" * 24], "the link block")
    assert [line for line in link_lines(proxy) if line.startswith("User")] == ["User: zoe"]


def test_banner_and_layout(rig: Rig) -> None:
    """platform.md 4, config.md 5.1 step 5, 5.4; every line of every journey is matched against the layout at its end."""
    proxy = rig.proxy({"general": {"disable_colors": True}})
    banner = [line.split(": ", 1)[1] for line in proxy.lines if " INFO " in line or " WARN " in line]
    assert re.fullmatch(rf"{VERSION} crypto=\w+ poller=\w+ python=3\.\d+\.\d+\S*", banner[0])
    wanted = ["Log level: debug", "Colors: disabled", "Modes: classic=true secure=true tls=true", "TLS domain: example.com"]
    at = [banner.index(line) for line in wanted]
    assert at == sorted(at), banner
    assert any(re.match("Mask: false -> example.com:443", line) for line in banner), banner
    assert Path(f"/proc/{proxy.pid}/comm").read_text() == "telemt\n"


def test_no_colours_in_a_pipe(rig: Rig) -> None:
    proxy = rig.proxy()
    assert not [line for line in proxy.lines if "\x1b" in line]


def test_unknown_keys_are_named_once_per_table(rig: Rig) -> None:
    """config.md section 8 item 7."""
    proxy = rig.proxy({"whatever": 1, "general": {"fast_modes": True, "zzz": {"a": 1}},
                       "server": {"listeners": [{"ip": "127.0.0.1", "colour": "red"}]}})
    warnings = [found.group(1) for found in proxy.log(r" WARN telemt[\w:]*: (unknown keys .*)")]
    assert warnings == ["unknown keys in [top level] ignored: whatever",
                        'unknown keys in [general] ignored: fast_modes (did you mean "general.fast_mode"?), zzz',
                        "unknown keys in [[server.listeners]] ignored: colour"]


def test_zero_secret_and_zero_limits_are_warned_of(rig: Rig) -> None:
    proxy = rig.proxy({"access": {"users": {"zoe": "0" * 32}, "user_max_tcp_conns": {"bob": 0}, "user_data_quota": {"ghost": 0}}})
    assert proxy.log(r"WARN .*access\.user_max_tcp_conns: 0 blocks user bob \(no limit = remove the entry\)")
    assert not proxy.log("0 blocks user ghost")
    assert [found for found in proxy.log(" WARN ") if "zoe" in found.string]


def test_relative_paths_start_at_the_working_directory(rig: Rig) -> None:
    folder = rig.folder / "proxy0"
    folder.mkdir()
    config = merged(base_config(free_port(), rig.dc.address), {"general": {"unknown_dc_log_path": "sub.txt"}, "access": {"users": USERS}})
    proxy = Proxy(folder, config, port=config["server"]["port"])
    rig.proxies.append(proxy)
    rig.client(dc=78).expect_closed()
    poll(lambda: (folder / "sub.txt").exists(), "the file in the working directory")
