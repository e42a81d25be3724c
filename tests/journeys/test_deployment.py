"""What lies in deploy/, read and run by the programs that it is made for: systemd, a shell, HAProxy, nginx, nft, promtool."""
from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from doubles import ROOT

DEPLOY = ROOT / "deploy"
UNITS = ("telemt.service", "telemt@.service")
EXPOSURE = 2.0               # of 10, as `systemd-analyze security` counts; ten measures that a proxy cannot take make up 1.6


def run(*words: str | Path, code: int | None = 0, text: str = "", cwd: Path | None = None) -> str:
    """Output of a program, stderr included; its exit code has to be `code` (None: any)."""
    if not shutil.which(str(words[0]), path="/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"):
        pytest.skip(f"{words[0]} not installed (make deps-test)")
    done = subprocess.run([str(word) for word in words], input=text, capture_output=True, text=True, timeout=60, check=False, cwd=cwd,
                          env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin", "LC_ALL": "C.UTF-8"})
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
