"""Room 27: arguments, log layout, levels, files, --init."""
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

import telemt
from telemt import Arguments, ConfigError, Level, LogSink, chosen_level, load_config, parse_arguments, parse_init, parse_rust_log
from tests.cases import SECRET

ROOT = Path(telemt.__file__).resolve().parent


@pytest.mark.parametrize(("words", "arguments"), [
    ([], Arguments()), (["a.toml"], Arguments("a.toml")), (["a", "b"], Arguments("b")), (["-s", "x"], Arguments("x", "silent")),
    (["--silent", "--log-level", "debug"], Arguments(level="silent")), (["--log-level", "DEBUG"], Arguments(level="debug")),
    (["--log-level=quiet"], Arguments(level="silent")), (["--log-level=info"], Arguments(level="normal")),
    (["--log-level", "nonsense"], Arguments(level="normal")),
    (["--log-level=debug", "--log-level=silent"], Arguments(level="silent")), (["-h"], Arguments(action="help")),
    (["x", "--version"], Arguments(action="version")), (["-V"], Arguments(action="version")), (["x", "--init"], Arguments(action="init")),
    (["check"], Arguments(action="check")), (["x", "check"], Arguments("check")), (["./check"], Arguments("./check")),
])
def test_arguments(words, arguments):
    assert parse_arguments(words) == arguments


@pytest.mark.parametrize("words", [["--log-level"], ["--port", "9000"], ["x.toml", "--force"], ["--user", "a"]])
def test_command_lines_that_cannot_be_meant(words, capsys):
    """Found by review: `--port 9000` wrote a configuration named 9000."""
    assert telemt.main(words) == 2
    assert "usage:" in capsys.readouterr().err


def test_unknown_option_is_reported_and_ignored(capsys):
    assert parse_arguments(["--frob", "x.toml"]) == Arguments("x.toml")
    assert capsys.readouterr().err == "Unknown option: --frob\n"


@pytest.mark.parametrize(("text", "level"), [
    ("", Level.ERROR), ("debug", Level.DEBUG), ("WARN", Level.WARN), ("telemt=trace", Level.TRACE), ("telemt=trace,info", Level.INFO),
    ("hyper=debug", None), ("nonsense", None), ("off", Level.ERROR + 1), ("nonsense,telemt=warn", Level.WARN),
])
def test_rust_log(text, level):
    assert parse_rust_log(text) == level


def test_precedence_of_levels(monkeypatch):
    monkeypatch.delenv("RUST_LOG", raising=False)
    assert chosen_level("", "silent") == Level.WARN and chosen_level("debug", "silent") == Level.TRACE
    monkeypatch.setenv("RUST_LOG", "error")
    assert chosen_level("debug", "silent") == Level.ERROR
    monkeypatch.setenv("RUST_LOG", "???")
    assert chosen_level("verbose", "silent") == Level.DEBUG


class Log:
    """A LogSink on a pipe of 64 KiB that is read when the test wants."""

    def __init__(self, monkeypatch, loop=None, colors=False):
        self.fd, self.inlet = os.pipe()
        self.sink = LogSink(self.inlet, colors, loop=loop)
        self.sink.patience_s = 0.0
        self.now = 100.0
        monkeypatch.setattr(telemt.time, "monotonic", lambda: self.now)

    def say(self, text="x", level=Level.INFO, target="telemt::cli"):
        self.sink(level, target, text)

    def read(self, size=1 << 20):
        return os.read(self.fd, size).decode()

    def close(self):
        for fd in {self.fd, self.inlet, self.sink._fd}:
            os.close(fd)


@pytest.fixture
def log(monkeypatch):
    log = Log(monkeypatch)
    yield log
    log.close()


def test_log_layout(log, monkeypatch):
    monkeypatch.setattr(telemt.time, "time", lambda: 1772618400.123456)
    log.say("User: alice", target="telemt::links")
    assert re.fullmatch(r"2026-03-04T10:00:00\.12345[56]Z  INFO telemt::links: User: alice\n", log.read())
    log.sink._colors = True
    log.say(level=Level.WARN)
    assert "\x1b[33m WARN\x1b[0m telemt::cli: x\n" in log.read()


def test_a_record_is_one_line_whatever_a_name_holds(log):
    log.say("User: a\nFAKE \x1b[31m\u2028 ж → \ttab")
    out = log.read()
    assert out.count("\n") == 1 and out.endswith("User: a\\nFAKE \\x1b[31m\\u2028 ж → \ttab\n")


def test_a_name_that_the_terminal_cannot_show(log):
    log.sink._encoding = "latin-1"
    log.say("ж")
    assert log.read().endswith("\\u0436\n")


@pytest.mark.parametrize("asks", [False, True], ids=["own-open-file", "poll"])
def test_a_log_that_nobody_reads_never_blocks(log, monkeypatch, asks):
    """Found from outside: the loop stood in write(2) after 64 KiB.  What is too much is counted, everything else arrives in order."""
    assert log.sink._fd != log.inlet and not log.sink._asks
    if asks:
        monkeypatch.setattr(telemt.os, "open", lambda *_: (_ for _ in ()).throw(OSError))
        os.close(log.sink._fd)
        log.sink._fd, log.sink._asks = telemt.open_log(log.inlet)
        assert (log.sink._fd, log.sink._asks) == (log.inlet, True)
    text = "y" * 1000
    for number in range(1000):
        log.say(f"{number} {text}")
    heard = ""
    while (piece := log.read(65536)) and "log lines lost" not in (heard := heard + piece):
        log.sink.flush()
    *lines, notice = heard.splitlines()
    numbers = [int(line.split()[3]) for line in lines]
    assert numbers == list(range(len(numbers))) and 250 < len(numbers) < 340
    assert notice.endswith(f" WARN telemt::cli: {1000 - len(numbers)} log lines lost: they could not be written")
    log.say("again")
    assert log.read().endswith(": again\n")


def test_the_open_file_of_stdout_stays_as_it_was(log):
    """O_NONBLOCK is shared with everybody who has the same open file: the shell would see EAGAIN."""
    assert os.get_blocking(log.inlet) and not os.get_blocking(log.sink._fd)


def test_a_log_with_room_again_goes_on_by_itself(monkeypatch):
    loop = telemt.Loop(telemt.pick_poller("auto"), lambda: 100.0)
    log = Log(monkeypatch, loop)
    try:
        for _ in range(100):
            log.say("y" * 1000)
        assert log.sink._watched and not loop.poller.poll(0)
        heard = log.read(65536)
        loop._turn(loop.poller.poll(0))
        assert not log.sink._watched and (heard + log.read()).count("\n") == 100
    finally:
        log.close()
        loop.mailbox.close()


def test_a_failed_write_is_tried_again_after_a_while(log, monkeypatch):
    """Found from outside: one full disk ended logging until the next start."""
    real, calls = os.write, []

    def full(fd, data):
        calls.append(bytes(data))
        if len(calls) == 1:
            return real(fd, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(telemt.os, "write", full)
    log.say("one")
    log.say("two")                             # not even tried
    assert len(calls) == 2
    log.now += 4.9
    log.say("three")
    assert len(calls) == 2
    log.now += 0.2
    monkeypatch.setattr(telemt.os, "write", real)
    log.say("four")
    assert [line.rpartition(" ")[2] for line in log.read().splitlines()] == ["one", "two", "three", "four"]


def test_a_record_of_a_signal_handler_joins_the_queue(log, monkeypatch):
    real = os.write

    def interrupted(fd, data):
        sent = real(fd, data)
        monkeypatch.setattr(telemt.os, "write", real)
        log.say("two")
        return sent

    monkeypatch.setattr(telemt.os, "write", interrupted)
    log.say("one")
    assert [line.rpartition(" ")[2] for line in log.read().splitlines()] == ["one", "two"]


def test_a_socket_as_log(monkeypatch):
    """What a service manager gives us: it cannot be opened again, so poll() is asked."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sink = LogSink(ours.fileno(), False)
        sink.patience_s = 0.0
        assert (sink._fd, sink._asks) == (ours.fileno(), True)
        for _ in range(2000):
            sink(Level.INFO, "telemt::cli", "y" * 1000)
        assert sink._lost and len(sink._kept) > 200_000


def test_a_terminal_that_stands_still(monkeypatch):
    """Ctrl-S, or a dead ssh: a terminal takes less than POLLOUT promises, so it must have an open file of its own."""
    master, slave = os.openpty()
    sink = LogSink(slave, True)
    try:
        assert sink._fd != slave and not sink._asks and os.get_blocking(slave)
        sink.patience_s = 0.0
        for _ in range(2000):
            sink(Level.INFO, "telemt::cli", "y" * 1000)
        assert sink._lost and len(sink._kept) > 200_000
    finally:
        for fd in (master, slave, sink._fd):
            os.close(fd)


def test_the_last_lines_go_out_while_the_reader_is_slow(monkeypatch):
    fd, inlet = os.pipe()
    sink = LogSink(inlet, False)
    sink.patience_s = 0.0
    for number in range(200):
        sink(Level.INFO, "telemt::cli", f"{number} " + "y" * 1000)
    heard = []

    def read_slowly():
        while data := os.read(fd, 65536):
            heard.append(data)

    reader = threading.Thread(target=read_slowly)
    reader.start()
    sink.close()
    os.close(inlet)
    os.close(sink._fd)
    reader.join()
    os.close(fd)
    assert b"".join(heard).count(b"\n") == 200


def test_default_config_is_private_random_and_loads(tmp_path):
    paths = [tmp_path / "a.toml", tmp_path / "b.toml"]
    secrets = []
    for path in paths:
        telemt.write_default_config(str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        loaded = load_config(str(path))
        assert not loaded.errors and not [text for text in loaded.warnings if "unknown" in text]
        secrets.append(loaded.settings.access.users["default"])
    assert secrets[0] != secrets[1]
    with pytest.raises(FileExistsError):
        telemt.write_default_config(str(paths[0]))


def test_a_default_config_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """Found by review: an empty file was left, and the next start served everybody."""
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(telemt.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        telemt.write_default_config(str(tmp_path / "x.toml"))
    assert os.listdir(tmp_path) == []


def test_includes_are_read_beside_the_including_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "main.toml").write_text('\ufeffinclude = "sub/users.toml"\n', encoding="utf-8")
    (tmp_path / "sub" / "users.toml").write_text("include = 'deeper.toml' # comment\n")
    (tmp_path / "sub" / "deeper.toml").write_text(f'[access.users]\nzoe = "{SECRET}"\n')
    assert load_config(str(tmp_path / "main.toml")).settings.access.users == {"zoe": SECRET}


def test_wrong_bytes_are_named(tmp_path):
    (tmp_path / "x.toml").write_bytes(b"a = 1\n\xff")
    with pytest.raises(ConfigError, match="not valid UTF-8 at byte 6"):
        load_config(str(tmp_path / "x.toml"))


@pytest.mark.parametrize("what", ["fifo", "device", "endless"])
def test_a_config_that_would_never_end(tmp_path, monkeypatch, what):
    """Found from outside: a FIFO without a writer was waited for, /dev/zero read until memory was gone."""
    path = tmp_path / "x.toml"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.setattr(telemt, "_CONFIG_MAX", 1 << 20)
        path.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB" if what == "endless" else "not a regular file"):
        load_config(str(path))


# -- --init


@pytest.mark.parametrize(("words", "text", "invalid"), [
    (["--init", "--secret", "xyz"], "Secret must be exactly 32 hex characters", False),
    (["--init", "--user", "a b"], "User name must be", False), (["--init", "--domain", "a/b"], "Domain must not contain", False),
    (["--init", "--port"], "--port needs a value", True), (["--init", "--user", "--no-start"], "--user needs a value", True),
])
def test_init_refuses(words, text, invalid):
    with pytest.raises(ConfigError, match=text) as caught:
        parse_init(words)
    assert caught.value.invalid is invalid


def test_init_defaults():
    request = parse_init(["--init", "--port", "nonsense"])
    assert (request.port, request.domain, request.user, request.config_dir) == (443, "www.google.com", "user", "/etc/telemt")
    assert request.start and not request.force and re.fullmatch("[0-9a-f]{32}", request.secret)


def test_init_takes_no_port_that_is_none():
    """Found by the fuzzer: int() refuses more than 4,300 digits with an error of its own."""
    assert [parse_init(["--init", "--port", port]).port for port in ("9" * 5000, "65536", "08443")] == [443, 443, 8443]


def test_init_writes_config_and_unit(tmp_path, monkeypatch, capsys):
    steps = []
    monkeypatch.setattr(telemt, "_UNIT_PATH", str(tmp_path / "telemt.service"))
    monkeypatch.setattr(telemt, "run_systemctl", steps.append)
    words = ["--init", "--secret", SECRET, "--user", "bob", "--domain", "front.example", "--config-dir", str(tmp_path), "--no-start"]
    assert telemt.main(words) == 0
    out = capsys.readouterr().out
    assert f"secret=ee{SECRET}{b'front.example'.hex()}" in out and steps == [["daemon-reload"], ["enable", "telemt.service"]]
    path = tmp_path / "config.toml"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    settings = load_config(str(path)).settings
    assert settings.access.users == {"bob": SECRET} and settings.general.links.show == ("bob",) and not settings.general.use_middle_proxy
    unit = (tmp_path / "telemt.service").read_text()
    for line in (f"ReadWritePaths={tmp_path}", "AmbientCapabilities=CAP_NET_BIND_SERVICE", "ExecReload=/bin/kill -HUP $MAINPID"):
        assert line in unit
    assert telemt.main(words) == 1 and "use --force to overwrite" in capsys.readouterr().err
    assert telemt.main([*words, "--force"]) == 0


def test_init_replaces_a_file_only_as_a_whole(tmp_path, monkeypatch, capsys):
    """Found from outside: --force truncated the configuration before the new one was written."""
    monkeypatch.setattr(telemt, "_UNIT_PATH", str(tmp_path / "missing" / "telemt.service"))
    (tmp_path / "real.toml").write_text("old")
    (tmp_path / "config.toml").symlink_to("real.toml")
    with monkeypatch.context() as full:
        full.setattr(telemt.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert telemt.main(["--init", "--force", "--config-dir", str(tmp_path)]) == 1
    assert (tmp_path / "real.toml").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["config.toml", "real.toml"]
    assert telemt.main(["--init", "--force", "--config-dir", str(tmp_path)]) == 0
    assert (tmp_path / "config.toml").is_symlink() and "[access.users]" in (tmp_path / "real.toml").read_text()


def written_unit(tmp_path, monkeypatch, *, script="/usr/local/lib/telemt/telemt.py", prefix="/usr", config_dir="/etc/telemt", held=()):
    """The unit that --init writes for a script, an interpreter and a configuration directory with these files."""
    monkeypatch.setattr(telemt, "_UNIT_PATH", str(tmp_path / "telemt.service"))
    monkeypatch.setattr(telemt, "run_systemctl", lambda _: None)
    monkeypatch.setattr(telemt.os, "listdir", lambda _: ["config.toml", *held])
    monkeypatch.setattr(telemt.sys, "executable", f"{prefix}/bin/python3")
    for name in ("prefix", "base_prefix"):
        monkeypatch.setattr(telemt.sys, name, prefix)
    monkeypatch.setattr(telemt, "main", types.SimpleNamespace(__code__=types.SimpleNamespace(co_filename=script)))
    telemt.install_unit(parse_init(["--init", "--no-start", "--config-dir", config_dir]), f"{config_dir}/config.toml")
    return (tmp_path / "telemt.service").read_text()


def test_the_unit_of_init_is_the_one_in_deploy(tmp_path, monkeypatch):
    """One source for the hardening: written where `make install` puts things, they are equal."""
    deployed = (ROOT / "deploy" / "systemd" / "telemt.service").read_text()
    unit = written_unit(tmp_path, monkeypatch)
    assert unit == deployed[deployed.index("[Unit]"):] and "User=telemt" in unit and "CapabilityBoundingSet=CAP_NET_BIND_SERVICE" in unit


@pytest.mark.parametrize(("words", "steps"), [
    ([], ["daemon-reload", "enable", "start", "is-active"]), (["--no-start"], ["daemon-reload", "enable"])])
def test_systemctl_is_asked_as_the_specification_says(tmp_path, monkeypatch, words, steps):
    """config.md 6.2 item 4: enabled in any case, started unless --no-start."""
    asked = []
    monkeypatch.setattr(telemt, "_UNIT_PATH", str(tmp_path / "telemt.service"))
    monkeypatch.setattr(telemt, "run_systemctl", lambda step: asked.append(step[0]))
    monkeypatch.setattr(telemt.time, "sleep", lambda _: None)
    telemt.install_unit(parse_init(["--init", *words, "--config-dir", str(tmp_path)]), str(tmp_path / "config.toml"))
    assert asked == steps


@pytest.mark.parametrize(("places", "lines"), [
    ({}, ["ProtectHome=true"]),
    ({"script": "/home/anna/telemt.py"},
     ["ProtectHome=tmpfs", "BindReadOnlyPaths=-/home/anna/telemt.py", "BindReadOnlyPaths=-/home/anna/telemt_api.py"]),
    ({"script": "/root/my apps/telemt.pyz/__main__.py"}, ["ProtectHome=tmpfs", 'BindReadOnlyPaths="-/root/my apps/telemt.pyz"']),
    ({"script": "/tmp/telemt.pyz/__main__.py"}, ["ProtectHome=true", "BindReadOnlyPaths=-/tmp/telemt.pyz"]),
    ({"prefix": "/home/anna/venv"}, ["ProtectHome=tmpfs", "BindReadOnlyPaths=-/home/anna/venv"]),
    ({"config_dir": "/home/anna/proxy"}, ["ProtectHome=tmpfs", "BindPaths=/home/anna/proxy"]),
    ({"config_dir": "/home/anna", "held": [".ssh"]}, ["ProtectHome=tmpfs", "BindPaths=/home/anna/config.toml"]),
], ids=str)
def test_the_unit_can_reach_its_script(tmp_path, monkeypatch, places, lines):
    """Found from outside: a script under /home or /root could not be started, because its unit hid those places.

    Nothing else there is shown: the places themselves are empty, and what is needed is bound into them.
    """
    unit = written_unit(tmp_path, monkeypatch, **places).splitlines()
    assert [line for line in unit if line.startswith(("ProtectHome", "Bind"))] == lines
    assert "PrivateTmp=true" in unit and "DynamicUser=true" in unit
    if shutil.which("systemd-analyze"):
        said = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "telemt.service")], capture_output=True, text=True, check=False)
        assert not [line for line in (said.stdout + said.stderr).splitlines() if "is not executable" not in line], said


@pytest.mark.parametrize(("config_dir", "held", "owned"), [
    ("/etc/telemt", ["tlsfront"], "/etc/telemt"), ("/srv/proxy", ["users.toml"], "/srv/proxy"),
    ("/etc", ["passwd"], "/etc/config.toml"), ("/home/anna", [".ssh"], "/home/anna/config.toml"),
])
def test_the_service_gets_no_directory_of_others(tmp_path, monkeypatch, capsys, config_dir, held, owned):
    """`--init --config-dir /etc` must not hand /etc to the service."""
    unit = written_unit(tmp_path, monkeypatch, config_dir=config_dir, held=held).splitlines()
    assert f"ExecStartPre=+/bin/chown -hR --reference=/var/lib/telemt/. {owned}" in unit and f"ReadWritePaths={owned}" in unit
    assert ("ConfigurationDirectory=telemt" in unit) is (config_dir == "/etc/telemt")
    assert ("holds other things too" in capsys.readouterr().err) is (owned != config_dir)


def test_what_the_service_cannot_read_is_said(tmp_path, monkeypatch, capsys):
    """Its user is nobody else's, so a script copied with umask 077 does not start."""
    script = tmp_path / "telemt.py"
    script.write_text("")
    for mode, said in (0o600, True), (0o644, False):
        script.chmod(mode)
        written_unit(tmp_path, monkeypatch, script=str(script))
        assert (f"{script} must be readable" in capsys.readouterr().err) is said
    monkeypatch.setattr(telemt, "_HIDDEN", ())
    for mode, said in (0o700, False), (0o755, True):
        tmp_path.chmod(mode)
        assert telemt.readable_for_all(str(script)) is (said and all(path.stat().st_mode & 1 for path in tmp_path.parents))


def test_init_tightens_a_file_that_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(telemt, "_UNIT_PATH", str(tmp_path / "missing" / "telemt.service"))
    path = tmp_path / "config.toml"
    path.write_text("")
    path.chmod(0o644)
    assert telemt.main(["--init", "--force", "--config-dir", str(tmp_path)]) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(("text", "word"), [
    ("/etc/telemt", "/etc/telemt"), ("/a b", '"/a b"'), ("/50%", "/50%%"), ('/a"b', '"/a\\"b"'),
])
def test_words_of_a_unit(text, word):
    assert telemt.unit_word(text) == word


@pytest.mark.parametrize(("level", "words"), [("debug", "debug"), ("error", "error")])
def test_the_banner_names_the_level_in_force(monkeypatch, level, words):
    monkeypatch.setenv("RUST_LOG", level)
    lines = []
    monkeypatch.setattr(telemt.LogBook, "sink", lambda _level, _target, text: lines.append(text))
    monkeypatch.setattr(telemt.LogBook, "threshold", Level.INFO)
    loaded = telemt.parse_settings(telemt.parse_document(""), telemt.Draws(lambda: 1500))
    telemt.print_banner(loaded, chosen_level("", "normal"), telemt.pick_backend(), telemt.pick_poller("auto"), False)
    assert "Log level: " + {"debug": "verbose"}.get(words, words) in lines


def test_init_without_systemd_prints_the_unit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(telemt, "_UNIT_PATH", str(tmp_path / "missing" / "telemt.service"))
    assert telemt.main(["--init", "--config-dir", str(tmp_path)]) == 0
    assert "[Service]" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert telemt.main(["--version"]) == 0
    assert capsys.readouterr().out == f"telemt.py {telemt.VERSION} (telemt 3.2.1 config and API)\n"
    assert telemt.main(["--help"]) == 0 and capsys.readouterr().err.startswith("usage: telemt.py")


def test_config_that_cannot_be_created(tmp_path, capsys):
    assert telemt.main([str(tmp_path / "no" / "such.toml")]) == 1
    assert "cannot create default config" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# -- telemt_api.py, compiled elsewhere

APART = """
import os, sys
sys.path[:0] = sys.argv[1:3]
sys.dont_write_bytecode = True
import telemt
{before}
try:
    module = telemt.import_apart("apart")
    print(module.VALUE, os.path.basename(module.__file__), module.value.__code__.co_filename == module.__file__, module.__spec__.name)
except ImportError as error:
    print("ImportError", error.name)
print("apart" in sys.modules)
"""


@pytest.mark.parametrize(("source", "before", "said"), [
    ("VALUE = __name__\ndef value(): pass\n", "", ["apart apart.py True apart", "True"]),
    ("VALUE = __name__\ndef value(): pass\n", "os.fork = lambda: (_ for _ in ()).throw(OSError)", ["apart apart.py True apart", "True"]),
    ("VALUE = __name__\ndef value(): pass\n", "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
     ["apart apart.py True apart", "True"]),
    ("import not_there_at_all\n", "", ["ImportError not_there_at_all", "False"]),
    (None, "", ["ImportError apart", "False"]),
], ids=["child", "no-fork", "threads", "missing-import", "missing"])
def test_a_module_compiled_by_a_child(tmp_path, source, before, said):
    if source is not None:
        (tmp_path / "apart.py").write_text(source)
    run = subprocess.run([sys.executable, "-c", APART.format(before=before), str(tmp_path), str(Path(telemt.__file__).parent)],
                         capture_output=True, text=True, check=False, timeout=60)
    assert (run.stderr, run.stdout.splitlines()) == ("", said)


def test_code_that_cannot_be_made_is_none():
    code = ("import telemt; print(telemt.code_from_child(lambda: 1 // 0), telemt.code_from_child(lambda: (lambda: 7).__code__).co_name, "
            "telemt.code_from_child(lambda: object()))")
    run = subprocess.run([sys.executable, "-B", "-c", code], cwd=Path(telemt.__file__).parent, capture_output=True, text=True, check=False,
                         timeout=60)
    assert run.stdout == "None <lambda> None\n", run


SAMPLE = '''
"""The module."""
class Thing:
    """A class keeps its docstring: somebody may ask for it."""
    word: str = "x"

    def far(self, value):
        """A method."""
        first = [value / divisor
                 for divisor in (2, 1, 0)]
''' + "\n" * 300 + '''
        return first
def fails(n):
    "x"
    text = "x"
    try:
        return (n
                + Thing().far(n)[0])
    finally:
        del text
def doubled(words): return ",".join(f"{word}" for word in words)
'''


def lines_of(code):
    """The line of every instruction of code and of all code in it."""
    yield [position[0] for position in code.co_positions()]
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from lines_of(item)


@pytest.mark.parametrize("text", [SAMPLE, Path(telemt.__file__).read_text(encoding="utf-8")], ids=["sample", "telemt.py"])
def test_slim_code_knows_every_line(text):
    code = compile(text, "book.py", "exec", dont_inherit=True)
    assert list(lines_of(telemt._slim(code))) == list(lines_of(code))


def test_slim_code_does_the_same_without_its_docstrings():
    names: dict = {}
    exec(telemt._slim(compile(SAMPLE, "book.py", "exec", dont_inherit=True)), names)
    assert names["fails"].__doc__ is None and names["Thing"].far.__doc__ is None and names["Thing"].__doc__.startswith("A class")
    assert names["doubled"](["a", "b"]) == "a,b"
    with pytest.raises(ZeroDivisionError) as caught:
        names["fails"](1)
    lines = [entry.lineno for entry in caught.traceback][1:]
    assert [SAMPLE.splitlines()[at].strip() for at in lines[:2]] == ["+ Thing().far(n)[0])", "first = [value / divisor"]


@pytest.mark.parametrize(("stuck", "taken_apart"), [(True, False), (False, True)])
def test_with_a_helper_thread_in_a_call_the_interpreter_is_not_taken_apart(stuck, taken_apart):
    """The thread woke up in what was left of it: a SIGSEGV instead of the exit code."""
    code = f"""
import atexit, sys, time, _thread
sys.path.insert(0, {os.path.dirname(telemt.__file__)!r})
import telemt
atexit.register(print, "taken apart")
telemt.main = lambda words: print("bye") or 7
if {stuck}:
    _thread.start_new_thread(time.sleep, (600,))
    while not _thread._count():
        time.sleep(0.01)
telemt.run_and_exit()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.split("\n")[:-1] == ["bye"] + ["taken apart"] * taken_apart
