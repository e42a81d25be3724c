"""Room 4: Inbox."""
import pytest

from telemt import Inbox, InternalError


def test_take_and_peek():
    inbox = Inbox(10)
    inbox.append(b"abc")
    inbox.append(memoryview(b"def"))
    assert (len(inbox), inbox.room, inbox.peek(4), inbox.take(2), inbox.take_all(), len(inbox)) == (6, 4, b"abcd", b"ab", b"cdef", 0)


def test_limit_holds():
    inbox = Inbox(4)
    inbox.append(b"1234")
    with pytest.raises(InternalError):
        inbox.append(b"5")
    inbox.take(1)
    inbox.append(b"5")
    assert inbox.take_all() == b"2345"
