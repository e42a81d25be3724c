"""The house: the section map is true, every rule of tools/house_check.py fires, and the documents name what exists."""
from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import house_check
import make_docs
import telemt

ROOT = Path(__file__).resolve().parent.parent
BOOKS = ["telemt.py", "telemt_api.py"]

# A book that breaks no rule; every test below breaks one.
BOOK = '''"""A tiny book.

  1  ground   pure  -        words and numbers
  2  streams  io    <- 1     the only room with sockets
  4  cli      io    <- 1-2   numbers may have gaps
"""
from __future__ import annotations

import datetime
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from telemt import Settings

# == 1. ground ===============================================================

LIMIT = 3


class Word:
    """A value."""

    def __init__(self, text: str) -> None:
        self.text = text


# == 2. streams ==============================================================

def pull(sock: socket.socket) -> bytes:
    """Read."""
    return sock.recv(LIMIT)


# == 4. cli ==================================================================

def main(words: list[Word]) -> None:
    """Go."""
    print(pull, words)
'''.replace("pure  -  ", "pure  <- -")

GROUND = "LIMIT = 3\n"
CLI = "    print(pull, words)\n"
LONG_BODY = "".join(f"    x = {n}\n" for n in range(75))
MANY = "".join(f"        self.a{n} = {n}\n" for n in range(16))
SLOTS = "class Fat:\n    __slots__ = (" + "".join(f'"s{n}", ' for n in range(16)) + ")\n"
FIELDS = "class Fat:\n" + "".join(f"    f{n}: int\n" for n in range(16))


def rules_of(source: str, policy: house_check.Policy | None = None) -> set[str]:
    """Letters of all findings in a book."""
    return {finding.rule for finding in house_check.check(house_check.open_book("telemt.py", source, policy or house_check.Policy()))}


def planted(after: str, code: str) -> str:
    """The good book with `code` behind the text `after`."""
    assert BOOK.count(after) == 1, after
    return BOOK.replace(after, after + code)


def test_good_book_is_in_order() -> None:
    assert rules_of(BOOK) == set()


@pytest.mark.parametrize(("rule", "source"), [
    pytest.param("M", BOOK.replace("  2  streams  io", "  2  brooks   io"), id="M: slug differs"),
    pytest.param("M", BOOK.replace("  4  cli ", "  4. cli "), id="M: not in the map"),
    pytest.param("L", planted(GROUND, "def early() -> object:\n    return pull\n"), id="L: a body"),
    pytest.param("L", planted(GROUND, "def early(sock: 'pull') -> None: ...\n"), id="L: a quoted annotation"),
    pytest.param("L", planted(GROUND, "def early(hook=main) -> None: ...\n"), id="L: a default"),
    pytest.param("L", planted(GROUND, "Alias: TypeAlias = 'list[main]'\n"), id="L: a quoted alias"),
    pytest.param("U", BOOK.replace("io    <- 1     the", "io    <- -     the"), id="U: leak"),
    pytest.param("U", planted(CLI, "# == 5. extra ====\n").replace('gaps\n"""', 'gaps\n  5  extra    io    <- 2     nothing\n"""'),
                 id="U: stale"),
    pytest.param("P", planted(GROUND, "def look(s: socket.socket) -> None: ...\n"), id="P: a module"),
    pytest.param("P", planted(GROUND, "def look() -> object:\n    return open('x')\n"), id="P: a file"),
    pytest.param("P", planted(GROUND, "def look() -> object:\n    return datetime.datetime.now()\n"), id="P: the clock"),
    pytest.param("F", planted(GROUND, "def long() -> None:\n" + LONG_BODY), id="F"),
    pytest.param("C", planted("        self.text = text\n", MANY), id="C: assignments"),
    pytest.param("C", planted(GROUND, SLOTS), id="C: slots"),
    pytest.param("C", planted(GROUND, FIELDS), id="C: fields"),
    pytest.param("C", planted(GROUND, "class Tall:\n" + "    x = 1\n" * 251), id="C: lines"),
    pytest.param("T", planted("import datetime\n", "import telemt\n"), id="T: import"),
    pytest.param("T", planted("import datetime\n", "from telemt import Settings\n"), id="T: from"),
    pytest.param("H", planted("import datetime\n", "import logging\n"), id="H"),
    pytest.param("H", planted("import datetime\n", "try:\n    from cryptography import x\nexcept ImportError:\n    pass\n"), id="H: try"),
    pytest.param("N", planted(CLI, "    import shlex\n"), id="N"),
    pytest.param("W", planted(GROUND, "def say() -> None:\n    print(LIMIT)\n"), id="W"),
    pytest.param("G", planted(CLI, "    global LIMIT\n"), id="G"),
    pytest.param("B", planted(CLI, "    try:\n        pass\n    except:\n        pass\n"), id="B"),
    pytest.param("E", planted(CLI, "    try:\n        pass\n    except Exception:\n        pass\n"), id="E"),
    pytest.param("E", planted(CLI, "    try:\n        pass\n    except (OSError, BaseException):\n        pass\n"), id="E: tuple"),
    *[pytest.param("S", planted(CLI, f"    words.{call}(1)\n"), id=f"S: {call}") for call in sorted(house_check.FD_CALLS)],
])
def test_planted_fault_is_found(rule: str, source: str) -> None:
    assert rules_of(source) == {rule}


def test_a_lazy_module_may_be_imported_in_a_function() -> None:
    source = planted(CLI, "    import ssl\n")
    assert rules_of(source) == {"N"}
    assert rules_of(source, house_check.Policy(lazy=frozenset({"ssl"}))) == set()


def test_a_named_exception_excuses_and_a_stale_one_is_found() -> None:
    source = planted(GROUND, "def long() -> None:\n" + LONG_BODY)
    assert rules_of(source, house_check.Policy(long_functions={"long": "one table"})) == set()
    assert rules_of(BOOK, house_check.Policy(long_functions={"long": "one table"})) == {"X"}


def test_the_tables_of_settings_may_have_many_fields() -> None:
    source = planted(GROUND, "class Table:\n    pass\n" + FIELDS.replace(":", "(Table):", 1))
    assert rules_of(source) == {"C"}
    assert rules_of(source, house_check.Policy(table_room="ground")) == set()


def test_every_rule_of_the_docstring_has_a_planted_fault() -> None:
    listed = set(re.findall(r"^  ([A-Z])  ", house_check.__doc__ or "", re.M))
    text = Path(__file__).read_text(encoding="utf-8")
    assert listed == set(re.findall(r'param\("([A-Z])"', text)) | {"X"}


def test_the_command_line_exits_with_1_on_a_finding(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(BOOK, encoding="utf-8")
    bad.write_text(planted(CLI, "    global LIMIT\n"), encoding="utf-8")
    tool = [sys.executable, str(ROOT / "tools" / "house_check.py")]
    assert subprocess.run([*tool, str(good)], check=False, capture_output=True).returncode == 0
    run = subprocess.run([*tool, str(good), str(bad)], check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert "bad.py:40: G main: global LIMIT" in run.stdout
    assert subprocess.run(tool, check=False, capture_output=True).returncode == 2


# -- the real house ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BOOKS)
def test_the_book_is_in_order(name: str) -> None:
    book = house_check.open_book(name, (ROOT / name).read_text(encoding="utf-8"))
    assert book.rooms, "no map in the docstring"
    assert [f"{name}:{finding.line}: {finding.rule} {finding.text}" for finding in house_check.check(book)] == []


# Rooms whose tests have another name, with the reason.
TESTED_ELSEWHERE: dict[str, str] = {}


@pytest.mark.parametrize("name", BOOKS)
def test_every_room_has_a_test_file(name: str) -> None:
    book = house_check.open_book(name, (ROOT / name).read_text(encoding="utf-8"))
    prefix = "test_" if name == "telemt.py" else "test_api_"
    missing = {room.slug for room in book.rooms if not (ROOT / "tests" / f"{prefix}{room.slug}.py").exists()}
    assert missing == set(TESTED_ELSEWHERE)


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == telemt.VERSION
    assert f"\n## [{telemt.VERSION}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nothing_is_needed_at_run_time() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == []
    assert project["requires-python"] == ">=3.11"


# -- the sample configuration ------------------------------------------------------------------------------------------------------

SAMPLE = (ROOT / "config.toml").read_text(encoding="utf-8")
EXAMPLES = re.sub(r"^#(?=[a-z\[])", "", SAMPLE, flags=re.M)              # every "#key" line switched on


def load(text: str) -> telemt.Loaded:
    """Settings of a configuration text."""
    return telemt.parse_settings(telemt.parse_document(text), telemt.Draws(lambda: 2000))


@pytest.mark.parametrize("text", [SAMPLE, EXAMPLES], ids=["as shipped", "every example on"])
def test_the_sample_loads_and_every_key_is_known(text: str) -> None:
    assert [warning for warning in load(text).warnings if "unknown keys" in warning] == []
    assert load(text).errors == ()


def test_the_sample_shows_its_examples() -> None:
    assert len(EXAMPLES) < len(SAMPLE)
    assert load(EXAMPLES).settings.censorship.mask_host == "www.example.com"
    assert load(EXAMPLES).settings.access.user_max_tcp_conns == {"default": 100}


def test_the_sample_starts_without_root_in_direct_mode_with_the_api_on_loopback() -> None:
    settings = load(SAMPLE).settings
    assert settings.server.port == 8443
    assert not settings.general.use_middle_proxy
    assert settings.general.modes.tls
    assert settings.server.api.enabled
    assert settings.server.api.listen == "127.0.0.1:9091"


def test_the_public_secret_of_the_sample_is_warned_about() -> None:
    assert load(SAMPLE).settings.access.users == {"default": "0" * 32}
    assert [warning for warning in load(SAMPLE).warnings if "default" in warning or "zero" in warning]


# -- the documents -----------------------------------------------------------------------------------------------------------------

DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def commands_in(document: str) -> list[list[str]]:
    """Command lines in the sh blocks of a document that are for this machine (test_printed_commands.py executes them)."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)
    marks = ("# on your server", "# needs the internet")            # at the end of a line, or as the first line of a block
    lines = [line for block in blocks if block.partition("\n")[0].strip() not in marks
             for line in block.splitlines() if not line.endswith(marks)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_document_exists(document: str) -> None:
    for words in commands_in(document):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= TARGETS, words
        elif words[0] == "python3" and words[1] != "-c":
            assert (ROOT / next(word for word in words[1:] if not word.startswith("-"))).is_file(), words
        else:
            assert words[0] in {"python3", "grep", "curl", "systemd-analyze", "haproxy", "promtool"}, words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_target_named_in_a_document_exists(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert set(re.findall(r"`make ([a-z][a-z-]*)", text)) <= TARGETS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / document).parent.joinpath(link).exists()] == []


def anchors(document: Path) -> set[str]:
    """What GitHub makes of the headings of a document."""
    heads = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_heading_leads_somewhere(document: str) -> None:
    path = ROOT / document
    for name, anchor in re.findall(r"\]\(([^():#]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
        assert anchor in anchors(path.parent / name if name else path), f"{name}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_key_named_in_a_document_exists(document: str) -> None:
    """`table.key` and `[table]` in running text are keys and tables of the settings."""
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.M | re.S)
    known = {path.replace("[]", "") for path in telemt.KEYS}
    roots = "|".join(sorted({path.partition(".")[0] for path in known if "." in path}))
    named = re.findall(rf"`((?:{roots})\.[a-z_0-9.]+)\b", text) + re.findall(rf"`\[+((?:{roots})[a-z_.]*)\]+`", text)
    assert [name for name in named if name not in known] == []


def test_the_readme_has_the_two_commands() -> None:
    commands = commands_in("README.md")
    assert ["python3", "telemt.py", "config.toml"] in commands
    assert ["make", "test"] in commands


def test_generated_documents_are_current() -> None:
    assert make_docs.stale() == [], "run make docs"


def test_the_document_of_the_configuration_has_every_key() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys = [path.rpartition(".") for path, spec in telemt.KEYS.items() if spec.table is None]
    known = {(make_docs.heading(table), name) for table, _, name in keys}
    shown, section = [], ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif section == "top level" or section.startswith("["):
            shown += [(section, name) for name in re.findall(r"^\| `(\w+)` \|", line)]
    assert len(shown) == len(set(shown)) and set(shown) == known and len(known) > 150


def test_a_stale_document_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(make_docs, "ROOT", tmp_path)
    for name in ("docs", "deploy/systemd"):
        (tmp_path / name).mkdir(parents=True)
    sources = {"performance.json", "operations.md"}                 # the second has a part that is made from the first
    for name in sources:
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    assert make_docs.main(["--check"]) == 1 and {path.name for path in (tmp_path / "docs").iterdir()} == sources
    assert make_docs.main([]) == 0 and make_docs.main(["--check"]) == 0
    path = tmp_path / "docs" / "configuration.md"
    path.write_text(path.read_text(encoding="utf-8").replace("8", "9", 1), encoding="utf-8")
    assert make_docs.main(["--check"]) == 1
    assert "configuration.md: not current" in capsys.readouterr().out


def test_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split())      # type: ignore[index]
    assert phony == TARGETS == set(re.findall(r"^([a-z-]+):.*## ", text, re.M))


def test_the_driver_of_the_pool_decides_nothing() -> None:
    """Room 17 performs what room 12 says: in class Pool nothing is compared with a limit, and no key of the planner is read."""
    tree = ast.parse((ROOT / "telemt.py").read_text(encoding="utf-8"))
    bodies = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    ordered = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
    judged = [ast.unparse(node) for node in ast.walk(bodies["Pool"])
              if isinstance(node, ast.Compare) and any(isinstance(op, ordered) for op in node.ops)]
    assert judged == []
    policy = {node.attr for name in ("Floors", "Roster", "Refill", "Renewal", "Swap", "Availability", "Dispatch", "Keepalive")
              for node in ast.walk(bodies[name]) if isinstance(node, ast.Attribute)} & (set(telemt.General.members) - {"links"})
    read = {node.attr for node in ast.walk(bodies["Pool"]) if isinstance(node, ast.Attribute)}
    assert len(policy) > 20 and not policy & read


ADDRESSES = {                          # of clients: the lines above debug that carry one are all of 3.2.1 (CONTRIBUTING, rule 6)
    "TLS handshake successful", "MTProto handshake successful", "Connecting to Telegram DC", "Routing via Middle-End",
    "Connection closed with error", "IP limit exceeded", "Failed to write TLS ServerHello", "Invalid PROXY protocol header",
    "TLS replay attack detected (duplicate digest)", "MTProto replay attack detected"}


def test_no_other_line_tells_the_address_of_a_client() -> None:
    found = set()
    for book in BOOKS:
        for call in ast.walk(ast.parse((ROOT / book).read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("info", "warn", "error"):
                ours = isinstance(call.func.value, ast.Name) and call.func.value.id == "log_network"          # it tells our own address
                named = {word.arg for word in call.keywords} & {"peer", "client", "sender", *(() if ours else ("ip",))}
                values = {node.attr for part in (*call.args, *(word.value for word in call.keywords)) for node in ast.walk(part)
                          if isinstance(node, ast.Attribute)} & {"peer", "client_address"}
                ends = isinstance(call.args[0], ast.Constant) and call.args[0].value == "Connection closed with error"
                if named or values or ends:
                    found.add(ast.literal_eval(call.args[0]))
    assert found == ADDRESSES


@pytest.mark.parametrize("name", BOOKS)
def test_no_name_has_two_owners(name: str) -> None:
    """A second definition of a top-level name silently replaces the first, in whatever room that stands."""
    seen: Counter[str] = Counter()
    for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            seen[node.name] += 1
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            seen.update(part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))
    assert not [word for word, times in seen.items() if times > 1]


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by their base name: the second one could not be collected."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, times in names.items() if times > 1]
