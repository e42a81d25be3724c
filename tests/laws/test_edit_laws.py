"""Laws of telemt_api's editor: whatever the layout, parse(edit(text)) == edit(parse(text)), and other lines stay."""
from __future__ import annotations

import tomllib

import hypothesis.strategies as st
from hypothesis import assume, given, note

import telemt
from telemt_api import change_document, edit_texts, render_key, render_value, same_documents

TABLES = ("users", "user_max_tcp_conns", "user_data_quota", "user_expirations", "user_enabled", "user_ad_tags")
names = st.one_of(st.sampled_from(["alice", "bob", "users", "access", "1", "a.b", "a b", 'q"q', "b\\s", "ключ", "🙂", "'", "#x", "[x]", "=",
                                   ""]),
                  st.text(st.characters(exclude_categories=["Cs"]), max_size=6))
values = st.one_of(st.booleans(), st.integers(0, 2**63 - 1), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
blanks = st.sampled_from(["", " ", "  ", "\t"])
comments = st.sampled_from(["", "", "# x", '# "', "# [access.users]", "# }", "#ключ", "# = '''"])
junk = st.sampled_from(["", "# [access.users]", "#", "   # deep", "", "\t"])
others = st.sampled_from([
    "[server]\nport = 1", "[general]\nfast_mode = true # x", '[x]\ny = """\n[access.users]\nalice = "no"\n"""',
    "[x.access.users]\nalice = 1",
    "[[upstreams]]\ntype = \"direct\"\n[[upstreams]]\ntype = 'direct'", "[y]\nz = [\n  1, # ]\n  [2, 3],\n]",
    "[w]\nd = 2030-01-01 00:00:00Z",
    "[v]\nq = '''\n\"\"\"'''\np = \"\\\"[\"", "[u]\nn = { a = { b = [1, {c = 2}] }, d = \"}\" }"])


@st.composite
def keys(draw: st.DrawFn, name: str) -> str:
    """One way to write a part of a key."""
    ways = [render_key(name), render_value(name)]
    if name and "'" not in name and all(char >= " " or char == "\t" for char in name) and "\x7f" not in name:
        ways.append(f"'{name}'")
    return draw(st.sampled_from(ways))


@st.composite
def layouts(draw: st.DrawFn) -> str:
    """A configuration with its access tables written in any way that TOML has."""
    access = {table: draw(st.dictionaries(names, values, min_size=table == "users", max_size=4))
              for table in TABLES if table == "users" or draw(st.booleans())}
    top: list[str] = []
    inside: list[str] = []
    blocks: list[list[str]] = [other.split("\n") for other in draw(st.lists(others, max_size=3, unique=True))]
    for table, entries in access.items():
        way = draw(st.sampled_from(["header", "header", "dotted", "inline", "top", "top inline"]))
        pairs = [(draw(keys(name)), render_value(value)) for name, value in entries.items()]
        gap, tail, indent = draw(blanks), draw(comments), draw(blanks)
        if way == "header":
            block = [f"[{gap}access{gap}.{gap}{draw(keys(table))}{gap}]{gap}{tail}"]
            for key, value in pairs:
                block += [*draw(st.lists(junk, max_size=1)), f"{indent}{key}{gap}={gap}{value}{gap}{draw(comments)}"]
            blocks.append(block)
        elif way in ("dotted", "top"):
            before = "access." if way == "top" else ""
            (top if way == "top" else inside).extend(f"{indent}{before}{table}{gap}.{key} = {value} {tail}" for key, value in pairs)
        else:
            before = "access." if way == "top inline" else ""
            items = f",{gap}".join(f"{key}{gap}={gap}{value}" for key, value in pairs)
            (top if way == "top inline" else inside).append(f"{before}{table} = {{{gap}{items}{gap}}}{gap}{tail}")
    if inside:
        blocks.append([f"[access] {draw(comments)}", *inside])
    draw(st.randoms(use_true_random=False)).shuffle(blocks)
    lines = [*draw(st.lists(junk, max_size=2)), *top, *(line for block in blocks for line in [*block, *draw(st.lists(junk, max_size=2))])]
    newline = draw(st.sampled_from(["\n", "\r\n"]))
    text = draw(st.sampled_from(["", "\ufeff"])) + newline.join(lines) + draw(st.sampled_from(["", newline]))
    try:
        document = tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError:
        assume(False)                                      # [access] beside access.x at the top, and the like
    assume(isinstance(document.get("access", {}), dict))
    return text


changes = st.tuples(st.sampled_from(TABLES), names, st.one_of(st.none(), values))


@given(layouts(), st.lists(changes, min_size=1, max_size=4), st.data())
def test_an_edit_means_what_was_intended_and_moves_nothing_else(text: str, wanted: list[tuple[str, str, object]],
                                                                data: st.DataObject) -> None:
    document = telemt.parse_document(text)
    for table, name, value in wanted:
        known = sorted(document.get("access", {}).get(table, {}))
        if known and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(known))
        change = [(("access", table, name), value)]
        edited = edit_texts({"c": text}, "c", lambda including, line: None, change)["c"]      # type: ignore[arg-type]
        note(f"{change}\n{edited!r}")
        after = telemt.parse_document(edited)
        assert same_documents(after, change_document(document, change))                      # type: ignore[arg-type]
        old, new = (each.removeprefix("\ufeff").split("\n") for each in (text, edited))
        while old and new and old[0] == new[0]:
            old, new = old[1:], new[1:]
        while old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
        assert len(old) <= 1 and len(new) <= 5, (old, new)
        if value is None and name not in known:
            assert edited == text
        text, document = edited, after
