"""tools/deploy.sh and tools/install.sh with stand-ins for ssh, systemd and the program: what is switched, kept, brought back.

The journey with a real sshd and the real program is tests/journeys/test_deploy_over_ssh.py.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import telemt

ROOT = Path(__file__).resolve().parent.parent

# A program of a few lines: what it says to check, --version and healthcheck is in its text.
PROGRAM = '''VERSION: Final = "{version}"
import pathlib, sys
here, word = pathlib.Path(__file__).parent, sys.argv[1]
if word == "check":
    {check}
if word == "healthcheck":
    running = pathlib.Path({folder!r}, "running").read_text()
    print("healthy" if running == "{version}" and {healthy} else "no answer")
    sys.exit(not (running == "{version}" and {healthy}))
'''
GOOD = 'print(sys.argv[-1] + ": no problems"); sys.exit(0)'
FINDS = 'print("[!] clock"); print(sys.argv[-1] + ": 1 problem"); sys.exit(1)'


def program_text(version: str, folder: Path, check: str = GOOD, healthy: bool = True) -> str:
    head, body = PROGRAM.format(version=version, check=check, healthy=healthy, folder=str(folder)).split("\n", 1)
    return f"from typing import Final\n{head}\n{body}"


class Server:
    """A folder that ssh leads to, and a systemctl that notes what it was told; `running` names the version that was started last."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lib, self.units = folder, folder / "prefix/lib/telemt", folder / "units"
        self.config = folder / "etc/telemt/config.toml"
        self.config.parent.mkdir(parents=True)
        self.config.write_text("port = 1\n")
        (folder / "bin").mkdir()
        (folder / "tmp").mkdir()
        self.stub("ssh", 'shift; exec sh -c "$*"')
        self.stub("scp", """for last; do :; done
            for word; do case "$word" in -*|*:*) ;; *) cp "$word" "${last#*:}" ;; esac; done""")
        self.stub("systemctl", f'''echo "$*" >> {folder}/told
            case "$1" in restart) sed -n 's/^VERSION: Final = "\\(.*\\)"/\\1/p' {self.lib}/telemt.py > {folder}/new
            printf %s "$(cat {folder}/new)" > {folder}/running ;; is-enabled) exit 1 ;; esac''')

    def stub(self, name: str, code: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/sh\n{code}\n")
        path.chmod(0o755)

    def have(self, version: str) -> None:
        """As after a deployment of it."""
        self.lib.mkdir(parents=True, exist_ok=True)
        self.units.mkdir(exist_ok=True)
        (self.lib / "telemt.py").write_text(program_text(version, self.folder))
        (self.lib / "telemt_api.py").write_text(f"# {version}\n")
        (self.units / "telemt.service").write_text("[Service]\n# of this server\n")
        (self.folder / "running").write_text(version)

    def call(self, word: str, code: int = 0, **settings: str) -> str:
        env = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "PREFIX": f"{self.folder}/prefix", "CONFIG": str(self.config),
               "WAIT": "0", "UNITDIR": str(self.units), "PYTHON": sys.executable, "TMPDIR": str(self.folder / "tmp"), **settings}
        run = subprocess.run(["sh", str(ROOT / "tools/deploy.sh"), word, "root@there"], env=env, check=False, capture_output=True,
                             text=True, timeout=60)
        assert run.returncode == code, run.stdout + run.stderr
        assert not list((self.folder / "tmp").iterdir()) and not (self.lib / ".busy").exists(), "something is left behind"
        return run.stdout + run.stderr

    def deploy(self, version: str, code: int = 0, check: str = GOOD, healthy: bool = True, **settings: str) -> str:
        source = self.folder / "source"
        source.mkdir(exist_ok=True)
        (source / "telemt.py").write_text(program_text(version, self.folder, check, healthy))
        (source / "telemt_api.py").write_text(f"# {version}\n")
        return self.call("deploy", code, FILES=settings.pop("FILES", f"{source}/telemt.py {source}/telemt_api.py"), **settings)

    def state(self) -> tuple[str, str, str]:
        """(version in use, version of its API, version that was started last)."""
        text = (self.lib / "telemt.py").read_text() if (self.lib / "telemt.py").exists() else ""
        api = (self.lib / "telemt_api.py").read_text()[2:-1] if (self.lib / "telemt_api.py").exists() else ""
        return text.partition('= "')[2].partition('"')[0], api, (self.folder / "running").read_text()

    def told(self) -> list[str]:
        path = self.folder / "told"
        words = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [word for word in words if not word.startswith("is-enabled")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield Server(tmp_path)


def test_deploy_again_and_back(server: Server) -> None:
    said = server.deploy("1.0.0")
    assert "now version 1.0.0" in said and "systemctl enable telemt" in said
    assert server.state() == ("1.0.0",) * 3 and server.told() == ["daemon-reload", "restart telemt"]
    unit = (server.units / "telemt.service").read_text()
    assert f"ExecStart={sys.executable} -B {server.lib}/telemt.py {server.config}\n" in unit
    assert f"ReadWritePaths={server.config.parent}\n" in unit and "/etc/telemt/config.toml" not in unit.replace(str(server.config), "")
    server.deploy("2.0.0")
    assert server.state() == ("2.0.0",) * 3 and server.told() == ["restart telemt"]
    assert stat.S_IMODE((server.lib / "telemt.py").stat().st_mode) == 0o644
    assert "now version 1.0.0" in server.call("rollback") and server.state() == ("1.0.0",) * 3
    assert "now version 2.0.0" in server.call("rollback") and server.state() == ("2.0.0",) * 3


@pytest.mark.parametrize("check", ["sys.exit(2)", "1 / 0", "sys.exit('no')", "def ("], ids=["config", "exception", "word", "syntax"])
def test_what_does_not_pass_check_changes_nothing(server: Server, check: str) -> None:
    server.have("1.0.0")
    said = server.deploy("2.0.0", code=1, check=check)
    assert "nothing was changed" in said and server.state() == ("1.0.0",) * 3 and server.told() == []
    assert not (server.lib / "previous").exists()


def test_findings_are_shown_and_no_reason_to_stop(server: Server) -> None:
    assert "[!] clock" in server.deploy("1.0.0", check=FINDS)
    assert server.state() == ("1.0.0",) * 3


def test_what_does_not_serve_goes_back(server: Server) -> None:
    """Files, API and unit of the version before are in force again, and what was kept for rollback is still there."""
    server.have("1.0.0")
    server.deploy("2.0.0", UNIT="", RESTART="systemctl restart telemt")
    server.told()
    said = server.deploy("3.0.0", code=1, healthy=False)
    assert "no health within 0 s: no answer" in said and "going back to version 2.0.0" in said and "healthy" in said
    assert server.state() == ("2.0.0",) * 3 and server.told() == ["daemon-reload", "restart telemt"] * 2
    assert (server.units / "telemt.service").read_text() == "[Service]\n# of this server\n"
    server.call("rollback")
    assert server.state() == ("1.0.0",) * 3


def test_a_first_version_that_does_not_serve(server: Server) -> None:
    assert "none to go back to" in server.deploy("1.0.0", code=1, healthy=False)


def test_a_restart_that_fails_goes_back(server: Server) -> None:
    server.have("1.0.0")
    said = server.deploy("2.0.0", code=1, RESTART=f"grep -q 1.0.0 {server.lib}/telemt.py && systemctl restart telemt")
    assert "failed: " in said and server.state() == ("1.0.0",) * 3


def test_an_exchange_that_does_not_happen_leaves_the_old_one_running(server: Server) -> None:
    """It was never stopped, so nothing is restarted: only its files come back."""
    server.have("1.0.0")
    server.deploy("1.0.1")                    # brings the unit, which is why it restarts
    server.told()
    deaf = subprocess.Popen(["sh", "-c", "trap : USR2; read never"], stdin=subprocess.PIPE)
    try:
        server.stub("sleep", "exit 0")
        server.stub("systemctl", f"""echo "$*" >> {server.folder}/told
            case "$*" in *Type*) echo notify ;; *MainPID*) echo {deaf.pid} ;; esac""")
        said = server.deploy("2.0.0", code=1, EXCHANGE="1")
        assert "did not take over" in said and "going back to version 1.0.1" in said and server.state() == ("1.0.1",) * 3
        assert "restart telemt" not in server.told()
    finally:
        deaf.kill()
        deaf.communicate()


def test_a_full_disk_goes_back(server: Server) -> None:
    """The second file cannot be copied: the first, which was, goes back as well."""
    server.have("1.0.0")
    full = server.folder / "full"
    server.stub("mv", f'case "$*" in *busy/telemt.py*) [ -e {full} ] || {{ : > {full}; exit 1; }} ;; esac; /bin/mv "$@"')
    said = server.deploy("2.0.0", code=1)
    assert "going back to version 1.0.0" in said and server.state() == ("1.0.0",) * 3


def test_one_file_is_enough_and_takes_the_api_of_before_away(server: Server) -> None:
    server.have("1.0.0")
    server.deploy("2.0.0", FILES=str(server.folder / "source/telemt.py"))
    assert server.state() == ("2.0.0", "", "2.0.0")
    server.call("rollback")
    assert server.state() == ("1.0.0",) * 3


def test_units_are_left_alone_where_that_is_wanted(server: Server) -> None:
    server.deploy("1.0.0", UNIT="", RESTART="systemctl restart proxy")
    assert not server.units.exists() and server.told() == ["restart proxy"]


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda server: server.config.unlink(), "config.toml: write one first"),
    (lambda server: (server.lib / ".busy").mkdir(parents=True), "another deployment is going on"),
    (lambda server: server.stub("sha256sum", '[ "$1" = -c ] && exit 1; /usr/bin/sha256sum "$@"'), "did not arrive as they were sent"),
    (lambda server: server.stub("ssh", "exit 255"), "cannot reach root@there"),
    (lambda server: server.stub("ssh", "echo Welcome to there"), "answered 'Welcome"),
], ids=["no config", "busy", "damaged", "unreachable", "chatty"])
def test_what_stops_it_before_anything_happens(server: Server, spoil, said: str) -> None:      # type: ignore[no-untyped-def]
    spoil(server)
    if (server.lib / ".busy").exists():
        with pytest.raises(AssertionError, match="something is left behind"):      # the mark of the other one stays
            server.deploy("1.0.0", code=1)
        (server.lib / ".busy").rmdir()
        return
    assert said in server.deploy("1.0.0", code=1) and not (server.lib / "telemt.py").exists()


def test_rollback_needs_a_version_before(server: Server) -> None:
    server.have("1.0.0")
    assert "no version before this one" in server.call("rollback", code=1) and server.state() == ("1.0.0",) * 3


def test_a_lost_connection_does_not_leave_a_half(server: Server) -> None:
    """Our end is gone when the other half wants to say something: it goes on and ends in order."""
    server.have("1.0.0")
    server.stub("ssh", 'shift; case "$*" in *there*) (sh -c "$*" | :); exit 255 ;; *) exec sh -c "$*" ;; esac')
    server.deploy("2.0.0", code=255)
    assert server.state() == ("2.0.0",) * 3


def test_a_config_in_a_directory_of_others_gets_no_unit(server: Server) -> None:
    assert "no directory named telemt" in server.deploy("1.0.0", code=2, CONFIG="/etc/telemt.toml")


def test_words_with_quotes_arrive(server: Server) -> None:
    server.deploy("1.0.0", RESTART="echo \"it's\" >> $(dirname '" + str(server.folder / "x") + "')/told; systemctl restart telemt")
    assert "it's" in server.told()


# -- make install, make uninstall

def install(word: str, dest: Path, *more: str) -> str:
    run = subprocess.run(["make", "-s", word, f"DESTDIR={dest}", *more], cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_install_and_uninstall_leave_the_configuration(tmp_path: Path) -> None:
    install("install", tmp_path, "PREFIX=/opt/x", f"PYTHON={sys.executable}")
    found = {str(path.relative_to(tmp_path)): oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"etc/telemt/config.toml": "0o600", "opt/x/bin/telemt": "0o755", "opt/x/lib/telemt/telemt.py": "0o644",
                     "opt/x/lib/telemt/telemt_api.py": "0o644", "etc/systemd/system/telemt.service": "0o644",
                     "etc/systemd/system/telemt@.service": "0o644"}
    unit = (tmp_path / "etc/systemd/system/telemt@.service").read_text()
    assert " -B /opt/x/lib/telemt/telemt.py /etc/telemt/%i.toml\n" in unit and "/usr/local/lib" not in unit
    config = tmp_path / "etc/telemt/config.toml"
    config.write_text(config.read_text() + "# mine\n")
    before = hashlib.sha256(config.read_bytes()).digest()
    assert "stays as it is" in install("install", tmp_path, "PREFIX=/opt/x")
    install("uninstall", tmp_path, "PREFIX=/opt/x")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()] == [Path("etc/telemt/config.toml")]
    assert hashlib.sha256(config.read_bytes()).digest() == before


def test_the_first_configuration_is_nobody_elses(tmp_path: Path) -> None:
    """The sample's secret is public; what is installed has a random one, and nothing says otherwise."""
    secrets = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        install("install", folder)
        loaded = telemt.load_config(str(folder / "etc/telemt/config.toml"))
        secrets.append(loaded.settings.access.users["default"])
        assert not [text for text in loaded.warnings if "secret" in text]
        assert "PUBLIC" not in (folder / "etc/telemt/config.toml").read_text()
    assert len(set(secrets)) == 2 and all(len(secret) == 32 and set(secret) != {"0"} for secret in secrets)


def test_uninstall_keeps_what_it_did_not_bring(tmp_path: Path) -> None:
    install("install", tmp_path)
    (tmp_path / "usr/local/lib/telemt/note").write_text("mine")
    install("uninstall", tmp_path)
    assert (tmp_path / "usr/local/lib/telemt/note").exists() and not (tmp_path / "usr/local/bin/telemt").exists()


def test_odd_paths_are_refused(tmp_path: Path) -> None:
    run = subprocess.run(["sh", "tools/install.sh", "install"], cwd=ROOT, env={**os.environ, "DESTDIR": str(tmp_path), "PREFIX": "/a|b"},
                         check=False, capture_output=True, text=True, timeout=20)
    assert run.returncode == 2 and "no absolute path" in run.stderr and not list(tmp_path.iterdir())


def test_shellcheck_finds_nothing() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck not installed (make deps-test)")
    subprocess.run(["shellcheck", *map(str, (ROOT / "tools").glob("*.sh"))], check=True, timeout=60)
