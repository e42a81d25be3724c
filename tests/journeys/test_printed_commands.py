"""Every command line that README and docs/ print is executed here, as it is printed, in the order of its document.

Blocks marked ```sh hold one command per line, blocks marked ```console hold output too and a command behind `$ `.  A line that ends
in one of MARKS is for another machine and is not run, nor is a block that begins with such a comment.  `make TARGET` is run as
`make -n TARGET`, because this very test is part of most of them; those of MADE are run.

Each document has a folder with what a newcomer has: the two files and the sample configuration.  Its ports are replaced by free
ones, in the file and in the commands alike, and its data centres and mask host by doubles.  A command that starts the proxy is
waited for until it listens; the others meet it running, and it ends with the document.
"""
from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from doubles import ROOT, Proxy, Rig, clean_env, free_port

MARKS = ("# needs the internet", "# on your server")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
PORTS = ("8443", "9091", "9090")                  # what the sample and the documents say
MADE = ("dist", "install", "uninstall")           # targets that need no environment and write where they are told
EXPECTED = re.compile(r"# exit ([0-9]+)")         # a comment that says what the reader will see
SUBCOMMANDS = ("check", "links", "ping", "healthcheck", "top")


def command_lines(text: str) -> list[str]:
    """The command lines in the blocks of a document, marks and comments included; continued lines are joined."""
    found = []
    for kind, block in re.findall(r"^ *```(sh|console)\n(.*?)^ *```", text, re.M | re.S):
        lines = re.sub(r"\\\n *", "", block).splitlines()
        if lines and lines[0].strip() in MARKS:
            continue
        if kind == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        found += [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return found


def runnable(text: str) -> list[str]:
    """Those that can run here."""
    return [line for line in command_lines(text) if not line.endswith(MARKS)]


def for_others(text: str) -> list[str]:
    """The command lines that are for another machine."""
    blocks = [block for kind, block in re.findall(r"^ *```(sh|console)\n(.*?)^ *```", text, re.M | re.S)]
    lines = [(line.strip(), block.strip().startswith(MARKS)) for block in blocks for line in re.sub(r"\\\n *", "", block).splitlines()]
    return [line for line, whole in lines if line and not line.startswith("#") and (whole or line.endswith(MARKS))]


def starts_the_proxy(line: str) -> bool:
    """Whether a line is `python3 telemt.py [CONFIG]` in the foreground."""
    words = shlex.split(line, comments=True)
    return words[:2] == ["python3", "telemt.py"] and not set(words) & {*SUBCOMMANDS, "-h", "--help", "-V", "--version", "--init"}


class Desk:
    """A folder with the files, and one proxy at a time."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.folder = rig, rig.folder / "desk"
        self.ports = {port: str(free_port()) for port in PORTS}
        (self.folder / "bin").mkdir(parents=True)
        python = self.folder / "bin" / "python3"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -B "$@"\n')
        python.chmod(0o755)
        for name in ("telemt.py", "telemt_api.py"):
            shutil.copy(ROOT / name, self.folder)
        shutil.copytree(ROOT / "tools", self.folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))   # they write beside it
        for name in ("Makefile", "pyproject.toml", "docs", "tests", "deploy"):
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / "config.toml").write_text(self.sample(), encoding="utf-8")

    def sample(self) -> str:
        """config.toml with what keeps it on this machine, as in doubles.base_config."""
        dc = self.rig.dc
        text = self.local((ROOT / "config.toml").read_text(encoding="utf-8")).replace("#metrics_port", "metrics_port")
        for table, lines in (("general", "middle_proxy_nat_probe = false"),
                             ("general.links", 'public_host = "127.0.0.1"'),
                             ("network", "stun_use = false\nhttp_ip_detect_urls = []"),
                             ("censorship", f'mask_host = "127.0.0.1"\nmask_port = {dc.port}\ntls_emulation = false')):
            text, count = re.subn(rf"^\[{re.escape(table)}\].*$", rf"\g<0>\n{lines}", text, flags=re.M)
            assert count == 1, table
        overrides = "\n".join(f'"{index}" = "{dc.address}"' for index in [*range(-5, 0), *range(1, 6), 203])
        return f'{text}\n[[upstreams]]\ntype = "direct"\nbind_addresses = ["127.0.0.1", "::1"]\n\n[dc_overrides]\n{overrides}\n'

    def local(self, text: str) -> str:
        """Text with the printed ports replaced by ours."""
        return re.sub(r"\b(" + "|".join(PORTS) + r")\b", lambda found: self.ports[found[0]], text)

    def start(self, line: str) -> None:
        """Start the proxy as the line says, instead of the one before."""
        self.stop()
        words = shlex.split(line, comments=True)
        config = next((word for word in words[2:] if not word.startswith("-")), "config.toml")
        path = self.folder / config
        if not path.exists():                     # what the first start writes would be on port 443: only the writing is tried
            return
        command = [sys.executable, "-B", "telemt.py"]
        self.rig.proxies.append(Proxy(self.folder, path.read_text(encoding="utf-8"), port=int(self.ports["8443"]), command=command))

    def stop(self) -> None:
        """End the running one as Ctrl-C would."""
        for proxy in self.rig.proxies:
            if proxy.process.poll() is None:
                proxy.settle()
                proxy.stop()

    def run(self, line: str) -> None:
        """Run one line and judge it: exit code 0, or what its comment says; the API has to answer with success."""
        words = shlex.split(line, comments=True)
        if words[0] == "make" and not set(words) & set(MADE):
            line = "make -n " + " ".join(words[1:])
        if not shutil.which(words[0]):
            pytest.skip(f"{words[0]} not installed (make deps-test)")
        promised = EXPECTED.search(line)
        env = clean_env({"PATH": f"{self.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "NO_COLOR": "1",
                         "TMPDIR": str(self.folder / "bin")})
        done = subprocess.run(["sh", "-c", self.local(line)], cwd=self.folder, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=60, check=False)
        assert done.returncode == int(promised[1] if promised else 0), f"{line}\n{done.stdout}\n{done.stderr}"
        if words[0] == "curl" and "/v1/" in line:
            assert json.loads(done.stdout)["ok"], f"{line}\n{done.stdout}"


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if runnable((ROOT / name).read_text(encoding="utf-8"))])
def test_what_is_printed_works(document: str, rig: Rig) -> None:
    desk = Desk(rig)
    for line in runnable((ROOT / document).read_text(encoding="utf-8")):
        if starts_the_proxy(line):
            desk.start(line)
            continue
        if re.search(r"\b(curl|top|healthcheck)\b", line) and not any(proxy.process.poll() is None for proxy in rig.proxies):
            desk.start("python3 telemt.py config.toml")
        desk.run(line)
    desk.stop()


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if for_others((ROOT / name).read_text(encoding="utf-8"))])
def test_what_is_for_another_machine_is_sound(document: str) -> None:
    """Those lines are read, not run: a shell understands them, what they take from here is here, subcommands and units exist."""
    for line in for_others((ROOT / document).read_text(encoding="utf-8")):
        judge(line)


def judge(line: str) -> None:
    """AssertionError if a line for another machine cannot work there."""
    assert subprocess.run(["sh", "-n", "-c", line], capture_output=True, check=False, timeout=20).returncode == 0, line
    words = shlex.split(line.replace("$(", " ").replace(";", " ; "), comments=True)
    for at, word in enumerate(words):
        if word.startswith(("deploy/", "docs/", "tools/")) and "mkdir" not in words:
            assert (ROOT / word).exists(), f"{line}: no {word}"
        if word.endswith("telemt.py") and words[at - 1].endswith("python3") and at + 1 < len(words):
            assert words[at + 1] in (*SUBCOMMANDS, "--init", "--version") or words[at + 1].endswith(".toml"), line
    if "systemctl" in words or "journalctl" in words:
        units = [re.sub("@.*", "@", word).removesuffix(".service") for word in words if word.startswith("telem")]
        assert all((ROOT / "deploy/systemd" / f"{unit}.service").is_file() for unit in units), line
    if words[:2] == ["docker", "compose"]:
        assert words[2:4] == ["-f", "deploy/docker/compose.yaml"], line
    if words[0] == "service":
        assert words[1] in ("telemt", "firewall") and words[2] in ("enable", "start", "stop", "restart", "reload"), line


def test_an_unsound_line_is_noticed() -> None:
    for line in ("scp deploy/no-such-file root@server:    # on your server", "if true; then    # on your server",
                 "systemctl restart telemd@1 telemt-2    # on your server", "python3 /opt/telemt.py chek x.toml    # on your server"):
        assert for_others(f"```sh\n{line}\n```\n") == [line]
        with pytest.raises(AssertionError):
            judge(line)
    assert for_others("```sh\n# on your server\na\nb    # why\n```\n```sh\nc\n```\n") == ["a", "b    # why"]


def test_the_documents_print_commands() -> None:
    """The parser of this test finds them: it cannot pass because it saw nothing."""
    assert len(runnable((ROOT / "README.md").read_text(encoding="utf-8"))) >= 5
    assert len(runnable((ROOT / "docs/api.md").read_text(encoding="utf-8"))) == 5


def test_marks_and_continuations_are_read() -> None:
    text = ("```sh\na 1   # why\n# only a comment\nscp x y    # on your server\nb \\\n  2\n```\n"
            "```console\n$ c\noutput\n$ d    # needs the internet\n```\n```toml\ne = 1\n```\n")
    assert runnable(text) == ["a 1   # why", "b 2", "c"]
    assert len(command_lines(text)) == 5
    assert not command_lines("```sh\n# on your server\nreboot\n```\n")


def test_a_command_that_fails_is_noticed(rig: Rig) -> None:
    desk = Desk(rig)
    desk.run("python3 telemt.py check --offline missing.toml    # exit 2")
    desk.run("make dist")
    desk.run("sh -c 'cd dist && sha256sum -c SHA256SUMS'")
    desk.run('make install DESTDIR="$(mktemp -d)"')
    installed = [path for path in desk.folder.rglob("telemt@.service") if "deploy" not in path.parts]
    assert len(installed) == 1 and (desk.folder / "dist" / "telemt.pyz").exists(), "make was not run"
    for line in ("python3 telemt.py check --offline missing.toml", "grep -q no-such-word-here config.toml", "make no-such-target"):
        with pytest.raises(AssertionError):
            desk.run(line)
    desk.start("python3 telemt.py config.toml")
    with pytest.raises(AssertionError):
        desk.run("curl -s -X DELETE http://127.0.0.1:9091/v1/users/nobody")
    desk.stop()
