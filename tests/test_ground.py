"""Room 1: the error tree, the log and its throttle."""
import copy
import errno
import pickle

import pytest

import telemt
from telemt import ConfigError, Level, Log, LogBook, Reason, Throttle, WireError


@pytest.fixture
def records(monkeypatch):
    """Everything that is logged, as (level, target, text), from TRACE up."""
    found = []
    monkeypatch.setattr(LogBook, "sink", lambda level, target, text: found.append((level, target, text)))
    monkeypatch.setattr(LogBook, "threshold", Level.TRACE)
    return found


def test_fields_follow_the_text(records):
    Log("room").info("Connecting to %s", "DC", user="alice", dc=-2)
    assert records == [(Level.INFO, "telemt::room", "Connecting to DC user=alice dc=-2")]


def test_text_without_arguments_is_not_formatted(records):
    Log("room").warn("100% of it", user="%s")
    assert records[0][2] == "100% of it user=%s"


def test_threshold_drops_and_links_survive_silent(records, monkeypatch):
    monkeypatch.setattr(LogBook, "threshold", Level.WARN)
    Log("room").info("lost")
    Log("links").info("kept")
    Log("links").debug("lost")
    Log("room").error("kept")
    assert [text for _, _, text in records] == ["kept", "kept"]


def test_nothing_happens_before_a_sink_is_opened(monkeypatch):
    monkeypatch.setattr(LogBook, "sink", None)
    Log("room").error("nobody listens")


def test_throttle_opens_once_per_period(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(LogBook, "now", lambda: now[0])
    throttle = Throttle(60)
    assert [throttle.ready(), throttle.ready()] == [True, False]
    now[0] = 59.9
    assert not throttle.ready()
    now[0] = 60.0
    assert throttle.ready()


@pytest.mark.parametrize(("error", "text"), [
    (ConfigError("x must be > 0"), "Config error: x must be > 0"),
    (ConfigError("Invalid secret", prefix=False), "Invalid secret"),
    (WireError(Reason.BAD_DIGEST), "tls_bad_digest"),
    (WireError(Reason.LIMIT, "User a expired"), "User a expired"),
])
def test_error_texts(error, text):
    assert str(error) == text and isinstance(error, telemt.TelemtError)


def test_reason_words_are_unique_labels():
    words = [reason.value for reason in Reason]
    assert len(set(words)) == len(words)
    assert all(word.replace("_", "").isalnum() and word == word.lower() for word in words)


class Row(telemt.NamedTuple):
    """One of each."""

    new: int
    text: str = "x"

    def total(self):
        return self.new + len(self.text)


class Bare(telemt.NamedTuple):
    """Nothing to carry."""


def test_a_named_tuple_is_a_tuple_with_names():
    row = Row(1, text="abc")
    assert row == (1, "abc") and (row.new, row.text, row.total()) == (1, "abc", 4) and repr(row) == "Row(new=1, text='abc')"
    assert row._replace(text="") == Row(1, "") and row._asdict() == {"new": 1, "text": "abc"} and Row(2).text == "x" and Bare() == ()
    match row:
        case Row(number, words):
            assert (number, words) == (1, "abc")
    assert copy.copy(row) == pickle.loads(pickle.dumps(row)) == row and type(copy.copy(row)) is Row and Row.__slots__ == ()


@pytest.mark.parametrize("wrong", [lambda: Row(), lambda: Row(1, "a", 2), lambda: Row(1, words="a"), lambda: Row(1)._replace(word="")])
def test_a_named_tuple_has_its_own_fields_only(wrong):
    with pytest.raises(TypeError):
        wrong()


def test_a_named_tuple_cannot_be_changed():
    with pytest.raises(AttributeError):
        Row(1).new = 2
    with pytest.raises(AttributeError):
        Row(1).other = 2


@pytest.mark.parametrize(("name", "hard"), [
    ("ECONNREFUSED", True), ("EADDRINUSE", True), ("EADDRNOTAVAIL", True), ("EINVAL", True), ("EOPNOTSUPP", True), ("ENOSYS", True),
    ("ETIMEDOUT", False), ("ENETUNREACH", False), ("EHOSTUNREACH", False), ("EACCES", False), ("EAFNOSUPPORT", False),
    ("ECONNRESET", False),
])
def test_errors_that_trying_again_does_not_mend(name, hard):
    """upstream-and-relay.md 7.4."""
    assert telemt.RouteError("x", code=getattr(errno, name)).hard is hard
