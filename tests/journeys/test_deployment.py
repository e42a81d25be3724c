"""What lies in deploy/, read and run by the programs that it is made for: systemd, a shell, HAProxy, nginx, nft, promtool."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from doubles import ROOT, Rig, free_port, run_program
from programs import SEARCH, needs, path_of

DEPLOY = ROOT / "deploy"
UNITS = ("telemt.service", "telemt@.service")
EXPOSURE = 2.0               # of 10, as `systemd-analyze security` counts; ten measures that a proxy cannot take make up 1.6


def run(*words: str | Path, code: int | None = 0, cwd: Path | None = None) -> str:
    """Output of a program, stderr included; its exit code has to be `code` (None: any)."""
    needs(str(words[0]))
    done = subprocess.run([path_of(str(words[0])), *map(str, words[1:])], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=60, check=False, cwd=cwd, env={"PATH": SEARCH, "LC_ALL": "C.UTF-8"})
    said = done.stdout + done.stderr
    assert code is None or done.returncode == code, f"{words}: exit {done.returncode}\n{said}"
    return said


# -- systemd

def options(unit: str, section: str = "Service") -> dict[str, list[str]]:
    """Every option of a section of a unit, with all its values."""
    found: dict[str, list[str]] = {}
    text = (DEPLOY / "systemd" / unit).read_text(encoding="utf-8")
    for line in text.split(f"[{section}]\n")[1].split("\n[")[0].splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_the_unit(unit: str, tmp_path: Path) -> None:
    """Not a word on stderr: an unknown option is only a warning there, and a hardening that does not happen here."""
    assert not run("systemd-analyze", "verify", DEPLOY / "systemd" / unit)
    wrong = tmp_path / unit
    wrong.write_text((DEPLOY / "systemd" / unit).read_text(encoding="utf-8").replace("PrivateTmp=", "PrivateTemp="), encoding="utf-8")
    assert "PrivateTemp" in run("systemd-analyze", "verify", wrong, code=None)


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_exposes_little(unit: str, tmp_path: Path) -> None:
    limit = f"--threshold={EXPOSURE * 10:.0f}"
    said = run("systemd-analyze", "security", "--offline=true", "--no-pager", limit, DEPLOY / "systemd" / unit)
    score = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert score and float(score[1]) <= EXPOSURE, said
    print(f"{unit}: exposure {score[1]} of 10")
    open_one = tmp_path / unit
    text = (DEPLOY / "systemd" / unit).read_text(encoding="utf-8")
    open_one.write_text(re.sub(r"^(Protect|Restrict|SystemCall|CapabilityB).*\n", "", text, flags=re.M), encoding="utf-8")
    run("systemd-analyze", "security", "--offline=true", "--no-pager", limit, open_one, code=1)


@pytest.mark.parametrize(("unit", "config", "state"), [("telemt.service", "config.toml", "telemt"),
                                                      ("telemt@.service", "%i.toml", "telemt-%i")])
def test_the_unit_lets_the_proxy_work(unit: str, config: str, state: str) -> None:
    """What platform.md 6 and config.md 8 item 20 ask for."""
    found = options(unit)
    assert found["ExecStart"] == [f"/usr/bin/python3 -B /usr/local/lib/telemt/telemt.py /etc/telemt/{config}"]
    assert found["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert found["Type"] == ["notify"] and "kill -TERM $MAINPID; exec tail" in found["ExecStop"][0]
    assert found["ReadWritePaths"] == ["/etc/telemt"] and found["ConfigurationDirectory"] == ["telemt"]
    assert found["StateDirectory"] == [state] and found["WorkingDirectory"] == [f"/var/lib/{state}"]
    assert found["ExecStartPre"] == [f"+/bin/chown -hR --reference=/var/lib/{state}/. /etc/telemt"]
    assert found["AmbientCapabilities"] == found["CapabilityBoundingSet"] == ["CAP_NET_BIND_SERVICE"]
    assert int(found["LimitNOFILE"][0]) >= 65_536 and int(found["TimeoutStopSec"][0]) > 4
    assert not {"StandardOutput", "StandardError"} & set(found), "stdout goes to the journal as it is"


def test_the_two_units_differ_only_in_their_names() -> None:
    """What is hardened in one is in the other."""
    one, many = (options(unit) for unit in UNITS)
    named: Sequence[str] = ("ExecStart", "ExecStartPre", "StateDirectory", "WorkingDirectory")
    assert {name: value for name, value in one.items() if name not in named} == {
        name: value for name, value in many.items() if name not in named}
    assert all("%i" in many[name][0] for name in named)


# -- OpenWrt

STUB = """
# what /etc/rc.common and /lib/functions.sh would bring, writing down every call
note() { line=$1; shift; for word in "$@"; do line="$line|$word"; done; echo "$line"; }
for name in procd_open_instance procd_set_param procd_append_param procd_close_instance procd_send_signal group_add_next user_add \\
            sysctl mkdir chmod chown; do
  eval "$name() { note $name \\"\\$@\\"; }"
done
group_exists() { [ -n "${HAVE_USER:-}" ]; }
user_exists() { [ -n "${HAVE_USER:-}" ]; }
. "$1"
shift
echo "USE_PROCD=$USE_PROCD START=$START STOP=$STOP"
"$@"
"""
INIT = DEPLOY / "openwrt" / "telemt.init"


def procd(tmp_path: Path, call: str, config: str | None = "[server]\nport = 8443\n", **env: str) -> list[str]:
    """The calls that the init script makes, with its configuration in a folder of the test's own."""
    path = tmp_path / "etc" / "config.toml"
    if config is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(config)
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "telemt").write_text(INIT.read_text(encoding="utf-8").replace("CONFIG=/etc/telemt/config.toml", f"CONFIG={path}"))
    done = subprocess.run(["sh", "-eu", "stub", "./telemt", call], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False,
                          env={"PATH": "/usr/bin:/bin", **env})
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.replace(str(path.parent), "CONF").splitlines()


def test_the_init_script_is_clean() -> None:
    run("sh", "-n", INIT)
    run("shellcheck", INIT)
    assert INIT.read_text(encoding="utf-8").startswith("#!/bin/sh /etc/rc.common\n") and INIT.stat().st_mode & 0o111 == 0o111
    assert INIT.read_text(encoding="utf-8").isascii()


def test_the_init_script_starts_the_proxy(tmp_path: Path) -> None:
    calls = procd(tmp_path, "start_service", HAVE_USER="1")
    assert calls[0] == "USE_PROCD=1 START=95 STOP=10"
    inside = calls[calls.index("procd_open_instance") + 1:calls.index("procd_close_instance")]
    assert all(line.startswith("procd_set_param|") for line in inside) and calls[-1] == "procd_close_instance"
    params = dict(line.removeprefix("procd_set_param|").split("|", 1) for line in inside)
    assert params["command"] == "/bin/sh|-c|cd /var/run/telemt && exec /usr/bin/python3 -B /usr/bin/telemt.py CONF/config.toml"
    assert params["user"] == "telemt" and params["stdout"] == params["stderr"] == params["no_new_privs"] == "1"
    assert params["limits"] == "nofile=8192 8192" and params["respawn"] == "3600|5|0"
    assert params["file"] == "CONF/config.toml" and params["reload_signal"] == "HUP" and int(params["term_timeout"]) > 4
    assert "chown|-R|telemt|CONF|/var/run/telemt" in calls[:calls.index("procd_open_instance")]
    assert not [line for line in calls if line.startswith(("user_add", "group_add", "sysctl"))]


def test_the_init_script_makes_its_user_and_opens_a_low_port(tmp_path: Path) -> None:
    """Without a configuration too: the proxy writes one, for port 443."""
    for config, port in (("# port = 8443\n[server]\n  port=853 # DNS over TLS\n[x]\nport = 9\n", "853"), (None, "443")):
        folder = tmp_path / port
        folder.mkdir()
        calls = procd(folder, "start_service", config)
        assert "group_add_next|telemt" not in calls, "its output is hidden, so it must not be seen here"
        assert any(line.startswith("user_add|telemt||") for line in calls)
        assert f"sysctl|-qw|net.ipv4.ip_unprivileged_port_start={port}" in calls


def test_the_init_script_reloads_by_a_signal(tmp_path: Path) -> None:
    assert procd(tmp_path, "reload_service")[1:] == ["procd_send_signal|telemt|*|HUP"]


# -- containers: no engine runs here, so the files are read as one would

def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, rest)."""
    text = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", (DEPLOY / "docker/Dockerfile").read_text(encoding="utf-8"), flags=re.M))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def test_the_dockerfile_keeps_its_promises() -> None:
    found = instructions()
    assert {word for word, _ in found} == {"FROM", "RUN", "COPY", "USER", "WORKDIR", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL",
                                           "ENTRYPOINT", "CMD"}
    value = dict(found)
    assert found[0][0] == "FROM" and value["FROM"].endswith("-slim")
    user, group = value["USER"].split(":")
    assert int(user) > 0 and f"--uid {user}" in value["RUN"] and f"--gid {group}" in value["RUN"]
    assert [word for word, _ in found].index("USER") > [word for word, _ in found].index("COPY"), "the program is not the user's"
    *sources, target = [word for word in value["COPY"].split() if not word.startswith("--")]
    assert sources == ["telemt.py", "telemt_api.py"] and all((ROOT / name).is_file() for name in sources)
    assert "/etc/telemt" in json.loads(value["VOLUME"]) and value["STOPSIGNAL"] == "SIGTERM"
    command = json.loads(value["ENTRYPOINT"]) + json.loads(value["CMD"])
    assert command == ["python3", "-B", f"{target}telemt.py", "/etc/telemt/config.toml"]
    options, _, check = value["HEALTHCHECK"].partition("CMD ")
    assert json.loads(check) == ["python3", "-B", f"{target}telemt.py", "healthcheck", "/etc/telemt/config.toml"]
    assert {word.partition("=")[0] for word in options.split()} == {"--interval", "--timeout", "--start-period", "--retries"}
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored and {f"!{name}" for name in sources} <= set(ignored)


def test_the_words_of_the_dockerfile_are_understood(rig: Rig) -> None:
    """Its health check, with the paths of this machine (what it finds wrong: test_ping_command)."""
    value = dict(instructions())
    proxy = rig.proxy()
    words = json.loads(value["HEALTHCHECK"].partition("CMD ")[2])
    done = run_program(*words[3:-1], str(proxy.config), cwd=proxy.folder, timeout=60)
    assert done.returncode == 0 and "healthy" in done.stdout, done.stderr


def test_the_compose_file_keeps_its_promises() -> None:
    yaml = pytest.importorskip("yaml")
    text = (DEPLOY / "docker/compose.yaml").read_text(encoding="utf-8")
    compose = yaml.safe_load(text)
    [service] = compose["services"].values()
    folder = DEPLOY / "docker"
    assert (folder / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    mounts = dict(mount.split(":") for mount in service["volumes"])
    assert mounts["./config"] == "/etc/telemt" and mounts["state"] == dict(instructions())["WORKDIR"] and "state" in compose["volumes"]
    assert not [source for source in mounts if source.endswith(".toml")], "a single file cannot be replaced by rename"
    assert service["cap_drop"] == ["ALL"] and service["read_only"] is True and service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"]["nofile"]["hard"] >= 65_536 and int(service["stop_grace_period"].rstrip("s")) > 4
    assert service["ports"] == ["443:443/tcp"] and service["sysctls"] == {"net.ipv4.ip_unprivileged_port_start": 0}
    assert "privileged" not in service and "user" not in service
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
        run("docker", "compose", "-f", folder / "compose.yaml", "config", "--quiet")


# -- balancers and the packet filter

def test_nft_accepts_the_limits() -> None:
    needs("nft", "unshare")
    said = run("unshare", "-n", "nft", "-c", "-f", DEPLOY / "nftables/telemt.nft", code=None)
    if "Operation not permitted" in said or "Could not process rule" in said or "unshare failed" in said:
        pytest.skip(f"this kernel or user may not: {said.strip().splitlines()[-1]}")
    assert not said
    twice = f"nft -f {DEPLOY}/nftables/telemt.nft && nft -f {DEPLOY}/nftables/telemt.nft && nft list tables"
    assert run("unshare", "-n", "sh", "-c", twice).strip() == "table inet telemt"


def test_nginx_accepts_the_sample(tmp_path: Path) -> None:
    """With ports that are free, the module where Debian has it, and its files in a folder of the test's own."""
    needs("nginx")
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    text = (DEPLOY / "nginx/nginx.conf").read_text(encoding="utf-8")
    load, port = (f"load_module {module};" if module.exists() else ""), free_port()
    text = text.replace("include /etc/nginx/modules-enabled/*.conf;", f"{load} pid {tmp_path}/pid;")
    text = text.replace("listen 443 ", f"listen 127.0.0.1:{port} ").replace("listen [::]:443 ", f"listen [::1]:{port} ")
    (tmp_path / "nginx.conf").write_text(text)
    said = run("nginx", "-t", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", "stderr")
    assert "test is successful" in said and "[warn]" not in said, said
    assert "proxy_protocol on;" in text and "least_conn;" in text
    assert len(re.findall(r"^ *server [0-9.]+:443 max_fails=1", text, re.M)) == 2


# -- monitoring

def exported(text: str) -> dict[str, set[str]]:
    """Every metric of a page, with the labels that it has."""
    found: dict[str, set[str]] = {name: set() for name in re.findall(r"^# TYPE (\S+) ", text, re.M)}
    for name, labels in re.findall(r"^(telemt_\w+)\{(.*)\} ", text, re.M):
        found[name] |= set(re.findall(r'(\w+)="', labels))
    return found


def queries() -> list[str]:
    """Every query of the dashboard, its variables replaced as Grafana would."""
    board = json.loads((DEPLOY / "monitoring/grafana.json").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    found += [entry["expr"] for entry in board["annotations"]["list"]]
    assert len(found) > 20
    return [query.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*").replace("$user", ".*")
            for query in found]


def test_queries_and_alerts_name_what_the_program_exports(rig: Rig) -> None:
    port = free_port()
    proxy = rig.proxy({"server": {"metrics_port": port}, "access": {"user_max_unique_ips": {"alice": 3}}})
    rig.client().req_pq()
    proxy.wait_log("Metrics endpoint")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as page:
        names = exported(page.read().decode())
    rules = (DEPLOY / "monitoring/telemt.rules.yml").read_text(encoding="utf-8")
    board = (DEPLOY / "monitoring/grafana.json").read_text(encoding="utf-8")
    asked = "\n".join(queries()) + rules + "\n".join(re.findall(r"label_values\(.*?\)", board.replace('\\"', '"')))
    assert not set(re.findall(r"\btelemt_\w+", asked)) - set(names)
    for name, selector in re.findall(r"(telemt_\w+)\{([^}]*)\}", asked):
        own = set(re.findall(r"(\w+)\s*=", selector)) - {"job", "instance"}
        assert own <= names[name], f"{name} has no label {own - names[name]}"
    for name, label in re.findall(r"label_values\((telemt_\w+)(?:\{.*?\})?, (\w+)\)", asked):
        assert label in names[name] | {"job", "instance"}, name
    known = set(re.findall(r'class="(\w+)"', "\n".join(line for line in rules.splitlines() if "class=" in line)))
    assert known == {"tls_clock_skew"}


def test_prometheus_accepts_queries_and_alerts(tmp_path: Path) -> None:
    needs("promtool")
    folder = DEPLOY / "monitoring"
    run("promtool", "check", "config", "prometheus.yml", cwd=folder)
    rules = [{"record": f"board:query{n}", "expr": query} for n, query in enumerate(queries())]
    (tmp_path / "board.yml").write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))      # JSON is YAML
    assert f"SUCCESS: {len(rules)} rules found" in run("promtool", "check", "rules", tmp_path / "board.yml")
    rules[0]["expr"] += " by by"
    (tmp_path / "board.yml").write_text(json.dumps({"groups": [{"name": "board", "rules": rules}]}))
    run("promtool", "check", "rules", tmp_path / "board.yml", code=1)


def test_the_alerts_ring_when_they_should_and_only_then(tmp_path: Path) -> None:
    """promtool plays a day of series, minute by minute, to the rules; each rule rings in one of the stories and is silent in the first."""
    needs("promtool")
    shutil.copy(DEPLOY / "monitoring/telemt.rules.yml", tmp_path)
    names = re.findall(r"alert: (\w+)", (tmp_path / "telemt.rules.yml").read_text())
    who = 'job="telemt",instance="a"'

    def story(at: str, series: dict[str, str], expected: Sequence[str]) -> dict[str, object]:
        tests = [{"expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) or vector(0)', "eval_time": at,
                  "exp_samples": [{"labels": "{}", "value": int(name in expected)}]} for name in names]
        return {"interval": "1m", "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": tests}
    healthy = {f"up{{{who}}}": "1x120", f"telemt_uptime_seconds{{{who}}}": "0+60x120", f"telemt_connections_total{{{who}}}": "0+100x120",
               f'telemt_connections_bad_by_class_total{{{who},class="tls_clock_skew"}}': "0+2x120",
               f"telemt_upstream_connect_success_total{{{who}}}": "0+90x120", f"telemt_upstream_connect_fail_total{{{who}}}": "0+1x120",
               f"telemt_me_fallback_sessions_total{{{who}}}": "7x120",
               f'telemt_handshake_failures_by_class_total{{{who},class="reset"}}': "0+5x120",
               f'telemt_user_connections_current{{{who},user="u"}}': "9x120",
               f'telemt_user_unique_ips_utilization{{{who},user="u"}}': "0.5x120"}
    ill = {f"up{{{who}}}": "0x120", f"telemt_uptime_seconds{{{who}}}": "60x80 0 60 0 60 0 60 0 60x40",
           f'telemt_connections_bad_by_class_total{{{who},class="tls_clock_skew"}}': "0+30x120",
           f"telemt_upstream_connect_fail_total{{{who}}}": "0+900x120", f"telemt_me_fallback_sessions_total{{{who}}}": "0+2x120",
           f'telemt_handshake_failures_by_class_total{{{who},class="reset"}}': "0+80x120",
           f'telemt_user_unique_ips_utilization{{{who},user="u"}}': "1x120"}
    lonely = {f'telemt_user_connections_current{{{who},user="u"}}': "9x1440 0x200"}
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": ["telemt.rules.yml"], "evaluation_interval": "1m", "tests": [
        story("100m", healthy, []), story("100m", {**healthy, **ill}, [name for name in names if name != "TelemtNobodyComes"]),
        story("1500m", lonely, ["TelemtNobodyComes"])]}))
    run("promtool", "test", "rules", tmp_path / "test.yml")
