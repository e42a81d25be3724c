"""telemt.pyz, links to the program, a folder that cannot be written: however it is started, sessions, API, signals work."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import make_dist
from doubles import MIB, ROOT, ApiScript, Rig, clean_env, free_port, poll


def archive(folder: Path) -> Path:
    path = folder / "telemt.pyz"
    make_dist.put(path, 0o755, make_dist.build_pyz(ROOT))
    return path


def link_to_the_archive(folder: Path) -> Path:
    (folder / "bin").mkdir()
    (folder / "bin" / "telemt").symlink_to(archive(folder))
    return folder / "bin" / "telemt"


def link_to_the_script(folder: Path) -> Path:
    """As /usr/local/bin/telemt: a relative link, whose name says nothing about Python."""
    (folder / "bin").mkdir()
    for name in ("telemt.py", "telemt_api.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "bin" / "telemt").symlink_to("../telemt.py")
    return folder / "bin" / "telemt"


@pytest.mark.parametrize(("install", "flags"), [(archive, []), (link_to_the_archive, ["-I"]), (link_to_the_script, [])],
                         ids=["archive", "link to the archive, -I", "link to the script"])
def test_a_day(rig: Rig, install: Callable[[Path], Path], flags: list[str]) -> None:
    """A session, the API, SIGHUP, a new image of the interpreter, SIGTERM; nothing is written beside the program."""
    place = rig.folder / "place"
    place.mkdir()
    program, port = install(place), free_port()
    before = sorted(path.relative_to(place) for path in place.rglob("*"))
    proxy = rig.proxy({"server": {"api": {"enabled": True, "listen": f"127.0.0.1:{port}"}}},
                      command=[sys.executable, *flags, "-B", str(program)])
    client = rig.client()
    client.req_pq()
    client.download(MIB)
    assert ApiScript(port).data("/v1/health")["status"] == "ok"
    command = Path(f"/proc/{proxy.pid}/cmdline").read_bytes().split(b"\0")
    assert f"telemt={program}".encode() in command, "the compiler's memory is kept"
    proxy.process.send_signal(signal.SIGHUP)
    proxy.wait_log("SIGHUP received")
    client.echo()
    rig.close_clients()
    proxy.settle()
    proxy.stop()
    assert sorted(path.relative_to(place) for path in place.rglob("*")) == before


def test_a_new_archive_takes_over(rig: Rig) -> None:
    """SIGUSR2 starts what lies there now, the API of the new archive included."""
    place, port = rig.folder / "place", free_port()
    place.mkdir()
    path = archive(place)
    proxy = rig.proxy({"server": {"api": {"enabled": True, "listen": f"127.0.0.1:{port}"}}}, command=[sys.executable, "-B", str(path)])
    make_dist.put(path, 0o755, make_dist.build_pyz(ROOT).replace(b'VERSION: Final = "0', b'VERSION: Final = "9', 1))
    os.kill(proxy.process.pid, signal.SIGUSR2)
    proxy.pid = int(proxy.wait_log(r"Process (\d+) accepts now", timeout=60.0)[1])
    proxy.wait_log(r"telemt\.py 9\.")
    poll(lambda: ApiScript(port).data("/v1/system/info")["version"].startswith("9."), "the API of the new one", 20.0)
    rig.client().req_pq()


def test_the_commands_of_the_archive(tmp_path: Path) -> None:
    """Executed by its first line; `links --qr` needs the second book."""
    archive(tmp_path)
    text = (ROOT / "config.toml").read_text().replace("#public_host", "public_host")
    (tmp_path / "config.toml").write_text(text)
    env = clean_env({"NO_COLOR": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    for words, code, word in ((["--version"], 0, "telemt.py "), (["links", "--qr", "config.toml"], 0, "\u2588"),
                              (["check", "x"], 2, "x: No such")):
        run = subprocess.run(["./telemt.pyz", *words], cwd=tmp_path, env=env, check=False, capture_output=True, text=True, timeout=60)
        assert run.returncode == code and word in run.stdout + run.stderr, run
