#!/usr/bin/env python3
"""house_check - keep a single-file program honest about its own section map.

usage: house_check.py [--graph] FILE...

Reads two things out of each FILE ("book") and compares them with what the code really does:

  the map      lines in the module docstring:   "  7  faketls  pure  <- 2 5   Fake-TLS records"
  the banners  one comment line per section:    "# == 7. faketls ======================"

A range in the map (5-8) means the rooms of that range that exist.  Findings, each with the letter of its rule:

  M  map and banners differ in number, order or slug
  L  a section uses a top-level name bound in a LATER section
  U  the sections used differ from those named after "<-" (an undeclared use is a leak, a declared non-use is a stale map)
  P  a section marked "pure" touches I/O, clock, threads or randomness
  F  a function is longer than 70 lines (from 41 on it is listed, which is no finding)
  C  a class is longer than 250 lines or has more than 15 instance attributes
  T  telemt is imported outside `if TYPE_CHECKING:` (the program runs as __main__: a second copy would be loaded)
  H  a module that the smallest routers lack, or that costs start-up time, is imported at module level
  N  an import inside a function that is not one of the lazy ones
  W  print() outside the room that may write to the terminal
  G  a `global` statement
  B  a bare `except:`
  E  `except Exception` where neither a loop nor a thread ends
  S  recv, send, splice ... called outside the one room that owns file descriptors
  X  an exception in POLICIES that nothing needs any more

It exits with 1 if anything was found.  It cannot see duck-typed calls (self.pool.acquire()); type those attributes
with a Protocol that lives in an earlier section and rule L covers them too.
"""
from __future__ import annotations

import ast
import re
import symtable
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

FUNCTION_WARN, FUNCTION_MAX = 40, 70
CLASS_LINES_MAX, CLASS_ATTRIBUTES_MAX = 250, 15

MAP_LINE = re.compile(r"^\s+(\d+)\s+([a-z_]+)\s+(pure|io)\s+<-((?:\s\d+(?:-\d+)?)+|\s-)(?:\s{2,}.*)?$")
BANNER = re.compile(r"^# == (\d+)\. ([a-z_]+) =+")
IMPURE = frozenset("asyncio concurrent fcntl http logging mmap multiprocessing os queue random resource secrets select selectors "
                   "shutil signal socket socketserver ssl subprocess sys syslog tempfile threading time urllib uuid".split())
CLOCK_METHODS = frozenset({"now", "utcnow", "today"})                      # of names imported from datetime
FD_CALLS = frozenset("recv recv_into recvmsg recvmsg_into send sendall sendmsg splice sendfile".split())
# platform.md 1: never at module import
HEAVY = frozenset("asyncio concurrent ctypes cryptography Crypto decimal email http logging lzma multiprocessing sqlite3 ssl "
                  "unicodedata urllib uuid uvloop xml".split())

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Reasons = dict[str, str]                                                    # qualified name -> why it may


@dataclass
class Policy:
    """What one book is allowed beyond the rules; every entry carries its reason and rule X removes it when it is stale."""

    heavy: frozenset[str] = HEAVY
    lazy: frozenset[str] = frozenset()           # modules that may be imported inside a function
    print_room: str = "cli"
    fd_room: str = "streams"
    table_room: str = "settings"                 # Tables here hold the keys: no attribute limit
    long_functions: Reasons = field(default_factory=dict)
    big_classes: Reasons = field(default_factory=dict)
    catch_all: Reasons = field(default_factory=dict)
    fd_calls: Reasons = field(default_factory=dict)


POLICIES: dict[str, Policy] = {
    "telemt.py": Policy(
        lazy=HEAVY | {"argparse", "datetime", "json", "marshal", "queue", "selectors", "subprocess", "telemt_api", "threading",
                      "_queue", "_thread",
                      "traceback"},              # a quiet proxy needs none
        big_classes={"Server": "owner of everything that outlives a connection: a line each, and nothing else in it"},
        catch_all={
            "pick_backend": "whatever a crypto library throws at us, the next one may work (platform.md 3)",
            "Loop.call": "one callback costs what it belongs to, never the loop",
            "Loop._turn": "the same for handlers, without a call in between",
            "Loop._run_idle_job": "the same for jobs of an idle turn",
            "Control.ask.run": "the error belongs to the thread that asked",
            "WorkerPool.submit.task": "the end of a helper thread: the error is handed to `done`",
        },
        fd_calls={
            "Mailbox.post": "the loop's own wake-up pair, not a peer's socket",
            "Mailbox.take": "the other end of it",
        },
    ),
    "telemt_api.py": Policy(
        heavy=HEAVY - {"http"},                  # imported only where the control plane is wanted
        lazy=HEAVY | {"termios", "tomli_w", "tty"},
        print_room="top",
        fd_room="http",
        catch_all={
            "Store._publish": "the file is written: whatever our own code does now, the answer says so",
            "HttpServer._serve_one": "one connection costs itself, never the thread that accepts (as in socketserver)",
            "ControlApi.answer": "one request costs an answer 500 and a traceback in the log, never the thread's connection",
            "MetricsSite.answer": "the same",
        },
    ),
}


class Finding(NamedTuple):
    """One line of the report."""

    rule: str
    line: int
    text: str


class Room(NamedTuple):
    """One line of the map."""

    number: int
    slug: str
    kind: str
    uses: frozenset[int]


class Owned(NamedTuple):
    """A definition, handler or call and the qualified name of the function or class it stands in."""

    node: ast.AST
    inside: str


class Book:
    """One parsed file: its map, its banners, who owns which name, and where every node stands."""

    def __init__(self, name: str, source: str, policy: Policy) -> None:
        self.name, self.source, self.policy = name, source, policy
        self.tree = ast.parse(source)
        self.banners = [(int(m[1]), m[2], n) for n, line in enumerate(source.splitlines(), 1) if (m := BANNER.match(line))]
        self.rooms = self._read_map()
        self.owner: dict[str, int] = {}          # top-level name -> section
        self.imported: dict[str, str] = {}       # top-level name -> module
        for node in top_level(self.tree.body):
            self._bind(node)
        self.nodes = list(walk_owned(self.tree, ""))
        self.uses = collect_uses(self)           # section -> {(global name, line)}
        self.excused: set[tuple[str, str]] = set()

    def _read_map(self) -> list[Room]:
        exist = {number for number, _, _ in self.banners}
        doc = ast.get_docstring(self.tree, clean=False) or ""
        return [Room(int(m[1]), m[2], m[3], span(m[4], exist)) for m in map(MAP_LINE.match, doc.splitlines()) if m]

    def _bind(self, node: ast.stmt) -> None:
        here = self.section(node.lineno)
        if isinstance(node, FunctionNode | ast.ClassDef):
            self.owner.setdefault(node.name, here)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for sub in ast.walk(target):
                    if isinstance(sub, ast.Name):
                        self.owner.setdefault(sub.id, here)
        elif isinstance(node, ast.Import):
            self.imported |= {(a.asname or a.name).split(".")[0]: root_of(a.name) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            self.imported |= {a.asname or a.name: root_of(node.module) for a in node.names}

    def section(self, line: int) -> int:
        """Number of the section that `line` stands in; 0 before the first banner."""
        return next((number for number, _, start in reversed(self.banners) if start <= line), 0)

    def room_of(self, line: int) -> str:
        """Slug of the section that `line` stands in; empty before the first banner."""
        return next((slug for _, slug, start in reversed(self.banners) if start <= line), "")

    def excuse(self, table: str, name: str) -> bool:
        """True if the policy's `table` names `name`; remembers that the entry was needed."""
        known = name in getattr(self.policy, table)
        if known:
            self.excused.add((table, name))
        return known


def root_of(module: str | None) -> str:
    """First part of a dotted module name."""
    return (module or "").split(".")[0]


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Roots of the modules that an import statement loads."""
    return [root_of(a.name) for a in node.names] if isinstance(node, ast.Import) else [root_of(node.module)]


def span(text: str, exist: Iterable[int]) -> frozenset[int]:
    """Section numbers in "1 2 5-8"; "-" is none; a range covers only numbers that exist."""
    found: set[int] = set()
    for part in text.split():
        low, _, high = part.partition("-")
        if high:
            found.update(number for number in exist if int(low) <= number <= int(high))
        elif low:
            found.add(int(low))
    return frozenset(found)


def top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield module-level statements, descending into if/try/with blocks."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from top_level(handler.body)


def walk_owned(node: ast.AST, inside: str) -> Iterator[Owned]:
    """Yield every node below `node` with the qualified name of what it stands in."""
    for child in ast.iter_child_nodes(node):
        yield Owned(child, inside)
        named = isinstance(child, FunctionNode | ast.ClassDef)
        yield from walk_owned(child, f"{inside}.{child.name}".lstrip(".") if named else inside)  # type: ignore[attr-defined]


def names_in(node: ast.AST) -> Iterator[str]:
    """Names loaded anywhere under `node`."""
    return (sub.id for sub in ast.walk(node) if isinstance(sub, ast.Name) and isinstance(sub.ctx, ast.Load))


def names_in_annotation(node: ast.AST) -> Iterator[str]:
    """Names loaded under an annotation, looking inside quoted ones."""
    yield from names_in(node)
    for sub in ast.walk(node):
        if isinstance(sub, ast.Constant) and isinstance(sub.value, str):
            try:
                yield from names_in(ast.parse(sub.value, mode="eval"))
            except SyntaxError:
                pass                             # Literal["text"] and the like


def length_of(node: FunctionNode | ast.ClassDef) -> int:
    """Lines from the header to the end, docstring included, decorators not."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


# -- who uses whom: rules M, L, U, P ---------------------------------------------------------------------------------------------

def annotations_of(node: ast.AST) -> Iterator[ast.AST]:
    """What symtable does not report: annotations, decorators, defaults and bases."""
    spots: Sequence[ast.AST | None] = ()
    if isinstance(node, FunctionNode):
        args = node.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        spots = [a.annotation for a in every if a] + [node.returns, *node.decorator_list, *args.defaults, *args.kw_defaults]
    elif isinstance(node, ast.ClassDef):
        spots = [*node.bases, *node.keywords, *node.decorator_list]
    elif isinstance(node, ast.AnnAssign):
        alias = isinstance(node.annotation, ast.Name) and node.annotation.id == "TypeAlias"
        spots = [node.annotation, node.value if alias else None]
    return (spot for spot in spots if spot is not None)


def collect_uses(book: Book) -> dict[int, set[tuple[str, int]]]:
    """Return section -> {(global name, line)}; a name in a function carries the line of the function."""
    uses: dict[int, set[tuple[str, int]]] = defaultdict(set)

    def scopes(table: symtable.SymbolTable) -> None:
        for child in table.get_children():
            here = uses[book.section(child.get_lineno())]
            here.update((s.get_name(), child.get_lineno()) for s in child.get_symbols() if s.is_referenced() and s.is_global())
            scopes(child)

    scopes(symtable.symtable(book.source, book.name, "exec"))
    for node, _ in book.nodes:
        for spot in annotations_of(node):
            line = node.lineno                   # type: ignore[attr-defined]
            uses[book.section(line)].update((name, line) for name in names_in_annotation(spot))
    for statement in book.tree.body:
        if not isinstance(statement, FunctionNode | ast.ClassDef):
            uses[book.section(statement.lineno)].update((name, statement.lineno) for name in names_in(statement))
    return uses


def actual_uses(book: Book, room: Room) -> set[int]:
    """Numbers of the other sections whose names `room` uses."""
    return {book.owner[name] for name, _ in book.uses[room.number] if book.owner.get(name, 0) not in (0, room.number)}


def rule_map(book: Book) -> Iterator[Finding]:
    """M: the map is the table of contents."""
    declared, found = [room[:2] for room in book.rooms], [banner[:2] for banner in book.banners]
    if declared != found:
        odd = sorted(set(declared) ^ set(found)) or "the order"
        yield Finding("M", 1, f"map and banners differ in {odd}")
    numbers = [number for number, _, _ in book.banners]
    if numbers != sorted(set(numbers)):
        yield Finding("M", 1, f"section numbers do not ascend: {numbers}")


def rule_uses(book: Book) -> Iterator[Finding]:
    """L and U: dependency order, and the map says which."""
    for room in book.rooms:
        where = f"section {room.number} {room.slug}"
        for name, line in sorted(book.uses[room.number], key=lambda use: (use[1], use[0])):
            if book.owner.get(name, 0) > room.number:
                yield Finding("L", line, f"{where} uses {name} of later section {book.owner[name]}")
        actual = {number for number in actual_uses(book, room) if number < room.number}
        if actual - room.uses:
            yield Finding("U", 1, f"{where} also uses {sorted(actual - room.uses)}")
        if room.uses - actual:
            yield Finding("U", 1, f"{where} no longer uses {sorted(room.uses - actual)}")


def rule_pure(book: Book) -> Iterator[Finding]:
    """P: bytes in, values out; `now` and `entropy` are arguments."""
    for room in (room for room in book.rooms if room.kind == "pure"):
        for name, line in sorted(book.uses[room.number], key=lambda use: (use[1], use[0])):
            if book.imported.get(name) in IMPURE and name not in book.owner:
                yield Finding("P", line, f"pure section {room.number} {room.slug} uses {name} (module {book.imported[name]})")
    pure = {room.number for room in book.rooms if room.kind == "pure"}
    for node, inside in book.nodes:
        what = impure_act(book, node, inside)
        if what and book.section(node.lineno) in pure:                      # type: ignore[attr-defined]
            yield Finding("P", node.lineno, f"pure section: {inside or 'module'} {what}")  # type: ignore[attr-defined]


def impure_act(book: Book, node: ast.AST, inside: str) -> str:
    """What a node does that a pure room must not; empty if nothing."""
    if isinstance(node, ast.Import | ast.ImportFrom) and inside:
        return "".join(f"imports {module}" for module in modules_of(node) if module in IMPURE)
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Name) and node.func.id in ("open", "input"):
        return f"calls {node.func.id}()"
    if isinstance(node.func, ast.Attribute) and node.func.attr in CLOCK_METHODS:
        if any(book.imported.get(name) == "datetime" for name in names_in(node.func.value)):
            return f"reads the clock: {node.func.attr}()"
    return ""


# -- size: rules F, C ------------------------------------------------------------------------------------------------------------

def functions(book: Book) -> Iterator[tuple[str, FunctionNode]]:
    """Every function with its qualified name."""
    for node, inside in book.nodes:
        if isinstance(node, FunctionNode):
            yield f"{inside}.{node.name}".lstrip("."), node


def rule_function_length(book: Book) -> Iterator[Finding]:
    """F: a function that does not fit the eye is two functions."""
    for name, node in functions(book):
        if length_of(node) > FUNCTION_MAX and not book.excuse("long_functions", name):
            yield Finding("F", node.lineno, f"{name} has {length_of(node)} lines (max {FUNCTION_MAX})")


def attributes_of(node: ast.ClassDef) -> set[str]:
    """Names of the instance attributes: `__slots__`, annotated fields, assignments to self.x in methods."""
    found: set[str] = set()
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "ClassVar" not in names_in_annotation(statement.annotation):
                found.add(statement.target.id)
        elif isinstance(statement, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__slots__" for t in statement.targets):
            found.update(sub.value for sub in ast.walk(statement.value) if isinstance(sub, ast.Constant) and isinstance(sub.value, str))
        elif isinstance(statement, FunctionNode) and statement.args.args:
            found.update(assigned_to(statement, statement.args.args[0].arg))
    return found


def assigned_to(function: FunctionNode, this: str) -> Iterator[str]:
    """Attributes of the first argument that `function` assigns."""
    if any(isinstance(d, ast.Name) and d.id in ("classmethod", "staticmethod") for d in function.decorator_list):
        return
    for sub in ast.walk(function):
        if isinstance(sub, ast.Attribute) and isinstance(sub.ctx, ast.Store) and isinstance(sub.value, ast.Name) and sub.value.id == this:
            yield sub.attr


def is_settings_table(book: Book, node: ast.ClassDef) -> bool:
    """True for a table of keys in the room of the settings."""
    of_keys = any(isinstance(base, ast.Name) and base.id == "Table" for base in node.bases)
    return of_keys and book.room_of(node.lineno) == book.policy.table_room


def rule_class_size(book: Book) -> Iterator[Finding]:
    """C: a class with many lines or many attributes has more than one job."""
    for node, inside in book.nodes:
        if not isinstance(node, ast.ClassDef):
            continue
        name, many = f"{inside}.{node.name}".lstrip("."), len(attributes_of(node))
        if length_of(node) > CLASS_LINES_MAX and not book.excuse("big_classes", name):
            yield Finding("C", node.lineno, f"class {name} has {length_of(node)} lines (max {CLASS_LINES_MAX})")
        if many > CLASS_ATTRIBUTES_MAX and not is_settings_table(book, node) and not book.excuse("big_classes", name):
            yield Finding("C", node.lineno, f"class {name} has {many} instance attributes (max {CLASS_ATTRIBUTES_MAX})")


# -- imports: rules T, H, N ------------------------------------------------------------------------------------------------------

def type_checking_lines(book: Book) -> set[int]:
    """Lines of the bodies of `if TYPE_CHECKING:`."""
    return {line for node in ast.walk(book.tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in names_in(node.test)
            for statement in node.body for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)}


def rule_imports(book: Book) -> Iterator[Finding]:
    """T, H, N: what is loaded, and when."""
    typing_only = type_checking_lines(book)
    for node, inside in book.nodes:
        if not isinstance(node, ast.Import | ast.ImportFrom) or node.lineno in typing_only:
            continue
        for module in modules_of(node):
            if module == "telemt":
                yield Finding("T", node.lineno, "imports telemt at run time")
            elif not inside and module in book.policy.heavy:
                yield Finding("H", node.lineno, f"imports {module} at module level")
            elif inside and module not in book.policy.lazy:
                yield Finding("N", node.lineno, f"{inside} imports {module}: not one of the lazy modules")


# -- habits: rules W, G, B, E, S -------------------------------------------------------------------------------------------------

def rule_habits(book: Book) -> Iterator[Finding]:
    """W, G, B: short bans."""
    for node, inside in book.nodes:
        if isinstance(node, ast.Global):
            yield Finding("G", node.lineno, f"{inside}: global {', '.join(node.names)}")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield Finding("B", node.lineno, f"{inside or 'module'}: bare except")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            if book.room_of(node.lineno) != book.policy.print_room:
                yield Finding("W", node.lineno, f"{inside or 'module'}: print() outside {book.policy.print_room}")


def rule_catch_all(book: Book) -> Iterator[Finding]:
    """E: errors are caught by type, in one place per session."""
    for node, inside in book.nodes:
        if isinstance(node, ast.ExceptHandler) and node.type and {"Exception", "BaseException"} & set(names_in(node.type)):
            if not book.excuse("catch_all", inside):
                yield Finding("E", node.lineno, f"{inside or 'module'}: except Exception")


def rule_fd_calls(book: Book) -> Iterator[Finding]:
    """S: one owner per fd."""
    for node, inside in book.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FD_CALLS:
            if book.room_of(node.lineno) != book.policy.fd_room and not book.excuse("fd_calls", inside):
                yield Finding("S", node.lineno, f"{inside or 'module'}: .{node.func.attr}() outside {book.policy.fd_room}")


def rule_stale(book: Book) -> Iterator[Finding]:
    """X: runs last; an exception that excuses nothing goes."""
    for table in ("long_functions", "big_classes", "catch_all", "fd_calls"):
        for name in getattr(book.policy, table):
            if (table, name) not in book.excused:
                yield Finding("X", 1, f"{table} need not name {name} any more")


RULES: tuple[Callable[[Book], Iterator[Finding]], ...] = (
    rule_map, rule_uses, rule_pure, rule_function_length, rule_class_size, rule_imports, rule_habits, rule_catch_all, rule_fd_calls,
    rule_stale)


def open_book(name: str, source: str, policy: Policy | None = None) -> Book:
    """Parse one book; its policy is looked up by file name unless given."""
    return Book(name, source, policy or POLICIES.get(Path(name).name, Policy()))


def check(book: Book) -> list[Finding]:
    """All findings in one book."""
    return [finding for rule in RULES for finding in rule(book)]


def show_graph(book: Book) -> None:
    """Print the map as the code has it, with the length of every room."""
    ends = [start for _, _, start in book.banners[1:]] + [len(book.source.splitlines()) + 1]
    for room, (_, _, start), end in zip(book.rooms, book.banners, ends, strict=False):
        needs = " ".join(map(str, sorted(actual_uses(book, room)))) or "-"
        print(f"{room.number:>3}  {room.slug:<12} {room.kind:<4} {end - start:>5} lines  <- {needs}")


def show_long(book: Book) -> None:
    """Print the functions above the warning length, longest first."""
    for name, node in sorted(functions(book), key=lambda pair: -length_of(pair[1])):
        if length_of(node) > FUNCTION_WARN:
            print(f"{book.name}:{node.lineno}: long: {name} has {length_of(node)} lines")


def main(arguments: list[str]) -> int:
    """Check every file named; 1 if anything was found, 2 on wrong use."""
    options, files = {a for a in arguments if a.startswith("--")}, [a for a in arguments if not a.startswith("--")]
    if not files or options - {"--graph"}:
        print(__doc__, file=sys.stderr)
        return 2
    bad = False
    for file in files:
        book = open_book(file, Path(file).read_text(encoding="utf-8"))
        if "--graph" in options:
            show_graph(book)
        show_long(book)
        findings = check(book)
        for finding in findings:
            print(f"{file}:{finding.line}: {finding.rule} {finding.text}")
        print(f"{file}: {f'{len(findings)} findings' if findings else 'house is in order'}")
        bad = bad or bool(findings)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
