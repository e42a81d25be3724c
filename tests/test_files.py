"""Room 21: used quotas on disk.  How files of the configuration are read: test_control.py, journeys/test_reload.py."""
import errno
import os

import pytest

import telemt
from telemt import Level
from tests.cases import OTHER, SECRET, TestLoop, settings_of


STATE = '''{
  "last_reset_epoch_secs": 1700000000,
  "users": {
    "alice": {
      "used_bytes": 42,
      "last_reset_epoch_secs": 0
    },
    "häns": {
      "used_bytes": 0,
      "last_reset_epoch_secs": 1700000000
    }
  }
}
'''


def test_quota_state_reads_back():
    text = telemt.render_quota_state([("häns", 0, 1_700_000_000), ("alice", 42, 0), ("nobody", 0, 0)])
    assert text.decode() == STATE
    assert telemt.parse_quota_state(text) == {"alice": (42, 0), "häns": (0, 1_700_000_000)}
    assert telemt.render_quota_state([]) == b'{\n  "last_reset_epoch_secs": 0,\n  "users": {}\n}\n'


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"users": []}', '{"users": {"a": 5}}', '{"users": {"a": {"used_bytes": -1}}}',
                                  '{"users": {"a": {"used_bytes": 1.0}}}', '{"users": {"a": {"used_bytes": true}}}',
                                  '{"users": {"a": {"used_bytes": 18446744073709551616}}}', "\ud800", "[" * 100_000])
def test_what_is_no_quota_state(text):
    with pytest.raises(ValueError):
        telemt.parse_quota_state(text.encode(errors="surrogatepass"))


def test_unknown_members_of_a_quota_state_are_ignored():
    assert telemt.parse_quota_state(b'{"version": 2, "users": {"a": {"used_bytes": 5, "x": []}}}') == {"a": (5, 0)}


@pytest.mark.parametrize("read", [
    telemt.read_config_bytes, lambda path: telemt.read_small_file(path, 100), telemt.read_front_file,
    lambda path: telemt.read_small_file(path, 100, os.O_NOFOLLOW)], ids=["config", "small", "front", "quota"])
def test_a_directory_in_the_place_of_a_file_costs_no_descriptor(tmp_path, read):
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(IsADirectoryError):
            read(str(tmp_path))
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("use", [
    telemt.bind_unix, telemt.read_config_bytes, telemt.read_front_file, lambda path: telemt.write_whole(path, "", replace=True),
    lambda path: telemt.write_quota_file(path, b""), lambda path: telemt.Observer._write(path, []),
    lambda path: telemt.write_front_file(path, "a", "{}")],
    ids=["unix socket", "config", "front", "write", "quota", "observer", "front cache"])
def test_a_nul_in_a_path_is_an_error_of_the_system(tmp_path, use):
    """Found from outside: Python's ValueError for it was a traceback at the start, and at the stop."""
    with pytest.raises(OSError, match="Invalid argument"):
        use(f"{tmp_path}/a\0b")


class Quotas:
    """A QuotaState whose helper thread works when told."""

    def __init__(self, loop, path):
        self.table = telemt.UserTable()
        self.table.apply(settings_of(f'[access.users]\nalice = "{SECRET}"\nbob = "{OTHER}"\n').access)
        self.loop, self.path, self.waiting = loop, path, []
        loop.offload = lambda work, done: self.waiting.append((work, done))
        self.state = telemt.QuotaState(loop, self.table, str(path))

    def use(self, name, octets):
        """What a relay does for a chunk."""
        user = self.table.users[name]
        user.used += octets
        if user.used >= user.mark:
            user.mark = user.quota
            self.state.touch()

    def work(self):
        work, done = self.waiting.pop(0)
        try:
            done(work())
        except OSError as error:
            done(error)

    @property
    def stored(self):
        return {name: used for name, (used, _) in telemt.parse_quota_state(self.path.read_bytes()).items()}


@pytest.fixture
def quotas(tmp_path):
    loop = TestLoop()
    yield Quotas(loop, tmp_path / "var" / "quota.json")
    loop.dispose()


def test_used_octets_are_written_a_minute_after_the_first_change(quotas):
    quotas.state.load()
    quotas.use("alice", 5)
    quotas.loop.turn(59.0)
    quotas.use("alice", 6)
    assert not quotas.waiting
    quotas.loop.turn(1.1)
    quotas.use("bob", 1)                       # after the numbers were taken: for the next time
    quotas.work()
    assert quotas.stored == {"alice": 11} and quotas.path.stat().st_mode & 0o777 == 0o600
    quotas.loop.turn(60.0)
    quotas.work()
    assert quotas.stored == {"alice": 11, "bob": 1}


def test_nothing_is_armed_while_everything_is_written(quotas):
    assert quotas.loop.wake_at == float("inf")
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.work()
    quotas.loop.turn(1000.0)
    assert quotas.loop.wake_at == float("inf") and not quotas.waiting
    quotas.use("alice", 5)
    assert quotas.loop.wake_at == quotas.loop.at + 60.0


def test_only_the_first_chunk_after_a_write_costs_anything(quotas):
    quotas.use("alice", 5)
    assert quotas.table.users["alice"].mark == telemt.UNLIMITED
    quotas.loop.turn(60.0)
    assert quotas.table.users["alice"].mark == 0


def test_one_write_at_a_time(quotas):
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    assert len(quotas.waiting) == 1
    quotas.work()
    quotas.loop.turn(60.0)
    quotas.work()
    assert quotas.stored == {"alice": 10}


def test_an_older_snapshot_never_replaces_a_newer(quotas):
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.use("bob", 7)
    quotas.state.reset(quotas.table.users["alice"])()        # by the API, while the helper thread has not begun
    quotas.work()
    assert quotas.stored == {"alice": 0, "bob": 7}


def test_a_full_disk_is_said_once_and_tried_again(quotas, logged, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(telemt, "write_quota_file", full)
        quotas.use("alice", 5)
        for _ in range(3):
            quotas.loop.turn(60.0)
            quotas.work()
    assert logged == [(Level.WARN, f"Failed to write quota state file path={quotas.path} error=No space left on device (os error 28)")]
    quotas.loop.turn(60.0)
    quotas.work()
    assert quotas.stored == {"alice": 5}


def test_a_reset_that_cannot_be_written_is_in_force(quotas, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.work()
    alice = quotas.table.users["alice"]
    with monkeypatch.context() as patch:
        patch.setattr(telemt, "write_quota_file", full)
        with pytest.raises(OSError, match="No space"):
            quotas.state.reset(alice)()
    assert alice.used == 0 and alice.reset_wall > 1_700_000_000
    quotas.loop.turn()                         # the other thread asked for another try
    quotas.loop.turn(60.0)
    quotas.work()
    assert telemt.parse_quota_state(quotas.path.read_bytes()) == {"alice": (0, alice.reset_wall)}


def test_what_is_not_written_is_written_at_the_end(quotas):
    quotas.use("alice", 5)
    quotas.state.close()
    assert quotas.stored == {"alice": 5}


def test_nothing_new_is_not_written_at_the_end(quotas):
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.work()
    quotas.path.unlink()
    quotas.state.close()
    assert not quotas.path.exists()


def test_used_octets_come_back(quotas, logged):
    quotas.path.parent.mkdir()
    quotas.path.write_text(STATE)
    quotas.state.load()
    assert (quotas.table.users["alice"].used, quotas.table.users["bob"].used) == (42, 0)
    assert logged == [(Level.INFO, f"Loaded per-user quota state path={quotas.path} loaded_users=1")]
    quotas.use("bob", 1)
    quotas.state.close()
    assert quotas.stored == {"alice": 42, "bob": 1}          # names that are not configured are dropped


def test_no_state_yet(quotas, logged):
    quotas.state.load()
    assert not logged


def test_an_unreadable_state_is_put_aside(quotas, logged):
    quotas.path.parent.mkdir()
    quotas.path.write_text("{")
    quotas.state.load()
    assert logged[0][1].startswith(f"Failed to parse quota state file path={quotas.path} error=")
    assert quotas.path.with_name("quota.json.bad").read_text() == "{" and not quotas.path.exists()


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc/hostname"), lambda path: path.mkdir(), lambda path: os.mkfifo(path)])
def test_what_is_no_plain_file_is_not_read(quotas, logged, make):
    quotas.path.parent.mkdir()
    make(quotas.path)
    quotas.state.load()
    assert len(logged) == 1 and logged[0][1].startswith(f"Failed to read quota state file path={quotas.path} error=")


def test_a_symlink_is_replaced_and_not_followed(quotas, tmp_path):
    quotas.path.parent.mkdir()
    (tmp_path / "victim").write_text("precious")
    quotas.path.symlink_to(tmp_path / "victim")
    quotas.use("alice", 5)
    quotas.state.close()
    assert (tmp_path / "victim").read_text() == "precious" and quotas.stored == {"alice": 5} and not quotas.path.is_symlink()


def test_without_a_path_nothing_is_written_and_resets_work(tmp_path, monkeypatch):
    loop = TestLoop()
    table = telemt.UserTable()
    table.apply(settings_of(f'[access.users]\nalice = "{SECRET}"\n').access)
    state = telemt.QuotaState(loop, table, None)
    state.load()
    state.touch()
    table.users["alice"].used = 5
    state.reset(table.users["alice"])()
    state.close()
    assert table.users["alice"].used == 0 and loop.wake_at == float("inf")
    loop.dispose()
