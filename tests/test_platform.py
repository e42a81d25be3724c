"""platform.md 1 and 6: which modules the program may touch, and a Python as small as OpenWrt's python3-light."""
from __future__ import annotations

import ast
import hmac
import subprocess
import sys
from collections.abc import Iterator

import pytest

from doubles import MIB, PROGRAM, ROOT, Rig, clean_env

ALLOWED = set("""
    tomllib json re struct hashlib hmac secrets random select selectors socket signal resource ipaddress base64 binascii zlib
    threading _thread _queue _socket subprocess argparse fcntl mmap heapq collections datetime traceback syslog tempfile shutil
    socketserver dataclasses
    sys os time io math errno stat bisect itertools functools enum typing queue
    __future__ abc contextlib copy gc importlib marshal operator string textwrap types weakref""".split())    # these: in any interpreter
NEVER_AT_IMPORT = set("""
    ssl ctypes logging asyncio urllib email http concurrent unicodedata encodings.idna multiprocessing
    decimal sqlite3 uuid xml lzma""".split())
LAZY = NEVER_AT_IMPORT | {"cryptography", "Crypto", "uvloop", "telemt_api", "tomli_w", "_x25519",
                        "termios", "tty"}     # `top`: without them there are no keys
OPTIONAL = {"cryptography", "Crypto", "uvloop", "tomli_w"}
# What python3-light does not carry, as names that cannot be imported.
MISSING = sorted(NEVER_AT_IMPORT | OPTIONAL | set("""
    _ssl _hashlib _ctypes _asyncio _decimal _pydecimal _uuid _sqlite3 _lzma _multiprocessing pyexpat _elementtree stringprep
    unittest doctest pydoc cffi _cffi_backend html xmlrpc ftplib smtplib imaplib poplib nntplib telnetlib wsgiref cgi bz2 _bz2
    curses readline _curses dbm tkinter ensurepip venv distutils lib2to3 idlelib turtle pdb cProfile profile""".split()))

# Runs telemt.py as python3-light would: the modules above are not there, nor is the idna codec that needs them.
LIGHT = f"gone = set({MISSING!r})" + """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name in gone or name.partition(".")[0] in gone:
            raise ImportError(f"{name} is not in python3-light", name=name)
sys.meta_path.insert(0, Gone())
for name in [name for name in sys.modules if name in gone or name.partition(".")[0] in gone]:
    del sys.modules[name]
"""
RUN = LIGHT + """
import os, runpy
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def light(code: str, *args: str) -> list[str]:
    return [sys.executable, "-B", "-I", "-S", "-c", code, *args]


def evaluate(*command: str) -> str:
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=clean_env(), cwd=ROOT, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout


# -- a small Python ----------------------------------------------------------------------------------------------------------------

def test_the_small_python_is_small() -> None:
    """The emulation itself: imports fail, the idna codec is unknown, names resolve only as bytes."""
    said = evaluate(*light(LIGHT + """
import socket
for name in sorted(gone):
    try:
        __import__(name)
    except ImportError:
        continue
    print("importable:", name)
for host in ("localhost", b"localhost"):
    try:
        print(type(host).__name__, socket.getaddrinfo(host, 80)[0][4][1])
    except LookupError as err:
        print(type(host).__name__, err)
import hashlib, hmac
print(hmac.new(b"k", b"m", hashlib.sha256).hexdigest())
"""))
    assert said.splitlines() == ["str unknown encoding: idna", "bytes 80", hmac.digest(b"k", b"m", "sha256").hex()]


@pytest.mark.journey
@pytest.mark.parametrize("mode", ["tls", "classic", "secure"])
def test_serves_on_a_small_python(rig: Rig, mode: str) -> None:
    proxy = rig.proxy(command=light(RUN, str(PROGRAM)))
    assert proxy.log(r"crypto=python\b"), proxy.lines[0]
    client = rig.client("bob", mode)
    client.req_pq()
    client.download(MIB // 8)
    client.upload(MIB // 8)


@pytest.mark.journey
@pytest.mark.parametrize("word", ["--version", "--help"])
def test_speaks_on_a_small_python(word: str) -> None:
    evaluate(*light(RUN, str(PROGRAM), word))


@pytest.mark.journey
def test_loads_the_whole_configuration_on_a_small_python(rig: Rig) -> None:
    """Every kind of value, host names included: none needs the idna codec."""
    proxy = rig.proxy({
        "network": {"dns_overrides": ["example.com:443:127.0.0.1"]},
        "censorship": {"mask": True, "mask_host": "localhost", "tls_domains": ["b.example.org"]},
        "access": {"user_expirations": {"bob": "2099-01-01 00:00:00 +03:00"}, "user_data_quota": {"bob": 1 << 40},
                   "user_max_unique_ips": {"bob": 3}, "user_max_tcp_conns": {"bob": 3}},
        "general": {"links": {"show": "*"}},
    }, command=light(RUN, str(PROGRAM)))
    rig.client("bob").req_pq()
    stranger = rig.dial("bob", "classic")
    stranger.push(b"GET / HTTP/1.1\r\n\r\n")
    rig.client("bob").req_pq()
    assert not proxy.log("unknown encoding|idna")


@pytest.mark.journey
def test_a_small_python_has_no_control_plane_and_says_so_once(rig: Rig) -> None:
    proxy = rig.proxy({"server": {"api": {"enabled": True, "listen": "127.0.0.1:9"}, "metrics_port": 9}}, command=light(RUN, str(PROGRAM)))
    warning = r"WARN telemt::cli: control plane not started: http(\.server)? is missing \(OpenWrt: python3-email python3-urllib\)$"
    assert len(proxy.log(warning)) == 1
    rig.client("bob").req_pq()


# -- what an import pulls in -------------------------------------------------------------------------------------------------------

def modules_after(statement: str) -> set[str]:
    return set(evaluate(sys.executable, "-B", "-I", "-S", "-c", f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
{statement}
print(*sys.modules)""").split())


def forbidden(modules: set[str]) -> set[str]:
    return {name for name in modules if name in NEVER_AT_IMPORT or name.partition(".")[0] in NEVER_AT_IMPORT}


def test_import_pulls_nothing_heavy() -> None:
    """Beyond what allowed modules of the standard library pull in on their own (shutil looks for lzma)."""
    theirs = modules_after(f"import {', '.join(sorted(ALLOWED - {'__future__'}))}")
    assert forbidden(theirs) <= {"lzma"} | {name for name in theirs if name.startswith("importlib")}, forbidden(theirs)
    assert forbidden(modules_after("import telemt") - theirs) == set()


CONTROL_PLANE = {"http", "email", "urllib", "html", "_socketserver", "mimetypes"}        # http.server and what it brings


def test_import_of_the_control_plane_pulls_http_server_and_no_openssl() -> None:
    theirs = modules_after(f"import {', '.join(sorted(ALLOWED - {'__future__'}))}")
    found = {name.partition(".")[0] for name in forbidden(modules_after("import telemt_api") - theirs)}
    assert found and found <= CONTROL_PLANE
    assert "ssl" not in modules_after("import telemt_api") and "ssl" in modules_after("import ssl, telemt_api")


def test_import_does_not_need_a_path_or_a_home() -> None:
    assert "telemt" in modules_after("import telemt")


# -- what the source says ----------------------------------------------------------------------------------------------------------

def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """(module, line, at module level); what only the type checker sees is left out."""
    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module or "", child.lineno, top
            yield from walk(child, top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))
    yield from walk(tree, True)


BOOKS = [PROGRAM, PROGRAM.with_name("telemt_api.py")]


@pytest.fixture(scope="module", params=BOOKS, ids=lambda book: book.name)
def tree(request: pytest.FixtureRequest) -> ast.Module:
    return ast.parse(request.param.read_text(encoding="utf-8"))


def test_imports_at_module_level(tree: ast.Module) -> None:
    """The control plane, which is loaded only where it is wanted, has one module more."""
    found = {name for name, _, top in imports(tree) if top and name.partition(".")[0] not in ALLOWED}
    assert found <= {"http.server"}
    assert not found or "ThreadingHTTPServer" in ast.dump(tree)


def test_imports_inside_functions(tree: ast.Module) -> None:
    assert not [(name, line) for name, line, top in imports(tree) if not top and name.partition(".")[0] not in ALLOWED | LAZY]


RESOLVERS = {"create_connection", "create_server", "gethostbyname", "gethostbyname_ex", "getfqdn", "gethostbyaddr"}


def test_no_text_host_is_resolved(tree: ast.Module) -> None:
    """platform.md 1: getaddrinfo gets bytes; the calls that would resolve a str behind our back are not used at all."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    for call in calls:
        assert isinstance(call.func, ast.Attribute)
        assert call.func.attr not in RESOLVERS, f"line {call.lineno}: {call.func.attr}"
        first = call.args[0] if call.args else None
        if call.func.attr == "getaddrinfo":
            text = isinstance(first, ast.JoinedStr) or isinstance(getattr(first, "value", None), str)
            assert not text, f"line {call.lineno}: str host"
        assert getattr(first, "value", None) != "idna", f"line {call.lineno}: idna"


def test_the_lists_of_this_file_are_sane() -> None:
    assert not ALLOWED & NEVER_AT_IMPORT
    assert {name for name in ALLOWED if name not in sys.stdlib_module_names} == set()
