"""Room 11: users, limits, tickets, replay windows, and who a hello belongs to."""
import contextlib
import datetime

import pytest

import telemt
from telemt import (ClientHello, Doorman, Effort, KeyedHmac, Reason, ReplayWindow, Transport, UserTable, WireError, admit,
                    parse_client_hello, without_random)
from tests.cases import OTHER, SECRET, load_vector, settings_of

BACKEND = telemt.pick_backend()


def table(text="", users=f'alice = "{SECRET}"\nbob = "{OTHER}"'):
    users_table = UserTable()
    users_table.apply(settings_of(f"{text}\n[access.users]\n{users}\n").access)
    return users_table


def refusal(user, ip="10.0.0.1", now_wall=1.0):
    with pytest.raises(WireError) as caught:
        admit(user, ip, now_wall)
    assert caught.value.reason is Reason.LIMIT
    return str(caught.value)


def test_no_limit_admits_and_release_counts_once():
    user = table().users["alice"]
    tickets = [admit(user, "10.0.0.1", 1.0) for _ in range(3)] + [admit(user, "10.0.0.2", 1.0)]
    assert (user.sessions, user.ips) == (4, {"10.0.0.1": 3, "10.0.0.2": 1})
    for ticket in tickets:
        ticket.release()
        ticket.release()
    assert (user.sessions, user.ips) == (0, {})


@pytest.mark.parametrize(("text", "message"), [
    ("[access.user_max_tcp_conns]\nalice = 0", "User alice exceeded connection limit"),
    ("[access.user_max_unique_ips]\nalice = 0", "User alice exceeded connection limit"),
    ("[access.user_data_quota]\nalice = 0", "User alice exceeded data quota"),
    ('[access.user_expirations]\nalice = "1970-01-01T00:00:00Z"', "User alice expired"),
    ("[access.user_enabled]\nalice = false", "User alice disabled"),
])
def test_zero_blocks_and_words(text, message):
    users = table(text)
    assert refusal(users.users["alice"]) == message
    admit(users.users["bob"], "10.0.0.1", 1.0)
    assert users.users["alice"].sessions == 0 and not users.users["alice"].ips


def test_order_of_limits(logged):
    user = table('[access.user_enabled]\nalice = false\n[access.user_expirations]\nalice = "1970-01-01T00:00:00Z"\n'
                 "[access.user_data_quota]\nalice = 0\n[access.user_max_unique_ips]\nalice = 0\n"
                 "[access.user_max_tcp_conns]\nalice = 0").users["alice"]
    assert refusal(user) == "User alice disabled"
    user.enabled = True
    assert refusal(user) == "User alice expired"
    user.expires_wall = 9.0
    logged.clear()
    assert refusal(user) == "User alice exceeded connection limit"
    assert logged == [(telemt.Level.WARN, "IP limit exceeded user=alice ip=10.0.0.1 reason=IP limit reached for user 'alice': "
                                          "0/0 unique IPs already connected")]
    user.max_ips = 1
    assert refusal(user) == "User alice exceeded connection limit" and len(logged) == 1
    user.max_sessions = 1
    assert refusal(user) == "User alice exceeded data quota"


def test_expiry_is_strictly_later():
    until = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    user = table(f'[access.user_expirations]\nalice = "{until.isoformat()}"').users["alice"]
    admit(user, "10.0.0.1", until.timestamp())
    assert refusal(user, now_wall=until.timestamp() + 0.001) == "User alice expired"


def test_unique_ips_count_sessions_not_connections():
    user = table("[access.user_max_unique_ips]\nalice = 1").users["alice"]
    first, second = admit(user, "10.0.0.1", 1.0), admit(user, "10.0.0.1", 1.0)
    assert refusal(user, ip="10.0.0.2") == "User alice exceeded connection limit"
    first.release()
    assert refusal(user, ip="10.0.0.2")
    second.release()
    admit(user, "10.0.0.2", 1.0)


def test_recent_addresses_are_those_admitted_within_the_last_half_minute():
    users = table()
    alice, bob = users.users["alice"], users.users["bob"]
    for at, ip in ((0.0, "10.0.0.1"), (10.0, "10.0.0.2"), (20.0, "10.0.0.1")):
        users.note_admission(alice, ip, at)
    assert alice.recent_ips(20.0) == alice.recent_ips(40.0) == ["10.0.0.2", "10.0.0.1"]
    assert alice.recent_ips(40.5) == ["10.0.0.1"]
    users.note_admission(bob, "10.0.0.9", 60.0)
    assert (list(alice.recent), list(bob.recent)) == ([], ["10.0.0.9"])        # what is too old does not stay in memory


def test_a_session_that_goes_on_is_active_and_no_longer_recent():
    users = table()
    user = users.users["alice"]
    admit(user, "10.0.0.1", 1.0)
    users.note_admission(user, "10.0.0.1", 1.0)
    assert (list(user.ips), user.recent_ips(31.5)) == (["10.0.0.1"], [])


def test_what_is_remembered_of_a_crowd_moves_and_stays_the_same():
    users = table()
    alice, bob = users.users["alice"], users.users["bob"]
    for number in range(300):
        users.note_admission(alice if number % 3 else bob, f"10.0.1.{number % 100}", number / 20)
        users.remember(f"10.0.1.{number % 100}", alice if number % 3 else bob)
    before = list(users._home.items()), list(users._recent.items()), list(alice.recent.items()), list(bob.recent.items())
    places = {id(ip) for ip in (*users._home, *alice.recent, *bob.recent)}
    users.compact()
    assert before == (list(users._home.items()), list(users._recent.items()), list(alice.recent.items()), list(bob.recent.items()))
    assert not places & {id(ip) for ip in (*users._home, *alice.recent, *bob.recent)}
    users.note_admission(alice, "10.0.2.1", 60.0)
    assert (list(alice.recent), list(bob.recent)) == (["10.0.2.1"], [])


def test_recent_addresses_of_all_users_are_bounded(monkeypatch):
    monkeypatch.setattr("telemt._RECENT_MAX", 1000)
    users = table()
    for number in range(3000):
        users.note_admission(users.users["alice" if number % 2 else "bob"], f"10.1.{number >> 8}.{number & 255}", 7.0)
    assert sum(len(user.recent) for user in users) == 1000
    assert "10.1.11.183" in users.users["alice"].recent and "10.1.0.0" not in users.users["bob"].recent


def test_connection_limit_is_reserved_at_admission():
    user = table("[access.user_max_tcp_conns]\nalice = 2").users["alice"]
    tickets = [admit(user, "10.0.0.1", 1.0) for _ in range(2)]
    assert refusal(user) and user.ips == {"10.0.0.1": 2}
    tickets[0].release()
    admit(user, "10.0.0.9", 1.0)


def test_quota_compares_used_octets():
    user = table("[access.user_data_quota]\nalice = 10").users["alice"]
    user.used = 9
    admit(user, "10.0.0.1", 1.0)
    user.used = 10
    assert refusal(user) == "User alice exceeded data quota"


def test_last_user_of_an_ip_is_tried_first():
    users = table(users="\n".join(f'u{n} = "{n:032x}"' for n in range(5)))
    users.remember("10.0.0.1", users.users["u3"])
    assert [user.name for user in users.candidates("10.0.0.1", 0, 0)] == ["u3", "u0", "u1", "u2", "u4"]
    assert [user.name for user in users.candidates("10.0.0.2", 0, 0)] == ["u0", "u1", "u2", "u3", "u4"]


def test_home_cache_is_bounded_and_forgets_removed_users():
    users = table()
    for n in range(5000):
        users.remember(f"10.0.{n >> 8}.{n & 255}", users.users["bob"])
    assert len(users._home) == 4096
    users.apply(settings_of(f'[access.users]\nalice = "{SECRET}"').access)
    assert not users._home


def test_apply_keeps_counters_of_users_that_stay():
    users = table()
    alice = users.users["alice"]
    alice.used = 77
    users.apply(settings_of(f'[access.users]\nalice = "{OTHER}"\ncarol = "{SECRET}"').access)
    assert users.users["alice"] is alice and alice.used == 77 and alice.secret.hex() == OTHER
    assert list(users.users) == ["alice", "carol"]


# -- replay


def test_replay_window_forgets_by_age_and_by_number():
    window = ReplayWindow(3, 10.0)
    assert not window.is_replay(b"a", 0.0)
    assert window.is_replay(b"a", 10.0), "a look-up does not renew the age, and the border still counts"
    assert not window.is_replay(b"a", 10.1)
    for key in (b"b", b"c", b"d"):
        assert not window.is_replay(key, 11.0)
    assert len(window) == 3 and not window.is_replay(b"a", 11.0)


def test_replay_window_evicts_the_least_recently_looked_up():
    window = ReplayWindow(2, 0.0)
    window.is_replay(b"a", 0.0)
    window.is_replay(b"b", 0.0)
    assert window.is_replay(b"a", 1e9), "0 = never by age"
    window.is_replay(b"c", 1e9)
    assert window.is_replay(b"a", 1e9) and not window.is_replay(b"b", 1e9)


def test_replay_size_zero_is_off_and_resize_keeps_the_newest():
    window = ReplayWindow(0, 1.0)
    assert not window.is_replay(b"a", 0.0) and not window.is_replay(b"a", 0.0)
    window.resize(3, 0.0)
    for key in (b"a", b"b", b"c"):
        window.is_replay(key, 0.0)
    window.resize(1, 0.0)
    assert len(window) == 1 and window.is_replay(b"c", 0.0)


def test_a_replay_window_makes_no_object_for_a_key():
    """Found after storms: keys and times of thousands of handshakes each held a page of the memory that had been the crowd's."""
    window = ReplayWindow(65_536, 10.0)
    for number in range(3000):
        window.is_replay(number.to_bytes(48, "big"), number / 1000)
    columns = [getattr(window, name) for name in ReplayWindow.__slots__ if isinstance(getattr(window, name), memoryview)]
    assert len(columns) == 6 and sum(column.nbytes for column in columns) <= 1.125 * 32 * 3001
    assert not window.is_replay(b"later", 13.1)
    assert len(window) == 1, "when the newest is too old, all are"


def test_a_full_replay_window_grows_no_further():
    window = ReplayWindow(1000, 0.0)
    for number in range(2000):
        window.is_replay(number.to_bytes(16, "big"), 1.0)
    assert len(window) == 1000 and len(window._heads) == 1001
    assert not window.is_replay((999).to_bytes(16, "big"), 1.0) and window.is_replay((1001).to_bytes(16, "big"), 1.0)


# -- recognition


def doorman(text="", users=f'alice = "{SECRET}"\nbob = "{OTHER}"'):
    found = Doorman(BACKEND)
    found.apply(settings_of(f"{text}\n[access.users]\n{users}").access)
    return found


def signed_hello(secret, timestamp, size=0):
    """A ClientHello record signed for `timestamp`, from a vector record; at least `size` bytes."""
    record = bytearray(bytes.fromhex(load_vector("faketls")["cases"][0]["record"]).ljust(size, b"\0"))
    mac = KeyedHmac(bytes.fromhex(secret)).digest(without_random(bytes(record)))
    record[11:43] = mac[:28] + (timestamp ^ int.from_bytes(mac[28:], "little")).to_bytes(4, "little")
    return bytes(record)


@pytest.mark.parametrize(("timestamp", "now_wall", "skew_ok", "outcome"), [
    (1_700_000_000, 1_700_000_000, False, True), (1_700_000_000, 1_700_000_601, False, Reason.CLOCK_SKEW),
    (1_700_000_000, 1_700_000_601, True, False), (1_700_001_200, 1_700_000_000, False, True),
    (1_700_001_201, 1_700_000_000, False, Reason.CLOCK_SKEW), (5, 1_700_000_000, False, False),
])
def test_clock_rules(timestamp, now_wall, skew_ok, outcome):
    door = doorman(f"[access]\nignore_time_skew = {str(skew_ok).lower()}")
    record = signed_hello(OTHER, timestamp)
    hello = parse_client_hello(record)
    if isinstance(outcome, Reason):
        with pytest.raises(WireError) as caught:
            door.find_hello(record, hello, "10.0.0.1", now_wall)
        assert caught.value.reason is outcome
    else:
        user, timed = door.find_hello(record, hello, "10.0.0.1", now_wall)
        assert (user.name, timed) == ("bob", outcome)


def test_unknown_secret_is_a_bad_digest():
    record = signed_hello("ab" * 16, 1_700_000_000)
    with pytest.raises(WireError) as caught:
        doorman().find_hello(record, parse_client_hello(record), "10.0.0.1", 1_700_000_000)
    assert caught.value.reason is Reason.BAD_DIGEST


@pytest.mark.parametrize(("ip", "neighbour", "other"), [
    ("10.0.0.1", "10.0.0.1", "10.0.0.2"), ("2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"),
])
def test_what_a_stranger_may_cost_is_limited(ip, neighbour, other):
    """Found from outside: with 1,000 users 1.6 MB/s of hellos of 16 KB kept the processor busy."""
    users = "\n".join(f'u{n} = "{n:032x}"' for n in range(1, 1000))
    door = doorman(users=users)
    now = 1_700_000_000.0
    door.users.remember(neighbour, door.users.users["u500"])

    def tried(who, secret="ab" * 16, size=517):
        record = signed_hello(secret, int(now), size)
        signs = []
        with pytest.MonkeyPatch.context() as patch:
            digest = KeyedHmac.digest
            patch.setattr(KeyedHmac, "digest", lambda self, *parts: signs.append(self) or digest(self, *parts))
            with contextlib.suppress(WireError):
                return door.find_hello(record, parse_client_hello(record), who, now)[0].name
        return len(signs)

    total_s = 0.0
    while (count := tried(ip, size=16_384)) > 1:
        total_s += count * 17.4e-6
        assert total_s < 0.6
    assert count == (ip == neighbour) and total_s > 0.5
    assert tried(neighbour, f"{500:032x}") == "u500", "who was here before is served"
    assert tried(ip, f"{700:032x}") == (ip == neighbour), "who was not waits"
    assert tried(other, f"{700:032x}") == "u700", "and nobody else notices"
    now += 3.0
    assert tried(ip, f"{700:032x}") == "u700", "for a moment"


def test_few_users_and_small_hellos_are_not_counted():
    door = doorman()
    record = signed_hello("ab" * 16, 1_700_000_000)
    for _ in range(3):
        with pytest.raises(WireError):
            door.find_hello(record, parse_client_hello(record), "10.0.0.1", 1_700_000_000)
    assert not door.users.effort._spent


def test_spent_effort_is_bounded_and_survives_a_clock_that_jumps():
    effort = Effort()
    for n in range(3000):
        effort.charge(f"10.0.{n >> 8}.{n & 255}", 1000.0, 1.0)
    assert len(effort._spent) == 1024 and effort.is_spent("10.0.11.183", 1000.0) and not effort.is_spent("10.0.0.0", 1000.0)
    assert effort.is_spent("10.0.11.183", 0.0) and not effort.is_spent("10.0.11.183", 1006.0)


def test_timed_and_timeless_hellos_have_tables_of_their_own():
    door = doorman("[access]\nreplay_window_secs = 10")
    hello = ClientHello(b"d" * 32, b"", (), None, (), frozenset())
    door.check_hello(hello, True, 0.0)
    door.check_hello(hello, False, 0.0)
    for timed in (True, False):
        with pytest.raises(WireError) as caught:
            door.check_hello(hello, timed, 5.0)
        assert caught.value.reason is Reason.TLS_REPLAY
    door.check_hello(hello, True, 11.0)
    with pytest.raises(WireError):
        door.check_hello(hello, False, 1e9)


def test_header_in_a_disabled_mode_is_refused():
    case = next(case for case in load_vector("obfuscated2")["cases"] if case["name"] == "abridged-dc1")
    door, block = doorman(), bytes.fromhex(case["header"])
    user, preamble = door.find_header(block, door.users, [Transport.ABRIDGED])
    assert (user.name, preamble.dc) == ("alice", 1)
    with pytest.raises(WireError) as caught:
        door.find_header(block, door.users, [Transport.PADDED])
    assert caught.value.reason is Reason.BAD_HEADER


def test_the_mark_follows_the_quota_unless_the_next_byte_is_waited_for():
    def apply(quota):
        users.apply(settings_of(f'[access.user_data_quota]\nalice = {quota}\n[access.users]\nalice = "{SECRET}"\n').access)

    users = UserTable()
    apply(10)
    alice = users.users["alice"]
    assert alice.mark == 0
    alice.mark = 10
    apply(20)
    assert alice.mark == 20
    alice.mark = 0
    apply(30)
    assert alice.mark == 0


def test_users_are_published_whole():
    """Other threads read the table: they must never see a part of it."""
    seen = []

    class Slow(dict):
        def items(self):
            for item in super().items():
                seen.append(len(users.users))
                yield item

    users = table()
    users.apply(settings_of("").access.but(users=Slow(alice=SECRET, bob=OTHER, carol=OTHER)))
    assert seen == [2, 2, 2] and len(users.users) == 3
