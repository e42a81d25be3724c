"""Room 21: arguments, log layout, levels, files, --init."""
import os
import re
import stat

import pytest

import telemt
from telemt import Arguments, ConfigError, Level, LogSink, chosen_level, load_config, parse_arguments, parse_init, parse_rust_log
from tests.cases import SECRET


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


def test_log_layout(capsys, monkeypatch):
    monkeypatch.setattr(telemt.time, "time", lambda: 1772618400.123456)
    LogSink(False)(Level.INFO, "telemt::links", "User: alice")
    LogSink(True)(Level.WARN, "telemt::cli", "x")
    plain, coloured = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"2026-03-04T10:00:00\.12345[56]Z  INFO telemt::links: User: alice", plain)
    assert "\x1b[33m WARN\x1b[0m telemt::cli: x" in coloured


def test_a_record_is_one_line_whatever_a_name_holds(capsys):
    LogSink(False)(Level.INFO, "telemt::links", "User: a\nFAKE \x1b[31m\u2028 ж → \ttab")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("User: a\\nFAKE \\x1b[31m\\u2028 ж → \ttab\n")


def test_a_closed_stdout_does_not_end_the_proxy(monkeypatch):
    class Gone:
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(telemt.sys, "stdout", Gone())
    monkeypatch.setattr(telemt.LogBook, "sink", None)
    LogSink(False)(Level.INFO, "telemt::cli", "x")


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


# -- --init


@pytest.mark.parametrize(("words", "text", "invalid"), [
    (["--init", "--secret", "xyz"], "Secret must be exactly 32 hex characters", False),
    (["--init", "--user", "a b"], "User name must be", False), (["--init", "--domain", "a/b"], "Domain must not contain", False),
    (["--init", "--port"], "--port needs a value", True),
])
def test_init_refuses(words, text, invalid):
    with pytest.raises(ConfigError, match=text) as caught:
        parse_init(words)
    assert caught.value.invalid is invalid


def test_init_defaults():
    request = parse_init(["--init", "--port", "nonsense"])
    assert (request.port, request.domain, request.user, request.config_dir) == (443, "www.google.com", "user", "/etc/telemt")
    assert request.start and not request.force and re.fullmatch("[0-9a-f]{32}", request.secret)


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


def test_subcommands_of_later_releases_are_a_usage_error(capsys):
    assert telemt.main(["ping", "x"]) == 2 and "not part of this version" in capsys.readouterr().err


def test_version_and_help(capsys):
    assert telemt.main(["--version"]) == 0
    assert capsys.readouterr().out == f"telemt.py {telemt.VERSION} (telemt 3.2.1 config and API)\n"
    assert telemt.main(["--help"]) == 0 and capsys.readouterr().err.startswith("usage: telemt.py")


def test_config_that_cannot_be_created(tmp_path, capsys):
    assert telemt.main([str(tmp_path / "no" / "such.toml")]) == 1
    assert "cannot create default config" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
