"""Room 7 of telemt_api: changes of the configuration on disk (api.md 7, 11, 12)."""
from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import telemt
import telemt_api
from telemt_api import ApiError, Command, Outcome, Store, remove_leftovers, replace_file

A, B, C = "a" * 32, "b" * 32, "c" * 32
TEXT = f'# mine\n[access.users]\nalice = "{A}"   # first\nbob = "{B}"\n'


class Port(telemt.Control):
    """The seam without a data plane: a published configuration is in force at once."""

    def __init__(self, path: Path) -> None:
        self.config_path = str(path)
        self.log = telemt.Log("api")
        self.config_error = telemt.ConfigError
        self.live: telemt.Settings = telemt.Settings()
        self.published: list[Mapping[str, bytes]] = []
        self.fails: Exception | None = None
        self.resets: Callable[[str], int] = lambda name: 5

    @property
    def settings(self) -> telemt.Settings:
        return self.live

    def publish(self, loaded: telemt.Loaded, files: Mapping[str, bytes], timeout_s: float = 10.0) -> None:
        if self.fails:
            raise self.fails
        self.live = loaded.settings
        self.published.append(files)

    def reset_quota(self, name: str, timeout_s: float = 10.0) -> int:
        return self.resets(name)


class Bench:
    """A store over one file."""

    def __init__(self, directory: Path, text: str | bytes = TEXT) -> None:
        self.path = directory / "config.toml"
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.port = Port(self.path)
        self.store = Store(self.port)

    def do(self, action: str, name: str, secret: str | None = None, wanted: str | None = None, **entries: Any) -> Outcome:
        return self.store.apply(Command(action, name, secret, entries), wanted)

    def refusal(self, action: str, name: str, wanted: str | None = None, **entries: Any) -> tuple[int, str, str]:
        with pytest.raises(ApiError) as caught:
            self.do(action, name, None, wanted, **entries)
        return caught.value.status, caught.value.code, caught.value.message

    @property
    def text(self) -> str:
        return self.path.read_bytes().decode()

    @property
    def users(self) -> dict[str, str]:
        found: dict[str, str] = tomllib.loads(self.text.removeprefix("\ufeff"))["access"]["users"]
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(telemt_api, "_SETTLE_S", 0.0)
    yield
    for directory in [tmp_path, *filter(Path.is_dir, tmp_path.iterdir())]:
        assert not [name for name in os.listdir(directory) if ".tmp-" in name]


# -- what a change does


def test_create(bench: Bench) -> None:
    made = bench.do("create", "eve", C, user_max_tcp_conns=4, user_expirations="2030-01-01T00:00:00Z")
    assert bench.text == (f'{TEXT}eve = "{C}"\n\n[access.user_max_tcp_conns]\neve = 4\n\n'
                          '[access.user_expirations]\neve = "2030-01-01T00:00:00Z"\n')
    assert made == Outcome(hashlib.sha256(bench.path.read_bytes()).hexdigest(), bench.port.live, "eve", C, True, 0)
    assert bench.port.live.access.users["eve"] == C and bench.port.live.access.user_max_tcp_conns == {"eve": 4}
    assert bench.port.published == [{str(bench.path): bench.path.read_bytes()}]


def test_a_drawn_secret_is_lower_case_hex(bench: Bench) -> None:
    made = bench.do("create", "eve")
    assert bench.users["eve"] == made.secret and telemt.is_hex32(made.secret) and made.secret.islower()
    assert bench.do("rotate_secret", "eve").secret != made.secret


def test_patch_rotate_delete(bench: Bench) -> None:
    assert bench.do("patch", "alice", user_data_quota=5).secret == A
    assert bench.do("rotate_secret", "alice", C).secret == C
    assert bench.do("disable", "alice", user_enabled=False).settings.access.user_enabled == {"alice": False}
    assert bench.do("enable", "alice", user_enabled=None).settings.access.user_enabled == {}
    assert bench.do("patch", "alice", user_data_quota=None).changed
    gone = bench.do("delete", "alice")
    assert (gone.secret, list(gone.settings.access.users)) == ("", ["bob"])
    assert bench.text == f'# mine\n[access.users]\nbob = "{B}"\n\n[access.user_data_quota]\n\n[access.user_enabled]\n'


@pytest.mark.parametrize("change", [
    Command("patch", "alice"), Command("patch", "alice", A), Command("patch", "alice", None, {"user_data_quota": None}),
    Command("enable", "alice", None, {"user_enabled": None}), Command("rotate_secret", "alice", A)])
def test_a_change_of_nothing_writes_nothing(bench: Bench, change: Command) -> None:
    before = os.stat(bench.path)
    made = bench.store.apply(change, None)
    assert (made.changed, made.revision, os.stat(bench.path)) == (False, bench.store.revision(), before)
    assert len(bench.port.published) == 1      # a pending edit outside takes effect nevertheless


def test_pending_edits_outside_are_seen(bench: Bench) -> None:
    bench.path.write_text(TEXT + f'dora = "{C}"\n')
    made = bench.do("patch", "dora", user_data_quota=1)
    assert made.settings.access.users["dora"] == C


def test_the_implicit_user_is_written_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "[server]\nport = 1\n")
    assert bench.refusal("delete", "default")[1] == "last_user_forbidden"
    bench.do("create", "eve", C)
    assert bench.text == f'[server]\nport = 1\n\n[access.users]\ndefault = "{"0" * 32}"\neve = "{C}"\n'


def test_includes_are_edited_where_the_entry_stands(tmp_path: Path) -> None:
    (tmp_path / "users.toml").write_text(f'[access.users]\r\nalice = "{A}"\r\nbob = "{B}"\r\n', newline="")
    bench = Bench(tmp_path, '# main\ninclude = "users.toml"\n[server]\nport = 1\n')
    before = bench.store.revision()
    made = bench.do("rotate_secret", "alice", C)
    assert (made.revision, made.changed) == (before, True)       # the revision is the main file's
    assert (tmp_path / "users.toml").read_bytes() == f'[access.users]\r\nalice = "{C}"\r\nbob = "{B}"\r\n'.encode()
    bench.do("patch", "alice", user_enabled=False)
    assert bench.text == '# main\ninclude = "users.toml"\n[server]\nport = 1\n\n[access.user_enabled]\nalice = false\n'
    assert bench.do("delete", "alice").settings.access.user_enabled == {}
    assert list(bench.port.published[-1]) == [str(bench.path), str(tmp_path / "users.toml")]


@pytest.mark.parametrize(("action", "order"), [("patch", ["config.toml", "users.toml"]), ("delete", ["users.toml", "config.toml"])])
def test_the_file_with_the_users_comes_last_and_on_delete_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str,
                                                                order: list[str]) -> None:
    (tmp_path / "users.toml").write_text(f'[access.users]\nalice = "{A}"\nbob = "{B}"\n')
    bench = Bench(tmp_path, 'include = "users.toml"\n[access.user_data_quota]\nalice = 5\n')
    written: list[str] = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (written.append(os.path.basename(target)), real(source, target))[1])
    bench.do(action, "alice", C, **({"user_data_quota": 6} if action == "patch" else {}))
    assert written == order


# -- refusals


@pytest.mark.parametrize(("action", "name", "refused"), [
    ("create", "alice", (409, "user_exists", "User already exists")),
    *[(action, "eve", (404, "not_found", "User not found"))
      for action in ("patch", "delete", "rotate_secret", "enable", "disable", "reset_quota")]])
def test_users_have_to_be_there_or_not(bench: Bench, action: str, name: str, refused: tuple[int, str, str]) -> None:
    assert bench.refusal(action, name) == refused
    assert bench.text == TEXT and not bench.port.published


def test_the_last_user_stays(bench: Bench) -> None:
    bench.do("delete", "bob")
    assert bench.refusal("delete", "alice") == (409, "last_user_forbidden", "Cannot delete the last configured user")


@pytest.mark.parametrize("wanted", ["*", "", "0" * 64])
def test_another_revision_is_refused_before_anything_else(bench: Bench, wanted: str) -> None:
    assert bench.refusal("delete", "nobody", wanted) == (409, "revision_conflict", "Config revision mismatch")
    assert bench.refusal("reset_quota", "alice", wanted)[0] == 409
    assert bench.do("delete", "bob", None, bench.store.revision()).changed


def test_a_result_that_would_not_start_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TEXT + "[general.modes]\ntls = false\n")
    assert bench.refusal("create", "eve") == (400, "bad_request", "config validation failed: Config error: No modes enabled")
    assert bench.text == TEXT + "[general.modes]\ntls = false\n"


@pytest.mark.parametrize(("content", "message"), [
    (b"x = \n", "failed to load config: Config error: "),
    (b"[access.users]\na = 5\n", "failed to load config: Config error: access.users.a"),
    (b"[access.users]\na = 'x'\n", "failed to load config: Invalid secret for user a"), (b"# \xff\n", "failed to load config: "),
    (b'include = "gone.toml"\n', "failed to load config: Config error: ")])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    bench = Bench(tmp_path, content)
    status, code, text = bench.refusal("create", "eve")
    assert (status, code) == (500, "internal_error") and text.startswith(message)


def test_a_directory_in_the_place_of_the_file_costs_no_descriptor(bench: Bench) -> None:
    bench.path.unlink()
    bench.path.mkdir()
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        assert bench.refusal("create", "eve") == (500, "internal_error", "failed to read config: Is a directory (os error 21)")
        with pytest.raises(ApiError, match="failed to read config"):
            bench.store.revision()
    assert os.listdir("/proc/self/fd") == before


def test_a_missing_file(bench: Bench) -> None:
    bench.path.unlink()
    assert bench.refusal("create", "eve") == (500, "internal_error", "failed to read config: No such file or directory (os error 2)")
    with pytest.raises(ApiError, match="failed to read config"):
        bench.store.revision()


def test_a_pipe_in_its_place_is_not_waited_for(bench: Bench) -> None:
    bench.path.unlink()
    os.mkfifo(bench.path)
    assert bench.refusal("create", "eve")[2] == "failed to read config: not a regular file (os error 22)"
    with pytest.raises(ApiError, match="not a regular file"):
        bench.store.revision()


def test_what_cannot_be_applied_is_written_all_the_same(bench: Bench, logged: list[tuple[telemt.Level, str]]) -> None:
    bench.port.fails = TimeoutError("the data plane did not answer")
    assert bench.do("create", "eve", C).changed
    assert bench.users["eve"] == C
    assert any(level is telemt.Level.ERROR and "could not be applied" in text for level, text in logged)


def test_a_reset_of_a_quota_writes_no_configuration(tmp_path: Path) -> None:
    bench = Bench(tmp_path, TEXT + '[general]\nquota_state_path = "/var/lib/telemt/quota.json"\n')
    bench.port.live = telemt.load_config(str(bench.path)).settings
    made = bench.do("reset_quota", "alice", None, bench.store.revision())
    assert (made.reset_wall, made.changed, made.revision) == (5, False, bench.store.revision())

    def full(name: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    bench.port.resets = full
    assert bench.refusal("reset_quota", "alice") == (
        500, "internal_error", "failed to write quota state: No space left on device (os error 28): directory /var/lib/telemt")

    def slow(name: str) -> int:
        raise TimeoutError("the data plane did not answer within 10 s")

    bench.port.resets = slow
    assert bench.refusal("reset_quota", "alice") == (
        500, "internal_error", "failed to write quota state: the data plane did not answer within 10 s")


# -- what the editor cannot do


@pytest.fixture
def clumsy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor that gets it wrong."""
    monkeypatch.setattr(telemt_api, "edit_texts", lambda texts, main, follow, changes: {**texts, main: texts[main] + "[access.x]\n"})


@pytest.mark.usefixtures("clumsy")
def test_a_wrong_edit_is_found_and_the_file_written_anew(bench: Bench, logged: list[tuple[telemt.Level, str]]) -> None:
    os.chmod(bench.path, 0o640)
    bench.do("create", "eve", C)
    assert bench.users == {"alice": A, "bob": B, "eve": C} and "# mine" not in bench.text
    backup = bench.path.with_name("config.toml.bak")
    assert (backup.read_text(), stat.S_IMODE(backup.stat().st_mode)) == (TEXT, 0o640)
    assert any(level is telemt.Level.WARN and "comments are lost" in text for level, text in logged)


@pytest.mark.usefixtures("clumsy")
def test_a_wrong_edit_without_tomli_w_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomli_w", None)
    assert bench.refusal("create", "eve")[2].startswith("failed to serialize config: the edited text does not mean")
    assert bench.text == TEXT


@pytest.mark.usefixtures("clumsy")
def test_a_file_with_includes_is_never_written_anew(tmp_path: Path) -> None:
    (tmp_path / "users.toml").write_text(TEXT)
    bench = Bench(tmp_path, 'include = "users.toml"\n')
    assert "failed to serialize config" in bench.refusal("create", "eve")[2]
    assert bench.text == 'include = "users.toml"\n'


def test_a_string_over_two_files_is_no_layout_for_the_editor(tmp_path: Path) -> None:
    (tmp_path / "open.toml").write_text('[x]\ny = """\n')
    text = f'include = "open.toml"\n"""\n{TEXT}'
    bench = Bench(tmp_path, text)
    assert "failed to serialize config" in bench.refusal("create", "eve")[2]
    assert bench.text == text


# -- how it is written


def test_mode_and_owner_stay(bench: Bench) -> None:
    os.chmod(bench.path, 0o604)
    if os.geteuid() == 0:
        os.chown(bench.path, 1234, 4321)
    before = os.stat(bench.path)
    bench.do("create", "eve")
    after = os.stat(bench.path)
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def test_extended_attributes_stay(bench: Bench) -> None:
    try:
        os.setxattr(bench.path, "user.origin", b"here")
    except OSError:
        pytest.skip("no extended attributes here")
    bench.do("create", "eve")
    assert os.getxattr(bench.path, "user.origin") == b"here"


def test_a_symlink_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.toml").symlink_to("real/config.toml")
    bench = Bench(tmp_path / "real")
    store = Store(Port(tmp_path / "link.toml"))
    store.apply(Command("create", "eve", C), None)
    assert os.readlink(tmp_path / "link.toml") == "real/config.toml" and bench.users["eve"] == C


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EPERM])
def test_a_directory_that_takes_no_file_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_EXCL:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    status, kind, text = bench.refusal("create", "eve")
    assert (status, kind) == (500, "internal_error")
    assert text == f"failed to write config: {os.strerror(code)} (os error {code}): directory {bench.path.parent}"
    assert bench.text == TEXT


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_file_as_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        assert f"directory {bench.path.parent}" in bench.refusal("create", "eve")[2]
    assert bench.text == TEXT and not bench.port.published


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EXDEV])
def test_a_mounted_file_is_written_in_place(bench: Bench, monkeypatch: pytest.MonkeyPatch, logged: list[tuple[telemt.Level, str]],
                                            code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    inode = os.stat(bench.path).st_ino
    bench.do("create", "eve", C)
    bench.do("delete", "eve")
    assert (os.stat(bench.path).st_ino, bench.text) == (inode, TEXT)
    assert len([text for _, text in logged if "written in place" in text]) == 1


def test_a_failing_overwrite_puts_the_old_text_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "busy")

    real, calls = os.ftruncate, []

    def fail_once(fd: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 1:
            raise OSError(errno.EIO, "I/O error")
        real(fd, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", busy)
        patch.setattr(os, "ftruncate", fail_once)
        assert bench.refusal("create", "eve")[2] == "failed to write config: I/O error (os error 5)"
    assert bench.text == TEXT


# -- others write too


class Meddler:
    """Somebody who changes the file between our reading it and our rename, `times` times."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.bench, self.times = bench, times
        self.real = telemt_api._copy_metadata
        monkeypatch.setattr(telemt_api, "_copy_metadata", self.copy)

    def copy(self, source: str, fd: int) -> None:
        if self.times:
            self.times -= 1
            self.bench.path.write_text(self.bench.text + f"# edit {self.times}\n")
        self.real(source, fd)


def test_an_edit_in_between_is_not_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    Meddler(bench, monkeypatch, 2)
    bench.do("create", "eve", C)
    assert bench.text == TEXT + f'eve = "{C}"\n# edit 1\n# edit 0\n'


def test_an_editor_who_never_stops_wins(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    Meddler(bench, monkeypatch, 3)
    assert bench.refusal("create", "eve") == (409, "revision_conflict", "Config revision mismatch")
    assert "eve" not in bench.text


def test_an_edit_in_between_breaks_the_precondition(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    Meddler(bench, monkeypatch, 1)
    assert bench.refusal("create", "eve", bench.store.revision())[1] == "revision_conflict"


def test_a_file_that_is_being_written_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TEXT + f'dora = "{C}"\n# the end\n'
    pieces = [whole[:size] for size in (len(TEXT) - 20, len(TEXT), len(whole))]
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if pieces:
            bench.path.write_text(pieces.pop(0))

    monkeypatch.setattr(telemt_api.time, "sleep", sleep)
    bench.do("create", "adam", C)
    assert not sleeps                          # what we wrote ourselves is whole
    bench.path.write_text(whole[:10])
    bench.do("create", "eve", C)
    assert len(sleeps) == 4 and bench.users.keys() == {"alice", "bob", "dora", "eve"}


def test_a_file_that_was_cut_off_does_not_swap_all_users_for_the_implicit_one(bench: Bench) -> None:
    bench.do("create", "adam", C)
    for text in ("", "# mine\n", "[general]\n"):
        bench.path.write_text(text)
        assert bench.refusal("create", "eve") == (500, "internal_error", "failed to load config: Config error: [access.users] is missing")
        assert bench.text == text


def test_sixteen_writers_with_if_match(bench: Bench) -> None:
    """Exactly one wins each revision, and nothing is lost."""
    wins: list[tuple[str, str]] = []
    guard = threading.Lock()

    def write(number: int) -> None:
        for round_number in range(4):
            name = f"u{number}-{round_number}"
            while True:
                revision = bench.store.revision()
                try:
                    bench.do("create", name, C, revision)
                except ApiError as error:
                    assert error.code == "revision_conflict"
                    continue
                with guard:
                    wins.append((revision, name))
                break

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(wins) == len({revision for revision, _ in wins}) == 64
    assert bench.users.keys() == {"alice", "bob", *(name for _, name in wins)}
    assert bench.text.startswith(TEXT)


def test_one_change_at_a_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemt_api, "_LOCK_WAIT_S", 0.01)
    bench.store.close(1.0)
    assert bench.refusal("create", "eve") == (500, "internal_error", "another change is still being written")


# -- revision


def test_the_revision_is_read_again_only_when_the_file_changed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    old = time.time() - 60
    os.utime(bench.path, (old, old))
    monkeypatch.setattr(telemt_api, "_FRESH_NS", -1)
    reads: list[str] = []
    real = bench.store._read
    monkeypatch.setattr(bench.store, "_read", lambda path: (reads.append(path), real(path))[1])
    first = bench.store.revision()
    assert first == bench.store.revision() == hashlib.sha256(TEXT.encode()).hexdigest()
    assert len(reads) == 1
    bench.path.write_text(TEXT.replace("first", "FIRST"))
    assert bench.store.revision() == hashlib.sha256(TEXT.replace("first", "FIRST").encode()).hexdigest()


def test_a_fresh_file_is_not_trusted_to_have_changed_its_time(bench: Bench) -> None:
    before = os.stat(bench.path)
    bench.store.revision()
    bench.path.write_text(TEXT.replace("first", "FIRST"))
    os.utime(bench.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bench.store.revision() == hashlib.sha256(TEXT.replace("first", "FIRST").encode()).hexdigest()


def test_a_file_that_is_not_utf8_has_no_revision(bench: Bench) -> None:
    bench.path.write_bytes(b"# \xff")
    with pytest.raises(ApiError) as caught:
        bench.store.revision()
    assert (caught.value.status, caught.value.message) == (500, f"failed to read config: {bench.path}: not valid UTF-8 at byte 2")
    assert bench.refusal("create", "eve")[2].startswith("failed to load config: Config error: ")


# -- leftovers


def test_leftovers_of_dead_writers_go_at_start(tmp_path: Path) -> None:
    for name in (".config.toml.tmp-1", ".config.toml.tmp-99999", "d/.users.toml.tmp-7"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / "d/users.toml").write_text(TEXT)
    kept = [".config.toml.tmp-x", ".other.toml.tmp-1", "config.toml.tmp-1"]
    for name in kept:
        (tmp_path / name).write_text("not ours")
    Bench(tmp_path, 'include = "d/users.toml"\n')
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "config.toml", "d"]) and os.listdir(tmp_path / "d") == ["users.toml"]
    for name in kept:
        (tmp_path / name).unlink()


def test_the_temp_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    draft = tmp_path / ".c.tmp-1"
    with open(draft, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(str(tmp_path / "c"), time.time() + 3600)
        assert draft.exists()
    remove_leftovers(str(tmp_path / "c"), time.time())
    assert not draft.exists()


def test_without_locks_the_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    draft = tmp_path / ".c.tmp-1"
    draft.write_text("half")
    remove_leftovers(str(tmp_path / "c"), time.time() + 59)
    assert draft.exists()
    remove_leftovers(str(tmp_path / "c"), time.time() + 61)
    assert not draft.exists()
    replace_file(str(tmp_path / "c"), b"new", lambda: None, lambda path: None)
    assert (tmp_path / "c").read_bytes() == b"new" and stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600
