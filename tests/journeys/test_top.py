"""`telemt.py top`: real screens through a terminal emulator, a clean terminal afterwards, and text for scripts."""
from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyte
import pytest

from doubles import PROGRAM, Rig, clean_env, free_port, patient, run_program

BLOCKED = """import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("curses", "http", "urllib", "email", "ssl", "_ssl", "logging"):
            raise ImportError(name + " is blocked", name=name)
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Terminal:
    """`top` on a pseudo terminal, and what its screen shows."""

    def __init__(self, config: str, width: int, height: int, *words: str, env: dict[str, str] | None = None) -> None:
        self.screen = pyte.Screen(width, height)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.fd, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self._size(width, height)
        self.process = subprocess.Popen([sys.executable, "-B", str(PROGRAM), "top", config, "--interval", "0.3", *words], stdin=slave,
                                        stdout=slave, stderr=slave, env=clean_env({"LANG": "C.UTF-8", "TERM": "xterm"} | (env or {})),
                                        start_new_session=True)

    def _size(self, width: int, height: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def resize(self, width: int, height: int) -> None:
        self.screen.resize(height, width)
        self._size(width, height)
        self.process.send_signal(signal.SIGWINCH)

    def read(self, wait_s: float = 0.1) -> None:
        while select.select([self.fd], [], [], wait_s)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                return
            self.raw += data
            self.stream.feed(data)

    def wait(self, *texts: str, timeout: float = 20.0) -> list[str]:
        """Lines of the screen once one of them has one of `texts`."""
        end = time.monotonic() + patient(timeout)
        while not any(text in line for line in self.screen.display for text in texts):
            assert time.monotonic() < end, "\n".join(self.screen.display)
            self.read()
        return [line.rstrip() for line in self.screen.display]

    def press(self, key: str) -> None:
        os.write(self.fd, key.encode())

    def wait_exit(self) -> int:
        end = time.monotonic() + patient(10)
        while self.process.poll() is None:
            assert time.monotonic() < end, "top does not end"
            self.read()
        self.read(0)
        return self.process.returncode


@contextmanager
def terminal(*args: Any, **options: Any) -> Iterator[Terminal]:
    made = Terminal(*args, **options)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        os.close(made.fd)
        os.close(made.slave)


def start(rig: Rig, **access: Any) -> Any:
    port = free_port()
    api = {"enabled": True, "listen": f"127.0.0.1:{port}", "minimal_runtime_enabled": True}
    return rig.proxy({"server": {"api": api}, "access": access})


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 15)])
def test_screens(rig: Rig, width: int, height: int) -> None:
    proxy = start(rig, user_max_tcp_conns={"alice": 9})
    client = rig.client("alice")
    with terminal(str(proxy.config), width, height) as top:
        lines = top.wait("online")
        assert lines[0].startswith("Running (direct)")
        row = next(line for line in lines if line.startswith("alice"))
        assert "1/9" in row and ("never" in row) == (width == 80)
        client.download(20_000_000)
        lines = top.wait("MB/s")
        assert lines[-1].startswith("q quit") and "bob" in "\n".join(lines)
        top.press("p")
        top.wait("PAUSED") if width == 80 else top.wait("go on")
        top.press("p")
        top.press("n")
        top.wait("p pause")
        top.press("q")
        assert top.wait_exit() == 0
        assert termios.tcgetattr(top.slave) == top.before
        assert top.raw.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")


def test_a_resize_redraws(rig: Rig) -> None:
    proxy = start(rig)
    with terminal(str(proxy.config), 80, 24) as top:
        assert "EXPIRES" in "\n".join(top.wait("alice"))
        top.resize(40, 15)
        lines = top.wait("q quit")
        end = time.monotonic() + patient(10)
        while "EXPIRES" in "\n".join(lines) and time.monotonic() < end:
            top.read()
            lines = top.screen.display
        assert "EXPIRES" not in "\n".join(lines)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_whatever_ends_it_the_terminal_is_as_before(rig: Rig, signum: signal.Signals, code: int) -> None:
    proxy = start(rig)
    with terminal(str(proxy.config), 80, 24) as top:
        top.wait("alice")
        top.process.send_signal(signum)
        assert top.wait_exit() == code
        assert termios.tcgetattr(top.slave) == top.before
        assert top.raw.rstrip().endswith(b"\x1b[?25h\x1b[?1049l") and b"Traceback" not in top.raw


def test_a_name_that_would_steer_the_terminal(rig: Rig) -> None:
    proxy = start(rig, users={"evil\x1b[2J\x07nm": "1" * 32})
    with terminal(str(proxy.config), 80, 24) as top:
        assert "evil?[2J?nm" in "\n".join(top.wait("evil"))
        top.press("q")
        top.wait_exit()
        assert b"\x1b[2J" not in top.raw


def test_a_proxy_that_restarts_under_it(rig: Rig) -> None:
    proxy = start(rig)
    with terminal(str(proxy.config), 100, 24) as top:
        top.wait("alice")
        top.wait(*(f"up {seconds} s" for seconds in range(4, 60)))       # so that the uptime of the next one goes back
        proxy.stop()
        lines = top.wait("no answer from the API")
        assert any("alice" in line for line in lines)                # the old values stay
        config = proxy.config.read_text()
        again = rig.proxy(port=proxy.port)
        again.stop()
        again.config.write_text(config)
        replaced = subprocess.Popen([sys.executable, "-B", str(PROGRAM), str(again.config)], stdout=subprocess.DEVNULL, env=clean_env(),
                                    cwd=again.folder)
        try:
            top.wait("counters began again")
        finally:
            replaced.terminate()
            replaced.wait(patient(10))


def test_once_is_text_for_scripts(rig: Rig) -> None:
    proxy = start(rig)
    client = rig.client("alice")
    client.echo()
    done = run_program("top", str(proxy.config), "--once", "--interval", "0.2", cwd=rig.folder)
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    rows = {line.split()[-1]: dict(zip(lines[0].split(), line.split(), strict=True)) for line in lines[1:]}
    assert rows["alice"]["conns"] == "1" and rows["alice"]["state"] == "online" and int(rows["alice"]["octets"]) > 0
    assert rows["bob"]["conns"] == "0"
    again = run_program("top", str(proxy.config), "--interval", "0.2", cwd=rig.folder)          # a pipe is no terminal
    assert again.returncode == 0 and "\x1b" not in again.stdout


def test_it_runs_where_a_small_python_lacks_almost_everything(rig: Rig) -> None:
    proxy = start(rig)
    done = subprocess.run([sys.executable, "-B", "-c", BLOCKED, str(PROGRAM), "top", str(proxy.config), "--once", "--interval", "0.2"],
                          capture_output=True, text=True, timeout=30, env=clean_env(), check=False)
    assert done.returncode == 0 and "alice" in done.stdout, done.stderr


def test_what_is_wrong_is_said_with_the_remedy(rig: Rig) -> None:
    off = rig.proxy()
    done = run_program("top", str(off.config), cwd=rig.folder)
    assert done.returncode == 1 and "enabled = true" in done.stderr
    proxy = start(rig)
    text = proxy.config.read_text()
    proxy.config.write_text(text.replace("[server.api]", '[server.api]\nauth_header = "other"'))
    done = run_program("top", str(proxy.config), cwd=rig.folder)
    assert done.returncode == 0                       # the running proxy asks for none
    proxy.stop()
    done = run_program("top", str(proxy.config), cwd=rig.folder)
    assert done.returncode == 1 and "no answer from the API" in done.stderr
    done = run_program("top", "--interval", "0", cwd=rig.folder)
    assert done.returncode == 2
