"""Room 5 of telemt_api: entries of [access.*] changed in the text; every other byte stays."""
from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping

import pytest

import telemt
from telemt_api import EditError, Layout, change_document, edit_texts, render_key, render_value, same_documents

A, B, NEW = "a" * 32, "b" * 32, "c" * 32
MAIN = "config.toml"

# Each layout has the users alice and bob; most have limits of alice.  A dict holds a main file with its includes.
USERS = f'[access.users]\nalice = "{A}"\nbob = "{B}"\n'
LAYOUTS: dict[str, str | dict[str, str]] = {
    "plain": f'{USERS}[access.user_max_tcp_conns]\nalice = 1\n',
    "no newline at the end": f'[access.user_max_tcp_conns]\nalice = 1\n[access.users]\nbob = "{B}"\nalice = "{A}"',
    "CRLF": f'[access.users]\r\nalice = "{A}"\r\nbob = "{B}"\r\n\r\n[access.user_max_tcp_conns]\r\nalice = 1\r\n',
    "CRLF without the last": f'[server]\r\nport = 1\r\n[access.users]\r\nalice = "{A}"\r\nbob = "{B}"',
    "mixed line ends": f'[access.users]\nalice = "{A}"\r\nbob = "{B}"\n[access.user_max_tcp_conns]\r\nalice = 1\n',
    "BOM": f'\ufeff{USERS}',
    "BOM before a comment": f'\ufeff# hello\n{USERS}[access.user_max_tcp_conns]\nalice = 1\n',
    "BOM before a dotted key": f'\ufeffaccess.users.alice = "{A}"\naccess.users.bob = "{B}"\n',
    "comments everywhere": f'# top\n[access.users] # users\n# alice is first\nalice = "{A}" # her\n  # bob\nbob = "{B}"\t#his\n# end\n',
    "a comment that looks like a header": f'[access.users]\nalice = "{A}"\n# [access.users]\n#bob = "x"\nbob = "{B}"\n',
    "a commented-out entry": f'[access.users]\n# alice = "{B}"\nalice = "{A}"\nbob = "{B}"\n[access.user_max_tcp_conns]\n# alice = 5\n',
    "blank lines": f'\n\n[access.users]\n\n\nalice = "{A}"\n\nbob = "{B}"\n\n\n[access.user_max_tcp_conns]\n\nalice = 1\n\n\n',
    "indented": f'[access]\n  [access.users]\n    alice = "{A}"\n    bob = "{B}"\n  [access.user_max_tcp_conns]\n\talice = 1\n',
    "no blanks": f'[access.users]\nalice="{A}"\nbob="{B}"\n[access.user_max_tcp_conns]\nalice=1\n',
    "many blanks": f'[ access . users ]\nalice   =    "{A}"   \nbob\t=\t"{B}"\t\n[ access.user_max_tcp_conns ]\nalice  =  1  \n',
    "quoted keys": f'["access"."users"]\n"alice" = "{A}"\n\'bob\' = "{B}"\n[access."user_max_tcp_conns"]\n\'alice\' = 1\n',
    "keys in literal quotes": f"['access'.'users']\n'alice' = '{A}'\n'bob' = '{B}'\n",
    "keys with escapes": f'[access.users]\n"\\u0061lice" = "{A}"\n"bo\\u0062" = "{B}"\n["acce\\u0073s".user_max_tcp_conns]\nalice = 1\n',
    "literal strings": f"[access.users]\nalice = '{A}'\nbob = '{B}'\n",
    "multi-line basic strings": f'[access.users]\nalice = """{A}"""\nbob = """\\\n  {B}"""\n',
    "multi-line literal strings": f"[access.users]\nalice = '''{A}'''\nbob = '''\n{B}'''\n",
    "dotted in access": f'[access]\nusers.alice = "{A}"\nusers.bob = "{B}"\nuser_max_tcp_conns.alice = 1\n',
    "dotted with blanks": f'[access]\nusers . alice = "{A}"\nusers. bob = "{B}"\nuser_max_tcp_conns .alice = 1\n',
    "dotted at the top": f'access.users.alice = "{A}"\naccess.users.bob = "{B}"\naccess.user_max_tcp_conns.alice = 1\n[server]\nport = 1\n',
    "dotted and quoted": f'"access"."users".alice = "{A}"\naccess.\'users\'.bob = "{B}"\n',
    "dotted and headers": f'[access]\nusers.alice = "{A}"\nusers.bob = "{B}"\n[access.user_max_tcp_conns]\nalice = 1\n',
    "inline users": f'[access]\nusers = {{ alice = "{A}", bob = "{B}" }}\nuser_max_tcp_conns = {{ alice = 1 }}\n',
    "inline without blanks": f'[access]\nusers={{alice="{A}",bob="{B}"}}\nuser_max_tcp_conns={{alice=1}}\n',
    "inline at the top": f'access.users = {{ alice = "{A}", bob = "{B}" }} # all\naccess.user_max_tcp_conns = {{ alice = 1 }}\n',
    "inline and comments": f'[access]\nusers = {{ alice = "{A}", bob = "{B}" }} # }} }} , = "\n# end\n',
    "inline empty limits": f'[access]\nusers = {{ alice = "{A}", bob = "{B}" }}\nuser_max_tcp_conns = {{}}\nuser_data_quota = {{  }}\n',
    "inline quoted": f'[access]\nusers = {{ "alice" = "{A}", \'bob\' = "{B}", "x }} y" = "{B}" }}\n',
    "inline all": f'access = {{ users = {{ alice = "{A}", bob = "{B}" }}, user_max_tcp_conns = {{ alice = 1 }}, replay_check_len = 9 }}\n',
    "inline dotted": f'access = {{ users.alice = "{A}", users.bob = "{B}", user_max_tcp_conns.alice = 1 }}\n',
    "inline in the middle": f'[access]\nreplay_check_len = 9\nusers = {{ bob = "{B}", alice = "{A}" }}\nx = 1\n[server]\n',
    "an empty table": f'{USERS}[access.user_max_tcp_conns]\n[access.user_data_quota]\n\n[server]\n',
    "an empty table at the end": f'{USERS}[access.user_max_tcp_conns]',
    "tables out of order": f'[access.user_max_tcp_conns]\nalice = 1\n[server]\nport = 1\n{USERS}',
    "tables between": f'{USERS}\n[general]\nfast_mode = true\n\n[access]\nreplay_check_len = 9\n',
    "arrays over lines": f'[server]\nmetrics_whitelist = [\n  "10.0.0.0/8", # ]\n  "::1", ]\n{USERS}',
    "arrays in arrays": f'[x]\ny = [[1, 2], [\n"]", \'[access.users]\'\n]]\n{USERS}',
    "arrays of inline tables": f'x = [{{a = "}}"}}, {{b = [1]}}]\n{USERS}',
    "headers in strings": f'[x]\ny = """\n[access.users]\nalice = "no"\n"""\nz = \'\'\'\n[access.users]\n\'\'\'\n'
                          f'{USERS}',
    "quotes at the end of strings": f'[x]\ny = """a"""""\nz = \'\'\'b\'\'\'\'\'\nw = "\\\\"\n{USERS}',
    "escaped quotes": f'[x]\ny = "\\"[access.users]\\" # = "\n[access.users]\nalice = "{A}"\nbob = "{B}" # "quoted"\n',
    "arrays of tables": f'[[upstreams]]\ntype = "direct"\n[[upstreams]]\ntype = "direct"\nweight = 2\n{USERS}',
    "arrays of tables behind": f'{USERS}[[server.listeners]]\nip = "::"\n\n[[server.listeners]]\nip = "::1"',
    "tables in arrays of tables": f'[[x]]\n[x.access.users]\nalice = "no"\n[[x]]\n[x.access.users]\nalice = "no"\n'
                                  f'{USERS}',
    "other tables called access": f'[x.access.users]\nalice = "no"\n[general]\naccess.users.alice = "no"\n{USERS}',
    "dates": f'{USERS}[access.user_expirations]\nalice = 2030-01-01 00:00:00Z\nbob = "2031-01-01T00:00:00Z"\n',
    "dates inline": f'[access]\nusers = {{ alice = "{A}", bob = "{B}" }}\nuser_expirations = {{ alice = 2030-01-01 00:00:00+02:00 }}\n',
    "numbers": f'[x]\na = 0xff\nb = 1_000\nc = -inf\nd = nan\ne = 1e6\n{USERS}',
    "unicode": f'[access.users]\nalice = "{A}" # ключ\n"иван" = "{B}"\nbob = "{B}"\n"🙂" = "{B}"\n'
               '[access.user_max_tcp_conns]\n"иван" = 3\nalice = 1\n',
    "names with dots": f'[access.users]\n"alice.b" = "{B}"\nalice = "{A}"\nbob = "{B}"\n[access.user_max_tcp_conns]\n"alice.b" = 3\n',
    "names of tables": f'[access.users]\nusers = "{B}"\naccess = "{B}"\nalice = "{A}"\nbob = "{B}"\n'
                       '[access.user_max_tcp_conns]\nusers = 3\n',
    "names of digits": f'[access.users]\n1 = "{B}"\n2-3 = "{B}"\nalice = "{A}"\nbob = "{B}"\n',
    "trailing blanks and tabs": f'[access.users]  \t\nalice = "{A}"  \nbob = "{B}"\t\n   \n\t\n',
    "form feeds in comments": f'[access.users]\n# \u2028 \u0085 line separators\nalice = "{A}"\nbob = "{B}"\n',
    "a header with a comment": f'[access.users] # [not.this]\nalice = "{A}"\nbob = "{B}"\n[access.user_max_tcp_conns]# x\nalice = 1\n',
    "only comments behind": f'{USERS}# one\n\n# two',
    "old and new tables": f'show_link = ["alice"]\n[general]\n[access]\nreplay_window_secs = 5\n{USERS}'
                          f'[access.user_enabled]\nalice = false\n[access.user_max_tcp_conns]\nalice = 1\nbob = 2\n',
    "include of users": {MAIN: 'include = "u.toml"\n[server]\nport = 1\n', "u.toml": f'{USERS}'},
    "include inside a table": {MAIN: '[access.users]\ninclude = "u.toml"\n[server]\nport = 1\n', "u.toml": f'alice = "{A}"\nbob = "{B}"\n'},
    "include leaves a table open": {MAIN: f'include = "u.toml"\nbob = "{B}"\n[server]\n',
                                    "u.toml": f'# users\n[access.users]\nalice = "{A}"\n'},
    "include of limits": {MAIN: f'{USERS}include = \'d/l.toml\' # limits\n',
                          "d/l.toml": '[access.user_max_tcp_conns]\r\nalice = 1'},
    "includes in includes": {MAIN: f'include="d/a.toml"\n[access.users]\nbob = "{B}"\nalice = "{A}"\n',
                             "d/a.toml": 'x = 1\ninclude = "b.toml"\n',
                             "d/b.toml": '[access.user_max_tcp_conns]\nalice = 1\n# end'},
    "includes with BOM": {MAIN: '\ufeffinclude = "u.toml"\n', "u.toml": f'\ufeff{USERS}'},
    "words that look like includes": {MAIN: f'includes = 1\n"include" = 2\n# include = "no"\n[x]\ninclude_me = """\ninclude = "no"\n"""\n'
                                            f'{USERS}'},
    "an empty include": {MAIN: f'[access.users]\ninclude = "e.toml"\nalice = "{A}"\nbob = "{B}"\n', "e.toml": ""},
}

CHANGES: dict[str, list[tuple[tuple[str, ...], str | int | bool | None]]] = {
    "replace": [(("access", "users", "alice"), NEW)],
    "add": [(("access", "users", "zoë b"), NEW)],
    "create": [(("access", "users", "eve"), NEW), (("access", "user_max_tcp_conns", "eve"), 7), (("access", "user_data_quota", "eve"), 0),
               (("access", "user_expirations", "eve"), "2030-01-01T00:00:00Z"), (("access", "user_enabled", "eve"), False)],
    "limit": [(("access", "user_max_tcp_conns", "alice"), 5)],
    "two limits": [(("access", "user_data_quota", "alice"), 1 << 40), (("access", "user_data_quota", "bob"), 3)],
    "no limit": [(("access", "user_max_tcp_conns", "alice"), None)],
    "delete": [(("access", table, "alice"), None) for table in ("users", "user_max_tcp_conns", "user_expirations", "user_enabled")],
    "delete the last line": [(("access", "users", "bob"), None)],
    "round": [(("access", "users", "eve"), NEW), (("access", "users", "eve"), None)],
}


def follow(including: str, line: str) -> str | None:
    wanted = telemt.include_target(line)
    return None if wanted is None else os.path.join(os.path.dirname(including), wanted)


def meaning(texts: Mapping[str, str]) -> dict[str, object]:
    """What the files mean to the program itself."""
    def read(including: str, wanted: str) -> tuple[str, str]:
        path = os.path.join(os.path.dirname(including), wanted)
        return path, texts[path]
    return telemt.parse_document(telemt.expand_includes(texts[MAIN], MAIN, read)[0])


def changed_lines(before: str, after: str) -> tuple[list[str], list[str]]:
    """(old lines, new lines) between the common beginning and the common end."""
    old, new = (text.removeprefix("\ufeff").splitlines(keepends=True) for text in (before, after))
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return old, new


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_law_of_the_editor(layout: str, change: str) -> None:
    """parse(edit(text)) == edit(parse(text)), one entry at a time, and no other line moves."""
    found = LAYOUTS[layout]
    texts = {MAIN: found} if isinstance(found, str) else dict(found)
    for path, value in CHANGES[change]:
        edited = edit_texts(texts, MAIN, follow, [(path, value)])
        assert same_documents(meaning(edited), change_document(meaning(texts), [(path, value)])), (path, edited)
        touched = [name for name in texts if texts[name] != edited[name]]
        assert len(touched) <= 1
        for name in touched:
            old, new = changed_lines(texts[name], edited[name])
            assert len(old) <= (2 if "multi-line" in layout else 1), (old, new)
            assert len(new) <= (4 if not old or not texts[name].endswith("\n") else 1), (old, new)
        texts = edited


def test_there_are_enough_layouts() -> None:
    assert len(LAYOUTS) >= 60
    for name, layout in LAYOUTS.items():
        texts = {MAIN: layout} if isinstance(layout, str) else layout
        users = meaning(texts)["access"]["users"]  # type: ignore[index]
        assert users.items() >= {"alice": A, "bob": B}.items(), name


def edited(text: str, *changes: tuple[str, str, str | int | bool | None]) -> str:
    return edit_texts({MAIN: text}, MAIN, follow, [(("access", table, name), value) for table, name, value in changes])[MAIN]


def test_the_comment_and_the_blanks_around_a_replaced_value_stay() -> None:
    text = '[access.users]\n  alice\t=  "old"   # hers\n'
    assert edited(text, ("users", "alice", "new")) == text.replace("old", "new")


def test_a_new_entry_stands_behind_the_last_one_of_its_table_in_its_style() -> None:
    assert edited('[access.users]\r\n\talice = "x"\r\n# end\r\n[server]\r\n', ("users", "bob", "y")) == (
        '[access.users]\r\n\talice = "x"\r\n\tbob = "y"\r\n# end\r\n[server]\r\n')


def test_a_missing_table_is_added_at_the_end() -> None:
    assert edited('[access.users]\nalice = "x"', ("user_enabled", "alice", False)) == (
        '[access.users]\nalice = "x"\n\n[access.user_enabled]\nalice = false\n')
    assert edited("", ("users", "a b", "x")) == '[access.users]\n"a b" = "x"\n'
    assert edited("\ufeff", ("users", "a", "x")) == '\ufeff[access.users]\na = "x"\n'


def test_an_emptied_table_stays() -> None:
    gone = ("user_data_quota", "alice", None)
    assert edited("[access.user_data_quota] # bytes\nalice = 1\n", gone) == "[access.user_data_quota] # bytes\n"
    assert edited("[access]\nuser_data_quota = { alice = 1 } # x\n", gone) == "[access]\nuser_data_quota = {} # x\n"


@pytest.mark.parametrize(("before", "name", "after"), [
    ("{ a = 1, b = 2, c = 3 }", "a", "{ b = 2, c = 3 }"), ("{ a = 1, b = 2, c = 3 }", "b", "{ a = 1, c = 3 }"),
    ("{ a = 1, b = 2, c = 3 }", "c", "{ a = 1, b = 2 }"), ("{a=1,b=2}", "b", "{a=1}"), ("{ a = 1 }", "a", "{}")])
def test_items_leave_an_inline_table_with_their_comma(before: str, name: str, after: str) -> None:
    assert edited(f"[access]\nuser_data_quota = {before}\n", ("user_data_quota", name, None)) == f"[access]\nuser_data_quota = {after}\n"


def test_removing_what_is_not_there_changes_nothing() -> None:
    text = '[access.users]\nalice = "x"\n'
    assert edited(text, ("users", "bob", None), ("user_data_quota", "alice", None)) == text


@pytest.mark.parametrize("name", ["a", "A-_9", "", "a b", "a.b", 'say "hi"', "back\\slash", "tab\there", "nul\0", "\x7f", "ü", "🙂",
                                  "'", "#", "="])
def test_keys_and_strings_read_back(name: str) -> None:
    assert tomllib.loads(f"{render_key(name)} = {render_value(name)}") == {name: name}


@pytest.mark.parametrize("value", [True, False, 0, (1 << 63) - 1])
def test_other_values_read_back(value: int | bool) -> None:
    found = tomllib.loads(f"x = {render_value(value)}")["x"]
    assert found is value or (type(found) is int and found == value)


@pytest.mark.parametrize("text", [
    "[access.users]\nalice\n", "[access.users\n", "[access.users]] \n", '[access.users]\nalice = "x" bob = "y"\n', 'x = ["1" "2"]\n',
    'x = {a = "1" b = "2"}\n', "x = {a}\n", "x =\n", '= 1\n', 'x = "open\n', "x = [[[\n", '"bad\\q" = 1\n', "[[x]\n",
    "x = " + "[" * 5000 + "]" * 5000 + "\n"])
def test_what_is_no_toml_is_refused(text: str) -> None:
    with pytest.raises(EditError):
        edited(text, ("users", "alice", "x"))


def test_an_include_that_was_not_read_is_refused() -> None:
    with pytest.raises(EditError, match="was not read"):
        Layout({MAIN: 'include = "x.toml"\n'}, MAIN, follow)


def test_documents_are_compared_by_type_and_value() -> None:
    assert same_documents({"x": [1.0, float("nan")], "access": {"users": {}}}, {"x": [1.0, float("nan")]})
    assert not same_documents({"x": 1}, {"x": True})
    assert not same_documents({"x": 1}, {"x": 1.0})
    assert not same_documents({"x": [1]}, {"x": [1, 2]})
    assert not same_documents({"x": {}}, {})
