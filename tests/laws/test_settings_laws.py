"""Properties of room 2: whatever stands in a file, it is accepted or it is a ConfigError; what is accepted stays as it is."""
from __future__ import annotations

import datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

import telemt
from telemt import ConfigError, Key, Settings

SECRET = "00112233445566778899aabbccddeeff"
WORDS = st.sampled_from(["", " ", "a", "a.example", "10.0.0.1", "::1", "10.0.0.0/8", "1.2.3.4:443", "[::1]:1", "h:1:1.2.3.4", SECRET,
                         "*", "https://a/", "2027-01-01T00:00:00Z", "direct", "socks5", "shadowsocks", "ttl", "é", "/run/x"])
NUMBERS = st.sampled_from([0, 1, 2, 4, 6, 9, 10, 32, 90, 300, 1000, 4096, 65535, 70000, -1, 2**31, 2**63 - 1])
NATURAL = NUMBERS.filter(lambda n: n >= 0)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.booleans() | NUMBERS | st.integers() | st.floats() | WORDS | st.text(max_size=8) | st.datetimes() | st.dates() | st.times()
    | st.datetimes(timezones=st.just(datetime.UTC)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.text(max_size=6), inner, max_size=3), max_leaves=5)
PLAIN = {                                 # Kind.name -> values of that type
    "bool": st.booleans(), "u8": st.integers(0, 40), "u16": st.integers(0, 65535), "u32": st.integers(0, 2**32 - 1),
    "u64": NATURAL, "usize": NATURAL, "int": st.integers(16, 1000), "f32": st.floats(0, 1),
    "str": WORDS, "ip": st.ip_addresses().map(str), "cidr": st.sampled_from(["10.0.0.5/8", "::1", "fd00::/8", "1.2.3.4"]),
    "time": st.datetimes(timezones=st.just(datetime.UTC)) | st.just("2027-01-01 00:00:00 +01:00"),
    '"*" or [str]': st.just("*") | st.lists(WORDS),
}


def values_of(key: Key) -> st.SearchStrategy[Any]:
    name = key.kind.name
    if key.table is not None:
        one = table_of(key.table)
        return st.lists(one, max_size=3) if key.many else one
    if name in PLAIN:
        return PLAIN[name]
    if name.startswith("["):
        return st.lists(PLAIN[name[1:-1]], max_size=4)
    if name.startswith("{name: "):
        return st.dictionaries(WORDS, PLAIN[name[7:-1]], max_size=3)
    if name.startswith("{dc: "):
        return st.dictionaries(st.sampled_from(["2", "-2", "203"]), WORDS | st.lists(WORDS, max_size=2), max_size=3)
    return st.sampled_from(name.split())                   # an enum


def table_of(cls: type[Any]) -> st.SearchStrategy[dict[str, Any]]:
    keys = cls.members
    required = {name: values_of(key) for name, key in keys.items() if key.required}
    return st.fixed_dictionaries(required, optional={name: values_of(key) for name, key in keys.items() if not key.required})


TYPED = st.deferred(lambda: table_of(Settings))
FEW = st.lists(st.sampled_from([path for path in telemt.KEYS if "[]" not in path]), max_size=6)


@st.composite
def harmless(draw: st.DrawFn) -> dict[str, Any]:
    """Documents with good users and some keys of the right type: most of them load."""
    document: dict[str, Any] = {"access": {"users": {"alice": SECRET}}}
    for path in draw(FEW):
        if not path.startswith("access.users") and path != "access":
            put(document, path, draw(values_of(telemt.KEYS[path])))
    return document


def put(document: dict[str, Any], path: str, value: Any) -> None:
    *tables, name = path.split(".")
    for table in tables:
        document = document.setdefault(table, {})
    document[name] = value


def load(document: dict[str, Any]) -> telemt.Loaded | None:
    """Return None for a ConfigError; anything else that is raised fails the test."""
    try:
        return telemt.parse_settings(document, telemt.Draws(lambda: 1500))
    except ConfigError as error:
        assert str(error)
        return None


def written(table: Any) -> dict[str, Any]:
    """The document that says explicitly what `table` holds."""
    document = {}
    for name, key in table.members.items():
        value = getattr(table, name)
        if key.table is not None:
            document[name] = [written(entry) for entry in value] if key.many else written(value)
        elif value is not None:
            document[name] = telemt.as_json(value)
    return document


@given(TYPED)
def test_documents_of_the_right_types(document: dict[str, Any]) -> None:
    load(document)


@given(harmless(), st.sampled_from(list(telemt.KEYS)), ANYTHING)
def test_one_key_holds_anything(document: dict[str, Any], path: str, value: Any) -> None:
    array, _, name = path.partition("[].")
    put(document, array, [{"type": "direct", "ip": "::1", name: value}] if name else value)
    load(document)


@given(ANYTHING)
def test_the_document_is_anything(value: Any) -> None:
    if isinstance(value, dict):
        load(value)


@given(harmless())
def test_what_was_loaded_loads_again_unchanged(document: dict[str, Any]) -> None:
    first = load(document)
    if first is not None:
        second = load(written(first.settings))
        assert second is not None and telemt.diff_settings(first.settings, second.settings) == ()
        assert second.unknown == {}


@given(harmless(), st.dictionaries(st.from_regex(r"q[a-z]{1,8}", fullmatch=True), ANYTHING, min_size=1, max_size=30),
       st.sampled_from(["", "general", "server.api"]))
def test_unknown_keys_change_nothing(document: dict[str, Any], strange: dict[str, Any], path: str) -> None:
    before = load(document)
    for name, value in strange.items():
        put(document, f"{path}.{name}".lstrip("."), value)
    after = load(document)
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        assert telemt.diff_settings(before.settings, after.settings) == ()
        assert after.unknown[path][-len(strange):] == tuple(strange)
        assert len(after.warnings) == len(before.warnings) + 1


SAMPLE = f"""\
show_link = ["alice"]   # why
include = "other"
[general]
fast_mode = false
ad_tag = '{"f" * 32}'
[server]
listeners = [{{ ip = "::" }}, {{ ip = "1.2.3.4", announce = \"\"\"a
include = "no"
\"\"\" }}]
[access.users]
alice = "{SECRET}"
"b c" = "{SECRET}"
[access.user_expirations]
alice = 2027-01-01T00:00:00Z
[[upstreams]]
type = "socks5"
address = "h:1"
[dc_overrides]
203 = ["1.2.3.4:443", ""]
"""
PIECES = st.sampled_from(['"', "'", '"""', "'''", "\\", "#", "=", "\n", "\r\n", "[", "]", "[[", "{", "}", ",", ".", "-", "0",
                          "99999999999999999999", "1e999", "nan", "\0", "\ufeff", "include = \"other\"\n", "true", " ", "é", "\x7f",
                          "2027-01-01", "_", "\ud800"])


@given(st.lists(st.tuples(st.integers(0, len(SAMPLE)), st.integers(0, 12), PIECES | st.text(max_size=3)), min_size=1, max_size=6))
def test_a_damaged_file_is_a_config_error_or_loads(edits: list[tuple[int, int, str]]) -> None:
    text = SAMPLE
    for at, removed, inserted in edits:
        text = text[:at] + inserted + text[at + removed:]
    try:
        expanded, _ = telemt.expand_includes(text, "/main", lambda including, wanted: ("/other", "default_dc = 3"))
        load(telemt.parse_document(expanded))
    except ConfigError:
        pass


@given(st.text(alphabet="\"'\\#=ab \n", max_size=60))
def test_text_without_include_lines_is_not_touched(text: str) -> None:
    def read(including: str, wanted: str) -> tuple[str, str]:
        raise AssertionError(wanted)
    assert telemt.expand_includes(text, "/main", read) == (text, ())


@given(st.lists(st.integers(0, SAMPLE.count("\n") - 1), min_size=2, max_size=2))
def test_a_part_moved_into_a_file_of_its_own_reads_the_same(cut: list[int]) -> None:
    lines = SAMPLE.replace('include = "other"\n', "").split("\n")
    low, high = sorted(cut)
    inside = next(index for index, line in enumerate(lines) if '"""a' in line)
    if low in (inside + 1, inside + 2):                    # the include line itself would be inside the string
        return
    outer = "\n".join([*lines[:low], "include = part", *lines[high:]])
    expanded, paths = telemt.expand_includes(outer, "/main", lambda including, wanted: (wanted, "\n".join(lines[low:high])))
    assert paths == ("part",)
    expected = lines if low != high else [*lines[:low], "", *lines[low:]]
    assert expanded.split("\n") == expected


@given(harmless(), harmless())
def test_a_reload_takes_every_hot_key_and_no_other_and_names_each(before: dict[str, Any], after: dict[str, Any]) -> None:
    old, new = load(before), load(after)
    if old is None or new is None:
        return
    running = telemt.merge_hot(old.settings, new.settings)
    changes = {change.path: change for change in telemt.diff_settings(old.settings, new.settings)}
    follows = changes.pop("censorship.mask_host", None)                      # may wait for a tls_domain: has a test of its own
    hot = {path for path, change in changes.items() if change.reload in (telemt.Reload.HOT, telemt.Reload.HOT_OURS)}
    taken = {change.path for change in telemt.diff_settings(old.settings, running)} - {"censorship.mask_host"}
    assert taken == hot
    assert {change.path for change in telemt.diff_settings(running, new.settings)} - {"censorship.mask_host"} == set(changes) - hot
    assert telemt.merge_hot(running, new.settings) == running              # once is enough
    told = telemt.describe_hot(old.settings, new.settings)
    silent = {path for path in hot if path in telemt._UNTOLD or path == "general.update_every"}
    assert bool(told) or not hot - silent or follows
    assert bool(telemt.describe_restart(old.settings, new.settings)) == any(
        change.reload in (telemt.Reload.RESTART, telemt.Reload.RESTART_OURS) for change in changes.values())
    assert telemt.describe_hot(new.settings, new.settings) == telemt.describe_restart(new.settings, new.settings) == []
