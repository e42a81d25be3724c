"""Room 10: counters, their gate, and the laws of metrics.md 4.1."""
import pytest

import telemt
from telemt import ME_TOTALS, Counters, MeCounters, Observations, Reason, classify_stranger, format_observations


def test_bad_classes_add_up():
    counters = Counters()
    for reason in (Reason.BAD_DIGEST, Reason.BAD_DIGEST, Reason.TLS_REPLAY):
        counters.bad(reason)
    assert counters.connections_bad_total == sum(counters.bad_by_class.values()) == 3
    assert counters.bad_by_class[Reason.BAD_DIGEST] == 2


def test_failures_add_up_and_timeouts_agree():
    counters = Counters()
    counters.failed(Reason.TIMEOUT, "direct_mtproto")
    counters.failed(Reason.EOF, "first_packet_prelude")
    assert sum(counters.failures_by_class.values()) == sum(counters.failures_by_stage.values()) == 2
    assert counters.handshake_timeouts_total == counters.failures_by_class[Reason.TIMEOUT] == 1


def test_a_closed_gate_stands_still():
    counters = Counters()
    counters.accepted()
    counters.enabled = False
    counters.accepted()
    counters.bad(Reason.BAD_HEADER)
    counters.failed(Reason.TIMEOUT, "direct_mtproto")
    counters.attempt()
    counters.hard_error()
    counters.cycle(True, 1, 5)
    assert (counters.connections_total, counters.connections_bad_total, counters.handshake_timeouts_total) == (1, 0, 0)
    assert (counters.connect_attempt_total, counters.connect_success_total, counters.connect_failfast_hard_error_total) == (0, 0, 0)
    assert not counters.bad_by_class and counters.connect_attempts == [0, 0, 0, 0]


@pytest.mark.parametrize(("attempts", "bucket"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (99, 3)])
def test_attempt_buckets(attempts, bucket):
    counters = Counters()
    counters.cycle(False, attempts, 0)
    assert counters.connect_attempts[bucket] == 1 and counters.connect_fail_total == 1


@pytest.mark.parametrize(("duration_ms", "bucket"), [(0, 0), (100, 0), (101, 1), (500, 1), (501, 2), (1000, 2), (1001, 3)])
@pytest.mark.parametrize("ok", [True, False])
def test_duration_buckets(duration_ms, bucket, ok):
    counters = Counters()
    counters.cycle(ok, 1, duration_ms)
    hit, other = counters.connect_success_ms, counters.connect_fail_ms
    if not ok:
        hit, other = other, hit
    assert hit[bucket] == sum(hit) == 1 and sum(other) == 0


# -- the middle end ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("level", "normal", "debug"), [("silent", 0, 0), ("normal", 2, 0), ("debug", 2, 2)])
def test_a_level_counts_its_classes(level, normal, debug):
    counters = Counters()
    counters.gate(True, level)
    counters.me.count("reader_eof_total", 2)
    counters.me.count("keepalive_sent_total", 2)
    assert (counters.me.totals["reader_eof_total"], counters.me.totals["keepalive_sent_total"]) == (normal, debug)


def test_a_lowered_level_keeps_what_was_counted():
    counters = Counters()
    counters.me.count("desync_total")
    counters.gate(False, "silent")
    counters.me.count("desync_total")
    assert counters.me.totals["desync_total"] == 1


def test_a_name_that_is_not_in_the_table_is_an_error():
    with pytest.raises(KeyError):
        MeCounters().count("keepalive_total")


def test_handshake_errors_by_code():
    me = MeCounters()
    for code in (-1, 7, -1):
        me.handshake_rejected(code)
    assert me.error_codes == {-1: 2, 7: 1} and me.totals["handshake_reject_total"] == 3
    me.level = 0
    me.handshake_rejected(9)
    assert 9 not in me.error_codes
    me.level = 1
    for code in range(100, 300):               # a peer that invents codes
        me.handshake_rejected(code)
    me.handshake_rejected(7)
    assert len(me.error_codes) == 64 and me.error_codes[7] == 2 and me.totals["handshake_reject_total"] == 204


@pytest.mark.parametrize(("frames", "bucket"), [(0, "0"), (1, "1_2"), (2, "1_2"), (3, "3_10"), (10, "3_10"), (11, "gt_10")])
def test_desync_buckets(frames, bucket):
    me = MeCounters()
    me.desync(frames, full=frames % 2 == 0)
    assert me.totals[f"desync_frames_bucket_{bucket}"] == me.totals["desync_total"] == 1
    assert me.totals["desync_full_logged_total"] + me.totals["desync_suppressed_total"] == 1


def test_a_full_queue_is_the_high_profile():
    me = MeCounters()
    me.queue_full()
    assert me.totals["route_drop_queue_full_total"] == me.totals["route_drop_queue_full_high_total"] == 1
    assert me.totals["route_drop_queue_full_base_total"] == 0


def test_the_table_names_each_total_once():
    names = " ".join(ME_TOTALS.values()).replace("!", "").split()
    assert len(names) == len(set(names)) == len(MeCounters().totals)


# -- who knocked


@pytest.mark.parametrize(("head", "kind"), [
    (b"GET / HTTP/1.1", "HTTP"), (b"POST /", "HTTP"), (b"HEAD /", "HTTP"), (b"PUT /", "HTTP"), (b"DELETE /", "HTTP"),
    (b"OPTIONS *", "HTTP"),
    (b"PATCH /", "HTTP"), (b"CONNECT a:1", "HTTP"), (b"TRACE /", "HTTP"), (b"PRI * HTTP/2.0", "HTTP"), (b"GET ", "port-scanner"),
    (b"DELE", "port-scanner"), (b"\x16\x03\x01\x02", "TLS-scanner"), (b"\x16\x03\x01", "port-scanner"),
    (b"\x16\x04\x01\x02" + bytes(60), "unknown"),
    (b"SSH-", "SSH"), (b"SSH-2.0-OpenSSH", "SSH"), (b"", "port-scanner"), (b"x" * 9, "port-scanner"), (b"x" * 10, "unknown"),
])
def test_class_of_a_stranger(head, kind):
    assert classify_stranger(head) == kind


def test_observations_are_counted_sorted_and_forgotten():
    seen = Observations()
    assert format_observations(seen.rows()) == "empty\n" and seen.oldest_at() == float("inf")
    for at, kind, ip in [(0, "TLS-scanner", "2001:db8::1"), (1, "HTTP", "198.51.100.7"), (2, "HTTP", "203.0.113.9"),
                         (3, "HTTP", "203.0.113.9"),
                         (4, "TLS-scanner", "2001:db8::1"), (5, "HTTP", "192.0.2.1"), (6, "other", "192.0.2.1")]:
        seen.note(kind, ip, at, 600)
    assert format_observations(seen.rows()) == ("[HTTP]\n203.0.113.9-2\n192.0.2.1-1\n198.51.100.7-1\n[TLS-scanner]\n2001:db8::1-2\n"
                                                "[other]\n192.0.2.1-1\n")
    assert seen.oldest_at() == 1               # by the last try: 2001:db8::1 came again
    seen.compact()
    assert seen.oldest_at() == 1 and len(seen) == 5
    seen.forget(604, 600)
    assert [row[:2] for row in seen.rows()] == [("TLS-scanner", "2001:db8::1"), ("HTTP", "192.0.2.1"), ("other", "192.0.2.1")]
    seen.forget(700, 600)
    assert not seen.rows()


def test_observations_are_bounded(monkeypatch):
    monkeypatch.setattr(telemt, "OBSERVATIONS_MAX", 3)
    seen = Observations()
    for n, ip in enumerate("abcad"):
        seen.note("HTTP", ip, n, 600)
    assert seen.rows() == [("HTTP", "c", 1), ("HTTP", "a", 2), ("HTTP", "d", 1)] and len(seen) == 3


def test_numbers_move_and_stay_what_they_are():
    counters = telemt.Counters()
    table = counters.bad_by_class
    counters.connections_total, table[telemt.Reason.EOF], table[telemt.Reason.BAD_DIGEST] = 100_000, 2000, 3000
    number = counters.connections_total
    counters.compact()
    assert counters.connections_total == number and counters.connections_total is not number
    assert counters.bad_by_class is table == {telemt.Reason.EOF: 2000, telemt.Reason.BAD_DIGEST: 3000}
