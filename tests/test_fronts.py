"""Room 18, fronts: probes, the schedule of fetches, files, key shares.  The mask host is a socket in the test's hand, the clock too."""
import functools
import json
import os
import random
import stat

import pytest

import telemt
from telemt import FrontProfile, FrontProfiles, LogBook, RouteError
from tests.cases import TestLoop, read_all, settings_of, tcp_pair
from tests.test_faketls import answer, dissect, is_grease, server_hello, tls_record

NOW = 1_800_000_000.0


class Asked:
    """One connection of a probe: `wire` is the mask host's end."""

    def __init__(self, loop, done):
        self.loop, self.done, self.aborted, self.wire = loop, done, False, None

    def accept(self):
        near, self.wire = tcp_pair()
        self.done(telemt.Stream(self.loop, near))

    def refuse(self, text="IO error: Connection refused (os error 111)"):
        self.done(RouteError(text, code=111))

    def abort(self):
        self.aborted = True


class Bench:
    """FrontProfiles with everything around it."""

    def __init__(self, folder, text="", start=True, **censorship):
        self.loop, self.folder, self.log = TestLoop(), folder, []
        self.loop.offload = self.offload
        keys = {"tls_domain": "a.example", "tls_front_dir": str(folder), **censorship}
        self.settings = settings_of("[censorship]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()) + text)
        self.asked, self.taken, self.targets, self.now_wall, self.writes = [], [], [], NOW, []
        self.rng = random.Random(7)
        LogBook.sink, LogBook.threshold = self.note, telemt.Level.DEBUG
        self.fronts = FrontProfiles(self.settings, self.loop, lambda: self.rng.randbytes(32), self.rng.randbytes, self.connect,
                                    lambda: self.now_wall)
        if start:
            self.fronts.start()
            self.turn()

    def note(self, level, target, text):
        self.log.append((level.name, text))

    def connect(self, settings, done):
        self.targets.append(settings.censorship.mask_host)
        self.asked.append(Asked(self.loop, done))
        return self.asked[-1]

    def offload(self, work, done):
        self.writes.append(work)
        try:
            result = work()
        except OSError as error:
            result = error
        self.loop.defer(functools.partial(done, result))

    def turn(self, seconds=0.0):
        self.now_wall += seconds
        self.loop.turn(seconds)
        self.loop.settle()

    def take(self):
        """The oldest connection nobody has dealt with."""
        self.taken.append(self.asked.pop(0))
        return self.taken[-1]

    def answer(self, data, hang_up=False):
        """Serve one probe with `data`; returns its first bytes."""
        asked = self.take()
        asked.accept()
        self.loop.settle()
        opening, _ = read_all(asked.wire)
        asked.wire.sendall(data)
        if hang_up:
            asked.wire.close()
        self.loop.settle()
        self.turn(0.5)
        return opening

    def fetch(self, *answers):
        for data in answers:
            self.answer(data)

    def texts(self, level="WARN"):
        return [text for name, text in self.log if name == level]

    @property
    def next_s(self):
        """Seconds until the loop wakes for the fronts."""
        return min(timer.at for timer in self.loop._timers if timer.callback) - self.loop.now

    def profile(self, name="a.example"):
        return self.fronts._fronts[name].profile

    def dispose(self):
        self.fronts.close()
        for asked in self.asked + self.taken:
            if asked.wire is not None:
                asked.wire.close()
        self.loop.settle()
        assert set(self.loop.handlers) == {self.loop.mailbox.fd}, "a probe left its stream behind"
        self.loop.dispose()
        LogBook.sink, LogBook.threshold = None, telemt.Level.ERROR + 1


@pytest.fixture
def bench(tmp_path):
    made = []

    def make(**more):
        made.append(Bench(tmp_path / "tlsfront", **more))
        return made[-1]

    yield make
    for one in made:
        one.dispose()


# -- a fetch


def test_three_probes_make_a_profile_and_a_file(bench):
    b = bench()
    hello = b.answer(answer(2600, suite=0x1302, order=(51, 43)))
    _, extensions, _ = dissect(hello)
    assert dict(extensions)[0] == b"\0\x0c\0\0\x09a.example" and is_grease(extensions[0][0])
    b.fetch(answer(27, 2574), answer(2602, suite=0x1303))
    assert b.profile() == FrontProfile((2600, 2601, 2602), 0x1303, 29, (43, 51), b.profile().fetched_wall, "probe", host="a.example:443")
    assert not b.asked and not b.texts() and ("DEBUG", "TLS cache updated domain=a.example len=2602") in b.log
    path = b.folder / "a.example.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(b.folder) == ["a.example.json"]
    document = json.loads(path.read_bytes())
    assert document["profile"]["flights"] == [2600, 2601, 2602] and document["server_hello_template"]["cipher_suite"] == [0x13, 3]
    b.turn(5.0)
    assert 14_395 <= b.next_s <= 28_795


def test_a_host_that_prefers_the_hybrid_group_is_asked_without_it_too(bench):
    """OpenSSL adds its list of groups to the flight where the client did not offer the best one: 10 bytes more."""
    b = bench()
    groups = [telemt.parse_client_hello(b.answer(data)).groups for data in (
        answer(2600, group=4588), answer(2601, group=4588, suite=0x1303), answer(2611))]
    assert groups == [{29, 4588}, {29, 4588}, {29}]
    assert b.profile() == FrontProfile((2600, 2601), 0x1303, 4588, (43, 51), b.profile().fetched_wall, "probe", (2611,), "a.example:443")
    assert {b.fronts.shape(None, True).size for _ in range(40)} == {2600, 2601} and b.fronts.shape(None, False).size == 2611
    again = Bench(b.folder)
    assert again.profile() == b.profile()._replace(source="file", fetched_wall=float(int(b.profile().fetched_wall)))
    again.dispose()


def test_a_host_that_has_nothing_but_the_hybrid_group(bench):
    b = bench()
    b.fetch(answer(2600, group=4588), answer(2601, group=4588), tls_record(0x15, b"\2\x28"))
    assert (b.profile().flights, b.profile().plain) == ((2600, 2601), ()) and not b.texts()
    assert b.fronts.shape(None, False).size in (2600, 2601)


def test_a_whole_answer_counts_when_the_host_hangs_up_or_goes_on_in_pieces(bench):
    b = bench()
    b.answer(answer(2600), hang_up=True)
    asked = b.take()
    asked.accept()
    b.loop.settle()
    whole = answer(500, 600)
    for at in range(0, len(whole), 300):       # never silent for 400 ms, three seconds in all
        asked.wire.sendall(whole[at:at + 300])
        b.turn(0.39)
    b.turn(0.5)
    b.answer(answer(2601))
    assert b.profile().flights == (2600, 1100, 2601)


def test_silence_inside_a_record_is_waited_out(bench):
    b = bench()
    asked = b.take()
    asked.accept()
    b.loop.settle()
    whole = answer(100, 2000)
    asked.wire.sendall(whole[:-500])
    b.turn(1.0)
    assert not b.asked, "still the first probe"
    asked.wire.sendall(whole[-500:])
    b.turn()
    b.turn(0.41)
    assert len(b.asked) == 1
    b.fetch(answer(2100), answer(2100))
    assert b.profile().flights == (2100,) * 3


def test_later_probes_may_fail(bench):
    b = bench()
    b.answer(answer(2600))
    b.take().refuse()
    b.turn()
    b.answer(tls_record(0x15, b"\2\x28"))
    assert b.profile().flights == (2600,) and not b.texts()


@pytest.mark.parametrize(("reply", "reason"), [
    (tls_record(0x15, b"\2\x28"), "alert 40"), (answer(draw=telemt._RETRY_RANDOM, share=b"\0\x17"), "hello retry"),
    (answer(100, suite=0xC02F, order=()), "no TLS 1.3"), (b"SSH-2.0-x\r\n", "no TLS 1.3"), (os.urandom(0) + b"\xff" * 5000, "no TLS 1.3"),
    (answer(), "timeout"), (answer()[:50], "timeout"),
])
def test_an_answer_that_cannot_be_used(bench, reply, reason):
    b = bench()
    before = b.profile()
    b.answer(reply)
    b.turn(5.0)
    assert f"TLS emulation initial fetch failed domain=a.example error={reason}" in b.texts()
    assert b.profile() == before and not b.writes
    assert len(b.asked) <= 1


@pytest.mark.parametrize("hang_up", [True, False])
def test_a_host_that_cannot_take_the_large_hello_is_asked_with_a_small_one(bench, hang_up):
    b = bench()
    large = b.answer(b"", hang_up=hang_up)
    b.turn(5.0)
    small = b.answer(answer(1500))
    assert telemt.parse_client_hello(large).groups == {29, 4588} and telemt.parse_client_hello(small).groups == {29}
    assert telemt.parse_client_hello(b.answer(answer(1500))).groups == {29}
    b.fetch(answer(1500))
    assert b.profile().flights == (1500,) * 3 and not [text for text in b.texts() if "failed" in text]


def test_small_hello_fails_too(bench):
    b = bench()
    b.answer(b"", hang_up=True)
    b.answer(b"", hang_up=True)
    assert b.texts() == ["TLS emulation initial fetch failed domain=a.example error=closed"] and not b.asked


def test_a_reset_is_an_end(bench):
    b = bench()
    for _ in range(2):
        asked = b.take()
        asked.accept()
        b.loop.settle()
        asked.wire.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")      # SO_LINGER 1, 0
        asked.wire.close()
        b.turn()
    assert b.texts() == ["TLS emulation initial fetch failed domain=a.example error=closed"]


@pytest.mark.parametrize(("version", "header"), [(0, b""), (1, b"PROXY UNKNOWN\r\n"), (2, b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")])
def test_proxy_header_stands_before_the_hello(bench, version, header):
    b = bench(mask_proxy_protocol=version)
    opening = b.answer(answer(100))
    assert opening.startswith(header + b"\x16\3\1") and len(dissect(opening[len(header):])[1]) == 18


def test_a_flight_above_what_clients_take(bench):
    b = bench()
    b.fetch(answer(16_000), answer(16_001), answer(16_002))
    assert b.texts() == ["front flight of 16002 bytes is more than clients accept; using 10240 domain=a.example"]
    assert b.fronts.shape(None).size == 10_240 and b.profile().flights == (16_000, 16_001, 16_002)
    b.turn(30_000.0)
    b.fetch(*(answer(10_000, 7000),) * 3)
    assert b.profile().flights == (17_000,) * 3 and len(b.texts()) == 1, "once per domain"


def test_a_host_that_does_not_know_the_name(bench):
    b = bench()
    b.fetch(answer(3000), answer(3000), answer(3000))
    default = b.fronts._primary._default
    b.turn(30_000.0)
    b.answer(tls_record(0x15, b"\2\x70"))
    assert b.texts() == ["TLS emulation refresh failed domain=a.example error=alert 112", "front server does not know a.example"]
    assert b.profile() == default and 12 <= b.next_s <= 18


# -- the schedule


def test_failures_without_a_profile_back_off(bench):
    b = bench()
    pauses = []
    for _ in range(9):
        b.take().refuse()
        b.turn()
        b.turn(0.0)
        pause = min(timer.at for timer in b.loop._timers if timer.callback and timer.callback.__func__ is telemt.Front._on_due) - b.loop.now
        pauses.append(pause)
        b.turn(pause)
    for pause, middle in zip(pauses, (15, 30, 60, 120, 240, 480, 900, 900, 900), strict=True):
        assert 0.8 * middle <= pause <= 1.2 * middle
    assert len(set(pauses)) == 9
    said = b.texts()
    assert said.count("TLS emulation initial fetch failed domain=a.example error=IO error: Connection refused (os error 111)") == 9
    assert said.count("TLS-front fetch not ready within timeout; using cache/default fake cert fallback domain=a.example "
                      "timeout_secs=5 fake_cert_len=2048") == 1


def test_failures_with_a_profile_keep_it(bench):
    b = bench()
    b.fetch(answer(3000), answer(3001), answer(3002))
    measured = b.profile()
    b.turn(30_000.0)
    for number in range(1, 5):
        b.take().refuse("Connection timeout to 192.0.2.1:443")
        b.turn()
        assert b.next_s == 900 and b.profile() == measured
        assert len([text for text in b.texts() if "three fetches" in text]) == (number >= 3)
        b.turn(900.0)
    assert "TLS emulation refresh failed domain=a.example error=Connection timeout to 192.0.2.1:443" in b.texts()
    assert "TLS front profile of a.example is 9 h old: three fetches in a row failed" in b.texts()
    b.fetch(answer(4000), answer(4000), answer(4000))
    assert b.profile().flights == (4000,) * 3 and 14_400 <= b.next_s <= 28_800


def test_at_most_four_domains_at_once(bench):
    b = bench(tls_domains=[f"{letter}.example" for letter in "bcdefgh"])
    assert len(b.asked) == 4
    b.take().refuse()
    b.turn()
    assert len(b.asked) == 4
    for _ in range(6):
        b.take().refuse()
        b.turn()
    assert len(b.asked) == 1
    b.take().refuse()
    b.turn()
    assert not b.asked and len(b.fronts._running) == 0


def test_no_warning_after_five_seconds_where_a_profile_is(bench):
    b = bench(tls_domains=["b.example"])
    b.asked.sort(key=lambda asked: 0)
    b.fetch(answer(3000))
    first = [front for front in b.fronts._fronts.values() if front.fetch]
    assert len(first) == 2
    b.turn(5.0)
    assert len([text for text in b.texts() if "not ready" in text]) == 2
    assert len([timer for timer in b.loop._timers if timer.callback]) < 5


@pytest.mark.parametrize("text", ["[general.modes]\ntls = false\nsecure = true\n", ""])
def test_no_fetch_where_nobody_asks_for_it(bench, text):
    b = bench(text=text, **({} if text else {"tls_emulation": False}))
    b.turn(100.0)
    assert not b.asked and not b.log and not [timer for timer in b.loop._timers if timer.callback]


def test_an_idle_proxy_wakes_only_for_the_refresh(bench):
    b = bench()
    b.fetch(answer(3000), answer(3000), answer(3000))
    b.turn(5.0)
    assert len([timer for timer in b.loop._timers if timer.callback]) == 1 and b.next_s > 14_000


def test_an_error_of_ours_costs_one_fetch(bench, monkeypatch):
    b = bench()
    monkeypatch.setattr(telemt.FlightReader, "feed", lambda self, data: 1 // 0)
    b.answer(answer(3000))
    monkeypatch.undo()
    assert "TLS emulation initial fetch failed domain=a.example error=internal error" in b.texts()
    b.turn(20.0)
    b.fetch(answer(3000), answer(3000), answer(3000))
    assert b.profile().flights == (3000,) * 3
    monkeypatch.setattr(telemt, "profile_of", lambda hello: 1 // 0)
    b.turn(30_000.0)
    b.fetch(*(answer(3100),) * (len(b.asked)))
    monkeypatch.undo()
    assert b.profile().flights == (3000,) * 3 and b.fronts._running == set() and b.next_s <= 900


# -- reload


def other(b, text):
    return settings_of(f'[censorship]\ntls_domain = "a.example"\ntls_front_dir = "{b.folder}"\n{text}')


def test_a_new_mask_host_is_measured_at_once_and_with_its_own_settings(bench):
    b = bench()
    b.fetch(answer(3000), answer(3000))
    running = b.asked[0]
    b.fronts.apply(other(b, 'mask_host = "other.example"\nmask_proxy_protocol = 1'))
    b.turn()
    assert running.aborted and b.asked.pop(0) is running
    assert b.targets[-1] == "other.example"
    assert b.answer(answer(4000)).startswith(b"PROXY UNKNOWN")
    b.fetch(answer(4000), answer(4000))
    assert b.profile().flights == (4000,) * 3 and b.targets[0] == "a.example"


@pytest.mark.parametrize("text", ["", "server_hello_delay_max_ms = 10", '[network]\ndns_overrides = ["b.example:443:192.0.2.1"]'])
def test_a_reload_that_does_not_concern_the_front_leaves_it_alone(bench, text):
    b = bench()
    b.fronts.apply(other(b, text))
    b.turn()
    assert len(b.asked) == 1 and not b.asked[0].aborted


def test_a_new_override_of_the_mask_host_is_a_new_target(bench):
    b = bench()
    b.fetch(answer(3000), answer(3000), answer(3000))
    b.fronts.apply(other(b, '[network]\ndns_overrides = ["A.example:443:192.0.2.1"]'))
    b.turn()
    assert len(b.asked) == 1


def test_modes_tls_switches_the_fetches(bench):
    b = bench()
    first = b.asked[0]
    off, on = other(b, "[general.modes]\ntls = false\nsecure = true"), other(b, "")
    b.fronts.apply(off)
    b.turn(100.0)
    assert first.aborted and b.asked == [first]
    b.fronts.apply(on)
    b.turn()
    assert len(b.asked) == 2
    b.asked.pop(0)
    b.fetch(answer(3000), answer(3000), answer(3000))
    b.fronts.apply(off)
    b.fronts.apply(on)
    b.turn(1.0)
    assert not b.asked, "measured a moment ago"
    b.turn(30_000.0)
    assert len(b.asked) == 1


# -- files


def store(folder, domain="a.example", age_s=0.0, flights=(2604, 2605), name=None, **change):
    folder.mkdir(exist_ok=True)
    profile = FrontProfile(flights, 0x1302, 4588, (51, 43), NOW - age_s)
    hello = telemt.parse_server_hello(server_hello(0x1302, 4588, order=(51, 43)))
    path = folder / f"{name or domain}.json"
    document = {**json.loads(telemt.build_front_file(domain, profile, hello)), **change}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))
    return path


def test_a_fresh_file_is_used_and_not_asked_again(bench, tmp_path):
    store(tmp_path / "tlsfront", age_s=3600.0)
    b = bench()
    assert b.fronts.shape("A.Example.").suite == 0x1302 and b.profile().source == "file" and not b.asked
    assert ("INFO", "Loaded TLS cache entries from disk count=1") in b.log
    assert any(14_400 - 3600 <= timer.at - b.loop.now <= 28_800 - 3600 for timer in b.loop._timers)
    b.turn(5.0)
    assert not b.texts()


@pytest.mark.parametrize(("host", "asked"), [("a.example:443", False), ("", False), ("b.example:443", True), ("unix:/x", True)])
def test_a_fresh_file_of_another_host_is_used_but_asked_again(bench, tmp_path, host, asked):
    """The operator chose another mask host and started again."""
    path = store(tmp_path / "tlsfront", age_s=60.0)
    document = json.loads(path.read_text())
    document["profile"]["host"] = host
    path.write_text(json.dumps(document))
    b = bench()
    assert b.profile().source == "file" and bool(b.asked) is asked


@pytest.mark.parametrize(("age_s", "used", "asked"), [
    (4 * 3600 + 1, True, True), (72 * 3600 + 1, True, True), (30 * 86_400 - 1, True, True), (30 * 86_400 + 1, False, True),
    (-86_400, True, False),
])
def test_age_of_a_file(bench, tmp_path, age_s, used, asked):
    store(tmp_path / "tlsfront", age_s=age_s)
    b = bench()
    assert (b.profile().source == "file", bool(b.asked)) == (used, asked)
    assert b.texts() == ([] if used else ["Skipping stale TLS cache entry (>72h) domain=a.example"])


def test_stale_files_are_fetched_before_recent_ones(bench, tmp_path):
    names = [f"{letter}.example" for letter in "abcdef"]
    for domain in names:
        store(tmp_path / "tlsfront", domain, age_s=100 * 3600.0 if domain in ("e.example", "f.example") else 5 * 3600.0)
    b = bench(tls_domains=names[1:])
    assert {front.domain for front in b.fronts._running} == {"e.example", "f.example", "a.example", "b.example"}


def test_a_file_of_the_reference_dates_from_its_mtime(bench, tmp_path):
    path = store(tmp_path / "tlsfront", profile=None)
    os.utime(path, (NOW - 100, NOW - 100))
    b = bench()
    assert b.profile() == FrontProfile((2605,), 0x1302, 4588, (51, 43), NOW - 100, "file") and not b.asked


def test_files_that_are_not_ours_to_use(bench, tmp_path):
    folder = tmp_path / "tlsfront"
    store(folder, "other.example", name="a.example")                        # another domain's
    store(folder, "../../etc/x", name="b.example")                          # nobody's
    store(folder, "foreign.example")                                        # not configured: not even opened
    (folder / "c.example.json").write_text("{ broken")
    (folder / "d.example.json").write_bytes(b" " * (telemt.FRONT_FILE_MAX + 1))
    (folder / "e.example.json").mkdir()
    os.mkfifo(folder / "f.example.json")
    (folder / "g.example.json").symlink_to("/nowhere")
    b = bench(tls_domains=[f"{letter}.example" for letter in "bcdefg"])
    assert {front.profile.source for front in b.fronts._fronts.values()} == {"default"}
    assert b.texts() == [f"Skipping TLS cache entry with invalid domain file='{folder}/b.example.json'"]
    assert (folder / "foreign.example.json").exists()


@pytest.mark.parametrize("domain", [
    "../escape.example", "a\\b.example", "..", "a b.example", "ä.example", "a_b.example", "x" * 255, "y" * 300])
def test_names_that_are_no_file_names(bench, tmp_path, domain):
    """Such a domain gets its profile, but a file only where the name leads nowhere else."""
    b = bench(tls_domains=[domain])
    if domain not in b.settings.censorship.tls_domains:
        assert "/" in domain or " " in domain, "the configuration drops only these"
        return
    while b.asked:
        b.answer(answer(3000))
    known = b.profile(telemt._front_key(domain)).source
    assert known == ("default" if len(domain) > 255 else "probe")
    inside = sorted(os.listdir(b.folder))
    assert inside in (["a.example.json"], ["...json", "a.example.json"]) and os.listdir(tmp_path) == ["tlsfront"]
    b.turn(10.0)
    assert [text for text in b.texts() if "write failed" in text] == (
        [f"TLS cache write failed domain={domain} error=[Errno 36] File name too long: '{b.folder}/{domain}.json.{os.getpid()}.new'"]
        if domain == "x" * 255 else [])


def test_a_write_error_is_told_once_and_leaves_nothing(bench, tmp_path):
    folder = tmp_path / "tlsfront"
    folder.mkdir()
    (folder / "a.example.json").mkdir()        # cannot be replaced by a file
    b = bench()
    for _ in range(2):
        b.fetch(answer(3000), answer(3000), answer(3000))
        b.turn(30_000.0)
    assert len(b.writes) == 2 and len(b.texts()) == 1
    assert b.texts()[0].startswith("TLS cache write failed domain=a.example error=[Errno 17]")
    assert os.listdir(folder) == ["a.example.json"] and b.profile().source == "probe"


def test_a_refresh_rewrites_the_file(bench):
    b = bench()
    b.fetch(answer(3000), answer(3000), answer(3000))
    b.turn(30_000.0)
    b.fetch(answer(4000), answer(4000), answer(4000))
    assert json.loads((b.folder / "a.example.json").read_bytes())["profile"]["flights"] == [4000] * 3


# -- shapes and shares


def test_unknown_names_get_the_shape_of_the_primary_domain(bench):
    b = bench(tls_domains=["B.example"])
    while b.asked:
        asked = b.asked[0]
        size = 5000 if b.fronts._fronts["b.example"].fetch and asked is b.fronts._fronts["b.example"].fetch._probe._dial else 3000
        b.answer(answer(size))
    assert {b.fronts.shape(name).size for name in ("b.EXAMPLE.", "b.example")} == {5000}
    assert {b.fronts.shape(name).size for name in ("", None, "c.example", "a.example", "ä")} == {3000}


def test_flight_size_is_drawn_once_per_domain_within_three_percent(bench):
    b = bench(tls_domains=["b.example"], fake_cert_len=3000, start=False)
    sizes = {b.fronts.shape(name).size for name in ("a.example", "A.EXAMPLE.", None, "unknown", "a.example")}
    assert len(sizes) == 1 and 2910 <= sizes.pop() <= 3090
    assert 2910 <= b.fronts.shape("b.example").size <= 3090


@pytest.mark.parametrize(("length", "size"), [(2048, 1500), (10, 64), (99_999, 10_240)])
def test_flight_size_without_emulation(bench, length, size):
    assert bench(tls_emulation=False, fake_cert_len=length, start=False).fronts.shape(None).size == size


def test_hybrid_share_is_a_ciphertext_and_a_key(bench):
    b = bench(start=False)
    first, second = b.fronts.share(4588), b.fronts.share(4588)
    assert len(first) == 1120 and first[:1088] != second[:1088] and len(b.fronts.share(29)) == 32


def test_stock_is_filled_when_idle_and_never_runs_dry(bench):
    b = bench(start=False)
    assert len(b.fronts._keys) == len(b.fronts._hybrids) == 0
    b.fronts.share(4588)
    b.loop.settle()
    assert (len(b.fronts._keys), len(b.fronts._hybrids)) == (64, 16)
    shares = {b.fronts.share(4588) for _ in range(100)}
    assert len(shares) == 100
    b.loop.settle()
    assert (len(b.fronts._keys), len(b.fronts._hybrids)) == (64, 16)


def test_stock_survives_an_error_of_its_maker():
    loop, made = TestLoop(), []

    def make():
        made.append(1)
        if len(made) == 3:
            raise MemoryError
        return b"x"

    stock = telemt.Stock(8, make, loop.when_idle)
    stock.take()
    loop.settle()
    assert len(stock) == 1
    stock.take()
    loop.settle()
    assert len(stock) == 8
    loop.dispose()


def test_ciphertexts_are_kept_only_while_a_profile_asks_for_them(bench):
    b = bench()
    b.fetch(answer(3000, group=4588), answer(3000, group=4588), answer(3000, group=4588))
    b.fronts.share(4588)
    b.loop.settle()
    assert len(b.fronts._hybrids) == 16
    b.turn(30_000.0)
    b.fetch(answer(3000), answer(3000), answer(3000))
    assert len(b.fronts._hybrids) == 0


# -- the way to the mask host


class FakeWay:
    def __init__(self, *args, **more):
        self.args, self.more, self.aborted = args, more, False

    def abort(self):
        self.aborted = True


class FakeRoute:
    def __init__(self, kind="direct", interface=None, bind=None):
        self.kind = kind
        self.entry = telemt.Upstream(type=kind, address=None, interface=interface, bind_addresses=bind, enabled=True)


@pytest.fixture
def way(monkeypatch):
    """Makes a FrontDial whose ways are in the test's hand: (dial, results, the direct way, upstream ways)."""
    loop = TestLoop()
    detours, direct, results = [], [], []

    class Upstreams:
        routes = ()

        def connect(self, targets, done, blame):
            detours.append(FakeWay(targets, done, blame=blame))
            return detours[-1]

    class Masks:
        resolver = telemt.Resolver(loop)

    Masks.loop = loop
    monkeypatch.setattr(telemt, "MaskDial", lambda *args: direct.append(FakeWay(*args)) or direct[-1])

    def make(text="", *routes):
        upstreams = Upstreams()
        upstreams.routes = routes
        settings = settings_of(f'[censorship]\nmask_host = "127.0.0.1"\n{text}' if "sock" not in text else f"[censorship]\n{text}")
        return telemt.FrontDial(Masks, upstreams, settings, results.append), results, direct, detours

    make.loop = loop
    yield make
    loop.dispose()


REFUSED = RouteError("IO error: Connection refused (os error 111)", code=111)


def test_a_direct_connection_is_handed_on(way):
    _, results, direct, detours = way("", FakeRoute("socks5"))
    near, far = tcp_pair()
    stream = telemt.Stream(way.loop, near)
    direct[0].args[-1](stream)
    assert results == [stream] and not detours
    stream.close()
    way.loop.settle()
    far.close()


@pytest.mark.parametrize(("text", "route", "error"), [
    ("", FakeRoute(), REFUSED), ('mask_unix_sock = "/tmp/sock"', FakeRoute("socks5"), REFUSED),
    ("", FakeRoute("socks5"), RouteError("Mask target is this proxy", hard=True)),
])
def test_no_detour_where_it_leads_nowhere(way, text, route, error):
    _, results, direct, detours = way(text, route)
    direct[0].args[-1](error)
    assert results == [error] and not detours


@pytest.mark.parametrize("route", [FakeRoute("socks4"), FakeRoute(interface="eth1"), FakeRoute(bind=("192.0.2.1",))])
def test_the_upstreams_are_the_second_way(way, route):
    dial, results, direct, detours = way("mask_port = 8443", route)
    direct[0].args[-1](REFUSED)
    assert detours[0].args[0] == [("127.0.0.1", 8443)] and detours[0].more == {"blame": False} and not results
    near, far = tcp_pair()
    stream = telemt.Stream(way.loop, near)
    detours[0].args[1](telemt.Connected(stream))
    assert results == [stream]
    dial.abort()
    stream.close()
    way.loop.settle()
    far.close()


def test_the_second_way_has_five_seconds(way):
    _, results, direct, detours = way("", FakeRoute("socks5"))
    direct[0].args[-1](REFUSED)
    way.loop.turn(5.0)
    assert results == [REFUSED] and detours[0].aborted


def test_a_detour_that_fails_tells_of_the_direct_way(way):
    _, results, direct, detours = way("", FakeRoute("socks5"))
    direct[0].args[-1](REFUSED)
    detours[0].args[1](RouteError("SOCKS5 refused"))
    assert results == [REFUSED]


def test_an_aborted_dial_calls_nobody_and_keeps_nothing(way):
    dial, results, direct, detours = way("", FakeRoute("socks5"))
    dial.abort()
    assert direct[0].aborted
    near, far = tcp_pair()
    direct[0].args[-1](telemt.Stream(way.loop, near))
    way.loop.settle()
    assert not results and read_all(far) == (b"", True)
    far.close()
