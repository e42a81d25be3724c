"""`telemt.py links` and `telemt.py healthcheck`."""
from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import tomli_w
import zxingcpp

from doubles import PROGRAM, USERS, Rig, run_program

DRAWN = {"█": "11", "▀": "10", "▄": "01", " ": "00"}


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.toml"
    path.write_text(tomli_w.dumps(config))
    return path


def plain(folder: Path, **users: str) -> Path:
    return written(folder, {"server": {"port": 8443}, "censorship": {"tls_domain": "www.example.com"},
                            "general": {"modes": {"classic": True, "secure": True, "tls": True}, "links": {"public_host": "proxy.example"}},
                            "access": {"users": users or {"alice": USERS["alice"]}}})


def test_links_are_those_of_the_running_proxy(rig: Rig) -> None:
    proxy = rig.proxy({"general": {"links": {"show": "*"}}})
    logged = {match[1] for line in proxy.lines if (match := re.search(r" (tg://proxy\S+)", line))}
    done = run_program("links", str(proxy.config), cwd=rig.folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(re.findall(r"tg://proxy\S+", done.stdout)) == logged and logged


def test_json_and_one_user(tmp_path: Path) -> None:
    path = plain(tmp_path, alice=USERS["alice"], bob=USERS["bob"])
    rows = json.loads(run_program("links", str(path), "--user", "bob", "--json", cwd=tmp_path).stdout)
    assert [(row["user"], row["kind"], row["domain"]) for row in rows] == [
        ("bob", "classic", None), ("bob", "secure", None), ("bob", "tls", "www.example.com")]
    assert all(row["host"] == "proxy.example" and row["port"] == 8443 and row["link"].startswith("tg://proxy?server=proxy.example&port=8443")
               and row["web_link"].startswith("https://t.me/proxy?") for row in rows)
    done = run_program("links", str(path), "--user", "carol", cwd=tmp_path)
    assert done.returncode == 1 and "no user 'carol'" in done.stderr
    done = run_program("links", "nowhere.toml", cwd=tmp_path)
    assert done.returncode == 1 and "nowhere.toml" in done.stderr


def test_qr_codes_are_read_back_from_the_screen(tmp_path: Path) -> None:
    done = run_program("links", str(plain(tmp_path)), "--qr", cwd=tmp_path)
    assert done.returncode == 0 and "\x1b" not in done.stdout      # no terminal, no colours
    shown = re.split(r"\n?alice  [\w-]+: ", done.stdout)[1:]
    assert len(shown) == 3
    for text in shown:
        link, *lines = text.splitlines()
        rows = ["".join(DRAWN[char][half] for char in line) for line in lines for half in (0, 1)]
        picture = numpy.array([[255 * int(cell) for cell in row] for row in rows], dtype=numpy.uint8)      # drawn = light
        assert zxingcpp.read_barcodes(numpy.kron(picture, numpy.ones((4, 4), dtype=numpy.uint8)))[0].text == link


def test_qr_without_the_second_file(tmp_path: Path) -> None:
    shutil.copy(PROGRAM, tmp_path / "telemt.py")
    import subprocess
    done = subprocess.run([sys.executable, "-B", "telemt.py", "links", str(plain(tmp_path)), "--qr"], cwd=tmp_path, check=False,
                          capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "telemt_api.py" in done.stderr


def test_a_terminal_that_lacks_the_letters(tmp_path: Path) -> None:
    path, env = str(plain(tmp_path, **{"häns ж": USERS["alice"]})), {"PYTHONIOENCODING": "latin-1"}
    done = run_program("links", path, "--qr", cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout) == (1, "") and "LC_ALL=C.UTF-8" in done.stderr and "Traceback" not in done.stderr
    done = run_program("links", path, cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("h\\xe4ns \\u0436  Classic: tg://")
    done = run_program("links", path, "--json", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert {row["user"] for row in json.loads(done.stdout)} == {"häns ж"}


@pytest.mark.parametrize("words", [["--qr"], ["--json"], []])
def test_a_closed_stdout(tmp_path: Path, words: list[str]) -> None:
    import subprocess
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-B", str(PROGRAM), "links", str(plain(tmp_path)), *words],
                          cwd=tmp_path, check=False, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("modes", [{"tls": True}, {"tls": False, "secure": True}, {"tls": False, "classic": True}])
def test_healthcheck_in_every_mode(rig: Rig, modes: dict[str, bool]) -> None:
    proxy = rig.proxy({"general": {"modes": {"classic": False, "secure": False} | modes}})
    done = run_program("healthcheck", str(proxy.config), cwd=rig.folder, timeout=30)
    assert done.returncode == 0 and "healthy" in done.stdout, done.stderr


def test_healthcheck_of_a_proxy_that_is_gone(rig: Rig) -> None:
    proxy = rig.proxy()
    proxy.stop()
    done = run_program("healthcheck", str(proxy.config), cwd=rig.folder, timeout=30)
    assert done.returncode == 1 and "at connect: port closed" in done.stderr


def test_healthcheck_without_a_usable_user(rig: Rig) -> None:
    proxy = rig.proxy({"access": {"user_max_tcp_conns": dict.fromkeys(USERS, 0)}})
    done = run_program("healthcheck", str(proxy.config), cwd=rig.folder, timeout=30)
    assert done.returncode == 1 and "no user is usable" in done.stderr
