#!/usr/bin/env python3
"""telemt.py - an MTProto proxy in one file.

Telegram clients connect to it with a secret; it takes them to Telegram's data centres.  To everybody else it looks like
an ordinary HTTPS server.  Start it with `python3 telemt.py config.toml`; nothing has to be installed.

How to read it.  The file is a book of rooms in the order of dependency: a room uses earlier rooms only.  Rooms marked
`pure` take bytes and return values: no socket, clock, thread or randomness inside.  `grep -n '^# == ' telemt.py` prints the
contents; tools/house_check.py keeps this map true.

   1  ground      pure  <- -                     errors, Reason (one word per way to fail), the log
   2  settings    pure  <- 1                     every configuration key; parsing, normalisation, validation
   3  crypto      pure  <- 1                     AES-256-CTR/CBC of four backends, HMAC with ready pads, X25519 points
   4  buffer      pure  <- 1                     Inbox: bytes of a peer that is not understood yet
   5  framing     pure  <- 1                     abridged, intermediate and padded frames of clients
   6  obfuscated  pure  <- 1 3                   64-byte preambles of clients and for data centres
   7  faketls     pure  <- 1 3                   ClientHello, ServerHello flight, records
   8  neighbours  pure  <- 1 2                   PROXY headers, SOCKS dialogues, STUN messages, addresses that are not public
   9  rpc         pure  <- 1 2 3 5               links to the middle end: keys, handshake, frames, requests, proxy lists
  10  stats       pure  <- 1                     counters, and the snapshots that other threads look at
  11  access      pure  <- 1 2 3 6 7 10          users, limits, tickets, replay windows, who is this
  12  planner     pure  <- 1 2 10                which links to the middle end exist: facts and `now` in, actions out
  13  loop        io    <- 1                     pollers, timers, signals, helper threads
  14  streams     io    <- 1 3 7 8 13            sockets; Arena and flows: where bytes move
  15  discovery   io    <- 1 2 8 13 14           our own addresses, and what the world sees of them
  16  upstreams   io    <- 1 2 8 10 13-15        data-centre addresses, ways out and their health, connect cycles
  17  links       io    <- 1-3 9 10 12-14 16     links to the middle end, their sessions, the lists that name them
  18  masking     io    <- 1-3 7 8 10 13 14 16   strangers see the real site; our ServerHello looks like its own
  19  relay       io    <- 1-3 5 9-11 13 14 17   a session that has both its ends
  20  session     io    <- 1 2 4 6-14 16-19      from accept to a relay
  21  files       io    <- 1 2 11 13             what lies on disk: the configuration with its includes, used quotas
  22  server      io    <- 1-3 9-21              listeners, places, sweep, start, drain and stop of all of it
  23  control     io    <- 1 2 10 11 21 22       links handed out, reload, the seam to telemt_api.py
  24  handover    io    <- 1 2 13 22 23          at SIGUSR2 a new program takes our place
  25  ping        io    <- 1-4 6 7 13 14         a client of our own: through any proxy link to a data centre
  26  check       io    <- 1-3 9 13 14 16 17 22  what an operator would like to know before people complain
  27  cli         io    <- 1-3 13 14 21-26       arguments, files, log on stdout, process set-up, systemd unit, main()

The trip of one client.  `Listener` accepts; `Server._on_accept` gives it a place and a `ClientSession`, which sniffs the
first bytes (`_sniff`).  A ClientHello goes to `Doorman.find_hello`, which tries secrets in the order of
`UserTable.candidates`; `build_server_hello` answers in the shape that `FrontProfiles` measured at the mask host.  Inside its
records, or without any, come 64 bytes: `parse_client_preamble`.  A `Routing` takes over: `admit` reserves a place under the
user's limits, `Upstreams.connect_dc` dials, and both streams are joined in a `DirectRelay` with two flows: `CopyFlow` or
`UnwrapFlow` up, `CopyFlow` or `WrapFlow` down.  From then on every byte is moved by `Flow.run` and counted by the relay,
until `DirectRelay.close` gives back the streams, the ticket and the place.  A peer that is no client leaves this path in one
place, `ClientSession._stranger`.

The life of a link.  `Directory` downloads the proxy-secret and the lists of middle ends and tells `Pool`, which tells
`PoolPlanner`; from then on the planner decides and the pool performs.  `OpenLink` makes a `MeLink`: dial, `LinkHandshake`,
ready.  `Routing` asks `Pool.route`, gets a `Bind`, and a `MiddleRelay` joins the client to the link: its frames become
`RPC_PROXY_REQ`, answers come back through the link's table of bound sessions.  `beat` keeps the link alive, `plan` replaces it
when it idles, when its generation is renewed or its endpoint leaves the list: it drains, and `CloseLink` ends it.
"""
from __future__ import annotations

import os
import signal
import sys

if sys.version_info < (3, 11):
    sys.stderr.write("telemt.py needs Python 3.11 or newer\n")
    sys.exit(1)


def _slim(code: Any) -> Any:
    """The same code without what nothing reads while it runs: docstrings, annotations of functions, names of classes in front of
    those of methods, the columns of its line table, which are half of it.  Tracebacks keep the lines.

    Bytes of the table as in CPython's locations.md: two kinds of entries are enough, for up to eight code units each.
    """
    runs: list[tuple[int, int, int | None]] = []
    for begin, end, line in code.co_lines():                   # 3.11 has a run for every expression
        runs.append((runs.pop()[0] if runs and runs[-1][2] == line else begin, end, line))
    table, before = bytearray(), code.co_firstlineno
    for begin, end, line in runs:
        for units in range((end - begin) // 2, 0, -8):
            if line is None:
                table.append(0xF8 | min(units, 8) - 1)
                continue
            table.append(0xE8 | min(units, 8) - 1)             # the line moves by `step`: the sign is the lowest bit, six bits a byte
            step, before = line - before << 1 if line >= before else before - line << 1 | 1, line
            while step > 63:
                table.append(step & 63 | 64)
                step >>= 6
            table.append(step)
    consts = [_slim(item) if isinstance(item, type(code)) else () if isinstance(item, tuple) and item[-2:-1] == ("return",) else item
              for item in code.co_consts]                      # annotations are ("name", "type", ... "return", "type")
    if consts and code.co_flags & 2 and code.co_name[0] != "<" and isinstance(consts[0], str):     # 2: has fast locals, so no class
        consts[0] = None
    return code.replace(co_consts=tuple(consts), co_linetable=bytes(table), co_qualname=code.co_name)


# Every object of the new image comes from malloc.  Python's own allocator works in pieces of a megabyte and gives one back when nothing
# in it is alive: a counter, a timer, a name of a client that was here is something, and 5,000 connections left 7 MB behind them.
# malloc gives back single pages, and must not keep more than small change for the next one who asks.  Who has set these himself is
# obeyed; free-threaded builds know no other allocator than their own.
_GLIBC = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ())
_MALLOC: dict[str, str] = {}
if _GLIBC and "t" not in sys.abiflags:
    _MALLOC = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.tcache_max=64"}

_LOADER = """
import sys
sys.path[:] = %r
def _load(fd, size):
    import marshal
    with open(fd, 'rb') as file:
        file.seek(-size, 2)
        return marshal.loads(file.read())
exec(_load(%d, %d))
run_and_exit()
"""


def _start_afresh() -> bool:
    """Continue in a new image of the interpreter that gets this file compiled, so the compiler's memory is gone.

    Compiling 18,000 lines leaves 20 MB of heap that malloc does not give back: as much as the running proxy needs.  Python runs
    compiled code from any file, so it goes into a nameless one in memory, behind a few lines that run it, so that the code of
    classes and of the file itself can be forgotten before the proxy begins; `-X telemt=` carries the name, for us and for `ps`.
    What `site` found out is in sys.path already and goes along, so the image does without that module (-S).
    Same process, same arguments.  Where anything is unusual, or fails, nothing happens.  True: this is the new image.
    """
    at = len(sys.orig_argv) - len(sys.argv)
    script = sys.argv[0]
    stops = (signal.SIGINT, signal.SIGTERM)
    if script.startswith("/proc/self/fd/") and "telemt" in sys._xoptions:
        for key, value in _MALLOC.items():
            if os.environ.get(key) == value:
                del os.environ[key]            # meant for us, not for programs that we start
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)      # what came during the change of images is heard now
        return True
    flags = sys.orig_argv[1:at]
    usual = all(set(flag) <= set("-bBdEIOPqRsSuv") or flag[:2] in ("-X", "-W") or before in ("-X", "-W")
                for before, flag in zip(["", *flags], flags, strict=False))        # not -c, -m, -mcProfile, -i, -x ...
    if at < 1 or sys.orig_argv[at] != script or not usual or not hasattr(os, "memfd_create") or not sys.executable:
        return False
    import marshal
    try:
        fd = os.memfd_create("telemt", 0)
        if fd <= 2:                            # started with a standard stream closed: this must not become it
            os.close(fd)
            return False
        with open(fd, "wb", closefd=False) as file:
            magic: bytes = sys.modules["_frozen_importlib_external"].MAGIC_NUMBER
            book = marshal.dumps(_slim(sys._getframe(1).f_code))
            loader = _LOADER % ([os.path.abspath(entry) for entry in sys.path], fd, len(book))
            file.write(magic + bytes(12) + marshal.dumps(compile(loader, "<loader>", "exec")) + book)
        if not os.path.exists(f"/proc/self/fd/{fd}"):          # no /proc, as in a chroot: after execv there is no way back
            os.close(fd)
            return False
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)        # the new image has no handlers yet; the mask outlives exec
        command = [sys.orig_argv[0], *flags, "-S", "-X", f"telemt={script}", f"/proc/self/fd/{fd}", *sys.argv[1:]]
        os.execve(sys.executable, command, {**_MALLOC, **os.environ})
    except (OSError, ValueError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    return False


def _leave_early(_signum: int, _frame: object) -> None:
    """SIGINT or SIGTERM before anything was opened: go at once, in good order (config.md 6.4)."""
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)     # never fatal, from the first moment (config.md 8 item 2); outlives the restart
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)    # the same: it is for programs that serve
    signal.signal(signal.SIGINT, _leave_early)       # while this file is being compiled, nobody can help: they kill
    signal.signal(signal.SIGTERM, _leave_early)
    _AFRESH = _start_afresh()

# OpenSSL's hashes would load a libcrypto of 3.5 MB beside the one that `cryptography` brings.  With few users the built-in
# SHA-256 does: 2 us more per ClientHello and user tried.  With many, hash_with_openssl() undoes this.
sys.modules.setdefault("_hashlib", None)  # type: ignore[arg-type]

import binascii
import bisect
import collections
import contextlib
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import importlib
import io
import ipaddress
import itertools
import mmap
import re
import resource
import select
import stat
import struct
import time
from collections.abc import Callable, Container, Generator, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence

TYPE_CHECKING = False                          # for a type checker it is True; `typing` is 0.4 MB for words that only it reads
if TYPE_CHECKING:
    import argparse
    import datetime
    import http.client
    import socket
    from typing import Any, BinaryIO, ClassVar, Final, Generic, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar, assert_never

    from _typeshed import WriteableBuffer
else:
    import _socket as socket  # without the layer of Python, which makes enums of 300 constants

    Protocol = object

    class Generic:
        """What `class Lane(Generic[_Key])` needs while the program runs."""

        __slots__ = ()

        def __class_getitem__(cls, _kind):
            return cls

    def TypeVar(_name, **_bounds):
        """Nothing: only a type checker looks at it."""

    def assert_never(value):
        """For the branch that no value can reach."""
        raise AssertionError(f"unexpected: {value!r}")

_T = TypeVar("_T")

# == 1. ground ===============================================================
# What every room stands on: the ways to fail, the words for them, and the log.
# `Reason` is the one vocabulary of failure: the same word appears in the log,
# in the API and as a metric label (metrics.md 4.1), so it is spelled once here.
# The log lives here because `logging` is not on the smallest routers
# (platform.md 1); its sink and its clock are put in by cli, so it stays pure.

VERSION: Final = "0.1.0"
REFERENCE: Final = "telemt 3.2.1 config and API"

Bytes: TypeAlias = "bytes | bytearray | memoryview"
Entropy: TypeAlias = "Callable[[int], bytes]"      # n -> n unpredictable bytes; os.urandom outside tests
Clock: TypeAlias = "Callable[[], float]"           # seconds; monotonic or unix as the parameter name says
INF: Final = float("inf")                          # `math` would load the C library of that name


class _RowType(type):
    """Makes the classes that are written as `class Name(NamedTuple)`, as typing does, for a quarter of its memory.

    typing.NamedTuple takes 12 KB a class, more than half a megabyte here: it compiles every annotation and a maker, and gives each
    class five methods of its own.  Here classes share them, and the code of the maker with all classes of as many fields.
    """

    _makers: ClassVar[dict[int, Any]] = {}

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if bases == (tuple,):
            return super().__new__(cls, name, bases, body)
        fields = tuple(body.get("__annotations__", ()))
        first = cls._makers.get(len(fields))
        if first is None:
            words = "".join(f"_{at}, " for at in range(len(fields)))
            first = cls._makers[len(fields)] = eval(f"lambda _cls, {words}: new(_cls, ({words}))", {"new": tuple.__new__})
        maker = type(first)(first.__code__.replace(co_varnames=("_cls", *fields), co_name=name, co_qualname=name), first.__globals__)
        maker.__defaults__ = tuple(body[field] for field in fields if field in body)
        body.update((field, collections._tuplegetter(at, "")) for at, field in enumerate(fields))  # type: ignore[attr-defined]
        return super().__new__(cls, name, bases, {"__slots__": (), **body, "__new__": maker, "_fields": fields, "__match_args__": fields})


if not TYPE_CHECKING:
    class NamedTuple(tuple, metaclass=_RowType):
        """A tuple whose items have names; see _RowType."""

        __slots__ = ()
        _fields = ()

        def _replace(self, **changes):
            """Return a copy with some items changed."""
            row = tuple.__new__(type(self), [changes.pop(field, item) for field, item in zip(self._fields, self, strict=True)])
            if changes:
                raise TypeError(f"no such fields: {list(changes)}")
            return row

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            return f"{type(self).__name__}({', '.join(map('{}={!r}'.format, self._fields, self))})"


class Reason(enum.Enum):
    """One word per way to fail; the value is what log, API and metrics show (metrics.md 4.1)."""

    # connections_bad_by_class
    PROXY_UNTRUSTED = "proxy_protocol_untrusted"
    PROXY_INVALID = "proxy_protocol_invalid_header"
    PROXY_TIMEOUT = "proxy_protocol_header_timeout"
    HELLO_LENGTH = "tls_clienthello_len_out_of_bounds"
    HELLO_TRUNCATED = "tls_clienthello_truncated"
    HELLO_MALFORMED = "tls_clienthello_malformed"
    TLS_DISABLED = "tls_mode_disabled"
    BAD_DIGEST = "tls_bad_digest"
    CLOCK_SKEW = "tls_clock_skew"
    TLS_REPLAY = "tls_replay"
    BAD_INNER = "tls_bad_inner"
    INNER_REPLAY = "tls_inner_replay"
    PLAIN_DISABLED = "direct_modes_disabled"
    RESERVED_PREFIX = "direct_reserved_prefix"
    BAD_HEADER = "direct_bad_header"
    PLAIN_REPLAY = "direct_replay"
    PLAIN_TRUNCATED = "direct_truncated"
    # handshake_failures_by_class
    TIMEOUT = "timeout"
    EOF = "eof"
    RESET = "reset"
    IO_ERROR = "io_error"
    CROWDED_OUT = "crowded_out"          # ours: the oldest of too many half-open connections of one address
    # after the handshake: log words only
    BAD_RECORD = "bad_record"
    BAD_FRAME = "bad_frame"
    BAD_RPC = "bad_rpc"
    LIMIT = "limit"


class TelemtError(Exception):
    """Root of every error that this program raises on purpose."""


class ConfigError(TelemtError):
    """The operator's fault: names the key and what is allowed.

    str(error) is the text as the reference prints it, prefix `Config error: ` included where config.md 3 has it.
    `invalid` tells the second step (validate, config.md F39-F43) from the first (load).
    """

    def __init__(self, text: str, *, prefix: bool = True, invalid: bool = False) -> None:
        super().__init__(f"Config error: {text}" if prefix else text)
        self.invalid = invalid


class WireError(TelemtError):
    """The peer's fault: bytes that fit no protocol we speak.  Costs that connection, never more."""

    def __init__(self, reason: Reason, text: str = "") -> None:
        super().__init__(text or reason.value)
        self.reason = reason


_HARD_ERRORS: Final = frozenset((errno.ECONNREFUSED, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS))


class RouteError(TelemtError):
    """The network's fault: no way to the other side.

    code: the system's error number, 0 without one.  `hard`: trying the same way again is pointless (upstream-and-relay.md 7.4).
    """

    def __init__(self, text: str, *, hard: bool = False, code: int = 0) -> None:
        super().__init__(text)
        self.hard = hard or code in _HARD_ERRORS
        self.code = code


class InternalError(TelemtError):
    """Our fault: logged with a traceback, costs one session, never the process."""


def describe(error: Exception) -> str:
    """An error as the log words it; errors of the system with their number."""
    return f"IO error: {error.strerror} (os error {error.errno})" if isinstance(error, OSError) else str(error)


def moved(plain: _T) -> _T:
    """A copy of numbers, text, tuples, lists and dicts in which every object is new, one behind the other as far as there is room."""
    import marshal
    data: Any = plain
    copy: _T = marshal.loads(marshal.dumps(data))
    return copy


class Level(enum.IntEnum):
    """Severity of a log record; order is emission order."""

    TRACE = 5
    DEBUG = 10
    INFO = 20
    WARN = 30
    ERROR = 40


class LogBook:
    """The one sink of all logs.  cli opens it; until then records are dropped, as in a library."""

    threshold: int = Level.ERROR + 1
    sink: Callable[[Level, str, str], None] | None = None   # level, target, text
    always: str = "telemt::links"                           # this target's INFO survives `silent` (config.md 6.3)
    now: Clock | None = None                                # monotonic seconds, for Throttle

    @classmethod
    def write(cls, level: Level, target: str, text: str) -> None:
        """Hand one record to the sink; the caller has checked the threshold."""
        if cls.sink is not None:
            cls.sink(level, target, text)


class Log:
    """Logger of one room: lazy `%` formatting, then ` key=value` fields.

    log.info("Connecting to Telegram DC", user=name, dc=2) prints `Connecting to Telegram DC user=name dc=2`.
    """

    __slots__ = ("target",)

    def __init__(self, target: str) -> None:
        self.target = f"telemt::{target}"

    def enabled(self, level: Level) -> bool:
        """True if a record of `level` would be printed: ask before building costly fields."""
        return level >= LogBook.threshold or (level >= Level.INFO and self.target == LogBook.always)

    def _emit(self, level: Level, text: str, args: tuple[object, ...], fields: dict[str, object]) -> None:
        if self.enabled(level):
            text = text % args if args else text
            LogBook.write(level, self.target, text + "".join(f" {key}={value}" for key, value in fields.items()))

    def trace(self, text: str, *args: object, **fields: object) -> None:
        """Every step; only for somebody who reads along."""
        self._emit(Level.TRACE, text, args, fields)

    def debug(self, text: str, *args: object, **fields: object) -> None:
        """What a developer wants to see."""
        self._emit(Level.DEBUG, text, args, fields)

    def info(self, text: str, *args: object, **fields: object) -> None:
        """The operator may care."""
        self._emit(Level.INFO, text, args, fields)

    def warn(self, text: str, *args: object, **fields: object) -> None:
        """The operator should act."""
        self._emit(Level.WARN, text, args, fields)

    def error(self, text: str, *args: object, **fields: object) -> None:
        """Something of ours does not work."""
        self._emit(Level.ERROR, text, args, fields)


class Throttle:
    """Lets a repeated log line through once per `every_s` seconds."""

    __slots__ = ("every_s", "_open_at")

    def __init__(self, every_s: float) -> None:
        self.every_s = every_s
        self._open_at = float("-inf")

    def ready(self) -> bool:
        """True when the line may be printed now; starts the next pause."""
        now = LogBook.now() if LogBook.now else 0.0
        if now < self._open_at:
            return False
        self._open_at = now + self.every_s
        return True
# == 2. settings =============================================================
# The configuration.  One table says everything about a key: the Tables
# below mirror the TOML paths (settings.server.api.listen is [server.api]
# listen), and each field is one call of `key`: how the value is read, what it
# is when absent, what a reload does with it, its unit, a sentence, its rule.
# Reading, unknown keys, range checks, diffs and documentation walk that table.
#
#   text --expand_includes--> text --parse_document--> dict --parse_settings-->
#        1. read     every value gets its type; a wrong one fails
#        2. settle   the steps of config.md 1.3, in order: the first failure wins
#        3. clamp    values that cannot work are corrected with a warning
#        4. validate what an API mutation is checked against as well
#        5. advise   unknown keys, zero limits, public secrets: warnings only
#
# Nothing here reads a file, logs or draws a random number: files come through
# `read`, warnings go out as texts, the one random value comes from `Draws`.
# Trap: secrets are values too, so no message shows what a SECRET key held.
# Source: config.md 1-3, 7, 8 (items 7, 8, 10, 15, 21-25); `Fn` is a row of 3.

_D = TypeVar("_D")

IpAddress: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
IpNetwork: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

INCLUDE_DEPTH_MAX: Final = 10
_UNIX_PATH_MAX: Final = 107              # sun_path of Linux, less its NUL
_INT64: Final = range(-2**63, 2**63)     # TOML integers; u64 and usize end here too
_UNKNOWN_SHOWN: Final = 20
_ZERO_LIMITS_SHOWN: Final = 50
_QUOTED_MAX: Final = 60                  # characters of a value that a message repeats
_ZERO_SECRET: Final = "0" * 32
_CDN_OVERRIDE: Final = ("91.105.192.100:443",)
_HEX32: Final = re.compile("[0-9a-fA-F]{32}")
_BARE_KEY: Final = re.compile("[A-Za-z0-9_-]+")


# -- what a key is

class Reload(enum.Enum):
    """What a reload does with a changed key (config.md 2)."""

    HOT = "H"                 # applied
    HOT_OURS = "h"            # applied; 3.2.1 takes it along with the next HOT change only
    RESTART = "R"             # kept until restart
    RESTART_OURS = "R!"       # kept until restart; 3.2.1 leaks it with the next HOT change
    NO_EFFECT = "-"           # read by nothing (config.md 2.10)


class Kind(NamedTuple, Generic[_T]):
    """How a TOML value becomes ours: `read(path, value)` raises ConfigError; `name` is the type in the documentation."""

    name: str
    read: Callable[[str, object], _T]


class Rule(NamedTuple):
    """What a value must fulfil beyond its type, and the text after the key if it does not."""

    text: str
    holds: Callable[[Any], bool]


class Key(NamedTuple):
    """Everything known about one key or table."""

    kind: Kind[Any]
    default: Any              # before normalisation; a required key has none, whatever stands here
    reload: Reload
    unit: str
    help: str
    rule: Rule | None = None  # checked in the order of _CHECKS, not when read
    only: str = ""            # words: the upstream types that have this key; empty = all
    required: bool = False
    table: type[Any] | None = None    # keys inside; many = an array of such tables
    many: bool = False


def key(kind: Kind[_T], default: _D, reload: str, unit: str, help: str, rule: Rule | None = None, *,
        only: str = "", required: bool = False) -> _T | _D:
    """Declare a key of a Table."""
    spec: Any = Key(kind, default, Reload(reload), unit, help, rule, only, required)
    found: _T | _D = spec
    return found


def table(cls: type[_Table]) -> _Table:
    """Declare a table of keys; absent and empty are the same."""
    spec: Any = Key(Kind("table", lambda path, value: _read_table(cls, path, value)), None, Reload.NO_EFFECT, "", "", table=cls)
    found: _Table = spec
    return found


def tables(cls: type[_T], read: Callable[[str, object], _T], reload: str, help: str) -> tuple[_T, ...]:
    """Declare an array of tables, none by default."""
    many: Kind[Any] = _list_of(Kind("table", read))
    spec: Any = Key(many, (), Reload(reload), "", help, table=cls, many=True)
    found: tuple[_T, ...] = spec
    return found


class Table:
    """A frozen record whose fields are declared by key(), table() and tables().

    Not a dataclass: that module brings `inspect` and the compiler's inner life along, a megabyte that nothing here needs.
    Not printable on purpose: a repr would hold every secret.
    """

    members: ClassVar[dict[str, Key]] = {}

    def __init_subclass__(cls) -> None:
        cls.members = {name: vars(cls)[name] for name in cls.__annotations__}
        for name in cls.members:
            delattr(cls, name)

    def __init__(self, **values: Any) -> None:
        for name, spec in self.members.items():
            fresh = spec.table is not None and not spec.many and name not in values
            self.__dict__[name] = spec.table() if fresh and spec.table else values.pop(name, spec.default)
        if values:
            raise TypeError(f"{type(self).__name__} has no {', '.join(values)}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} is frozen")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]    # holds maps

    def but(self: _Table, **changes: Any) -> _Table:
        """Return a copy with some fields changed."""
        return type(self)(**{**self.__dict__, **changes})


_Table = TypeVar("_Table", bound=Table)


# -- texts of errors

def _quoted(text: str) -> str:
    """`text` for a message: one printable line of limited length, in double quotes."""
    shown = text if len(text) <= _QUOTED_MAX else text[:_QUOTED_MAX] + "..."
    return '"' + "".join(char if char.isprintable() else "?" for char in shown) + '"'


def _join(path: str, name: str) -> str:
    """Path of `name` inside `path`; a name that TOML would quote is quoted."""
    shown = name if _BARE_KEY.fullmatch(name) else _quoted(name)
    return f"{path}.{shown}" if path else shown


_WORDS: Final[tuple[tuple[type[Any], str], ...]] = (
    (list, "an array"), (dict, "a table"), (str, "a string"), (bool, "a boolean"), (int, "an integer"), (float, "a float"),
    (object, "a date-time"))


def _word(value: object) -> str:
    """The TOML type of a value, without the value: all that may be said of a secret."""
    return next(word for cls, word in _WORDS if isinstance(value, cls))


def _found(value: object) -> str:
    """What stands there instead: `string "yes"`, `70000`, `true`, `an array`."""
    if isinstance(value, (list, dict)) or (isinstance(value, int) and value not in _INT64):    # of more digits than Python prints
        return _word(value)
    if isinstance(value, str):
        # a line appended to the file lands in its last table
        return "a secret: users stand under [access.users]" if _HEX32.match(value) else f"string {_quoted(value)}"
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- kinds of values (config.md 1.2)

def _kind(name: str, expected: str, convert: Callable[[Any], _T | None], secret: bool = False) -> Kind[_T]:
    """Make a Kind of a function that returns None for what it does not take."""
    def read(path: str, value: object) -> _T:
        made = convert(value)
        if made is None:
            raise ConfigError(f"{path}: expected {expected}, found {_word(value) if secret else _found(value)}")
        return made
    return Kind(name, read)


def _integer(name: str, low: int, high: int) -> Kind[int]:
    return _kind(name, f"an integer within [{low}, {high}]", lambda value: value if type(value) is int and low <= value <= high else None)


def _one_of(*words: str) -> Kind[str]:
    expected = "one of " + ", ".join(f'"{word}"' for word in words)
    return _kind(" ".join(words), expected, lambda value: value if value in words else None)


def _as_table(path: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path or 'top level'}: expected a table, found {_word(value)}")
    return value


def _list_of(kind: Kind[_T]) -> Kind[tuple[_T, ...]]:
    def read(path: str, value: object) -> tuple[_T, ...]:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: expected an array, found {_found(value)}")
        return tuple(kind.read(f"{path}[{index}]", item) for index, item in enumerate(value))
    return Kind(f"[{kind.name}]", read)


def _map_of(kind: Kind[_T]) -> Kind[Mapping[str, _T]]:
    def read(path: str, value: object) -> Mapping[str, _T]:
        return {name: kind.read(_join(path, name), item) for name, item in _as_table(path, value).items()}
    return Kind("{name: " + kind.name + "}", read)


def _as_float(value: object) -> float | None:
    return float(value) if isinstance(value, float) or (type(value) is int and value in _INT64) else None


def _as_str(value: object) -> str | None:
    """Strings, and the canonical text of an unquoted date-time: so the reference sees it."""
    if hasattr(value, "isoformat"):
        return re.sub(r"(\.[0-9]+?)0+\b", r"\1", value.isoformat().replace("+00:00", "Z"))
    return value if isinstance(value, str) else None


def parse_ip(text: object) -> IpAddress | None:
    """Return a plain IPv4 or IPv6 address: no brackets, no zone, no port; None for anything else."""
    try:
        return ipaddress.ip_address(text) if isinstance(text, str) and "%" not in text else None
    except ValueError:
        return None


_BOGONS: Final = tuple(map(ipaddress.ip_network, (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "::/128", "::1/128", "fc00::/7", "fe80::/10", "::ffff:0:0/96", "100::/64", "2001:db8::/32", "2002::/16", "ff00::/8")))


def is_bogon(ip: str) -> bool:
    """True for an address that is not publicly routable (upstream-and-relay.md 3.3)."""
    address = ipaddress.ip_address(ip)
    return any(address.version == net.version and address in net for net in _BOGONS)


def parse_network(text: object) -> IpNetwork | None:
    """Return a network from an address, address/n or IPv4/netmask; host bits may be set; None for anything else."""
    if not isinstance(text, str) or "%" in text:
        return None
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
    mask = text.partition("/")[2]
    return None if "." in mask and str(network.netmask) != mask else network       # ipaddress also takes 0.0.0.255 for /24


# Date, time and offset are mandatory, the rest is lenient (config.md 7).  No two runs of blanks meet: matching stays linear.
_MOMENT: Final = re.compile(
    r"\s*([0-9]{1,4})\s*-\s*([0-9]{1,2})\s*-\s*([0-9]{1,2})(?:\s*[Tt]\s*|\s+)([0-9]{1,2})\s*:\s*([0-9]{1,2})\s*:\s*([0-9]{1,2})"
    r"(?:\.([0-9]+))?\s*(?:[Zz]|[Uu][Tt][Cc]|([-+\u2212])\s*(?:([0-9]{2})([0-9]{2})|([0-9]{1,2})(?:\s*:\s*|\s+)([0-9]{1,2})))\s*")


def parse_expiration(text: str) -> datetime.datetime | None:
    """Return the moment in UTC, at microsecond resolution, or None if the text is none (config.md 7)."""
    import datetime  # few configurations have a date
    match = _MOMENT.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = map(int, match.groups()[:6])
    fraction, sign, *offset = match.groups()[6:]
    hours, minutes = map(int, [part for part in offset if part] or (0, 0))
    if second > 60 or hours > 23 or minutes > 59:
        return None
    east = datetime.timedelta(hours=hours, minutes=minutes) * (1 if sign in (None, "+") else -1)
    rest = datetime.timedelta(seconds=second, microseconds=int((fraction or "")[:6].ljust(6, "0")))     # 60 is a leap second
    try:
        return datetime.datetime(year, month, day, hour, minute, tzinfo=datetime.UTC) - east + rest
    except (ValueError, OverflowError):
        return None


def _read_show(path: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, list):
        return STRINGS.read(path, value)
    return ALL_USERS.read(path, value)


def _read_overrides(path: str, value: object) -> Mapping[str, tuple[str, ...]]:
    """Addresses per data centre, as written: they are parsed at use (upstream-and-relay.md 2.3)."""
    found = {dc: STRINGS.read(_join(path, dc), entry) if isinstance(entry, list) else (STR.read(_join(path, dc), entry),)
             for dc, entry in _as_table(path, value).items()}
    kept = {dc: tuple(text for text in texts if text.strip()) for dc, texts in found.items()}
    return {dc: texts for dc, texts in kept.items() if texts}


BOOL: Final = _kind("bool", "true or false", lambda value: value if isinstance(value, bool) else None)
U8: Final = _integer("u8", 0, 2**8 - 1)
U16: Final = _integer("u16", 0, 2**16 - 1)
U32: Final = _integer("u32", 0, 2**32 - 1)
U64: Final = _integer("u64", 0, 2**63 - 1)
USIZE: Final = _integer("usize", 0, 2**63 - 1)
OUR_INT: Final = _integer("int", -2**63, 2**63 - 1)    # keys of 2.9: their rule has the say, also below zero
F32: Final = _kind("f32", "a number", _as_float)
STR: Final = _kind("str", "a string", _as_str)
SECRET: Final = _kind("str", "a string", _as_str, secret=True)
IP: Final[Kind[IpAddress]] = _kind("ip", "an IPv4 or IPv6 address", parse_ip)
MOMENT: Final = _kind("time", 'date, time and offset like "2027-01-31T23:59:59Z"', lambda value: parse_expiration(_as_str(value) or ""))
STRINGS: Final = _list_of(STR)
NETWORK: Final[Kind[IpNetwork]] = _kind("cidr", 'a network like "10.0.0.0/8" or "fd00::/8"', parse_network)
NETWORKS: Final = _list_of(NETWORK)
ALL_USERS: Final = _kind("*", '"*" or an array of user names', lambda value: "*" if value == "*" else None)
SHOW: Final = Kind('"*" or [str]', _read_show)
OVERRIDES: Final = Kind("{dc: str or [str]}", _read_overrides)


# -- rules (config.md 2.9, 3)

def parse_ip_port(text: str) -> tuple[IpAddress, int] | None:
    """Return (address, port) of `IP:PORT` or `[IPv6]:PORT`; None for anything else."""
    host, _, digits = text.rpartition(":")
    bracketed = host[:1] == "[" and host[-1:] == "]"
    address, port = parse_ip(host[1:-1] if bracketed else host), parse_port(digits)
    if address is None or port is None or bracketed != (address.version == 6):
        return None
    return address, port


def parse_port(text: str) -> int | None:
    """Return a port of ASCII digits, 0..65535; None for anything else."""
    if not (text.isascii() and text.isdigit()):
        return None
    digits = text.lstrip("0") or "0"
    return int(digits) if len(digits) <= 5 and int(digits) <= 0xFFFF else None


_URL: Final = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?(?:[/?#][\x21-\x7e]*)?", re.IGNORECASE)


def _is_url(text: str) -> bool:
    """True for https, and for http to a loopback host.  No user part: `http://localhost@elsewhere` is no loopback."""
    match = _URL.fullmatch(text)
    if match is None or int(match[3] or 0) > 0xFFFF:
        return False
    host = match[2].lower()
    ip = parse_ip(host.strip("[]"))
    if host[0] == "[" and (ip is None or ip.version == 4):
        return False
    loopback = host == "localhost" or (ip is not None and (str(ip) == "::1" or (ip.version == 4 and ip.is_loopback)))
    return loopback or match[1].lower() == "https"


def within(low: float, high: float) -> Rule:
    """Both ends included; NaN is outside."""
    return Rule(f"must be within [{low}, {high}]", lambda value: low <= value <= high)


POSITIVE: Final = Rule("must be > 0", lambda value: value > 0)
FILLED: Final = Rule("cannot be empty", lambda value: value.strip() != "")
FILLED_IF_SET: Final = Rule("cannot be empty when provided", lambda value: value.strip() != "")
IP_PORT: Final = Rule("must be in IP:PORT format", lambda value: parse_ip_port(value) is not None)
HTTPS: Final = Rule("must be an https URL (plain http only to a loopback host)", _is_url)
OFF_OR_10_300: Final = Rule("must be 0 or within [10, 300]", lambda value: value == 0 or 10 <= value <= 300)


# -- the table of keys (config.md 2)

class Modes(Table):
    """[general.modes]: which kinds of links work."""

    classic: bool = key(BOOL, False, "h", "", "Plain obfuscated links: easy to recognise.")
    secure: bool = key(BOOL, False, "h", "", "Links starting with dd: random padding, no disguise.")
    tls: bool = key(BOOL, True, "h", "", "Links starting with ee: looks like TLS.")


class Telemetry(Table):
    """[general.telemetry]: what is counted for API and metrics; limits work regardless."""

    core_enabled: bool = key(BOOL, True, "H", "", "Count process-wide totals.")
    user_enabled: bool = key(BOOL, True, "H", "", "Count totals of each user.")
    me_level: str = key(_one_of("silent", "normal", "debug"), "normal", "H", "", "How much is counted about the middle end.")


class Links(Table):
    """[general.links]: the links that are printed and handed out."""

    show: str | tuple[str, ...] = key(SHOW, "*", "h", "", 'Users whose links are printed: "*" = all, [] = none.')
    public_host: str | None = key(STR, None, "h", "", "Host in links, taken as it is; without it the address that was found.")
    public_port: int | None = key(U16, None, "h", "", "Port in links; without it server.port.")


class General(Table):
    """[general]"""

    modes: Modes = table(Modes)
    telemetry: Telemetry = table(Telemetry)
    links: Links = table(Links)
    prefer_ipv6: bool = key(BOOL, False, "R", "", "Old form of network.prefer = 6.")
    fast_mode: bool = key(BOOL, True, "h", "", "Direct mode: pass on what a data centre sends without encrypting it again.")
    use_middle_proxy: bool = key(BOOL, True, "R!", "", "Reach Telegram through its middle end; needed for ad tags.")
    proxy_secret_path: str = key(STR, "proxy-secret", "R", "", "Cache file of the downloaded proxy-secret.")
    ad_tag: str | None = key(STR, None, "H", "", "Sponsor tag (32 hex) of users without one of their own; invalid = none.")
    middle_proxy_nat_ip: IpAddress | None = key(IP, None, "R", "", "Our public IP behind NAT; wins over detection.")
    middle_proxy_nat_probe: bool = key(BOOL, True, "R", "", "Find the public address by STUN and HTTP; always on with the middle end.")
    middle_proxy_nat_stun: str | None = key(STR, None, "R", "", "Old form of one entry in network.stun_servers.")
    middle_proxy_nat_stun_servers: tuple[str, ...] = key(STRINGS, (), "R", "", "Old form of network.stun_servers.")
    stun_nat_probe_concurrency: int = key(USIZE, 8, "R", "", "STUN probes at a time.", POSITIVE)
    middle_proxy_pool_size: int = key(USIZE, 8, "-", "", "Once: cap of the reserve links opened at start.")
    middle_proxy_warm_standby: int = key(USIZE, 16, "-", "", "Reserved.")
    me_keepalive_enabled: bool = key(BOOL, True, "H", "", "Ping idle links at the interval below; false = a fixed built-in period.")
    me_keepalive_interval_secs: int = key(U64, 8, "H", "s", "Base ping interval of an idle link.")
    me_keepalive_jitter_secs: int = key(U64, 2, "H", "s", "Random addition to it, at most half the interval.")
    me_keepalive_payload_random: bool = key(BOOL, True, "-", "", "Only shown in the API.")
    rpc_proxy_req_every: int = key(U64, 0, "R", "s", "Period of the activity signal to the middle end; 0 = off.", OFF_OR_10_300)
    crypto_pending_buffer: int = key(USIZE, 262144, "h", "B", "Ciphertext queued per client; 0 acts as 65536, less than 4096 as 4096.")
    max_client_frame: int = key(USIZE, 16777216, "h", "B", "Largest client frame with the middle end; more than 16777120 acts as that.")
    desync_all_full: bool = key(BOOL, False, "H", "", "Full forensics for every desync, not once per window.")
    beobachten: bool = key(BOOL, True, "h", "", "Remember addresses that scan or fail handshakes.")
    beobachten_minutes: int = key(U64, 10, "h", "min", "How long they are remembered.", POSITIVE)
    beobachten_flush_secs: int = key(U64, 15, "h", "s", "Period of the snapshot file.", POSITIVE)
    beobachten_file: str = key(STR, "cache/beobachten.txt", "h", "", "Snapshot file; its directory is created.", FILLED)
    hardswap: bool = key(BOOL, True, "H", "", "Replace all links at once by a new generation.")
    me_warmup_stagger_enabled: bool = key(BOOL, True, "R", "", "Open reserve links one after the other.")
    me_warmup_step_delay_ms: int = key(U64, 500, "R", "ms", "Pause between them.")
    me_warmup_step_jitter_ms: int = key(U64, 300, "R", "ms", "Random addition to the pause.")
    me_reconnect_max_concurrent_per_dc: int = key(U32, 8, "R", "", "Dials at a time per data centre; 0 acts as 1.")
    me_reconnect_backoff_base_ms: int = key(U64, 500, "R", "ms", "First pause after a failed dial.")
    me_reconnect_backoff_cap_ms: int = key(U64, 30000, "R", "ms", "Longest pause after failed dials.")
    me_reconnect_fast_retry_count: int = key(U32, 16, "R", "", "Dials without a growing pause; 0 acts as 1.")
    me_single_endpoint_shadow_writers: int = key(U8, 2, "h", "", "Reserve links where a data centre has one endpoint.", within(0, 32))
    me_single_endpoint_outage_mode_enabled: bool = key(BOOL, True, "h", "", "Recover such a data centre at its own pace.")
    me_single_endpoint_outage_disable_quarantine: bool = key(BOOL, True, "h", "", "And ignore the quarantine of its endpoint.")
    me_single_endpoint_outage_backoff_min_ms: int = key(U64, 250, "h", "ms", "First pause of that recovery.", POSITIVE)
    me_single_endpoint_outage_backoff_max_ms: int = key(U64, 3000, "h", "ms", "Longest pause of that recovery.", POSITIVE)
    me_single_endpoint_shadow_rotate_every_secs: int = key(U64, 900, "h", "s", "Renewal of idle reserve links there; 0 = off.")
    me_floor_mode: str = key(_one_of("static", "adaptive"), "adaptive", "H", "", "Whether the floor of links follows use.")
    me_adaptive_floor_idle_secs: int = key(U64, 90, "H", "s", "Idle time after which the floor sinks.")
    me_adaptive_floor_min_writers_single_endpoint: int = key(U8, 1, "H", "", "Lowest floor with one endpoint.", within(1, 32))
    me_adaptive_floor_recover_grace_secs: int = key(U64, 180, "H", "s", "How long the full floor is kept after use.")
    upstream_connect_retry_attempts: int = key(U32, 2, "R", "", "Attempts per connect request.", POSITIVE)
    upstream_connect_retry_backoff_ms: int = key(U64, 100, "R", "ms", "Pause between attempts, up to half more at random; 0 = none.")
    upstream_unhealthy_fail_threshold: int = key(U32, 5, "R", "", "Failed requests until an upstream counts as unhealthy.", POSITIVE)
    upstream_connect_failfast_hard_errors: bool = key(BOOL, False, "R", "", "No further attempt after errors like a refused connection.")
    stun_iface_mismatch_ignore: bool = key(BOOL, False, "-", "", "Once: use a STUN answer of another interface.")
    unknown_dc_log_path: str = key(STR, "unknown-dc.txt", "h", "", 'Unknown data centres asked for are listed here; "" = nowhere.')
    log_level: str = key(_one_of("debug", "verbose", "normal", "silent"), "normal", "H", "", "How much is logged.")
    disable_colors: bool = key(BOOL, False, "R", "", "No colours in the log.")
    me_socks_kdf_policy: str = key(_one_of("strict", "compat"), "strict", "H", "", "Key material of links through SOCKS.")
    me_route_backpressure_base_timeout_ms: int = key(U64, 25, "-", "ms", "Once: patience with a full answer queue.", POSITIVE)
    me_route_backpressure_high_timeout_ms: int = key(U64, 120, "H", "ms", "How long a session with a full answer queue is tolerated.")
    me_route_backpressure_high_watermark_pct: int = key(U8, 80, "-", "%", "Once: when a queue counts as nearly full.", within(1, 100))
    fast_mode_min_tls_record: int = key(USIZE, 0, "-", "B", "Once: smallest TLS record in fast mode.")
    update_every: int | None = key(U64, 300, "H", "s", "Refresh period of middle-end lists and proxy-secret.", POSITIVE)
    me_reinit_every_secs: int = key(U64, 900, "h", "s", "Period of the renewal of all links.", POSITIVE)
    me_hardswap_warmup_delay_min_ms: int = key(U64, 1000, "h", "ms", "Shortest pause between dials of a new generation.")
    me_hardswap_warmup_delay_max_ms: int = key(U64, 2000, "h", "ms", "Longest pause between dials of a new generation.", POSITIVE)
    me_hardswap_warmup_extra_passes: int = key(U8, 3, "h", "", "Further rounds for endpoints that failed.", within(0, 10))
    me_hardswap_warmup_pass_backoff_base_ms: int = key(U64, 500, "h", "ms", "Pause before a further round.", POSITIVE)
    me_config_stable_snapshots: int = key(U8, 2, "h", "", "Equal downloads until a new middle-end list counts.", POSITIVE)
    me_config_apply_cooldown_secs: int = key(U64, 300, "h", "s", "Least time between two applied lists.")
    me_snapshot_require_http_2xx: bool = key(BOOL, True, "h", "", "Discard lists that came with another status.")
    me_snapshot_reject_empty_map: bool = key(BOOL, True, "-", "", "Once: discard an empty list; now always.")
    me_snapshot_min_proxy_for_lines: int = key(U32, 1, "h", "", "Discard lists with fewer proxy_for lines.", POSITIVE)
    proxy_secret_stable_snapshots: int = key(U8, 2, "h", "", "Equal downloads until a new proxy-secret counts.", POSITIVE)
    proxy_secret_rotate_runtime: bool = key(BOOL, True, "h", "", "Use a new proxy-secret without a restart.")
    me_secret_atomic_snapshot: bool = key(BOOL, True, "-", "", "Once: change secret and list together; now always.")
    proxy_secret_len_max: int = key(USIZE, 256, "h", "B", "Longest proxy-secret accepted.", within(32, 4096))
    me_pool_drain_ttl_secs: int = key(U64, 90, "H", "s", "Lower bound of me_reinit_drain_timeout_secs.")
    me_bind_stale_mode: str = key(_one_of("never", "ttl", "always"), "ttl", "h", "", "May new sessions use links of an older list?")
    me_bind_stale_ttl_secs: int = key(U64, 90, "h", "s", "For how long they may, in mode ttl.")
    me_pool_min_fresh_ratio: float = key(F32, 0.8, "H", "", "Share of new links that must stand before old ones go.", within(0.0, 1.0))
    me_reinit_drain_timeout_secs: int = key(U64, 120, "H", "s", "When links being replaced are closed by force; 0 = never.")
    proxy_secret_auto_reload_secs: int = key(U64, 3600, "H", "s", "Old form of update_every, for the secret.")
    proxy_config_auto_reload_secs: int = key(U64, 3600, "H", "s", "Old form of update_every, for the lists.")
    me_reinit_singleflight: bool = key(BOOL, True, "-", "", "Once: one renewal at a time; now always.")
    me_reinit_trigger_channel: int = key(USIZE, 64, "R", "", "Renewal requests that may wait.", POSITIVE)
    me_reinit_coalesce_window_ms: int = key(U64, 200, "h", "ms", "Requests within this time are one; 0 = none are joined.")
    me_deterministic_writer_sort: bool = key(BOOL, True, "h", "", "Equal candidates in a fixed order.")
    ntp_check: bool = key(BOOL, True, "-", "", "Once: compare the clock with NTP.")
    ntp_servers: tuple[str, ...] = key(STRINGS, ("pool.ntp.org",), "-", "", "Once: NTP servers.")
    auto_degradation_enabled: bool = key(BOOL, True, "H", "", "New sessions go direct while the middle end is not usable.")
    degradation_min_unavailable_dc_groups: int = key(U8, 2, "H", "", "How many data centres must be down for that.")
    proxy_secret_url: str | None = key(STR, None, "R", "", "Where proxy-secret is downloaded from.", HTTPS)
    proxy_config_v4_url: str | None = key(STR, None, "R", "", "Where the IPv4 middle-end list is downloaded from.", HTTPS)
    proxy_config_v6_url: str | None = key(STR, None, "R", "", "Where the IPv6 middle-end list is downloaded from.", HTTPS)
    proxy_config_v4_cache_path: str = key(STR, "cache/proxy-config-v4.txt", "R", "", "Cache file of the IPv4 list.", FILLED_IF_SET)
    proxy_config_v6_cache_path: str = key(STR, "cache/proxy-config-v6.txt", "R", "", "Cache file of the IPv6 list.", FILLED_IF_SET)
    event_loop: str = key(_one_of("auto", "epoll", "selectors", "uvloop"), "auto", "R", "",
                          "What waits for sockets; uvloop if that package is installed, and slower than epoll.")
    quota_state_path: str | None = key(STR, None, "R", "", "File that keeps used quotas over a restart.", FILLED_IF_SET)


_STUN_SERVERS: Final = tuple("""
    stun.l.google.com:5349 stun1.l.google.com:3478 stun.gmx.net:3478 stun.l.google.com:19302 stun.1und1.de:3478
    stun1.l.google.com:19302 stun2.l.google.com:19302 stun3.l.google.com:19302 stun4.l.google.com:19302
    stun.services.mozilla.com:3478 stun.stunprotocol.org:3478 stun.nextcloud.com:3478 stun.voip.eutelia.it:3478""".split())
_IP_SITES: Final = ("https://ifconfig.me/ip", "https://api.ipify.org")
_LOOPBACK: Final[tuple[IpNetwork, ...]] = (ipaddress.IPv4Network("127.0.0.1/32"), ipaddress.IPv6Network("::1/128"))


class Network(Table):
    """[network]"""

    ipv4: bool = key(BOOL, True, "R", "", "Use IPv4.")
    ipv6: bool = key(BOOL, False, "R!", "", "Use IPv6.")
    prefer: int = key(U8, 4, "R!", "", "Family to try first: 4 or 6.")
    multipath: bool = key(BOOL, False, "R", "", "Middle end over both families.")
    stun_use: bool = key(BOOL, True, "R", "", "Ask STUN servers for our public address.")
    stun_servers: tuple[str, ...] = key(STRINGS, _STUN_SERVERS, "R", "", "STUN servers, host:port or [v6]:port.")
    stun_tcp_fallback: bool = key(BOOL, True, "R", "", "STUN over TCP where UDP gets no answer.")
    http_ip_detect_urls: tuple[str, ...] = key(STRINGS, _IP_SITES, "R", "", "Sites that tell our address, tried in order.")
    cache_public_ip_path: str = key(STR, "cache/public_ip.txt", "R", "", "Cache file of the public address.")
    dns_overrides: tuple[str, ...] = key(STRINGS, (), "H", "", "host:port:ip entries that replace name resolution.")


class Api(Table):
    """[server.api]"""

    enabled: bool = key(BOOL, False, "R", "", "Serve the Control API.")
    listen: str = key(STR, "127.0.0.1:9091", "R", "", "Its address; port 0 = not started.", IP_PORT)
    whitelist: tuple[IpNetwork, ...] = key(NETWORKS, _LOOPBACK, "R", "", "Networks that may use it; [] = all.")
    auth_header: str = key(SECRET, "", "R", "", 'Value that the Authorization header must have; "" = none needed.')
    request_body_limit_bytes: int = key(USIZE, 65536, "R", "B", "Largest request body.", POSITIVE)
    minimal_runtime_enabled: bool = key(BOOL, False, "R", "", "Serve the runtime views.")
    minimal_runtime_cache_ttl_ms: int = key(U64, 1000, "R", "ms", "How long they are cached; 0 = not.", within(0, 60000))
    read_only: bool = key(BOOL, False, "R", "", "Refuse every change.")
    ui: bool = key(BOOL, True, "R", "", "Serve the status page.")
    allowed_hosts: tuple[str, ...] = key(STRINGS, (), "R", "", "Host headers that are answered; [] = all.")
    runtime_edge_enabled: bool = key(BOOL, False, "R", "", "Serve the connection views.")
    runtime_edge_cache_ttl_ms: int = key(OUR_INT, 1000, "R", "ms", "How long they are cached; 0 = not.", within(0, 60000))
    runtime_edge_top_n: int = key(OUR_INT, 10, "R", "", "Length of their top lists.", within(1, 1000))
    runtime_edge_events_capacity: int = key(OUR_INT, 256, "R", "", "Events that are kept.", within(16, 4096))


class ListenerEntry(Table):
    """One of [[server.listeners]]."""

    ip: IpAddress = key(IP, ipaddress.IPv4Address(0), "R", "", "Address to listen on, with server.port.", required=True)
    announce: str | None = key(STR, None, "R!", "", "Host in the links of this listener, taken as it is.")
    announce_ip: IpAddress | None = key(IP, None, "R!", "", "Old form of announce.")
    proxy_protocol: bool | None = key(BOOL, None, "R", "", "Instead of server.proxy_protocol.")
    reuse_allow: bool = key(BOOL, False, "R", "", "Let several processes share the port.")


class ServerSettings(Table):
    """[server]; the Server itself is in room 20."""

    port: int = key(U16, 443, "R!", "", "Port of every TCP listener.")
    listen_addr_ipv4: str = key(STR, "0.0.0.0", "R", "", "Address to listen on without [[server.listeners]].")
    listen_addr_ipv6: str = key(STR, "::", "R", "", "Second address to listen on without [[server.listeners]].")
    listen_unix_sock: str | None = key(STR, None, "R", "", "Path of a unix socket to listen on as well.")
    listen_unix_sock_perm: str | None = key(STR, None, "R", "", 'Its mode, octal, like "0666".')
    listen_tcp: bool | None = key(BOOL, None, "R", "", "false = only listen on what [[server.listeners]] names.")
    proxy_protocol: bool = key(BOOL, False, "h", "", "Expect a PROXY protocol header on every connection.")
    metrics_port: int | None = key(U16, None, "R", "", "Port of the Prometheus metrics.")
    metrics_whitelist: tuple[IpNetwork, ...] = key(NETWORKS, _LOOPBACK, "R", "", "Networks that may read them; [] = all.")
    api: Api = table(Api)
    listeners: tuple[ListenerEntry, ...] = tables(
        ListenerEntry, lambda path, value: _read_table(ListenerEntry, path, value), "R", "Addresses to listen on.")
    metrics_listen: str | None = key(STR, None, "R", "", "Address of the metrics, IP:PORT, instead of metrics_port.", IP_PORT)
    proxy_protocol_trusted_cidrs: tuple[IpNetwork, ...] | None = key(
        NETWORKS, None, "h", "", "Networks whose PROXY header is believed; absent = all, [] = none.")


class Timeouts(Table):
    """[timeouts]"""

    client_handshake: int = key(U64, 30, "h", "s", "From accept to the end of the handshake.")
    tg_connect: int = key(U64, 10, "R", "s", "One attempt to connect through an upstream.")
    client_keepalive: int = key(U64, 60, "h", "s", "TCP keepalive of client sockets, idle time and interval.")
    client_ack: int = key(U64, 300, "h", "s", "How long sent data may stay unacknowledged (TCP_USER_TIMEOUT).")
    me_one_retry: int = key(U8, 12, "-", "", "Once: retries of one middle-end connection.")
    me_one_timeout_ms: int = key(U64, 1200, "R", "ms", "One attempt to reconnect to a middle end.")


class Censorship(Table):
    """[censorship]"""

    tls_domain: str = key(STR, "petrovich.ru", "R!", "", "Site that FakeTLS links name.")
    tls_domains: tuple[str, ...] = key(STRINGS, (), "R!", "", "Further sites, each with links of its own.")
    mask: bool = key(BOOL, True, "h", "", "Pass strangers on to the real site; false = read them and answer nothing.")
    mask_host: str | None = key(STR, None, "h", "", "Where to; without it tls_domain.")
    mask_port: int = key(U16, 443, "h", "", "Port of mask_host.")
    mask_unix_sock: str | None = key(STR, None, "h", "", "Unix socket instead of mask_host.")
    fake_cert_len: int = key(USIZE, 2048, "R", "B", "Size of the disguised certificate where none was measured.")
    tls_emulation: bool = key(BOOL, True, "R!", "", "Use the certificate sizes of the real site.")
    tls_front_dir: str = key(STR, "tlsfront", "R", "", "Directory where they are kept.")
    server_hello_delay_min_ms: int = key(U64, 0, "h", "ms", "Shortest delay of the ServerHello.")
    server_hello_delay_max_ms: int = key(U64, 0, "h", "ms", "Longest delay of the ServerHello; 0 = none.")
    tls_new_session_tickets: int = key(U8, 0, "-", "", "Once: session tickets to imitate.")
    tls_full_cert_ttl_secs: int = key(U64, 90, "-", "s", "Once: time between two full certificates per address.")
    alpn_enforce: bool = key(BOOL, True, "-", "", "Once: answer ALPN.")
    mask_proxy_protocol: int = key(U8, 0, "h", "", "PROXY header to the mask site: 0 = none, 1 = text, 2 = binary.")


class Access(Table):
    """[access]: who may use the proxy, and how much.  A limit of 0 blocks."""

    users: Mapping[str, str] = key(_map_of(SECRET), {"default": _ZERO_SECRET}, "H", "", "Secret (32 hex) of each user.")
    user_ad_tags: Mapping[str, str] = key(_map_of(STR), {}, "H", "", "Sponsor tag (32 hex) of a user.")
    user_max_tcp_conns: Mapping[str, int] = key(_map_of(USIZE), {}, "H", "", "Connections of a user at a time.")
    user_expirations: Mapping[str, datetime.datetime] = key(_map_of(MOMENT), {}, "H", "", "When a user ends (UTC once read).")
    user_data_quota: Mapping[str, int] = key(_map_of(U64), {}, "H", "B", "Octets of a user, both directions together.")
    user_max_unique_ips: Mapping[str, int] = key(_map_of(USIZE), {}, "H", "", "Addresses of a user at a time.")
    user_enabled: Mapping[str, bool] = key(_map_of(BOOL), {}, "H", "", "false = the user is refused; absent = true.")
    replay_check_len: int = key(USIZE, 65536, "H", "", "Handshakes remembered to recognise replays.")
    replay_window_secs: int = key(U64, 1800, "H", "s", "How long they are remembered.")
    ignore_time_skew: bool = key(BOOL, False, "H", "", "Accept clients with a wrong clock.")


class Upstream(Table):
    """One of [[upstreams]]: a way to Telegram.  `type` is shadowsocks only in a disabled entry (config.md 8 item 24)."""

    type: str = key(_one_of("direct", "socks4", "socks5"), "direct", "R", "", "Kind of the way.", required=True)
    weight: int = key(U16, 1, "R", "", "Share of the connections, relative to the others.")
    enabled: bool = key(BOOL, True, "R", "", "false = not used.")
    scopes: str = key(STR, "", "R", "", "Only for users scope_X of these X, separated by commas.")
    interface: str | None = key(STR, None, "R", "", "Interface or local IP to connect from.")
    bind_addresses: tuple[str, ...] | None = key(STRINGS, None, "R", "", "Local IPs to connect from, in turn.", only="direct")
    address: str = key(STR, "", "R", "", "The SOCKS server, ip:port or host:port.", only="socks4 socks5", required=True)
    user_id: str | None = key(SECRET, None, "R", "", "SOCKS4 user id.", only="socks4")
    username: str | None = key(SECRET, None, "R", "", "SOCKS5 user name.", only="socks5")
    password: str | None = key(SECRET, None, "R", "", "SOCKS5 password.", only="socks5")


class Settings(Table):
    """The whole file."""

    general: General = table(General)
    network: Network = table(Network)
    server: ServerSettings = table(ServerSettings)
    timeouts: Timeouts = table(Timeouts)
    censorship: Censorship = table(Censorship)
    access: Access = table(Access)
    upstreams: tuple[Upstream, ...] = tables(Upstream, lambda path, value: _read_upstream(path, value), "R", "Ways to Telegram.")
    dc_overrides: Mapping[str, tuple[str, ...]] = key(OVERRIDES, {}, "h", "", "Addresses of a data centre instead of the built-in ones.")
    default_dc: int | None = key(U8, None, "h", "", "Data centre for unknown ones; outside 1..5 acts as 2.")
    show_link: str | tuple[str, ...] = key(SHOW, (), "h", "", "Old form of general.links.show.")


# -- the table, walked

def walk_keys(cls: type[Any] = Settings, path: str = "") -> Iterator[tuple[str, Key]]:
    """Yield (TOML path, Key) of every table and key in table order; what array entries hold as `upstreams[].type`."""
    for name, spec in cls.members.items():
        yield path + name, spec
        if spec.table is not None:
            yield from walk_keys(spec.table, f"{path}{name}{'[]' if spec.many else ''}.")


KEYS: Final[Mapping[str, Key]] = dict(walk_keys())


def raw_defaults() -> dict[str, Any]:
    """Return TOML path -> value when absent, before normalisation, in JSON types; None = unset or required."""
    return {path: None if spec.required else as_json(spec.default) for path, spec in KEYS.items() if spec.table is None or spec.many}


def as_json(value: Any) -> Any:
    """Return a setting in JSON types, as it would stand in the file."""
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    if isinstance(value, Mapping):
        return {name: as_json(item) for name, item in value.items()}
    if hasattr(value, "isoformat"):
        return value.replace(tzinfo=None).isoformat() + "Z"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


class Change(NamedTuple):
    """One key whose value differs."""

    path: str
    old: Any
    new: Any
    reload: Reload


def diff_settings(old: Any, new: Any, path: str = "") -> tuple[Change, ...]:
    """Return the changed keys in table order; an array of tables counts as one key."""
    changes: list[Change] = []
    for name, spec in old.members.items():
        before, after = getattr(old, name), getattr(new, name)
        if spec.table is not None and not spec.many:
            changes += diff_settings(before, after, f"{path}{name}.")
        elif before != after:
            changes.append(Change(path + name, before, after, spec.reload))
    return tuple(changes)


def merge_hot(running: Settings, new: Settings) -> Settings:
    """Return `running` with the hot keys of `new`: what is in force after a reload (config.md 8 item 1)."""
    merged = running
    for change in diff_settings(running, new):
        if change.reload in (Reload.HOT, Reload.HOT_OURS) and not _follows(change, running, new):
            merged = _with_value(merged, change.path, change.new)
    return merged


def _follows(change: Change, old: Settings, new: Settings) -> bool:
    """True for a mask_host that is nothing but the tls_domain, which needs a restart."""
    return (change.path == "censorship.mask_host" and change.old == old.censorship.tls_domain
            and change.new == new.censorship.tls_domain)


def _value_at(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name)
    return root


def _with_value(root: Any, path: str, value: object) -> Any:
    """Return `root` with the key at `path` replaced."""
    name, _, rest = path.partition(".")
    return root.but(**{name: _with_value(getattr(root, name), rest, value) if rest else value})


# -- what a reload says (config.md 4.2, 8 item 1); each line follows `config reload: `

_MAPS: Final = {"access.user_ad_tags": "user_ad_tags", "network.dns_overrides": "network.dns_overrides",
                "access.user_max_tcp_conns": "user_max_tcp_conns", "access.user_expirations": "user_expirations",
                "access.user_data_quota": "user_data_quota", "access.user_max_unique_ips": "user_max_unique_ips"}
_SCALARS: Final = {"general.desync_all_full": "", "general.hardswap": "", "general.me_pool_drain_ttl_secs": "s",
                   "general.me_reinit_drain_timeout_secs": "s", "general.me_socks_kdf_policy": ""}      # with the unit shown
_UNTOLD: Final = frozenset(("access.replay_check_len", "access.replay_window_secs", "access.ignore_time_skew",
                            "general.proxy_secret_auto_reload_secs", "general.proxy_config_auto_reload_secs"))


_RESTART_ORDER: Final = ("server.port", "server.api", "censorship.tls_domain ", "network.ipv4/ipv6", "use_middle_proxy",
                         "general.stun_nat_probe_concurrency", "general.upstream_*")       # the lines of 3.2.1, the others behind


def describe_restart(old: Settings, new: Settings) -> list[str]:
    """Return a line per change between two files that waits for a restart."""
    listed = [resolve_listeners(settings.server.but(listeners=())) == settings.server.listeners for settings in (old, new)]
    lines = [_restart_text(change) for change in diff_settings(old, new)
             if change.reload in (Reload.RESTART, Reload.RESTART_OURS) and not (change.path == "server.listeners" and all(listed))]
    lines.sort(key=lambda line: next((rank for rank, word in enumerate(_RESTART_ORDER) if line.startswith(word)), len(_RESTART_ORDER)))
    return [f"{line}; restart required" for line in dict.fromkeys(lines)]


def _restart_text(change: Change) -> str:
    path = change.path
    if path == "server.port":
        return f"{path} changed ({change.old} \u2192 {change.new})"
    if path == "censorship.tls_domain":
        return f"{path} changed ('{change.old}' \u2192 '{change.new}')"
    if path in ("network.ipv4", "network.ipv6"):
        return "network.ipv4/ipv6 changed"
    if path.startswith("server.api."):
        return "server.api changed"
    if path.startswith("general.upstream_") or path == "general.rpc_proxy_req_every":
        return "general.upstream_* changed"
    return f"{path.removeprefix('general.') if path == 'general.use_middle_proxy' else path} changed"


def describe_hot(old: Settings, new: Settings) -> list[str]:
    """Return a line per change between two files that is in force now."""
    left = {change.path: change for change in diff_settings(old, new)
            if change.reload in (Reload.HOT, Reload.HOT_OURS) and not _follows(change, old, new)}
    lines = []
    if level := left.pop("general.log_level", None):
        lines.append(f"log_level: '{level.old}' \u2192 '{level.new}'")
    lines += [f"{name} updated ({len(change.new)} entries)" for path, name in _MAPS.items() if (change := left.pop(path, None))]
    if enabled := left.pop("access.user_enabled", None):
        lines.append(f"user_enabled updated ({list(enabled.new.values()).count(False)} disabled overrides)")
    if left.pop("general.ad_tag", None):
        lines.append("general.ad_tag updated (applied on next connection)")
    for path, unit in _SCALARS.items():
        if change := left.pop(path, None):
            lines.append(f"{path.removeprefix('general.')}: {_shown(change.old)}{unit} \u2192 {_shown(change.new)}{unit}")
    if ratio := left.pop("general.me_pool_min_fresh_ratio", None):
        lines.append(f"me_pool_min_fresh_ratio: {ratio.old:.3f} \u2192 {ratio.new:.3f}")
    lines += _describe_groups(old, new, left)
    users = left.pop("access.users", None)
    lines += [f"{path}: {_shown(change.old)} \u2192 {_shown(change.new)}" for path, change in left.items() if path not in _UNTOLD]
    return lines + (_describe_users(users.old, users.new) if users else [])


def _describe_groups(old: Settings, new: Settings, left: dict[str, Change]) -> Iterator[str]:
    """Lines that tell several keys at once; takes their keys out of `left`."""
    def changed(*names: str) -> bool:
        found = [left.pop(f"general.{name}", None) for name in names]        # all of them, not up to the first
        return any(found)

    general = new.general
    left.pop("general.update_every", None)
    periods = [effective_update_every(settings.general) for settings in (old, new)]
    if periods[0] != periods[1]:
        yield f"update_every(effective): {periods[0]}s \u2192 {periods[1]}s"
    if changed("me_keepalive_enabled", "me_keepalive_interval_secs", "me_keepalive_jitter_secs"):
        yield (f"me_keepalive: enabled={_shown(general.me_keepalive_enabled)} interval={general.me_keepalive_interval_secs}s "
               f"jitter={general.me_keepalive_jitter_secs}s random_payload={_shown(general.me_keepalive_payload_random)}")
    if changed("telemetry.core_enabled", "telemetry.user_enabled", "telemetry.me_level"):
        told = general.telemetry
        yield f"telemetry: core_enabled={_shown(told.core_enabled)} user_enabled={_shown(told.user_enabled)} me_level={told.me_level}"
    if changed("me_floor_mode", "me_adaptive_floor_idle_secs", "me_adaptive_floor_min_writers_single_endpoint",
               "me_adaptive_floor_recover_grace_secs"):
        yield (f"me_floor: mode={general.me_floor_mode.capitalize()} idle={general.me_adaptive_floor_idle_secs}s "
               f"min_single={general.me_adaptive_floor_min_writers_single_endpoint} "
               f"recover_grace={general.me_adaptive_floor_recover_grace_secs}s")
    if changed("me_route_backpressure_high_timeout_ms"):
        yield (f"me_route_backpressure: base={general.me_route_backpressure_base_timeout_ms}ms "
               f"high={general.me_route_backpressure_high_timeout_ms}ms watermark={general.me_route_backpressure_high_watermark_pct}%")


def _describe_users(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    named = {"added": new.keys() - old.keys(), "removed": old.keys() - new.keys(),
             "secret changed": {name for name in old.keys() & new.keys() if old[name] != new[name]}}
    return [f"users {what}: [{', '.join(sorted(names))}]" for what, names in named.items() if names]


def _shown(value: Any) -> str:
    """A value in a log line; capitals for the policies that 3.2.1 prints so."""
    if isinstance(value, bool):
        return str(value).lower()
    if value in ("strict", "compat"):
        return str(value).capitalize()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_shown(item)}' for name, item in value.items())}}}"
    return "none" if value is None else f"'{value}'" if isinstance(value, str) else str(value)


def effective_update_every(general: General) -> int:
    """Refresh period of the middle-end lists, seconds: the key, or the shorter of the old two."""
    old = min(general.proxy_secret_auto_reload_secs, general.proxy_config_auto_reload_secs)
    return old if general.update_every is None else general.update_every


# -- TOML 1.0 (toml.io/en/v1.0.0).  Ours, because tomllib and what it needs (typing, re, string, datetime) take 1.7 MB for good;
# tests/laws/test_toml_laws.py compares the two.

_TOML_WS: Final = " \t"
_TOML_BARE: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
_TOML_SCALAR: Final = _TOML_BARE + "+.:"
_TOML_ESCAPES: Final = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}
_TOML_BASES: Final = {"0x": (16, "0123456789abcdefABCDEF_"), "0o": (8, "01234567_"), "0b": (2, "01_")}
_NAN: Final = float("nan")
_TOML_WORDS: Final = {"true": True, "false": False, "inf": INF, "+inf": INF, "-inf": -INF, "nan": _NAN, "+nan": _NAN, "-nan": _NAN}
_DIGITS: Final = "0123456789"


def _whole(digits: str) -> bool:
    """Whether these are decimal digits, one underscore at most between two."""
    return not digits.strip(_DIGITS + "_") and all(group for group in digits.split("_"))


def _toml_number(token: str) -> int | float | None:
    """The integer or float that `token` writes, None if it is none.  Raises ValueError for thousands of digits."""
    base, digits = _TOML_BASES.get(token[:2], (10, ""))
    if digits:
        fits = len(token) > 2 and not token[2:].strip(digits) and all(token[2:].split("_"))
        return int(token[2:].replace("_", ""), base) if fits else None
    mantissa, e, exponent = token.replace("E", "e").partition("e")
    whole, point, fraction = mantissa.partition(".")
    unsigned = whole[1:] if whole[:1] in ("+", "-") else whole
    if not _whole(unsigned) or unsigned[0] == "0" != unsigned or (point and not _whole(fraction)):
        return None
    if e and not _whole(exponent[1:] if exponent[:1] in ("+", "-") else exponent):
        return None
    return float(token.replace("_", "")) if point or e else int(token)


def _toml_time(text: str) -> tuple[int, int, int, int] | None:
    """`07:32:00.5` as hour, minute, second, microsecond; None for anything else."""
    clock, point, fraction = text.partition(".")
    parts = clock.split(":")
    if [len(part) for part in parts] != [2, 2, 2] or clock.strip(_DIGITS + ":") or (point and (not fraction or fraction.strip(_DIGITS))):
        return None
    hour, minute, second = map(int, parts)
    return hour, minute, second, int(fraction[:6].ljust(6, "0"))


def _toml_moment(token: str) -> datetime.date | datetime.time | None:
    """The date, time or both that `token` writes, None if it has another shape.  Raises ValueError for the 30th of February."""
    import datetime  # few configurations have one
    if token[2:3] == ":":
        clock = _toml_time(token)
        return None if clock is None else datetime.time(*clock)
    date, rest = token[:10], token[10:]
    if [len(part) for part in date.split("-")] != [4, 2, 2] or date.strip(_DIGITS + "-"):
        return None
    year, month, day = (int(part) for part in date.split("-"))
    if not rest:
        return datetime.date(year, month, day)
    zone: datetime.tzinfo | None = None
    if rest[-1] in "Zz":
        rest, zone = rest[:-1], datetime.UTC
    elif rest[-6:-5] in ("+", "-"):
        offset = _toml_time(rest[-5:] + ":00")
        if offset is None or offset[0] > 23 or offset[1] > 59:
            return None
        zone = datetime.timezone(datetime.timedelta(hours=offset[0], minutes=offset[1]) * (1 if rest[-6] == "+" else -1))
        rest = rest[:-6]
    clock = _toml_time(rest[1:]) if rest[:1] in ("T", "t", " ") else None
    return None if clock is None else datetime.datetime(year, month, day, *clock, zone)


class _TomlText:
    """The text of a document and a place in it: what a reader does without knowing what it reads, and strings."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.at = 0

    def _error(self, text: str) -> ConfigError:
        if self.at >= len(self.text):
            return ConfigError(f"{text} (at end of document)")
        line, column = self.text.count("\n", 0, self.at) + 1, self.at - self.text.rfind("\n", 0, self.at)
        return ConfigError(f"{text} (at line {line}, column {column})")

    def _span(self, chars: str) -> str:
        """Step over a run of `chars` and return it."""
        begin = self.at
        while piece := self.text[self.at:self.at + 64]:
            left = len(piece.lstrip(chars))
            self.at += len(piece) - left
            if left:
                break
        return self.text[begin:self.at]

    def _take(self, word: str) -> bool:
        """Step over `word` if it comes next."""
        found = self.text.startswith(word, self.at)
        if found:
            self.at += len(word)
        return found

    def _plain(self, end: int, lines: bool = False) -> str:
        """Step to `end` and return what is passed: no control characters but tabs, and newlines if `lines`."""
        piece = self.text[self.at:end]
        if not piece.isprintable():
            for index, char in enumerate(piece):
                if (char < " " and char != "\t" and not (lines and char == "\n")) or char == "\x7f":
                    self.at += index
                    raise self._error(f"Illegal character {char!r}")
        self.at = end
        return piece

    def _comment(self) -> None:
        if self.text.startswith("#", self.at):
            end = self.text.find("\n", self.at)
            self._plain(end if end >= 0 else len(self.text))

    def _blank(self) -> None:
        """Step over everything that may stand between the values of an array."""
        while self._span(_TOML_WS + "\n") or self.text.startswith("#", self.at):
            self._comment()

    # -- strings; the first quotes are passed

    def _literal(self, many: bool) -> str:
        quotes = "'''" if many else "'"
        if many:
            self._take("\n")
        end = self.text.find(quotes, self.at)
        if end < 0:
            self.at = len(self.text)
            raise self._error(f"Expected {quotes!r}")
        found = self._plain(end, many)
        self.at += len(quotes)
        return found + self._more("'") if many else found

    def _basic(self, many: bool) -> str:
        if many:
            self._take("\n")
        parts: list[str] = []
        quote = -1
        while True:
            if quote < self.at:
                quote = self.text.find('"', self.at)
                if quote < 0:
                    self.at = len(self.text)
                    raise self._error("Unterminated string")
            back = self.text.find("\\", self.at, quote)
            parts.append(self._plain(quote if back < 0 else back, many))
            self.at += 1
            if back >= 0:
                parts.append(self._escape(many))
            elif not many:
                return "".join(parts)
            elif self._take('""'):
                return "".join(parts) + self._more('"')
            else:
                parts.append('"')

    def _more(self, quote: str) -> str:
        """Up to two quotes more: they belong to the text when three have ended it."""
        return quote * (self._take(quote) + self._take(quote))

    def _escape(self, many: bool) -> str:
        """What stands behind a backslash."""
        char = self.text[self.at:self.at + 1]
        if many and char in (" ", "\t", "\n"):
            self._span(_TOML_WS)
            if self.at < len(self.text) and not self._take("\n"):
                raise self._error("Unescaped '\\' in a string")
            self._span(_TOML_WS + "\n")
            return ""
        self.at += 1
        if char in _TOML_ESCAPES:
            return _TOML_ESCAPES[char]
        size = {"u": 4, "U": 8}.get(char, 0)
        digits = self.text[self.at:self.at + size]
        if not size or len(digits) < size or digits.strip(_TOML_BASES["0x"][1][:-1]):
            raise self._error("Unescaped '\\' in a string" if not size else "Invalid hex value")
        code = int(digits, 16)
        if code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise self._error("Escaped character is not a Unicode scalar value")
        self.at += size
        return chr(code)


class _Toml(_TomlText):
    """One document.  Tables are told apart by identity: an inline one is closed, one that has a header has it once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.root: dict[str, Any] = {}
        self._table = self.root                # where pairs go
        self._named: set[int] = set()          # tables that have had their header, or were made by dotted keys of another
        self._dotted: set[int] = set()         # made by dotted keys since the last header
        self._closed: set[int] = set()         # inline tables and arrays

    def read(self) -> dict[str, Any]:
        """Return the tables.  Raises ConfigError."""
        while self.at < len(self.text):
            self._span(_TOML_WS)
            if self.text.startswith("[", self.at):
                self._header()
            elif self.text[self.at:self.at + 1] not in ("\n", "#", ""):
                self._pair(self._table, False)
            self._span(_TOML_WS)
            self._comment()
            if self.at < len(self.text) and not self._take("\n"):
                raise self._error("Expected newline or end of document after a statement")
        return self.root

    # -- keys and tables

    def _key(self) -> list[str]:
        parts = []
        while True:
            self._span(_TOML_WS)
            if self._take('"'):
                part = self._basic(False)
            elif self._take("'"):
                part = self._literal(False)
            elif not (part := self._span(_TOML_BARE)):
                raise self._error("Invalid initial character for a key part")
            parts.append(part)
            self._span(_TOML_WS)
            if not self._take("."):
                return parts

    def _inner(self, table: dict[str, Any], name: str, key: Sequence[str]) -> dict[str, Any]:
        """The table of that name, made if it is missing; of a list of tables the last one.  `key`: for the message."""
        if name not in table:
            table[name] = {}
        inner = table[name]
        if id(inner) in self._closed:
            raise self._error(f"Cannot mutate immutable namespace {tuple(key)}")
        if isinstance(inner, list):
            inner = inner[-1]
        if not isinstance(inner, dict):
            raise self._error("Cannot overwrite a value")
        return inner

    def _header(self) -> None:
        many = self._take("[[")
        self.at += not many
        key = self._key()
        self._named |= self._dotted
        self._dotted.clear()
        table = self.root
        for name in key[:-1]:
            table = self._inner(table, name, key)
        name = key[-1]
        if many:
            tables = table.setdefault(name, [])
            if not isinstance(tables, list) or id(tables) in self._closed:
                raise self._error("Cannot overwrite a value" if id(tables) not in self._closed else
                                  f"Cannot mutate immutable namespace {tuple(key)}")
            tables.append({})
        elif isinstance(table.get(name), list) or id(table.get(name)) in self._named | self._closed:
            raise self._error(f"Cannot declare {tuple(key)} twice")
        self._table = self._inner(table, name, key)
        self._named.add(id(self._table))
        if not self._take("]]" if many else "]"):
            raise self._error(f"Expected {']]' if many else ']'!r} at the end of a table declaration")

    def _pair(self, table: dict[str, Any], inline: bool) -> None:
        key = self._key()
        if not self._take("="):
            raise self._error("Expected '=' after a key in a key/value pair")
        self._span(_TOML_WS)
        value = self._value()
        for name in key[:-1]:
            if isinstance(table.get(name), list):
                raise self._error("Cannot overwrite a value")
            table = self._inner(table, name, key)
            if id(table) in self._named:
                raise self._error(f"Cannot redefine namespace {tuple(key)}")
            if not inline:
                self._dotted.add(id(table))
        if key[-1] in table:
            raise self._error("Cannot overwrite a value")
        table[key[-1]] = value

    # -- values

    def _value(self) -> Any:
        char = self.text[self.at:self.at + 1]
        if char in ('"', "'"):
            many = self._take(char * 3)
            self.at += not many
            return self._basic(many) if char == '"' else self._literal(many)
        if char == "[":
            return self._array()
        if char == "{":
            return self._inline()
        begin = self.at
        token = self._span(_TOML_SCALAR)
        if token in _TOML_WORDS:
            return _TOML_WORDS[token]
        if len(token) == 10 and token[4] == "-" and self._clock_follows():
            self.at += 1
            token = f"{token} {self._span(_TOML_SCALAR)}"
        dated = token[2:3] == ":" or (token[4:5] == "-" and token[:4].isdecimal())
        try:
            value = _toml_moment(token) if dated else _toml_number(token) if token else None
        except ValueError:
            value = None
        if value is None:
            self.at = begin
            raise self._error("Invalid value")
        return value

    def _clock_follows(self) -> bool:
        """Whether a blank and a time follow: they belong to the date."""
        ahead = self.text[self.at:self.at + 4]
        return ahead[:1] == " " and ahead[1:3].isdecimal() and ahead[3:] == ":"

    def _array(self) -> list[Any]:
        self.at += 1
        found: list[Any] = []
        self._closed.add(id(found))
        self._blank()
        while not self._take("]"):
            found.append(self._value())
            self._blank()
            if not self._take(",") and not self.text.startswith("]", self.at):
                raise self._error("Unclosed array")
            self._blank()
        return found

    def _inline(self) -> dict[str, Any]:
        self.at += 1
        found: dict[str, Any] = {}
        self._span(_TOML_WS)
        if not self._take("}"):
            while True:
                self._pair(found, True)
                self._span(_TOML_WS)
                if self._take("}"):
                    break
                if not self._take(","):
                    raise self._error("Unclosed inline table")
        self._closed.add(id(found))
        return found


def parse_toml(text: str) -> dict[str, Any]:
    """Return the tables of a TOML document, in its order.  Raises ConfigError, RecursionError."""
    return _Toml(text).read()


# -- from text to tables (config.md 1.1)

_TOKEN: Final = re.compile(r'#.*|"""|\'\'\'|"(?:[^"\\]|\\.)*"?|\'[^\']*\'?')
_CLOSER: Final = {'"""': re.compile(r'(?:\\.|[^\\])*?"{3,5}'), "'''": re.compile("(?:.*?)'{3,5}")}


def _open_string(line: str, inside: str) -> str:
    """Return the quotes of the multi-line string that is open at the end of `line`; `inside`: at its begin."""
    at = 0
    while True:
        if inside:
            closed = _CLOSER[inside].match(line, at)
            if closed is None:
                return inside
            at = closed.end()
        token = _TOKEN.search(line, at)
        while token is not None and token[0] not in _CLOSER:
            token = _TOKEN.search(line, token.end())
        if token is None:
            return ""
        at, inside = token.end(), token[0]


def include_target(line: str) -> str | None:
    """Return the path of an include line, None for any other line (config.md 8 item 21)."""
    rest = line.strip().removeprefix("include").strip() if line.strip().startswith("include") else ""
    if not rest.startswith("="):
        return None
    value = rest[1:].strip()
    if value[:1] in ("'", '"'):
        wanted, closed, tail = value[1:].partition(value[0])
        if closed and tail.strip()[:1] in ("", "#"):
            return wanted
    return re.split(r"\s#", value, maxsplit=1)[0].strip().strip('"')


class _Expansion:
    """Lines collected so far, over all files: a multi-line string may begin in one and end in another."""

    def __init__(self, read: Callable[[str, str], tuple[str, str]]) -> None:
        self._read = read
        self._inside = ""
        self.lines: list[str] = []
        self.included: dict[str, None] = {}

    def add(self, text: str, chain: tuple[str, ...]) -> None:
        """Take in a file; chain: the files that led here, itself last."""
        if len(chain) - 1 > INCLUDE_DEPTH_MAX:
            raise ConfigError(f"Include depth > {INCLUDE_DEPTH_MAX}: {' -> '.join(chain)}")
        for line in text.removeprefix("\ufeff").split("\n"):
            line = line.removesuffix("\r")
            wanted = None if self._inside else include_target(line)
            if wanted is None:
                self.lines.append(line)
                self._inside = _open_string(line, self._inside)
            else:
                path, inner = self._open(chain[-1], wanted)
                self.included[path] = None
                self.add(inner, (*chain, path))

    def _open(self, including: str, wanted: str) -> tuple[str, str]:
        try:
            return self._read(including, wanted)
        except OSError as error:
            text = f"{error.strerror} (os error {error.errno})" if error.errno is not None else str(error)
        except ValueError as error:                       # a NUL in the path
            text = str(error)
        raise ConfigError(f"{including}: cannot include {_quoted(wanted)}: {text}")


def expand_includes(text: str, path: str, read: Callable[[str, str], tuple[str, str]]) -> tuple[str, tuple[str, ...]]:
    """Return the text with include lines replaced by their files, and the paths of those files.

    read(including path, path as written) -> (path, text); its OSError becomes a ConfigError.  config.md 1.1, 8 item 21.
    """
    expansion = _Expansion(read)
    expansion.add(text, (path,))
    return "\n".join(expansion.lines), tuple(expansion.included)


def parse_document(text: str) -> dict[str, Any]:
    """Return the TOML tables of `text`, in file order; [server.admin_api] becomes [server.api].  Raises ConfigError."""
    try:
        document = parse_toml(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ConfigError("arrays or tables are nested too deeply") from None
    _refuse_big_integers(document)
    server = document.get("server")
    if isinstance(server, dict) and "admin_api" in server:
        if "api" in server:
            raise ConfigError("server: duplicate field `api`: [server.admin_api] is another name of [server.api]")
        document["server"] = {"api" if name == "admin_api" else name: value for name, value in server.items()}
    return document


def _refuse_big_integers(document: dict[str, Any]) -> None:
    """Raise ConfigError for an integer that TOML 1.0 does not promise; a stack, because dotted keys nest without limit."""
    todo: list[tuple[str, Any]] = [("", document)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            todo += [(_join(path, name), item) for name, item in value.items()]
        elif isinstance(value, list):
            todo += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, int) and value not in _INT64:
            raise ConfigError(f"{path}: integer does not fit into 64 bits")


# -- from tables to settings

def _read_table(cls: type[_Table], path: str, value: object, variant: str = "") -> _Table:
    """Return `cls` filled from a TOML table.  Keys of other variants are not looked at.  Raises ConfigError."""
    given, values = _as_table(path, value), {}
    for name, spec in cls.members.items():
        if spec.only and variant not in spec.only.split():
            continue
        if name in given:
            values[name] = spec.kind.read(_join(path, name), given[name])
        elif spec.required:
            raise ConfigError(f"{_join(path, name)}: required key is missing")
    return cls(**values)


def _read_upstream(path: str, value: object) -> Upstream:
    variant = _as_table(path, value).get("type")
    if variant == "shadowsocks":                          # of later versions: loads, never connects (config.md 8 item 24)
        return Upstream(type=variant, enabled=False)
    return _read_table(Upstream, path, value, variant if isinstance(variant, str) else "")


def parse_dns_overrides(entries: Iterable[str], *, invalid: bool = False) -> dict[tuple[str, int], IpAddress]:
    """Return (lower-case host, port) -> address; later entries win.  Raises ConfigError (F38; F43 with `invalid`)."""
    found = {}
    for entry in map(str.strip, entries):
        host, port_text, ip_text = (*map(str.strip, entry.split(":", 2)), "", "")[:3]
        port, bracketed = parse_port(port_text.removeprefix("+")), ip_text[:1] == "[" and ip_text[-1:] == "]"
        ip = parse_ip(ip_text[1:-1] if bracketed else ip_text)
        faults = (
            (not entry, "entry cannot be empty"),
            (entry.count(":") < 2, f"entry must use host:port:ip format: '{entry}'"),
            (not host, f"host cannot be empty: '{entry}'"),
            (port is None, f"port is invalid: '{entry}'"),
            (bracketed and (ip is None or ip.version == 4), f"IPv6 override is invalid: '{ip_text}'"),
            (ip is None, f"IP is invalid: '{ip_text}'"),
            (ip is not None and ip.version == 6 and not bracketed, f"IPv6 must be bracketed: '{ip_text}'"),
        )
        for wrong, text in faults:
            if wrong:
                raise ConfigError(f"network.dns_overrides {text}", invalid=invalid)
        assert port is not None and ip is not None
        found["".join(char.lower() if char.isascii() else char for char in host), port] = ip
    return found


# F2-F30 in the order in which the first failure wins, then the keys of 2.9.  A row is a key whose rule must hold, or a relation.
_CHECKS: Final = (
    "general.stun_nat_probe_concurrency", "general.upstream_connect_retry_attempts", "general.upstream_unhealthy_fail_threshold",
    "general.rpc_proxy_req_every", "general.me_reinit_every_secs", "general.me_single_endpoint_shadow_writers",
    "general.me_adaptive_floor_min_writers_single_endpoint", "general.me_single_endpoint_outage_backoff_min_ms",
    "general.me_single_endpoint_outage_backoff_max_ms",
    "general.me_single_endpoint_outage_backoff_min_ms <= general.me_single_endpoint_outage_backoff_max_ms",
    "general.beobachten_minutes", "general.beobachten_flush_secs", "general.beobachten_file", "general.me_hardswap_warmup_delay_max_ms",
    "general.me_hardswap_warmup_delay_min_ms <= general.me_hardswap_warmup_delay_max_ms",
    "general.me_hardswap_warmup_extra_passes", "general.me_hardswap_warmup_pass_backoff_base_ms", "general.me_config_stable_snapshots",
    "general.me_snapshot_min_proxy_for_lines", "general.proxy_secret_stable_snapshots", "general.me_reinit_trigger_channel",
    "general.proxy_secret_len_max", "general.me_pool_min_fresh_ratio", "general.me_route_backpressure_base_timeout_ms",
    "general.me_route_backpressure_high_timeout_ms >= general.me_route_backpressure_base_timeout_ms",
    "general.me_route_backpressure_high_watermark_pct", "server.api.request_body_limit_bytes", "server.api.minimal_runtime_cache_ttl_ms",
    "server.api.listen",
    "general.proxy_secret_url", "general.proxy_config_v4_url", "general.proxy_config_v6_url", "general.proxy_config_v4_cache_path",
    "general.proxy_config_v6_cache_path", "general.quota_state_path", "server.metrics_listen", "server.api.runtime_edge_cache_ttl_ms",
    "server.api.runtime_edge_top_n", "server.api.runtime_edge_events_capacity",
)


def _check(settings: Settings, row: str) -> None:
    """Raise ConfigError if a row of _CHECKS does not hold; an unset key always does."""
    path, *relation = row.split()
    value, rule = _value_at(settings, path), KEYS[path].rule
    if relation:
        limit = _value_at(settings, relation[1])
        rule = Rule(f"must be {relation[0]} {relation[1]}", lambda value: value <= limit if relation[0] == "<=" else value >= limit)
    if rule is not None and value is not None and not rule.holds(value):
        raise ConfigError(f"{path} {rule.text}")


# Values that load in 3.2.1 and cannot work: key, lowest, used below it, highest, used above it (config.md 8 item 8).
_CLAMPS: Final = (
    ("general.me_keepalive_interval_secs", 1, 1, None, 0),
    ("general.max_client_frame", 4096, 4096, None, 0),
    ("timeouts.client_handshake", 1, 30, None, 0),
    ("timeouts.tg_connect", 1, 1, None, 0),
    ("timeouts.client_keepalive", 1, 1, 32_767, 32_767),
    ("timeouts.client_ack", 0, 0, 2_147_483, 2_147_483),
    ("server.api.request_body_limit_bytes", 1, 1, 1_048_576, 1_048_576),
    ("censorship.mask_proxy_protocol", 0, 0, 2, 1),
)


class Draws:
    """Random values that last as long as the process (config.md 8 item 22)."""

    __slots__ = ("_draw", "_fake_cert_len")

    def __init__(self, draw: Callable[[], int]) -> None:
        """draw: gives a random integer in [1024, 4095]."""
        self._draw = draw
        self._fake_cert_len = 0

    def fake_cert_len(self) -> int:
        """Return the certificate size of this process, bytes."""
        self._fake_cert_len = self._fake_cert_len or self._draw()
        return self._fake_cert_len


class _Draft:
    """Settings on their way through the steps of config.md 1.3."""

    __slots__ = ("settings", "document", "draws", "warnings")

    def __init__(self, settings: Settings, document: Mapping[str, Any], draws: Draws) -> None:
        self.settings, self.document, self.draws = settings, document, draws
        self.warnings: list[str] = []

    def put(self, path: str, value: object) -> None:
        """Replace the value of one key."""
        self.settings = _with_value(self.settings, path, value)

    def warn(self, text: str) -> None:
        """Keep one line for the log."""
        self.warnings.append(text)

    def settle(self) -> None:
        """Go through the steps in order.  Raises ConfigError."""
        self.update_period()
        self.stun_servers()
        self.ad_tag()
        self.ranges()
        self.drain_timeout()
        self.secrets_and_mask()
        self.domains()
        self.address_families()
        parse_dns_overrides(self.settings.network.dns_overrides)
        self.fill_in()
        self.links()
        self.clamps()

    def update_period(self) -> None:
        """Step 1: the old keys count only where update_every is not written."""
        general = self.document.get("general", {})
        if "update_every" not in general and {"proxy_secret_auto_reload_secs", "proxy_config_auto_reload_secs"} & general.keys():
            self.put("general.update_every", None)

    def stun_servers(self) -> None:
        """Step 2: the old keys add to the default list and never to a written one."""
        general, servers = self.settings.general, self.settings.network.stun_servers
        old = (*filter(None, [general.middle_proxy_nat_stun]), *general.middle_proxy_nat_stun_servers)
        used = general.middle_proxy_nat_stun is not None or bool(general.middle_proxy_nat_stun_servers)
        if is_written(self.document, "network.stun_servers"):
            old = ()
            if used:
                self.warn("general.middle_proxy_nat_stun* ignored: network.stun_servers is set")
        elif used:
            self.warn(f"general.middle_proxy_nat_stun* is deprecated: its entries ({len(old)}) were added to network.stun_servers")
        self.put("network.stun_servers", tuple(dict.fromkeys(filter(None, map(str.strip, (*servers, *old))))))
        if used:
            self.put("general.middle_proxy_nat_stun", None)
            self.put("general.middle_proxy_nat_stun_servers", ())

    def ad_tag(self) -> None:
        """Step 3."""
        tag = self.settings.general.ad_tag
        if tag is not None and not is_hex32(tag):
            self.warn(f"general.ad_tag: expected 32 hex characters, found {_quoted(tag)}, using none")
            self.put("general.ad_tag", None)

    def ranges(self) -> None:
        """Step 4: F1-F30 and the keys of 2.9."""
        general = self.settings.general
        _check(self.settings, "general.update_every")
        if general.update_every is None and 0 in (general.proxy_secret_auto_reload_secs, general.proxy_config_auto_reload_secs):
            raise ConfigError("legacy proxy_*_auto_reload_secs values must be > 0 when general.update_every is not set")
        for row in _CHECKS:
            _check(self.settings, row)

    def drain_timeout(self) -> None:
        """Step 5."""
        timeout, ttl = self.settings.general.me_reinit_drain_timeout_secs, self.settings.general.me_pool_drain_ttl_secs
        if 0 < timeout < ttl:
            self.warn(f"general.me_reinit_drain_timeout_secs: {timeout} is below general.me_pool_drain_ttl_secs, using {ttl}")
            self.put("general.me_reinit_drain_timeout_secs", ttl)

    def secrets_and_mask(self) -> None:
        """Step 6: F31-F35; before them item 8: an empty mask_host is none."""
        for name, secret in self.settings.access.users.items():
            if not is_hex32(secret):
                raise ConfigError(f"Invalid secret for user {name}: Must be 32 hex characters", prefix=False)
        if self.settings.censorship.mask_host == "":
            self.warn('censorship.mask_host: found "", using none')
            self.put("censorship.mask_host", None)
        cert = self.settings.censorship
        size = None if cert.mask_unix_sock is None else len(cert.mask_unix_sock.encode(errors="surrogatepass"))
        if not cert.tls_domain:
            raise ConfigError("tls_domain cannot be empty")
        if size == 0:
            raise ConfigError("mask_unix_sock cannot be empty")
        if size is not None and size > _UNIX_PATH_MAX:
            raise ConfigError(f"mask_unix_sock path too long: {size} bytes (max {_UNIX_PATH_MAX})")
        if size is not None and cert.mask_host is not None:
            raise ConfigError("mask_unix_sock and mask_host are mutually exclusive")

    def domains(self) -> None:
        """Steps 7 and 8; item 8: a name that no ClientHello can hold gives no link."""
        cert = self.settings.censorship
        if cert.mask_host is None and cert.mask_unix_sock is None:
            self.put("censorship.mask_host", cert.tls_domain)
        kept = []
        for domain in dict.fromkeys(cert.tls_domains):
            if "/" in domain or any(map(str.isspace, domain)):
                self.warn(f"censorship.tls_domains: {_quoted(domain)} is no domain name, ignored")
            elif domain not in ("", cert.tls_domain):
                kept.append(domain)
        self.put("censorship.tls_domains", tuple(kept))

    def address_families(self) -> None:
        """Steps 9-11 and 13: F36, F37."""
        general, network = self.settings.general, self.settings.network
        prefer = network.prefer
        if general.prefer_ipv6:
            prefer = 6 if prefer == 4 else prefer
            self.warn(f"general.prefer_ipv6 is deprecated, use network.prefer: using {prefer}")
        if general.use_middle_proxy and not general.middle_proxy_nat_probe:
            self.warn("general.middle_proxy_nat_probe: false does not go with general.use_middle_proxy = true, using true")
            self.put("general.middle_proxy_nat_probe", True)
        if not network.ipv4 and not network.ipv6:
            raise ConfigError("Both ipv4 and ipv6 are disabled in [network]")
        if prefer not in (4, 6):
            raise ConfigError("network.prefer must be 4 or 6")
        if not (network.ipv4 if prefer == 4 else network.ipv6):
            self.warn(f"network.prefer: {prefer} does not go with network.ipv{prefer} = false, using {10 - prefer}")
            prefer = 10 - prefer
        self.put("network.prefer", prefer)
        if general.use_middle_proxy and network.ipv6:
            self.warn("network.ipv6 = true with general.use_middle_proxy = true is experimental: keys may not match over IPv6")

    def fill_in(self) -> None:
        """Steps 14-16, 18 and 19: what is not said.  The default certificate size would look alike on every server."""
        settings = self.settings
        if not settings.censorship.tls_emulation and settings.censorship.fake_cert_len == KEYS["censorship.fake_cert_len"].default:
            self.put("censorship.fake_cert_len", self.draws.fake_cert_len())
        self.put("server.listeners", resolve_listeners(settings.server))
        if not settings.upstreams:
            self.put("upstreams", (Upstream(),))
        if "203" not in settings.dc_overrides:
            self.put("dc_overrides", {**settings.dc_overrides, "203": _CDN_OVERRIDE})

    def links(self) -> None:
        """Step 17 and item 10: show_link counts where general.links.show says nothing."""
        old, written = self.settings.show_link, is_written(self.document, "general.links.show")
        if (old and self.settings.general.links.show == ()) or (not written and is_written(self.document, "show_link")):
            self.put("general.links.show", old)

    def clamps(self) -> None:
        """Item 8: correct what cannot work, and say so."""
        for path, low, if_low, high, if_high in _CLAMPS:
            value = _value_at(self.settings, path)
            if value < low:
                self._clamp(path, value, if_low)
            elif high is not None and value > high:
                self._clamp(path, value, if_high)
        limit_ms, delay_ms = self.settings.timeouts.client_handshake * 1000, self.settings.censorship.server_hello_delay_max_ms
        if delay_ms >= limit_ms:
            self._clamp("censorship.server_hello_delay_max_ms", delay_ms, limit_ms // 2)

    def _clamp(self, path: str, found: int, used: int) -> None:
        self.warn(f"{path}: {found} is out of range, using {used}")
        self.put(path, used)


def is_hex32(text: str) -> bool:
    """True for a secret or an ad tag: exactly 32 hex characters."""
    return _HEX32.fullmatch(text) is not None


def is_written(document: Mapping[str, Any], path: str) -> bool:
    """True if the key at `path` stands in the file."""
    node: Any = document
    for name in path.split("."):
        if not isinstance(node, Mapping) or name not in node:
            return False
        node = node[name]
    return True


def resolve_listeners(server: ServerSettings) -> tuple[ListenerEntry, ...]:
    """Return the TCP listeners in force, `announce` filled (config.md 1.3 steps 15, 16)."""
    entries = server.listeners
    if not entries and server.listen_tcp is not False:
        found = map(parse_ip, (server.listen_addr_ipv4, server.listen_addr_ipv6))
        entries = tuple(ListenerEntry(ip=ip) for ip in found if ip is not None)
    return tuple(entry.but(announce=str(entry.announce_ip), announce_ip=None)
                 if entry.announce is None and entry.announce_ip is not None else entry for entry in entries)


def validate_settings(settings: Settings) -> None:
    """Raise ConfigError(invalid=True) for what loads and cannot serve: F39-F43."""
    modes, domain = settings.general.modes, settings.censorship.tls_domain
    if not settings.access.users:
        raise ConfigError("No users configured", invalid=True)
    if not (modes.classic or modes.secure or modes.tls):
        raise ConfigError("No modes enabled", invalid=True)
    if " " in domain or "/" in domain:
        raise ConfigError(f"Invalid tls_domain: '{domain}'. Must be a valid domain name", invalid=True)
    for name, tag in settings.access.user_ad_tags.items():
        if not is_hex32(tag):
            raise ConfigError(f"access.user_ad_tags['{name}'] must be exactly 32 hex characters", invalid=True)
    parse_dns_overrides(settings.network.dns_overrides, invalid=True)


# -- advice: warnings that change nothing

def unknown_keys(document: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return path of a table ("" = top, `upstreams[]` = all entries) -> its unknown names, in file order (config.md 8 item 7)."""
    return {path: tuple(names) for path, names in _unknown(Settings, "", [document])}


def _unknown(cls: type[Any], path: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield (path, unknown names) of a table, or of all entries of an array, then of the tables inside."""
    known = cls.members
    written = dict.fromkeys(name for entry in entries for name in entry)
    strange = [name for name in written if name not in known]
    if strange:
        yield path, strange
    for name in written:
        spec = known.get(name)
        if spec is not None and spec.table is not None:
            inner = [item for entry in entries if name in entry for item in (entry[name] if spec.many else [entry[name]])]
            inner = [item for item in inner if not (spec.table is Upstream and item.get("type") == "shadowsocks")]
            yield from _unknown(spec.table, f"{path}.{name}".lstrip(".") + ("[]" if spec.many else ""), inner)


def suggest_key(path: str, name: str) -> str:
    """Return the known path that an unknown `name` in the table `path` may mean: the nearest there, else the same name
    elsewhere; empty if there is none.  Near = an edit distance of at most a third of the length."""
    near, elsewhere = [], ""
    for known in KEYS:
        parent, _, last = known.rpartition(".")
        limit = max(len(last), len(name)) // 3
        if parent != path:
            elsewhere = elsewhere or (known if last == name else "")
        elif abs(len(last) - len(name)) <= limit and len(set(last) - set(name)) <= limit:      # cheap bounds of the distance
            distance = _edit_distance(last, name)
            if distance <= limit:
                near.append((distance, known))
    return min(near)[1] if near else elsewhere


def _edit_distance(left: str, right: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that turn one into the other."""
    older: list[int] = []
    before, row = older, list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        older, before, row = before, row, [i]
        for j, b in enumerate(right, 1):
            cost = min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and b == left[i - 2]:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


def unknown_key_warnings(unknown: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one line per table of unknown_keys(), at most 20 names each, with suggestions."""
    lines = []
    for path, names in unknown.items():
        heading = f"[[{path[:-2]}]]" if path.endswith("[]") else f"[{path or 'top level'}]"
        shown = [_join("", name) + "".join(f' (did you mean "{known}"?)' for known in [suggest_key(path, name)] if known)
                 for name in names[:_UNKNOWN_SHOWN]]
        lines.append(f"unknown keys in {heading} ignored: {', '.join([*shown, *_more(names, _UNKNOWN_SHOWN)])}")
    return lines


def _more(items: Sequence[str], shown: int) -> list[str]:
    """The last item of a list that was cut, if it was."""
    return [f"and {len(items) - shown} more"] if len(items) > shown else []


def zero_limit_warnings(access: Access, before: Access | None = None) -> list[str]:
    """Return a line per user and limit of 0; before: only those that became 0 since (config.md 8 item 25)."""
    lines = []
    for name in ("user_max_tcp_conns", "user_data_quota", "user_max_unique_ips"):
        was = {} if before is None else getattr(before, name)
        lines += [f"access.{name}: 0 blocks user {user} (no limit = remove the entry)"
                  for user, limit in getattr(access, name).items() if limit == 0 and user in access.users and was.get(user) != 0]
    return [*lines[:_ZERO_LIMITS_SHOWN], *_more(lines, _ZERO_LIMITS_SHOWN)]


def _public_secret_warnings(access: Access, explicit: bool) -> Iterator[str]:
    """Item 15, and tags of 32 zeros (2.6)."""
    if not explicit:
        yield '[access.users] is missing: user "default" has the public all-zero secret, anybody can use this proxy'
    else:
        lines = [f"access.users: user {name} has the public all-zero secret, anybody can use this proxy"
                 for name, secret in access.users.items() if secret == _ZERO_SECRET]
        yield from [*lines[:_ZERO_LIMITS_SHOWN], *_more(lines, _ZERO_LIMITS_SHOWN)]
    lines = [f"access.user_ad_tags: the tag of user {name} is all zeros: it selects no channel"
             for name, tag in access.user_ad_tags.items() if tag == _ZERO_SECRET]
    yield from [*lines[:_ZERO_LIMITS_SHOWN], *_more(lines, _ZERO_LIMITS_SHOWN)]


class Loaded(NamedTuple):
    """A file, accepted."""

    settings: Settings                       # normalised
    warnings: tuple[str, ...]                # texts of WARN lines, in order
    errors: tuple[str, ...]                  # texts of ERROR lines
    without_effect: tuple[str, ...]          # keys of config.md 2.10 that differ from their default
    unknown: Mapping[str, tuple[str, ...]]   # what unknown_keys() found
    users_explicit: bool                     # [access.users] stands in the file


def parse_settings(document: dict[str, Any], draws: Draws) -> Loaded:
    """Return what a document of parse_document means: normalised, validated, with everything there is to say about it.

    Raises ConfigError, the first one in the order of config.md 1.3; `invalid` if it is one of F39-F43.
    """
    raw = _read_table(Settings, "", document)
    draft = _Draft(raw, document, draws)
    draft.settle()
    settings = draft.settings
    validate_settings(settings)
    unknown, users_explicit = unknown_keys(document), is_written(document, "access.users")
    unsupported = [f'upstreams[{index}]: type "shadowsocks" is not supported, entry disabled'
                   for index, entry in enumerate(settings.upstreams) if entry.type == "shadowsocks"]
    cut_off = not any(entry.enabled for entry in settings.upstreams)
    return Loaded(
        settings=settings,
        warnings=(*draft.warnings, *unknown_key_warnings(unknown), *zero_limit_warnings(settings.access),
                  *_public_secret_warnings(settings.access, users_explicit), *unsupported),
        errors=("no enabled upstream: every connection to Telegram will fail",) if cut_off else (),
        without_effect=tuple(path for path, spec in KEYS.items() if spec.reload is Reload.NO_EFFECT and spec.table is None
                             and _value_at(raw, path) != spec.default),
        unknown=unknown,
        users_explicit=users_explicit,
    )


# == 3. crypto ===============================================================
# AES-256 from whatever this machine has, behind one small face.  A cipher is
# told where in a Region its bytes lie and where they go; nothing is allocated
# per call.  Chosen once, at start: the first of four that loads and reproduces
# the vectors of NIST SP 800-38A (platform.md 3).  Measured with CTR, 3.11, per
# call of 128 bytes, in bulk, and memory of an idle cipher: `cryptography` 0.26 us
# (its version 38: 1.0), 8 GB/s, 1.1 KB; libcrypto through ctypes 0.4 us, 8 GB/s,
# 0.7 KB; pycryptodome 2.5 us, 4 GB/s, 1.8 KB; pure Python 20 us, 25 MB/s, 0.4-3 KB.
#
# The pure-Python AES is two programs.  A few blocks go one by one through the
# usual tables (7 us each); from _SLICED_MIN blocks on, AES is bit-sliced on
# Python's big integers (0.45 us each).  There the state of n blocks is 32
# integers of 4n bits, one per row r of the AES square and bit j of its bytes
# (index 8r + j, j = 0 the high bit), holding at bit c*n + b column c of block b.
# Why so: a shift or NOT of a long integer costs five times a xor, so rows stand
# apart: MixColumns needs no shift at all and ShiftRows one rotation per row,
# and the constant of the S-box hides in the round keys.
# Decryption is the equivalent inverse cipher of FIPS-197 5.3.5 with the columns
# in the order 0 3 2 1: ShiftRows then turns the right way, and both directions
# are one code.
# Source: FIPS-197; NIST SP 800-38A; Boyar and Peralta, "A new combinational
# logic minimization technique with applications to cryptology" (SEA 2010),
# whose 115-gate S-box is below; RFC 2104; RFC 7748; client-protocol.md D13.
# Traps: `cryptography` 38 wants 15 spare bytes behind its output; a CTR counter
# of ff..ff wraps to zero; with padding on, libcrypto holds back the last block.

PURE_PYTHON_WARNING: Final = ("no AES library found: pure-Python AES is thousands of times slower; "
                              "install python3-cryptography or python3-ctypes with libopenssl")
KEY_SIZE: Final = 32
BLOCK_SIZE: Final = 16
CRYPT_SLACK: Final = 16          # spare bytes a caller keeps behind the output of crypt(); never changed
LIBCRYPTO_NAMES: Final = ("libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.so",
                          "/opt/lib/libcrypto.so.3", "/opt/lib/libcrypto.so.1.1", "/opt/lib/libcrypto.so")
_SLICED_MIN: Final = 40          # blocks; a sliced batch costs 250-400 us however small, a block by tables 7 us
_SLICED_MIN_CBC: Final = 64      # the same for decryption, which slices more slowly
_SLICED_MAX: Final = 896         # blocks, a multiple of 8: an int of 4 * 896 bits is the longest that pymalloc serves (512 bytes)
_PIECE: Final = _SLICED_MAX * BLOCK_SIZE
_AHEAD_MAX: Final = 128          # blocks of keystream made ahead of demand: 2 KiB that an idle cipher may hold
_RAMP_BITS: Final = 10           # low counter bits that change within a batch: _SLICED_MAX <= _RAMP_SIZE
_RAMP_SIZE: Final = 1 << _RAMP_BITS
_COUNTERS: Final = 1 << 128
_LOW_BITS: Final = int.from_bytes(b"\1" * 32, "big")
_AFFINE: Final = 0x63            # constant of the S-box; MixColumns leaves a column of equal bytes alone, so it may move past it
_AFFINE_SLICES: Final = bytes(15 * (_AFFINE >> 7 - j & 1) for _ in range(4) for j in range(8))      # as sets of columns, see _patterns
_P25519: Final = 2 ** 255 - 19
_A25519: Final = 486_662
_FOUR_WORDS: Final = struct.Struct(">4I")
_HMAC_INNER: Final = bytes(byte ^ 0x36 for byte in range(256))     # for bytes.translate
_HMAC_OUTER: Final = bytes(byte ^ 0x5C for byte in range(256))


class Region:
    """One fixed piece of memory that ciphers work on in place; made once, by Backend.region().

    address: where it lies, once a libcrypto cipher has asked; the view pins the memory there.
    """

    __slots__ = ("view", "size", "address")

    def __init__(self, memory: WriteableBuffer) -> None:
        self.view = memoryview(memory)
        self.size = len(self.view)
        self.address: int | None = None


class AesCtr(Protocol):
    """AES-256-CTR with a 128-bit big-endian counter; encrypts and decrypts; the position is kept between calls."""

    def update(self, data: Bytes) -> bytes:
        """Return `data`, of any length, under the next bytes of the keystream."""

    def crypt(self, source: Region, at: int, target: Region, to: int, size: int) -> None:
        """Turn source[at:at+size] into target[to:to+size].

        The two are the very same bytes or do not overlap; CRYPT_SLACK bytes of target behind them exist and stay as they are.
        """

    def gather(self, source: Region, spans: Iterable[tuple[int, int]], target: Region) -> int:
        """Turn the (start, length) pieces of `source` into one run from the start of `target`; return its length."""
        done = 0
        for at, size in spans:
            self.crypt(source, at, target, done, size)
            done += size
        return done

    def recrypt(self, onto: AesCtr, source: Region, at: int, size: int, target: Region) -> Bytes:
        """Return source[at:at + size] decrypted with this cipher and encrypted with `onto`; it may lie in `target`.

        For one small message: two ciphers in one step, which is what chat costs most in (0.4 us instead of 0.75).
        """
        self.crypt(source, at, target, 0, size)
        onto.crypt(target, 0, target, 0, size)
        return target.view[:size]

    def take(self, source: Region, at: int, size: int, target: Region) -> Bytes:
        """Return source[at:at + size] through this cipher alone; it may lie in `target`.  For one small message, too."""
        self.crypt(source, at, target, 0, size)
        return target.view[:size]


class AesCbc(Protocol):
    """AES-256-CBC in one direction without padding: whole blocks only; the chain is kept between calls."""

    def update(self, data: Bytes) -> bytes:
        """Return `data`, a multiple of 16 bytes, encrypted or decrypted."""

    def crypt(self, source: Region, at: int, target: Region, to: int, size: int) -> None:
        """Turn source[at:at+size] into target[to:to+size]; rules as for AesCtr, size a multiple of 16."""


class Backend:
    """Where AES comes from.  key: 32 bytes, iv: 16 bytes, both `bytes`."""

    name = ""

    def ctr(self, key: bytes, iv: bytes) -> AesCtr:
        """Return a CTR cipher whose first counter block is `iv`."""
        raise NotImplementedError

    def cbc_encryptor(self, key: bytes, iv: bytes) -> AesCbc:
        """Return an encrypting CBC cipher."""
        raise NotImplementedError

    def cbc_decryptor(self, key: bytes, iv: bytes) -> AesCbc:
        """Return a decrypting CBC cipher."""
        raise NotImplementedError

    def region(self, memory: WriteableBuffer) -> Region:
        """Return `memory` (bytearray, mmap ...) as a place to work on; it cannot be resized from now on."""
        return Region(memory)

    def x25519_public(self, entropy: Entropy) -> bytes:
        """Return a fresh X25519 public key, 32 bytes, to which nobody has the private key."""
        return make_x25519_public(entropy)


# -- the choice

_TEST_KEY: Final = bytes.fromhex("603deb1015ca71be2b73aef0857d7781 1f352c073b6108d72d9810a30914dff4")
_TEST_PLAIN: Final = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a ae2d8a571e03ac9c9eb76fac45af8e51"
                                   "30c81c46a35ce411e5fbc1191a0a52ef f69f2445df4f9b17ad2b417be66c3710")
_TEST_CTR: Final = bytes.fromhex("601ec313775789a5b7a7f504bbf3d228 f443e3ca4d62b59aca84e990cacaf5c5"      # F.5.5
                                 "2b0930daa23de94ce87017ba2d84988d dfc9c58db67aada613c2dd08457941a6")
_TEST_CBC: Final = bytes.fromhex("f58c4c04d6e5f1ba779eabfb5f7bfbd6 9cfc4e967edb808d679f777bc6702c7d"      # F.2.5
                                 "39f23369a9d9bacfa530e26304231461 b2eb05e2c39be9fcda6c19078c6a9d1b")


def _self_test(backend: Backend) -> None:
    """Raise InternalError unless `backend` reproduces SP 800-38A F.5.5, F.2.5 and F.2.6, each in two unequal pieces."""
    low, high = bytes(range(16)), bytes(range(0xF0, 0x100))
    for mode, make, iv, given, wanted, cut in (("CTR", backend.ctr, high, _TEST_PLAIN, _TEST_CTR, 21),
                                               ("CBC encryption", backend.cbc_encryptor, low, _TEST_PLAIN, _TEST_CBC, 16),
                                               ("CBC decryption", backend.cbc_decryptor, low, _TEST_CBC, _TEST_PLAIN, 16)):
        cipher = make(_TEST_KEY, iv)
        if cipher.update(given[:cut]) + cipher.update(given[cut:]) != wanted:
            raise InternalError(f"AES-256-{mode} self-test failed")
        rest, slack = len(given) - cut, bytes(CRYPT_SLACK)
        source, target = backend.region(bytearray(given + slack)), backend.region(bytearray(5 + len(given) + CRYPT_SLACK))
        cipher = make(_TEST_KEY, iv)
        cipher.crypt(source, 0, target, 5, cut)
        cipher.crypt(source, cut, source, cut, rest)
        if target.view[5:5 + cut] != wanted[:cut] or source.view[cut:] != wanted[cut:] + slack:
            raise InternalError(f"AES-256-{mode} self-test in place failed")


def pick_backend(forced: str = "", debug: Callable[[str], None] = lambda text: None) -> Backend:
    """Return the first backend that loads and passes its self-test; why others did not goes to `debug`.

    forced: value of TELEMT_CRYPTO, the only backend to try; empty tries all.  Raises ConfigError if it is unknown or does not work.
    The caller warns with PURE_PYTHON_WARNING when the answer is `python`.
    """
    if forced and forced not in _BACKENDS:
        raise ConfigError(f"TELEMT_CRYPTO must be one of {', '.join(_BACKENDS)}, not {forced!r}")
    trouble = ""
    for name in (forced,) if forced else tuple(_BACKENDS):
        try:
            backend = _BACKENDS[name]()
            _self_test(backend)
            return backend
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:         # a `cryptography` without its cffi dies of a Rust panic, which is no Exception
            trouble = f"crypto backend {name}: {type(error).__name__}: {error}"
            debug(trouble)
    raise ConfigError(f"TELEMT_CRYPTO={forced}: {trouble}" if forced else trouble)


# -- cryptography

class _CryptographyCipher:
    """A context of `cryptography`: any mode, any direction."""

    __slots__ = ("_context",)

    def __init__(self, context: Any) -> None:
        self._context = context

    def update(self, data: Bytes) -> bytes:
        result: bytes = self._context.update(data)
        return result

    def recrypt(self, onto: Any, source: Region, at: int, size: int, target: Region) -> Bytes:
        result: bytes = onto._context.update(self._context.update(source.view[at:at + size]))
        return result

    def take(self, source: Region, at: int, size: int, target: Region) -> Bytes:
        result: bytes = self._context.update(source.view[at:at + size])
        return result

    def crypt(self, source: Region, at: int, target: Region, to: int, size: int) -> None:
        # The output view may be longer than the data, so only its start is cut, and not even that at 0 (saves 0.04 of 0.28 us).
        self._context.update_into(source.view[at:at + size], target.view[to:] if to else target.view)

    def gather(self, source: Region, spans: Iterable[tuple[int, int]], target: Region) -> int:
        convert, view, out, done = self._context.update_into, source.view, target.view, 0
        for at, size in spans:
            convert(view[at:at + size], out[done:])
            done += size
        return done


class CryptographyBackend(Backend):
    """The `cryptography` package, 38 or newer.  Loading it costs 7-8 MB of memory."""

    name = "cryptography"

    def __init__(self) -> None:
        from cryptography.exceptions import InternalError as OpenSslError
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        self._cipher: Any = Cipher
        self._aes: Any = algorithms.AES
        self._modes: Any = modes
        self._unsupported, self._internal = UnsupportedAlgorithm, OpenSslError
        self._new_x25519: Callable[[], Any] | None = None      # found when FakeTLS wants the first key

    def ctr(self, key: bytes, iv: bytes) -> AesCtr:
        return _CryptographyCipher(self._cipher(self._aes(key), self._modes.CTR(iv)).encryptor())

    def cbc_encryptor(self, key: bytes, iv: bytes) -> AesCbc:
        return _CryptographyCipher(self._cipher(self._aes(key), self._modes.CBC(iv)).encryptor())

    def cbc_decryptor(self, key: bytes, iv: bytes) -> AesCbc:
        return _CryptographyCipher(self._cipher(self._aes(key), self._modes.CBC(iv)).decryptor())

    def x25519_public(self, entropy: Entropy) -> bytes:
        """Return the public half of a generated key; `entropy` is used only where OpenSSL has none (FIPS mode)."""
        try:
            if self._new_x25519 is None:
                self._new_x25519 = self._find_x25519()
            key: Any = self._new_x25519().public_key()
        except (self._unsupported, self._internal, ImportError, OSError):        # OSError: no descriptor left to import with
            return super().x25519_public(entropy)
        if hasattr(key, "public_bytes_raw"):   # since 40
            raw: bytes = key.public_bytes_raw()
        else:                                  # there `serialization` is loaded anyway; today it would cost 2 MB
            from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
            raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
        return raw

    @staticmethod
    def _find_x25519() -> Callable[[], Any]:
        """What makes a key: straight from the core of the library where it has that, because the public module loads 1.3 MB more."""
        try:
            from cryptography.hazmat.bindings._rust import openssl
            make: Callable[[], Any] = openssl.x25519.generate_key
            make().public_key().public_bytes_raw()
            return make
        except (ImportError, AttributeError, TypeError, ValueError):     # that place is no promise of theirs
            from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
            return X25519PrivateKey.generate


# -- libcrypto through ctypes

class _Evp:
    """The functions of libcrypto that 1.1 and 3 share, types declared; PyDLL keeps the interpreter lock, which saves 0.03 us.

    Letting go of it for 0.1 ms would win nothing: the loop is the only busy thread.
    """

    __slots__ = ("address", "new", "free", "ctr", "cbc", "encrypt_init", "encrypt_update", "decrypt_init", "decrypt_update",
                 "set_padding", "_written", "written_at", "keys")

    def __init__(self) -> None:
        import ctypes
        library = _open_libcrypto(ctypes.PyDLL)
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        declare = functools.partial(_declare, library)
        with contextlib.suppress(AttributeError):              # 1.1 and later: without openssl.cnf, which costs 0.6 MB to look at
            declare("OPENSSL_init_crypto", number, ctypes.c_uint64, pointer)(_NO_LOAD_CONFIG, None)
        self.new = declare("EVP_CIPHER_CTX_new", pointer)
        self.free = declare("EVP_CIPHER_CTX_free", None, pointer)
        try:
            self.keys: _EvpKeys | None = _EvpKeys(library)
        except (AttributeError, InternalError):                # older than 1.1.1, or FIPS mode
            self.keys = None
        self.ctr = self._checked(declare("EVP_aes_256_ctr", pointer)())
        self.cbc = self._checked(declare("EVP_aes_256_cbc", pointer)())
        self.encrypt_init = declare("EVP_EncryptInit_ex", number, pointer, pointer, pointer, text, text)
        self.decrypt_init = declare("EVP_DecryptInit_ex", number, pointer, pointer, pointer, text, text)
        self.set_padding = declare("EVP_CIPHER_CTX_set_padding", number, pointer, number)
        # The size is an int in C.  Declared as a pointer it arrives in the same register or stack slot, and ctypes
        # converts a plain int to a pointer 0.04-0.1 us faster than to an int: 0.28 instead of 0.32 us per call.
        self.encrypt_update = declare("EVP_EncryptUpdate", number, pointer, pointer, pointer, pointer, pointer)
        self.decrypt_update = declare("EVP_DecryptUpdate", number, pointer, pointer, pointer, pointer, pointer)
        self._written = number(0)              # where libcrypto leaves the output length: one for all, nobody reads it
        self.written_at = ctypes.addressof(self._written)

        def address(memory: WriteableBuffer) -> int:
            """Return where `memory` (not empty) lies."""
            return ctypes.addressof(ctypes.c_char.from_buffer(memory))

        self.address = address

    def _checked(self, pointer: Any) -> int:
        """Return `pointer` as an address; raises InternalError for NULL."""
        if not pointer:
            raise InternalError("libcrypto: no memory or no AES")
        return int(pointer)

    def make_context(self, kind: int, encrypt: bool, key: bytes, iv: bytes) -> int:
        """Return the address of a new context with padding off; the caller frees it."""
        if len(key) != KEY_SIZE or len(iv) != BLOCK_SIZE:      # C would read past the end
            raise InternalError("AES-256 wants a key of 32 and an IV of 16 bytes")
        context = self._checked(self.new())
        init = self.encrypt_init if encrypt else self.decrypt_init
        if init(context, kind, None, key, iv) != 1 or self.set_padding(context, 0) != 1:
            self.free(context)
            raise InternalError("libcrypto: EVP init failed")
        return context


def _declare(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of a C library with its types declared; AttributeError if there is none of that name."""
    function = library[name]                   # a new object each time: what is declared here nobody else changes
    function.restype, function.argtypes = result, arguments
    return function


class _EvpKeys:
    """X25519 keys by libcrypto (1.1.1 and later): 40 us each, where our own arithmetic takes 200."""

    __slots__ = ("_byref", "_pointer", "_size", "_buffer", "_generate", "_raw", "_free", "_context")

    def __init__(self, library: Any) -> None:
        import ctypes
        self._byref, self._pointer, self._size, self._buffer = ctypes.byref, ctypes.c_void_p, ctypes.c_size_t, ctypes.create_string_buffer
        pointer, number, declare = ctypes.c_void_p, ctypes.c_int, functools.partial(_declare, library)
        self._generate = declare("EVP_PKEY_keygen", number, pointer, pointer)
        self._raw = declare("EVP_PKEY_get_raw_public_key", number, pointer, pointer, pointer)
        self._free = declare("EVP_PKEY_free", None, pointer)
        self._context = declare("EVP_PKEY_CTX_new_id", pointer, number, pointer)(_NID_X25519, None)    # as long as the process
        if not self._context or declare("EVP_PKEY_keygen_init", number, pointer)(self._context) != 1:
            raise InternalError("libcrypto: no X25519")

    def public(self) -> bytes:
        """Return the public half of a fresh key, 32 bytes, or nothing if libcrypto refuses."""
        key, size, found = self._pointer(), self._size(32), self._buffer(32)
        if self._generate(self._context, self._byref(key)) != 1:
            return b""
        done = self._raw(key, found, self._byref(size)) == 1 and size.value == 32
        self._free(key)
        return found.raw if done else b""


_NID_X25519: Final = 1034
_NO_LOAD_CONFIG: Final = 0x80            # OPENSSL_INIT_NO_LOAD_CONFIG


def _open_libcrypto(load: Callable[[str], Any]) -> Any:
    """Return the first libcrypto that loads; raises OSError if none does."""
    for name in LIBCRYPTO_NAMES:
        try:
            return load(name)
        except OSError:
            continue
    from ctypes.util import find_library  # last: useless on musl, starts subprocesses elsewhere
    found = find_library("crypto")
    if not found:
        raise OSError("libcrypto not found")
    return load(found)


class _EvpCipher:
    """One EVP context; owns it and frees it with itself."""

    __slots__ = ("_evp", "_update", "_written_at", "_context")

    def __init__(self, evp: _Evp, kind: int, encrypt: bool, key: bytes, iv: bytes) -> None:
        self._evp, self._context = evp, 0
        self._update = evp.encrypt_update if encrypt else evp.decrypt_update
        self._written_at = evp.written_at
        self._context = evp.make_context(kind, encrypt, key, iv)

    def __del__(self) -> None:
        if self._context:
            self._evp.free(self._context)

    def update(self, data: Bytes) -> bytes:
        if not data:
            return b""
        result = bytearray(len(data))
        if self._update(self._context, self._evp.address(result), self._written_at, bytes(data), len(data)) != 1:
            raise InternalError("libcrypto: EVP update failed")
        return bytes(result)

    def crypt(self, source: Region, at: int, target: Region, to: int, size: int) -> None:
        base, goal = source.address, target.address
        if base is None or goal is None:
            base = source.address = self._evp.address(source.view)
            goal = target.address = self._evp.address(target.view)
        if self._update(self._context, goal + to, self._written_at, base + at, size) != 1:
            raise InternalError("libcrypto: EVP update failed")

    def gather(self, source: Region, spans: Iterable[tuple[int, int]], target: Region) -> int:
        base, goal = source.address, target.address
        if base is None or goal is None:
            base = source.address = self._evp.address(source.view)
            goal = target.address = self._evp.address(target.view)
        update, context, written_at, to = self._update, self._context, self._written_at, goal
        for at, size in spans:
            if update(context, to, written_at, base + at, size) != 1:
                raise InternalError("libcrypto: EVP update failed")
            to += size
        return to - goal

    def recrypt(self, onto: Any, source: Region, at: int, size: int, target: Region) -> Bytes:
        base, goal = source.address, target.address
        if base is None or goal is None:
            base = source.address = self._evp.address(source.view)
            goal = target.address = self._evp.address(target.view)
        written_at = self._written_at
        if self._update(self._context, goal, written_at, base + at, size) != 1 \
                or onto._update(onto._context, goal, written_at, goal, size) != 1:
            raise InternalError("libcrypto: EVP update failed")
        return target.view[:size]

    def take(self, source: Region, at: int, size: int, target: Region) -> Bytes:
        self.crypt(source, at, target, 0, size)
        return target.view[:size]


class LibcryptoBackend(Backend):
    """OpenSSL's libcrypto through ctypes: 3.5 MB by being loaded."""

    name = "libcrypto"

    def __init__(self) -> None:
        self._evp = _Evp()

    def ctr(self, key: bytes, iv: bytes) -> AesCtr:
        return _EvpCipher(self._evp, self._evp.ctr, True, key, iv)

    def cbc_encryptor(self, key: bytes, iv: bytes) -> AesCbc:
        return _EvpCipher(self._evp, self._evp.cbc, True, key, iv)

    def cbc_decryptor(self, key: bytes, iv: bytes) -> AesCbc:
        return _EvpCipher(self._evp, self._evp.cbc, False, key, iv)

    def x25519_public(self, entropy: Entropy) -> bytes:
        return (self._evp.keys.public() if self._evp.keys else b"") or super().x25519_public(entropy)


# -- pycryptodome

class _DomeCipher(AesCtr):
    """A cipher of pycryptodome, which forbids to mix its two directions: one bound method is all we keep."""

    __slots__ = ("_apply",)

    def __init__(self, apply: Any) -> None:
        self._apply = apply

    def update(self, data: Bytes) -> bytes:
        result: bytes = self._apply(data)
        return result

    def crypt(self, source: Region, at: int, target: Region, to: int, size: int) -> None:
        self._apply(source.view[at:at + size], output=target.view[to:to + size])


class PycryptodomeBackend(Backend):
    """The `Crypto` package of pycryptodome (OpenWrt: python3-cryptodome)."""

    name = "pycryptodome"

    def __init__(self) -> None:
        from Crypto.Cipher import AES
        self._aes: Any = AES

    def ctr(self, key: bytes, iv: bytes) -> AesCtr:
        # Without a nonce all 16 bytes count, and they wrap as in OpenSSL; CTR only ever encrypts.
        return _DomeCipher(self._aes.new(key, self._aes.MODE_CTR, nonce=b"", initial_value=iv).encrypt)

    def cbc_encryptor(self, key: bytes, iv: bytes) -> AesCbc:
        return _DomeCipher(self._aes.new(key, self._aes.MODE_CBC, iv=iv).encrypt)

    def cbc_decryptor(self, key: bytes, iv: bytes) -> AesCbc:
        return _DomeCipher(self._aes.new(key, self._aes.MODE_CBC, iv=iv).decrypt)


# -- pure Python: the ciphers

class PythonBackend(Backend):
    """AES by the interpreter alone."""

    name = "python"

    def ctr(self, key: bytes, iv: bytes) -> AesCtr:
        return _SoftCtr(key, iv)

    def cbc_encryptor(self, key: bytes, iv: bytes) -> AesCbc:
        return _SoftCbcEncryptor(key, iv)

    def cbc_decryptor(self, key: bytes, iv: bytes) -> AesCbc:
        return _SoftCbcDecryptor(key, iv)


class _SoftCipher(AesCtr):
    """What the pure ciphers share: the way into and out of a Region, in pieces that bound the memory of a call."""

    __slots__ = ("_schedule", "_nibbles")

    def __init__(self, schedule: bytes) -> None:
        self._schedule = schedule              # 15 round keys in the order of use
        self._nibbles = b""                    # the same for the sliced code, once it is needed

    def _some(self, data: memoryview) -> bytes:
        """Return `data`, 1.._PIECE bytes, transformed."""
        raise NotImplementedError

    def update(self, data: Bytes) -> bytes:
        view = memoryview(data)
        return b"".join([self._some(view[at:at + _PIECE]) for at in range(0, len(view), _PIECE)])

    def crypt(self, source: Region, at: int, target: Region, to: int, size: int) -> None:
        inlet, outlet = source.view[at:at + size], target.view[to:to + size]
        for done in range(0, size, _PIECE):
            outlet[done:done + _PIECE] = self._some(inlet[done:done + _PIECE])


class _SoftCtr(_SoftCipher):
    """CTR that makes keystream ahead, the more the more was asked of it, and keeps what is left over."""

    __slots__ = ("_counter", "_spare", "_ahead")

    def __init__(self, key: bytes, iv: bytes) -> None:
        super().__init__(_expand_key(key))
        self._counter = int.from_bytes(iv, "big")      # next block to make
        self._spare = b""
        self._ahead = 0                                # blocks made so far, up to _AHEAD_MAX

    def _some(self, data: memoryview) -> bytes:
        size = len(data)
        stream = self._spare
        if len(stream) < size:
            stream += self._make(size - len(stream) + BLOCK_SIZE - 1 >> 4)
        self._spare = stream[size:]
        return _xor(data, stream[:size])

    def _make(self, blocks: int) -> bytes:
        """Return the next keystream: `blocks` blocks, or a few more if that is cheap."""
        wanted = blocks + self._ahead
        self._ahead = min(wanted, _AHEAD_MAX)
        if wanted < _SLICED_MIN:
            counters = range(self._counter, self._counter + blocks)
            first, middle, last = _rounds(self._schedule)
            wheel = _tools().encrypt
            stream = b"".join([_turn(counter % _COUNTERS ^ first, middle, last, wheel).to_bytes(16, "big") for counter in counters])
        else:
            blocks = min(wanted + 7 & ~7, _SLICED_MAX)
            self._nibbles = self._nibbles or _slice_keys(self._schedule, 0)
            patterns = _patterns(blocks)
            state = _counter_slices(self._counter, blocks, patterns)
            stream = _from_slices(_sliced_rounds(state, self._nibbles, blocks, patterns, _sliced_sbox), blocks, patterns)
        self._counter = (self._counter + blocks) % _COUNTERS
        return stream


class _SoftCbcEncryptor(_SoftCipher):
    """CBC encryption: every block waits for the one before, so tables it is."""

    __slots__ = ("_chain",)

    def __init__(self, key: bytes, iv: bytes) -> None:
        super().__init__(_expand_key(key))
        self._chain = int.from_bytes(iv, "big")

    def _some(self, data: memoryview) -> bytes:
        _check_whole(data)
        first, middle, last = _rounds(self._schedule)
        wheel, chain, result = _tools().encrypt, self._chain, []
        for at in range(0, len(data), BLOCK_SIZE):
            chain = _turn(int.from_bytes(data[at:at + BLOCK_SIZE], "big") ^ chain ^ first, middle, last, wheel)
            result.append(chain.to_bytes(BLOCK_SIZE, "big"))
        self._chain = chain
        return b"".join(result)


class _SoftCbcDecryptor(_SoftCipher):
    """CBC decryption, many blocks at once."""

    __slots__ = ("_chain",)

    def __init__(self, key: bytes, iv: bytes) -> None:
        super().__init__(_invert_schedule(_expand_key(key)))
        self._chain = iv

    def _some(self, data: memoryview) -> bytes:
        _check_whole(data)
        coded, size = bytes(data), len(data)
        if size < _SLICED_MIN_CBC * BLOCK_SIZE:
            first, middle, last = _rounds(self._schedule)
            wheel = _tools().decrypt
            plain = b"".join([_mirror(_turn(int.from_bytes(_mirror(coded[at:at + 16]), "big") ^ first, middle, last, wheel)
                                      .to_bytes(16, "big")) for at in range(0, size, BLOCK_SIZE)])
        else:
            self._nibbles = self._nibbles or _slice_keys(self._schedule, 14)
            blocks = size + 127 >> 7 << 3           # whole groups of eight
            patterns = _patterns(blocks)
            state = _to_slices(coded.ljust(blocks * BLOCK_SIZE, b"\0"), blocks, patterns)
            plain = _from_slices(_sliced_rounds(state, self._nibbles, blocks, patterns, _sliced_unbox), blocks, patterns, mirrored=True)
        before = self._chain + coded[:-BLOCK_SIZE]
        self._chain = coded[-BLOCK_SIZE:]
        return _xor(plain[:size], before)


def _xor(a: Bytes, b: Bytes) -> bytes:
    return (int.from_bytes(a, "little") ^ int.from_bytes(b, "little")).to_bytes(len(a), "little")


def _check_whole(data: Bytes) -> None:
    if len(data) % BLOCK_SIZE:
        raise InternalError("CBC without padding wants whole blocks")


# -- pure Python: block by block

class _Wheel(NamedTuple):
    """Tables of one direction: SubBytes and MixColumns of one byte, as a word, for each of the four rows; and SubBytes alone."""

    row0: list[int]
    row1: list[int]
    row2: list[int]
    row3: list[int]
    box: bytes


class _Tools(NamedTuple):
    """What pure-Python AES looks up; 90 KB, made when first needed."""

    encrypt: _Wheel
    decrypt: _Wheel
    ramps: list[int]         # bit i of ramps[j] = bit j of i, for i < 2 * _RAMP_SIZE


def _times(a: int, b: int) -> int:
    """Return a * b in the field of AES, GF(2^8) modulo x^8 + x^4 + x^3 + x + 1."""
    product = 0
    while b:
        product ^= a * (b & 1)
        a = a << 1 ^ 0x11B * (a >> 7)
        b >>= 1
    return product


def _make_sbox() -> bytes:
    """Return the S-box, from its definition (FIPS-197 5.1.1)."""
    powers = [1]
    for _ in range(254):
        powers.append(_times(powers[-1], 3))   # 3 generates the field's non-zero elements
    inverse = {powers[i]: powers[-i % 255] for i in range(255)}
    box = bytearray()
    for byte in range(256):
        twice = inverse.get(byte, 0) * 0x101   # shifted right by k: rotated left by 8 - k
        box.append((_AFFINE ^ twice ^ twice >> 4 ^ twice >> 5 ^ twice >> 6 ^ twice >> 7) & 0xFF)
    return bytes(box)


def _make_wheel(box: bytes, factors: tuple[int, int, int, int]) -> _Wheel:
    """Return the tables of S-box `box` and the MixColumns matrix whose first column is `factors`."""
    row0 = [int.from_bytes(bytes(_times(byte, factor) for factor in factors), "big") for byte in box]
    rows = [[word >> turn | word << 32 - turn & 0xFFFF_FFFF for word in row0] for turn in (0, 8, 16, 24)]
    return _Wheel(rows[0], rows[1], rows[2], rows[3], box)


@functools.cache
def _tools() -> _Tools:
    """Return the tables; 2 ms when called first."""
    box = _make_sbox()
    unbox = bytes(box.index(byte) for byte in range(256))
    ones = (1 << 2 * _RAMP_SIZE) - 1
    ramps = [ones // ((1 << (1 << bit)) + 1) << (1 << bit) for bit in range(_RAMP_BITS)]
    return _Tools(_make_wheel(box, (2, 1, 1, 3)), _make_wheel(unbox, (14, 9, 13, 11)), ramps)


def _expand_key(key: bytes) -> bytes:
    """Return the 15 round keys (FIPS-197 5.2)."""
    if len(key) != KEY_SIZE:
        raise InternalError("AES-256 wants a key of 32 bytes")
    box = _tools().encrypt.box
    words = [key[at:at + 4] for at in range(0, KEY_SIZE, 4)]
    for at in range(8, 60):
        word = words[-1]
        if at % 8 == 0:
            word = (word[1:] + word[:1]).translate(box)
            word = bytes((word[0] ^ 1 << at // 8 - 1,)) + word[1:]
        elif at % 8 == 4:
            word = word.translate(box)
        words.append((int.from_bytes(words[-8], "big") ^ int.from_bytes(word, "big")).to_bytes(4, "big"))
    return b"".join(words)


def _mirror(block: bytes) -> bytes:
    """Return `block` (16 bytes) with its columns in the order 0 3 2 1."""
    return block[:4] + block[12:] + block[8:12] + block[4:8]


def _invert_schedule(schedule: bytes) -> bytes:
    """Return the round keys of the equivalent inverse cipher (FIPS-197 5.3.5), columns mirrored."""
    row0, row1, row2, row3, _ = _tools().decrypt
    box = _tools().encrypt.box
    keys = [schedule[at:at + 16] for at in range(224, -1, -16)]
    for at in range(1, 14):
        b = keys[at].translate(box)            # the tables begin with the inverse S-box
        keys[at] = _FOUR_WORDS.pack(*(row0[b[i]] ^ row1[b[i + 1]] ^ row2[b[i + 2]] ^ row3[b[i + 3]] for i in (0, 4, 8, 12)))
    return b"".join(map(_mirror, keys))


def _rounds(schedule: bytes) -> tuple[int, list[tuple[int, ...]], int]:
    """Return first round key, the middle ones as four words each, last round key."""
    return (int.from_bytes(schedule[:16], "big"), list(_FOUR_WORDS.iter_unpack(schedule[16:224])),
            int.from_bytes(schedule[224:], "big"))


def _turn(block: int, middle: list[tuple[int, ...]], last: int, wheel: _Wheel) -> int:
    """Return one block, to which the first round key has been added already, after 14 rounds."""
    t0, t1, t2, t3, box = wheel
    pack = _FOUR_WORDS.pack
    state = block.to_bytes(BLOCK_SIZE, "big")
    for k0, k1, k2, k3 in middle:
        b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15 = state
        state = pack(t0[b0] ^ t1[b5] ^ t2[b10] ^ t3[b15] ^ k0, t0[b4] ^ t1[b9] ^ t2[b14] ^ t3[b3] ^ k1,
                     t0[b8] ^ t1[b13] ^ t2[b2] ^ t3[b7] ^ k2, t0[b12] ^ t1[b1] ^ t2[b6] ^ t3[b11] ^ k3)
    return int.from_bytes((state * 5)[::5].translate(box), "big") ^ last       # byte 5i mod 16 of the state: ShiftRows


# -- pure Python: many blocks at once

_Slices: TypeAlias = "list[int]"         # 32 integers: bit j of row r at 8r + j; see the head of this section
_Row: TypeAlias = "tuple[int, int, int, int, int, int, int, int]"
_Box: TypeAlias = "Callable[..., _Row]"


def _patterns(n: int) -> list[int]:
    """Return for every set of columns (4 bits, bit c = column c) the slice with ones in these columns."""
    ones = (1 << n) - 1
    patterns = [0]
    for shift in (0, n, 2 * n, 3 * n):
        patterns += [pattern | ones << shift for pattern in patterns]
    return patterns


def _nibbles_of(block: bytes) -> bytes:
    """Return for a block that all have in common the 32 sets of columns that name its slices."""
    bits = f"{int.from_bytes(block, 'big'):0128b}".encode()    # digit 32c + 8r + j
    c0, c1, c2, c3 = (int.from_bytes(bits[at:at + 32], "big") & _LOW_BITS for at in (0, 32, 64, 96))
    return (c0 | c1 << 1 | c2 << 2 | c3 << 3).to_bytes(32, "big")


def _slice_keys(schedule: bytes, alone: int) -> bytes:
    """Return the round keys as sets of columns, with the S-box's constant in each but number `alone`, which touches no S-box."""
    constant = int.from_bytes(_AFFINE_SLICES, "big")
    keys = [int.from_bytes(_nibbles_of(schedule[at:at + 16]), "big") for at in range(0, len(schedule), 16)]
    return b"".join([(key if at == alone else key ^ constant).to_bytes(32, "big") for at, key in enumerate(keys)])


def _counter_slices(counter: int, n: int, patterns: list[int]) -> _Slices:
    """Return the slices of the counter blocks counter .. counter + n - 1, modulo 2^128; n <= _RAMP_SIZE."""
    low = counter % _RAMP_SIZE
    here = _nibbles_of((counter - low).to_bytes(16, "big"))
    slices = [patterns[columns] for columns in here]
    if low + n > _RAMP_SIZE:                   # the high bits change once, after _RAMP_SIZE - low blocks
        ones = (1 << _RAMP_SIZE - low) - 1
        before = ones | ones << n | ones << 2 * n | ones << 3 * n
        after = patterns[15] ^ before
        there = _nibbles_of(((counter - low + _RAMP_SIZE) % _COUNTERS).to_bytes(16, "big"))
        slices = [patterns[a] & before | patterns[b] & after for a, b in zip(here, there, strict=True)]
    ones = (1 << n) - 1
    for bit, ramp in enumerate(_tools().ramps):                # bit 0 is the last bit of column 3, row 3
        slices[31 - bit] |= (ramp >> low % (2 << bit) & ones) << 3 * n
    return slices


def _transpose(slices: Sequence[int], patterns: list[int]) -> list[int]:
    """Return 8 integers whose integer k has, as its byte i, the byte of lane 8i + k; works both ways.

    slices: low bit of the bytes first.
    """
    q = list(slices)
    ones = patterns[15]
    for shift, mask in ((1, ones // 3), (2, ones // 5), (4, ones // 17)):
        for i in range(8):
            if not i & shift:
                a, b = q[i], q[i + shift]
                swap = (a >> shift ^ b) & mask
                q[i], q[i + shift] = a ^ swap << shift, b ^ swap
    return q


def _from_slices(slices: _Slices, n: int, patterns: list[int], mirrored: bool = False) -> bytes:
    """Return the n blocks that `slices` hold."""
    result, step = bytearray(BLOCK_SIZE * n), n >> 3
    columns = (0, 12, 8, 4) if mirrored else (0, 4, 8, 12)
    for row in range(4):
        for lane, plane in enumerate(_transpose(slices[8 * row:8 * row + 8][::-1], patterns)):
            data, start = bytearray(plane.to_bytes(n >> 1, "little")), BLOCK_SIZE * lane + row
            for at, column in zip((0, step, 2 * step, 3 * step), columns, strict=True):
                result[start + column::128] = data[at:at + step]
    return bytes(result)


def _to_slices(data: bytes, n: int, patterns: list[int]) -> _Slices:
    """Return the slices of n blocks, n a multiple of 8, columns mirrored."""
    slices: list[int] = []
    for row in range(4):
        lanes = [b"".join([data[BLOCK_SIZE * lane + row + column::128] for column in (0, 12, 8, 4)]) for lane in range(8)]
        slices += _transpose([int.from_bytes(lane, "little") for lane in lanes], patterns)[::-1]
    return slices


def _sliced_rounds(state: _Slices, nibbles: bytes, n: int, patterns: list[int], box: _Box) -> _Slices:
    """Return `state` after AES with the round keys `nibbles`; box: _sliced_sbox or, to decrypt, _sliced_unbox."""
    n2, n3 = 2 * n, 3 * n
    one, two, three = (1 << n) - 1, (1 << n2) - 1, (1 << n3) - 1
    state = [x ^ patterns[columns] for x, columns in zip(state, nibbles, strict=False)]
    for at in range(32, 480, 32):
        key = [patterns[columns] for columns in nibbles[at:at + 32]]
        a = box(*state[:8])
        b = _sliced_shift(box(*state[8:16]), n, n3, one)
        c = _sliced_shift(box(*state[16:24]), n2, n2, two)
        d = _sliced_shift(box(*state[24:]), n3, n, three)
        if at == 448:                          # the last round mixes nothing
            break
        if box is _sliced_unbox:
            a, c = _sliced_add_four(a, c)
            b, d = _sliced_add_four(b, d)
        state = _sliced_mix(a, b, c, d, key)
    return [x ^ k for x, k in zip((*a, *b, *c, *d), key, strict=True)]


# What follows is one round, spelled out gate by gate: loops and list comprehensions took as long as the gates themselves.

def _sliced_shift(x: _Row, right: int, left: int, mask: int) -> _Row:
    """Return a row rotated by `right` bits; `mask` covers the bits that go round to the other end."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    return (x0 >> right | (x0 & mask) << left, x1 >> right | (x1 & mask) << left, x2 >> right | (x2 & mask) << left,
            x3 >> right | (x3 & mask) << left, x4 >> right | (x4 & mask) << left, x5 >> right | (x5 & mask) << left,
            x6 >> right | (x6 & mask) << left, x7 >> right | (x7 & mask) << left)


def _sliced_mix(a: _Row, b: _Row, c: _Row, d: _Row, k: _Slices) -> _Slices:
    """Return MixColumns of the rows a b c d, plus the round key: 2a + 3b + c + d = 2(a + b) + b + (c + d), and so on round."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    b0, b1, b2, b3, b4, b5, b6, b7 = b
    c0, c1, c2, c3, c4, c5, c6, c7 = c
    d0, d1, d2, d3, d4, d5, d6, d7 = d
    p0 = a0 ^ b0; q0 = b0 ^ c0; r0 = c0 ^ d0; s0 = d0 ^ a0; p1 = a1 ^ b1; q1 = b1 ^ c1; r1 = c1 ^ d1; s1 = d1 ^ a1
    p2 = a2 ^ b2; q2 = b2 ^ c2; r2 = c2 ^ d2; s2 = d2 ^ a2; p3 = a3 ^ b3; q3 = b3 ^ c3; r3 = c3 ^ d3; s3 = d3 ^ a3
    p4 = a4 ^ b4; q4 = b4 ^ c4; r4 = c4 ^ d4; s4 = d4 ^ a4; p5 = a5 ^ b5; q5 = b5 ^ c5; r5 = c5 ^ d5; s5 = d5 ^ a5
    p6 = a6 ^ b6; q6 = b6 ^ c6; r6 = c6 ^ d6; s6 = d6 ^ a6; p7 = a7 ^ b7; q7 = b7 ^ c7; r7 = c7 ^ d7; s7 = d7 ^ a7
    return [p1 ^ b0 ^ r0 ^ k[0], p2 ^ b1 ^ r1 ^ k[1], p3 ^ b2 ^ r2 ^ k[2], p4 ^ p0 ^ b3 ^ r3 ^ k[3],
            p5 ^ p0 ^ b4 ^ r4 ^ k[4], p6 ^ b5 ^ r5 ^ k[5], p7 ^ p0 ^ b6 ^ r6 ^ k[6], p0 ^ b7 ^ r7 ^ k[7],
            q1 ^ c0 ^ s0 ^ k[8], q2 ^ c1 ^ s1 ^ k[9], q3 ^ c2 ^ s2 ^ k[10], q4 ^ q0 ^ c3 ^ s3 ^ k[11],
            q5 ^ q0 ^ c4 ^ s4 ^ k[12], q6 ^ c5 ^ s5 ^ k[13], q7 ^ q0 ^ c6 ^ s6 ^ k[14], q0 ^ c7 ^ s7 ^ k[15],
            r1 ^ d0 ^ p0 ^ k[16], r2 ^ d1 ^ p1 ^ k[17], r3 ^ d2 ^ p2 ^ k[18], r4 ^ r0 ^ d3 ^ p3 ^ k[19],
            r5 ^ r0 ^ d4 ^ p4 ^ k[20], r6 ^ d5 ^ p5 ^ k[21], r7 ^ r0 ^ d6 ^ p6 ^ k[22], r0 ^ d7 ^ p7 ^ k[23],
            s1 ^ a0 ^ q0 ^ k[24], s2 ^ a1 ^ q1 ^ k[25], s3 ^ a2 ^ q2 ^ k[26], s4 ^ s0 ^ a3 ^ q3 ^ k[27],
            s5 ^ s0 ^ a4 ^ q4 ^ k[28], s6 ^ a5 ^ q5 ^ k[29], s7 ^ s0 ^ a6 ^ q6 ^ k[30], s0 ^ a7 ^ q7 ^ k[31]]


def _sliced_add_four(x: _Row, y: _Row) -> tuple[_Row, _Row]:
    """Return x + 4(x + y) and y + 4(x + y): done to rows a, c and b, d, it makes InvMixColumns of the MixColumns that follows."""
    x0, x1, x2, x3, x4, x5, x6, x7 = x
    y0, y1, y2, y3, y4, y5, y6, y7 = y
    s0 = x0 ^ y0; s1 = x1 ^ y1
    f0 = x2 ^ y2; f1 = x3 ^ y3; f2 = x4 ^ y4 ^ s0; f4 = x6 ^ y6 ^ s1; f5 = x7 ^ y7 ^ s0; f6 = s0 ^ s1; f3 = x5 ^ y5 ^ f6
    return ((x0 ^ f0, x1 ^ f1, x2 ^ f2, x3 ^ f3, x4 ^ f4, x5 ^ f5, x6 ^ f6, x7 ^ s1),
            (y0 ^ f0, y1 ^ f1, y2 ^ f2, y3 ^ f3, y4 ^ f4, y5 ^ f5, y6 ^ f6, y7 ^ s1))


def _sliced_affine(x0: int, x1: int, x2: int, x3: int, x4: int, x5: int, x6: int, x7: int) -> _Row:
    """Return the inverse of the linear part of the S-box's affine map."""
    return (x6 ^ x3 ^ x1, x7 ^ x4 ^ x2, x0 ^ x5 ^ x3, x1 ^ x6 ^ x4, x2 ^ x7 ^ x5, x3 ^ x0 ^ x6, x4 ^ x1 ^ x7, x5 ^ x2 ^ x0)


def _sliced_unbox(*x: int) -> _Row:
    """Return the inverse S-box without its constant: undo the affine map, invert, where inverting is S-box and undoing again."""
    return _sliced_affine(*_sliced_sbox(*_sliced_affine(*x)))


def _sliced_sbox(x0: int, x1: int, x2: int, x3: int, x4: int, x5: int, x6: int, x7: int) -> _Row:
    """Return the S-box without its constant 0x63, high bit first: 32 AND and 83 XOR.

    Names and gates are Boyar's and Peralta's; & binds before ^.  A gate used once stands inside its user and short-lived ones
    share a name: the interpreter frees the integer at once, and its memory is still in the cache for the next (15-30 % faster).
    """
    y14 = x3 ^ x5; y13 = x0 ^ x6; y9 = x0 ^ x3; y8 = x0 ^ x5; t0 = x1 ^ x2; y1 = t0 ^ x7; y4 = y1 ^ x3; y12 = y13 ^ y14
    y2 = y1 ^ x0; y5 = y1 ^ x6; y3 = y5 ^ y8; t1 = x4 ^ y12; y15 = t1 ^ x5; y20 = t1 ^ x1; y6 = y15 ^ x7; y10 = y15 ^ t0
    y11 = y20 ^ y9; y7 = x7 ^ y11; y17 = y10 ^ y11; y16 = t0 ^ y11
    # the inversion in GF(2^4), shared by both halves of the byte
    a = y12 & y15; b = y13 & y16; c = y9 & y11; d = y14 & y17 ^ c; c ^= y8 & y10
    t21 = y3 & y6 ^ a ^ d ^ y20; t22 = y4 & x7 ^ a ^ c ^ y10 ^ y8; t23 = y5 & y1 ^ b ^ d ^ y13 ^ y16; t24 = y2 & y7 ^ b ^ c ^ x0 ^ y16
    t25 = t21 ^ t22; a = t21 & t23; t27 = t24 ^ a; t29 = t25 & t27 ^ t22; t33 = (t22 ^ a) & (t23 ^ t24) ^ t24
    a = t24 & (t27 ^ t33); t37 = a ^ t23 ^ t33; t40 = t25 ^ t29 & (t27 ^ a)
    t41 = t40 ^ t37; t42 = t29 ^ t33; t43 = t29 ^ t40; t44 = t33 ^ t37; t45 = t42 ^ t41
    z0 = t44 & y15; z1 = t37 & y6; z2 = t33 & x7; z3 = t43 & y16; z4 = t40 & y1; z5 = t29 & y7; z6 = t42 & y11; z7 = t45 & y17
    z8 = t41 & y10; z9 = t44 & y12; z10 = t37 & y3; z11 = t33 & y4; z12 = t43 & y13; z13 = t40 & y5; z14 = t29 & y2
    z15 = t42 & y9; z16 = t45 & y14; z17 = t41 & y8
    # the affine map
    t46 = z15 ^ z16; t48 = z5 ^ z13; t53 = z0 ^ z3; t57 = z2 ^ z12 ^ t53; t58 = z4 ^ t46; t59 = z3 ^ z6 ^ z7; t62 = z7 ^ z8 ^ t58
    t63 = z9 ^ z10 ^ t58; t64 = z4 ^ t59; t65 = z14 ^ t57 ^ t62; t66 = z1 ^ t63; s3 = t53 ^ t66
    return (t59 ^ t63, t64 ^ s3, z16 ^ z17 ^ t64 ^ t65, s3, z2 ^ z5 ^ t66, z10 ^ z11 ^ t65, z12 ^ t48 ^ t62, t48 ^ t46 ^ t57)


_BACKENDS: Final[Mapping[str, type[Backend]]] = {
    backend.name: backend for backend in (CryptographyBackend, LibcryptoBackend, PycryptodomeBackend, PythonBackend)}


# -- keys and signatures

def make_x25519_public(entropy: Entropy) -> bytes:
    """Return 32 bytes that are a public key of X25519 (RFC 7748) to whoever looks; 0.2 ms.

    x of a random point of Curve25519 (not of its twist), three times doubled, so that it lies in the subgroup of prime order
    as every public key does (client-protocol.md D13).  One draw of entropy; a candidate that fails is hashed into the next.
    """
    draw = entropy(32)
    while True:
        x, z = int.from_bytes(draw, "little") & (1 << 255) - 1, 1
        if pow((x * x + _A25519 * x + 1) * x, _P25519 >> 1, _P25519) == 1:     # Euler: a y exists
            for _ in range(3):                 # RFC 7748 section 5, without division: the point is x / z
                xx, zz, xz = x * x, z * z, x * z
                x, z = pow(xx - zz, 2, _P25519), 4 * xz * (xx + _A25519 * xz + zz) % _P25519
            if z:                              # zero: a point of order 8 or less
                return (x * pow(z, -1, _P25519) % _P25519).to_bytes(32, "little")
        draw = hashlib.sha256(draw).digest()


def make_mlkem_ciphertext(entropy: Entropy) -> bytes:
    """Return 1088 bytes that nobody can tell from an ML-KEM-768 ciphertext (FIPS 203) without the receiver's private key; 0.3 ms.

    A genuine one is 768 and 256 values mod 3329, all of them uniform to whoever cannot solve module-LWE, rounded to 10 and to 4
    bits.  Plain random bytes do differ: 257 of the 1024 ten-bit words stand for four values each and the others for three, so
    one share is enough to count (tls-front.md 9.3).  Nothing else can be checked from outside, and the client never decapsulates.
    """
    values = _residues(entropy, 1024)
    words = [((x << 11) + 3329) // 6658 & 1023 for x in values[:768]]
    nibbles = [((x << 5) + 3329) // 6658 & 15 for x in values[768:]]
    return b"".join([(words[at] | words[at + 1] << 10 | words[at + 2] << 20 | words[at + 3] << 30).to_bytes(5, "little")
                     for at in range(0, 768, 4)]) + bytes([nibbles[at] | nibbles[at + 1] << 4 for at in range(0, 256, 2)])


def make_mlkem_key(entropy: Entropy) -> bytes:
    """Return 1184 bytes that a server takes for an ML-KEM-768 encapsulation key: 768 values below 3329 in 12 bits each, and a seed.

    Servers check the range of every value and answer a wrong one with an alert (tls-front.md 9.2).
    """
    values = _residues(entropy, 768)
    return b"".join([(values[at] | values[at + 1] << 12).to_bytes(3, "little") for at in range(0, 768, 2)]) + entropy(32)


def _residues(entropy: Entropy, count: int) -> list[int]:
    """`count` values uniform in 0..3328: 16-bit words below 19 * 3329, the rest refused."""
    found: list[int] = []
    while len(found) < count:
        found += [word % 3329 for word in struct.unpack("<512H", entropy(1024)) if word < 63_251]
    return found[:count]


class KeyedHmac:
    """HMAC-SHA256 under one key, for messages of 100..2000 bytes: 2.4 us for 517 where hmac.digest takes 3.5.

    RFC 2104: the hash states behind the two padded keys are kept and copied.  550 bytes each.
    """

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        sha256 = hashlib.sha256
        block = (key if len(key) <= 64 else sha256(key).digest()).ljust(64, b"\0")
        self._inner = sha256(block.translate(_HMAC_INNER))
        self._outer = sha256(block.translate(_HMAC_OUTER))

    def digest(self, *parts: Bytes) -> bytes:
        """Return the signature, 32 bytes, of the parts in a row."""
        inner, outer = self._inner.copy(), self._outer.copy()
        for part in parts:
            inner.update(part)
        outer.update(inner.digest())
        return outer.digest()


# == 4. buffer ===============================================================
# Bytes of a peer that is not understood yet.  A limit comes before the buffer:
# whoever sends more than a handshake can hold is not speaking our protocol.
# After the handshake nothing is kept here; the relay owns no buffer at all.


class Inbox:
    """Bytes received and not consumed yet, at most `limit` of them."""

    __slots__ = ("limit", "_data")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def append(self, data: Bytes) -> None:
        """Add what arrived; the caller read no more than `room` bytes."""
        if len(data) > self.room:
            raise InternalError(f"inbox of {self.limit} bytes overrun by {len(data) - self.room}")
        self._data += data

    @property
    def room(self) -> int:
        """How many bytes may still be appended."""
        return self.limit - len(self._data)

    def peek(self, size: int) -> bytes:
        """Return up to `size` leading bytes without consuming them."""
        return bytes(self._data[:size])

    def take(self, size: int) -> bytes:
        """Consume and return exactly `size` bytes; the caller checked len()."""
        head = bytes(self._data[:size])
        del self._data[:size]
        return head

    def take_all(self) -> bytes:
        """Consume and return everything."""
        data = bytes(self._data)
        self._data.clear()
        return data


# == 5. framing ==============================================================
# What MTProto messages are wrapped in on the client's side.  Needed only where
# they are taken apart, on the way to the middle end; a direct session forwards
# the stream as it is.  Three transports, one rule book (client-protocol.md 8):
# each class knows its length field, Framing everything else.
#
#   abridged      b | b = 7f: w LE24      w words follow; bit 7 of b = quick ack
#   intermediate  n LE32                  n bytes follow; bit 31 = quick ack
#   padded        n LE32                  n bytes follow, n mod 4 of them padding
#
# A quick-ack answer is four bytes without a length; clients tell it from a
# length by its bit 31 (abridged: by the first byte, so the token is reversed).
# Traps: a frame that is no whole number of words makes the middle end drop the
# link that all share, so it ends here; so does a long form of a short length.
# Buffers grow with what arrives, never with what a length announces.

_LE32: Final = struct.Struct("<I")
_NOISE: Final = struct.Struct("4s")
FRAME_SPARE: Final = 4                   # bytes around an answer that enclose() may overwrite, on either side
FRAMES_AT_ONCE: Final = 256
_EMPTY_COSTS: Final = 8                  # debt of an empty frame; a good one pays back 1 (middle-proxy-wire.md D10)
_DEBT_MAX: Final = 512
_ABRIDGED_LONG: Final = 0x7F
_ABRIDGED_MAX: Final = 4 << 24           # bytes: 24 bits of words


class FrameError(WireError):
    """A client frame, or an answer, that cannot be.

    kind: too_small, too_large, misaligned, overlong, flood.  length: what was announced, in bytes (overlong: words);
    prefix: the length field as it came, quick-ack bit included.
    """

    def __init__(self, kind: str, text: str, length: int, prefix: bytes = b"") -> None:
        super().__init__(Reason.BAD_FRAME, text)
        self.kind, self.length, self.prefix = kind, length, prefix


class Framing:
    """One client's frames: feed() takes them out of the stream, enclose() puts answers into it."""

    __slots__ = ("limit", "frames", "failed", "rest", "_debt", "_kept", "_need")
    name = ""

    def __init__(self, limit: int) -> None:
        self.limit = limit                     # bytes of the longest frame accepted
        self.frames = 0                        # good ones so far
        self.failed: FrameError | None = None  # why no further bytes are looked at
        self.rest = b""                        # what feed() did not look at yet: the next one has to be for that
        self._debt = 0
        self._kept = bytearray()               # an incomplete frame, from its length field on
        self._need = 0                         # bytes of it when complete; 0 = its length field is not complete either

    @property
    def waiting(self) -> int:
        """Bytes of a frame that has not come to its end."""
        return len(self._kept)

    @property
    def inside_frame(self) -> bool:
        """True if an end of the stream here cuts a frame; one inside or before a plain length field is in order."""
        return self._need > 0

    def feed(self, data: Bytes) -> list[tuple[Bytes, bool]]:
        """Return the frames that are complete now: (payload without padding, quick ack wanted).

        Payloads are slices of `data`, so views if it is one: use them before its memory changes.  After a fault `failed` is set;
        the good frames before it are returned.  No more than FRAMES_AT_ONCE are: a read may hold 50,000 of five bytes, and
        others have their turn.  Then `rest` is set aside; call feed(rest) before anything else.
        """
        self.rest = b""
        found: list[tuple[Bytes, bool]] = []
        at, end = 0, len(data)
        try:
            if self._kept:
                at = self._complete(data, found)
            while at < end and self.failed is None:
                head = self._head(data, at, end)
                if head is None or head[0] + head[1] > end:
                    self._keep(data[at:], head)
                    break
                start, length, quick = head
                at = start + length
                if length and not self._debt:          # _accept() in line: what every message is
                    found.append((data[start:start + (length & -4)], quick))
                    self.frames += 1
                else:
                    self._accept(data[start:start + (length & -4)], length, quick, found)
                if len(found) == FRAMES_AT_ONCE:
                    self.rest = bytes(data[at:])
                    break
        except FrameError as error:
            self.failed = error
            self._kept.clear()
        return found

    def _complete(self, view: Bytes, found: list[tuple[Bytes, bool]]) -> int:
        """Take what the kept frame lacks and return where the next one begins."""
        at, end, kept = 0, len(view), self._kept
        while at < end:
            missing = (self._need or len(kept) + 1) - len(kept)        # a length field grows byte by byte: no reading past it
            kept += view[at:at + missing]
            at = min(at + missing, end)
            if not self._need and (head := self._head(memoryview(bytes(kept)), 0, len(kept))) is not None:
                self._need = head[0] + head[1]
            if len(kept) == self._need:
                frame = memoryview(bytes(kept))
                kept.clear()
                self._need = 0
                head = self._head(frame, 0, len(frame))
                assert head is not None
                start, length, quick = head
                self._accept(frame[start:start + (length & -4)], length, quick, found)
                break
        return at

    def _keep(self, rest: Bytes, head: tuple[int, int, bool] | None) -> None:
        self._kept += rest
        self._need = 0
        if head is not None:
            length = head[1]
            self._need = self._field_size(rest[0]) + length

    def _accept(self, payload: Bytes, length: int, quick: bool, found: list[tuple[Bytes, bool]]) -> None:
        if length:
            found.append((payload, quick))
            self.frames += 1
            if self._debt:
                self._debt -= 1
            return
        self._debt += _EMPTY_COSTS             # skipped; its quick-ack bit means nothing
        if self._debt >= _DEBT_MAX:
            raise FrameError("flood", "Tiny frame overhead limit exceeded", 0)

    def _field_size(self, first: int) -> int:
        """Bytes of a length field that begins with `first`."""
        return 4

    def _head(self, view: Bytes, at: int, end: int) -> tuple[int, int, bool] | None:
        """Return (start of the body, its length, quick ack wanted), or None while the length field is incomplete."""
        if end - at < 4:
            return None
        word: int = _LE32.unpack_from(view, at)[0]
        length = word & 0x7FFF_FFFF
        if length > self.limit:
            raise FrameError("too_large", f"Frame too large: {length} (max {self.limit})", length, bytes(view[at:at + 4]))
        if 0 < length < 4:
            raise FrameError("too_small", f"Frame too small: {length}", length, bytes(view[at:at + 4]))
        return at + 4, length, word > 0x7FFF_FFFF

    def enclose(self, view: memoryview, at: int, size: int, noise: Bytes) -> tuple[int, int]:
        """Frame the answer view[at:at + size] where it lies and return (start, size) of the whole.

        The FRAME_SPARE bytes before and behind it are overwritten.  noise: 4 random bytes, for padding.  Raises FrameError.
        """
        _LE32.pack_into(view, at - 4, size)
        return at - 4, size + 4

    def ack(self, view: memoryview, at: int) -> None:
        """Turn the four bytes of a quick-ack token as the middle end sends it into what this transport's clients expect."""

    def wrap(self, data: Bytes, noise: Bytes) -> bytes:
        """Return the answer `data` as a frame; nothing for an empty one."""
        if not data:
            return b""
        room = memoryview(bytearray(b"".join((bytes(FRAME_SPARE), data, bytes(FRAME_SPARE)))))
        at, size = self.enclose(room, FRAME_SPARE, len(data), noise)
        return bytes(room[at:at + size])


class Abridged(Framing):
    """One byte of length where it suffices."""

    __slots__ = ()
    name = "abridged"

    def _field_size(self, first: int) -> int:
        return 4 if first & 0x7F == _ABRIDGED_LONG else 1

    def _head(self, view: Bytes, at: int, end: int) -> tuple[int, int, bool] | None:
        first = view[at]
        words, start = first & 0x7F, at + 1
        if words == _ABRIDGED_LONG:
            start = at + 4
            if end < start:
                return None
            words = int.from_bytes(view[at + 1:start], "little")
            if words < _ABRIDGED_LONG:
                raise FrameError("overlong", f"Overlong frame length: {words}", words, bytes(view[at:start]))
        if words << 2 > self.limit:
            raise FrameError("too_large", f"Frame too large: {words << 2} (max {self.limit})", words << 2, bytes(view[at:start]))
        return start, words << 2, first > 0x7F

    @property
    def inside_frame(self) -> bool:
        """True also inside a long length field: its first byte promised more."""
        return bool(self._kept)

    def enclose(self, view: memoryview, at: int, size: int, noise: Bytes) -> tuple[int, int]:
        """One byte or four in front."""
        if size & 3:
            raise FrameError("misaligned", f"Abridged payload must be 4-byte aligned, got {size}", size)
        if size < _ABRIDGED_LONG << 2:
            view[at - 1] = size >> 2
            return at - 1, size + 1
        if size >= _ABRIDGED_MAX:
            raise FrameError("too_large", f"Abridged frame too large: {size}", size)
        _LE32.pack_into(view, at - 4, size >> 2 << 8 | _ABRIDGED_LONG)
        return at - 4, size + 4

    def ack(self, view: memoryview, at: int) -> None:
        """Most significant byte first: bit 7 of the first byte marks it."""
        view[at:at + 4] = bytes(view[at:at + 4])[::-1]


class Intermediate(Framing):
    """Four bytes of length."""

    __slots__ = ()
    name = "intermediate"

    def _head(self, view: Bytes, at: int, end: int) -> tuple[int, int, bool] | None:
        head = super()._head(view, at, end)
        if head is not None and head[1] & 3:
            raise FrameError("misaligned", f"Frame misaligned: {head[1]}", head[1], bytes(view[at:at + 4]))
        return head


class Secure(Framing):
    """Four bytes of length, and padding that hides it."""

    __slots__ = ()
    name = "secure"

    def enclose(self, view: memoryview, at: int, size: int, noise: Bytes) -> tuple[int, int]:
        """One to three bytes of padding; the fourth byte of `noise` says how many."""
        if size & 3:
            raise FrameError("misaligned", f"Secure payload must be 4-byte aligned, got {size}", size)
        _NOISE.pack_into(view, at + size, noise)       # all four: FRAME_SPARE are ours
        size += noise[3] % 3 + 1
        _LE32.pack_into(view, at - 4, size)
        return at - 4, size + 4


# == 6. obfuscated ===========================================================
# The first 64 bytes of a client, and the 64 bytes we send to a data centre.
#
#   0        8                        40               56      60   62   64
#   | random | prekey                 | iv             | tag   | dc | rnd |
#   '------------ in clear ----------------------------'-- encrypted ----'
#
# The sender encrypts the whole block with its own key and puts only the last
# eight bytes of the result on the wire, so the keystream goes on at byte 64.
# The answer direction uses bytes 8..56 reversed as key and IV, from byte 0.
# Client keys are hashed with the user's secret; data-centre keys are not.
#
# fast_mode: we choose the block for the data centre so that its answer key is
# the key the client expects.  What the data centre sends is then already
# encrypted for the client, and a download needs no AES at all.
# Source: core.telegram.org/mtproto/mtproto-transports; client-protocol.md 5.

PREAMBLE_SIZE: Final = 64
_TAG_AT: Final = 56
_TAG_AND_DC: Final = struct.Struct("<4sh")

# Never at the start of a plain header (client-protocol.md 5.5): they are taken
# for HTTP, for TLS, or for another transport.
_NEVER_SENT: Final = frozenset((b"HEAD", b"POST", b"GET ", b"OPTI", b"\xee" * 4, b"\xdd" * 4, b"\x16\x03\x01\x02"))
# What a stranger opens with and no client of ours ever does (client-protocol.md D11).
_STRANGERS: Final = frozenset((b"GET ", b"POST", b"HEAD", b"PUT ", b"DELE", b"OPTI", b"PATC", b"CONN", b"TRAC", b"PRI ", b"SSH-",
                               b"\xee" * 4, b"\xdd" * 4))


class Transport(enum.Enum):
    """How the client cuts its stream into frames; the value is the tag in its preamble."""

    ABRIDGED = b"\xef\xef\xef\xef"
    INTERMEDIATE = b"\xee\xee\xee\xee"
    PADDED = b"\xdd\xdd\xdd\xdd"

    @property
    def word(self) -> str:
        """The name in log lines: abridged, intermediate, secure."""
        return "secure" if self is Transport.PADDED else self.name.lower()


_BY_TAG: Final = {transport.value: transport for transport in Transport}


class Preamble(NamedTuple):
    """A client's accepted first 64 bytes."""

    transport: Transport
    dc: int                  # signed, as the client wrote it: negative = media cluster
    from_client: AesCtr      # decrypts what follows; already past the 64 bytes
    to_client_key: bytes     # 32 bytes; nothing is encrypted with it yet
    to_client_iv: bytes      # 16 bytes
    replay_key: bytes        # bytes 8..56 of the header


class DcPreamble(NamedTuple):
    """What opens a stream to a data centre."""

    block: bytes             # 64 bytes for the wire
    to_dc: AesCtr            # encrypts what follows; already past the 64 bytes
    from_dc_key: bytes       # 32 bytes
    from_dc_iv: bytes        # 16 bytes


def has_reserved_prefix(head: Bytes) -> bool:
    """True as soon as `head`, the first bytes of a plain connection, cannot be a client's (client-protocol.md D11)."""
    return (head[:1] == b"\xef" or bytes(head[:4]) in _STRANGERS
            or (len(head) >= 8 and head[4:8] == b"\0\0\0\0"))


def parse_client_preamble(block: bytes, secret: bytes, backend: Backend) -> Preamble:
    """Return the preamble if `block` (64 bytes) was made with `secret` (16 bytes).

    Raises WireError(BAD_HEADER).  A tag is 32 bits: a wrong secret fits by chance once in 1.4e9 (client-protocol.md 5.6).
    """
    from_client = backend.ctr(hashlib.sha256(block[8:40] + secret).digest(), block[40:56])
    tag, dc = _TAG_AND_DC.unpack_from(from_client.update(block), _TAG_AT)
    transport = _BY_TAG.get(tag)
    if transport is None:
        raise WireError(Reason.BAD_HEADER)
    reverse = block[55:7:-1]
    return Preamble(transport, dc, from_client, hashlib.sha256(reverse[:32] + secret).digest(), reverse[32:], block[8:56])


class ClientPreamble(NamedTuple):
    """What a client opens with."""

    block: bytes             # 64 bytes for the wire
    to_dc: AesCtr            # encrypts what follows; already past the 64 bytes
    from_dc: AesCtr          # decrypts the answer


def make_client_preamble(transport: Transport, dc: int, secret: bytes, backend: Backend, entropy: Entropy) -> ClientPreamble:
    """Return the block that opens a stream through a proxy with `secret` (16 bytes): the other side of parse_client_preamble."""
    draw = draw_preamble(entropy)
    to_dc = backend.ctr(hashlib.sha256(draw[8:40] + secret).digest(), draw[40:56])
    plain = draw[:_TAG_AT] + transport.value + dc.to_bytes(2, "little", signed=True) + draw[62:]
    reverse = draw[55:7:-1]
    from_dc = backend.ctr(hashlib.sha256(reverse[:32] + secret).digest(), reverse[32:])
    return ClientPreamble(plain[:_TAG_AT] + to_dc.update(plain)[_TAG_AT:], to_dc, from_dc)


def draw_preamble(entropy: Entropy) -> bytes:
    """Return 64 random bytes that nothing on the way takes for another protocol."""
    while True:
        draw = entropy(PREAMBLE_SIZE)
        if draw[0] != 0xEF and draw[:4] not in _NEVER_SENT and draw[4:8] != b"\0\0\0\0":
            return draw


def make_dc_preamble(transport: Transport, dc: int, backend: Backend, entropy: Entropy,
                     answer_key: bytes = b"") -> DcPreamble:
    """Return the block that opens a stream to data centre `dc`, with the cipher that continues it.

    answer_key: the client's key and IV (48 bytes) for fast_mode; empty = random keys (upstream-and-relay.md 8).
    """
    draw = draw_preamble(entropy)
    keys = answer_key[::-1] or draw[8:56]
    plain = draw[:8] + keys + transport.value + dc.to_bytes(2, "little", signed=True) + draw[62:]
    to_dc = backend.ctr(keys[:32], keys[32:])
    reverse = keys[::-1]
    return DcPreamble(plain[:_TAG_AT] + to_dc.update(plain)[_TAG_AT:], to_dc, reverse[:32], reverse[32:])


# == 7. faketls ==============================================================
# A client that speaks TLS 1.3 as far as an observer can see.  Its ClientHello
# carries, in place of the 32 random bytes, an HMAC of the whole record under
# the user's secret; the last four bytes of it are XORed with the client's
# clock.  Our answer is one flight of exactly three records
#
#   16 03 03 ServerHello | 14 03 03 ChangeCipherSpec | 17 03 03 random bytes
#
# whose `random` is an HMAC in turn.  From then on both sides wrap ciphertext of
# room 6 into application-data records.  There is no MAC on records, so a
# payload is usable before its record is complete.
# Traps: clients hash exactly these three records, so one byte more breaks them
# (client-protocol.md 6.9); SNI only selects the shape of the answer; bytes
# behind the ClientHello record belong to the stream.
# The flight has the looks of the mask host's own.  They are measured with a
# ClientHello of ours (build_probe_hello, FlightReader) and kept in a file
# (build_front_file); room 17 does the I/O.
# Source: client-protocol.md 6, tls-front.md 9, RFC 8446.

HELLO_MIN: Final = 512           # shortest record body a client sends (they pad up to it)
HELLO_MAX: Final = 16_384        # RFC 8446 5.1: a longer plaintext record is not TLS
RECORD_HEADER: Final = 5
RECORD_IN_MAX: Final = 16_384 + 256   # RFC 8446 5.2: ciphertext limit
# What we send: 8192 + 17, the record of an nginx with `ssl_buffer_size 8k`.  No server known to us sends
# 16384, and TDLib refuses the usual 16401 (client-protocol.md D14).
RECORD_OUT_MAX: Final = 8_209
RECORDS_AT_ONCE: Final = 1_024    # of a client, before others have their turn: 1 ms; bulk has 364 in a megabyte
RECORD_HEAD: Final = b"\x17\x03\x03"
_CCS: Final = b"\x14\x03\x03\x00\x01\x01"
_RANDOM: Final = slice(11, 43)
_NO_RANDOM: Final = bytes(32)
_BOOT_CLOCK_LIMIT: Final = 86_400_000     # 1000 days: smaller is seconds since boot, not a date
_AHEAD_S: Final = 1200
_BEHIND_S: Final = 600
GROUP_X25519: Final = 29
GROUP_HYBRID: Final = 4588                # X25519MLKEM768
_SHARE_SIZE: Final = {GROUP_X25519: 32, GROUP_HYBRID: 1216}
_ANSWER_SIZE: Final = {GROUP_X25519: 32, GROUP_HYBRID: 1120}
_SUITES: Final = (0x1301, 0x1302, 0x1303)
_EXT_NAME, _EXT_ALPN, _EXT_PADDING, _EXT_VERSIONS, _EXT_SHARES = 0, 16, 21, 43, 51
_HANDSHAKE, _ALERT, _APPLICATION = 0x16, 0x15, 0x17
_RETRY_RANDOM: Final = hashlib.sha256(b"HelloRetryRequest").digest()      # RFC 8446 4.1.3
_FLIGHT_IN_MAX: Final = 65_536            # no server says more before our Finished
FRONT_SAMPLES: Final = 3
FRONT_FILE_MAX: Final = 1 << 20
_CERT_EXTRA: Final = 400                  # what stands around the Certificate message in a flight (tls-front.md 9.5)
FLIGHT_MIN: Final = 64
FLIGHT_MAX: Final = 10_240                # iOS closes above it (client-protocol.md 6.9)


class ClientHello(NamedTuple):
    """What we use of a ClientHello record."""

    digest: bytes                # the 32 random bytes
    session_id: bytes            # 0..32 bytes, echoed
    suites: tuple[int, ...]      # in the client's order; empty when the hello does not parse
    server_name: str | None
    alpn: tuple[str, ...]
    groups: frozenset[int]       # key-share groups that we could answer


class FrontShape(NamedTuple):
    """How the answer for one domain looks (tls-front.md 9.1)."""

    size: int                                                    # bytes of the application-data record, 64..10240
    suite: int | None = None                                     # None: the client's choice
    group: int = GROUP_X25519
    order: tuple[int, ...] = (_EXT_VERSIONS, _EXT_SHARES)


class FrontProfile(NamedTuple):
    """What the mask host answers for one domain, or what we answer until we know (tls-front.md 9.1)."""

    flights: tuple[int, ...]                                     # 1..3 samples, bytes of its encrypted flight
    suite: int | None = None
    group: int = GROUP_X25519
    order: tuple[int, ...] = (_EXT_VERSIONS, _EXT_SHARES)
    fetched_wall: float = 0.0                                    # unix seconds
    source: str = "default"                                      # or probe, file
    # Samples for hellos without the X25519MLKEM768 share, where the host prefers that group: OpenSSL then adds its list of
    # groups, 10 bytes.  Empty: the same.
    plain: tuple[int, ...] = ()
    host: str = ""                                               # who was asked; empty = not known

    def shape(self, entropy: Entropy, hybrid: bool = True) -> FrontShape:
        """The looks of one answer: one of the samples, as far as clients accept it.  hybrid: the client sent that share."""
        flights = self.flights if hybrid or not self.plain else self.plain
        size = flights[0] if len(flights) == 1 else flights[int.from_bytes(entropy(4), "big") % len(flights)]
        return FrontShape(min(max(size, FLIGHT_MIN), FLIGHT_MAX), self.suite, self.group, self.order)


class ServerHello(NamedTuple):
    """The first message of a real server's flight."""

    version: bytes
    random: bytes
    session_id: bytes
    suite: int
    compression: int
    extensions: tuple[tuple[int, bytes], ...]


class _Cursor:
    """Walks length-prefixed fields; IndexError-free: running over the end raises WireError(HELLO_MALFORMED)."""

    __slots__ = ("data", "at", "end")

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def skip(self, size: int) -> int:
        """Move on by `size` bytes and return where they began."""
        start, self.at = self.at, self.at + size
        if self.at > self.end:
            raise WireError(Reason.HELLO_MALFORMED)
        return start

    def number(self, width: int) -> int:
        """Read a big-endian integer of `width` bytes."""
        start = self.skip(width)
        return int.from_bytes(self.data[start:self.at], "big")

    def inner(self, width: int) -> _Cursor:
        """Read a length of `width` bytes and return a cursor over what it covers."""
        size = self.number(width)
        start = self.skip(size)
        return _Cursor(self.data, start, self.at)

    def rest(self) -> bytes:
        """Everything up to the end."""
        start, self.at = self.at, self.end
        return self.data[start:self.end]

    def __bool__(self) -> bool:
        return self.at < self.end


def parse_client_hello(record: bytes) -> ClientHello:
    """Return the used fields of a complete ClientHello record, header included.

    Raises WireError(HELLO_MALFORMED) only for a session id that we could not echo (client-protocol.md 6.1, D6); any
    other overrun makes the fields behind it absent (6.3).
    """
    if len(record) < 44 or record[43] > 32 or 44 + record[43] > len(record):
        raise WireError(Reason.HELLO_MALFORMED)
    session_id = record[44:44 + record[43]]
    suites: tuple[int, ...] = ()
    name: str | None = None
    alpn: tuple[str, ...] = ()
    groups = frozenset[int]()
    if record[0] == 0x16 and record[5] == 0x01:
        cursor = _Cursor(record, 44 + record[43], len(record))
        try:
            listed = cursor.inner(2).rest()
            suites = struct.unpack(f">{len(listed) // 2}H", listed[:len(listed) & ~1])
            cursor.inner(1)
            name, alpn, groups = _parse_extensions(cursor.inner(2))
        except WireError:
            pass                 # cut short: what was not reached is absent
    return ClientHello(record[_RANDOM], session_id, suites, name, alpn, groups)


def _parse_extensions(block: _Cursor) -> tuple[str | None, tuple[str, ...], frozenset[int]]:
    name: str | None = None
    alpn: tuple[str, ...] = ()
    groups = frozenset[int]()
    data, at, end = block.data, block.at, block.end
    while at < end:
        if at + 4 > end:
            break
        kind, size = _EXTENSION.unpack_from(data, at)
        at += 4 + size
        if at > end:
            break
        if kind == _EXT_NAME and name is None:
            name = _quiet(_parse_server_name, _Cursor(data, at - size, at), None)
        elif kind == _EXT_ALPN and not alpn:
            alpn = _quiet(_parse_alpn, _Cursor(data, at - size, at), ())
        elif kind == _EXT_SHARES:
            groups = _quiet(_parse_shares, _Cursor(data, at - size, at), frozenset())
    return name, alpn, groups


def _quiet(parse: Callable[[_Cursor], _T], body: _Cursor, absent: _T) -> _T:
    """Result of `parse`, or `absent` when the extension overruns itself (client-protocol.md 6.3)."""
    try:
        return parse(body)
    except WireError:
        return absent


def _parse_server_name(body: _Cursor) -> str | None:
    names = body.inner(2)
    while names:
        kind = names.number(1)
        text = names.inner(2).rest()
        if kind == 0 and text:
            try:
                return text.decode("utf-8")
            except UnicodeDecodeError:
                continue
    return None


def _parse_alpn(body: _Cursor) -> tuple[str, ...]:
    names = body.inner(2)
    found = []
    while names:
        found.append(names.inner(1).rest().decode("utf-8", "replace"))
    return tuple(found)


def _parse_shares(body: _Cursor) -> frozenset[int]:
    """Groups that occur exactly once with the right size (tls-front.md 9.3)."""
    shares = body.inner(2)
    seen: list[int] = []
    usable: set[int] = set()
    while shares:
        group = shares.number(2)
        size = len(shares.inner(2).rest())
        seen.append(group)
        if _SHARE_SIZE.get(group) == size:
            usable.add(group)
    if body:                                   # more than the list: the extension does not parse to its end
        raise WireError(Reason.HELLO_MALFORMED)
    return frozenset(group for group in usable if seen.count(group) == 1)


def without_random(record: bytes) -> bytes:
    """The message that the digest of a ClientHello record signs: its own place zeroed."""
    return record[:11] + _NO_RANDOM + record[43:]


def match_client_hello(digest: bytes, mac: bytes) -> int | None:
    """Return the client's clock (unix seconds, or seconds since boot) if `mac` fits its digest, else None.

    mac: HMAC-SHA256(secret, without_random(record)).  Constant-time compare (client-protocol.md 6.2).
    """
    if not hmac.compare_digest(digest[:28], mac[:28]):
        return None
    return int.from_bytes(digest[28:], "little") ^ int.from_bytes(mac[28:], "little")


def is_boot_clock(timestamp: int) -> bool:
    """True for a client that sends seconds since boot: such a hello never ages out of the replay window."""
    return timestamp < _BOOT_CLOCK_LIMIT


def is_clock_near(timestamp: int, now_wall: float) -> bool:
    """True if the client is at most 20 minutes ahead or 10 behind (client-protocol.md 6.2)."""
    return -_AHEAD_S <= int(now_wall) - timestamp <= _BEHIND_S


def choose_group(hello: ClientHello, preferred: int) -> int:
    """Return the key-share group to answer with.

    Raises WireError(HELLO_MALFORMED) when the client sent no share we know: a real server would ask for another, we cannot.
    """
    for group in (preferred, GROUP_X25519):
        if group in hello.groups:
            return group
    raise WireError(Reason.HELLO_MALFORMED)


def _choose_suite(hello: ClientHello, shape: FrontShape) -> int:
    if shape.suite in hello.suites and shape.suite is not None:
        return shape.suite
    return next((suite for suite in hello.suites if suite in _SUITES), _SUITES[0])


def build_server_hello(hello: ClientHello, shape: FrontShape, group: int, share: bytes, sign: KeyedHmac,
                       entropy: Entropy) -> bytes:
    """Return the complete answer: ServerHello, ChangeCipherSpec, one application-data record of `shape.size` bytes.

    share: our public key for `group`.  sign: the user's HMAC (client-protocol.md 6.4).
    """
    extension = {_EXT_SHARES: struct.pack(">HHHH", _EXT_SHARES, len(share) + 4, group, len(share)) + share,
                 _EXT_VERSIONS: struct.pack(">HHH", _EXT_VERSIONS, 2, 0x0304)}
    extensions = b"".join(extension[kind] for kind in shape.order)
    body = b"".join((b"\x03\x03", _NO_RANDOM, bytes((len(hello.session_id),)), hello.session_id,
                     struct.pack(">HBH", _choose_suite(hello, shape), 0, len(extensions)), extensions))
    flight = bytearray(b"".join((b"\x16\x03\x03", (len(body) + 4).to_bytes(2, "big"), b"\x02", len(body).to_bytes(3, "big"), body,
                                 _CCS, RECORD_HEAD, shape.size.to_bytes(2, "big"), entropy(shape.size))))
    flight[_RANDOM] = sign.digest(hello.digest, flight)
    return bytes(flight)


def build_fake_alert(entropy: Entropy) -> bytes:
    """Return one record that looks like an encrypted fatal alert: 2 bytes, content type and tag (client-protocol.md D10)."""
    return RECORD_HEAD + b"\x00\x13" + entropy(19)


class RecordReader:
    """Finds the payload in a stream of FakeTLS records from the client, wherever the stream was cut.

    It points instead of copying: spans() tells where payload lies in the caller's buffer.
    """

    __slots__ = ("_left", "_kind", "_head", "between", "seen", "closed", "failed")

    def __init__(self) -> None:
        self.between = True          # a header is to be expected, the whole of it
        self.seen = 0                # bytes of the last data that spans() looked at
        self._left = 0               # payload bytes of the current record still to come
        self._kind = 0x17
        self._head = b""             # 0..4 bytes of an unfinished header
        self.closed = False          # an alert arrived: the client will say nothing more
        self.failed: WireError | None = None     # a record that cannot be; nothing behind it is looked at

    @property
    def ended(self) -> bool:
        """True when nothing more is looked at."""
        return self.closed or self.failed is not None

    @property
    def mid_record(self) -> bool:
        """True when an end of stream here would cut a record (client-protocol.md 6.7)."""
        return bool(self._left or self._head)

    def spans(self, data: Bytes, size: int) -> list[tuple[int, int]]:
        """Return (start, length) of every piece of payload in data[:size], in order; of 1,024 records at once and no more.

        `seen` tells how far it came: the caller shows the rest again.  What client-protocol.md 6.7 refuses sets `failed`
        (BAD_RECORD), an alert sets `closed`: what stands before it is still returned, what follows is ignored.
        """
        found: list[tuple[int, int]] = []
        at, unpack, last, whole = 0, _HEADER.unpack_from, size - RECORD_HEADER, self.between
        for _ in range(RECORDS_AT_ONCE):
            if whole and at <= last:                   # in line: bulk comes in records of 3 KB
                kind, version, length = unpack(data, at)
                if kind == 0x17 and version == 0x0303 and length <= RECORD_IN_MAX and length <= last - at:
                    at += RECORD_HEADER
                    if length:
                        found.append((at, length))
                        at += length
                    continue
            if at >= size or self.ended:
                break
            at = self._step(data, at, size, found)
            whole = not (self._left or self._head or self.ended)
        self.between = whole
        self.seen = size if self.ended else at
        return found

    def is_one_record(self, data: Bytes, size: int) -> bool:
        """True if data[:size] is one whole record of application data, header included: what chat looks like."""
        if not self.between or size <= RECORD_HEADER:
            return False
        kind, version, length = _HEADER.unpack_from(data)
        whole: bool = kind == 0x17 and version == 0x0303 and length == size - RECORD_HEADER and length <= RECORD_IN_MAX
        return whole

    def payload(self, data: bytes) -> bytes:
        """Return all payload of `data`, however many records that is: for the little that a handshake reads at once."""
        found = []
        while data:
            found += [data[at:at + length] for at, length in self.spans(data, len(data))]
            data = data[self.seen:]
        return b"".join(found)

    def _step(self, data: Bytes, at: int, size: int, found: list[tuple[int, int]]) -> int:
        """Go on with the header or payload at `at`; return where it ends, or the data does."""
        if not self._left:
            try:
                at = self._read_header(data, at, size)
            except WireError as error:
                self.failed = error
                return size
        length = min(self._left, size - at)
        if length and self._kind == 0x17:
            found.append((at, length))
        self._left -= length
        return at + length

    def _read_header(self, data: Bytes, at: int, size: int) -> int:
        """Consume a header, or what there is of it; return where its payload begins."""
        if self._head or size - at < RECORD_HEADER:
            missing = RECORD_HEADER - len(self._head)
            self._head += bytes(data[at:min(at + missing, size)])
            at = min(at + missing, size)
            if len(self._head) < RECORD_HEADER:
                return at
            self._open(*_HEADER.unpack(self._head))
            self._head = b""
            return at
        self._open(*_HEADER.unpack_from(data, at))
        return at + RECORD_HEADER

    def _open(self, kind: int, version: int, length: int) -> None:
        if version != 0x0303 and version != 0x0301:
            raise WireError(Reason.BAD_RECORD, f"Invalid TLS version: {version:#06x}")
        if length > RECORD_IN_MAX:
            raise WireError(Reason.BAD_RECORD, f"TLS record too large: {length}")
        if kind == 0x15:
            self.closed = True
        elif kind == 0x14:
            if length != 1:
                raise WireError(Reason.BAD_RECORD, f"Invalid ChangeCipherSpec length: {length}")
        elif kind == 0x16:
            raise WireError(Reason.BAD_RECORD, "unexpected TLS handshake record")
        elif kind != 0x17:
            raise WireError(Reason.BAD_RECORD, f"unknown TLS record type: {kind:#04x}")
        self._kind, self._left = kind, length


# -- the probe: a hello of our own, and what a real server says to it

# Extensions that are the same in every hello, without GREASE, name, groups, versions and key shares (tls-front.md 9.2).
_PROBE_FIXED: Final = tuple((kind, bytes.fromhex(body)) for kind, body in (
    (0x0017, ""), (0xFF01, "00"), (0x000B, "0100"), (0x0023, ""), (_EXT_ALPN, "000c 02 6832 08 687474702f312e31"), (0x0005, "0100000000"),
    (0x000D, "0010 0403 0804 0401 0503 0805 0501 0806 0601"), (0x0012, ""), (0x002D, "0101"), (0x001B, "020002"), (0x44CD, "0003026832")))
_PROBE_SUITES: Final = bytes.fromhex("1301 1302 1303 c02b c02f c02c c030 cca9 cca8 c013 c014 009c 009d 002f 0035")
_ECH_SIZES: Final = (144, 176, 208, 240)


def build_probe_hello(name: str, make_key: Callable[[], bytes], entropy: Entropy, hybrid: bool = True) -> bytes:
    """Return the ClientHello record that Telegram clients send, unsigned: the real server's flight depends on it.

    make_key: gives X25519 public keys.  hybrid: with the X25519MLKEM768 share; without it the record fits one segment.
    """
    grease = [byte & 0xF0 | 0x0A for byte in entropy(5)]
    if grease[4] == grease[3]:
        grease[4] ^= 0x10                      # the first and the last extension differ
    suites, groups, versions, first, last = (bytes((byte, byte)) for byte in grease)
    shares = groups + b"\0\1\0"
    if hybrid:
        shares += _share(GROUP_HYBRID, make_mlkem_key(entropy) + make_key())
    shares += _share(GROUP_X25519, make_key())
    encoded = name.encode()
    ech = b"\0\0\1\0\1" + entropy(1) + b"\0\x20" + make_key() + _block(2, entropy(_ECH_SIZES[entropy(1)[0] & 3]))
    middle = [*_PROBE_FIXED, (_EXT_NAME, _block(2, b"\0" + _block(2, encoded))), (_EXT_SHARES, _block(2, shares)), (0xFE0D, ech),
              (0x000A, _block(2, groups + (b"\x11\xec" if hybrid else b"") + b"\0\x1d\0\x17\0\x18")),
              (_EXT_VERSIONS, _block(1, versions + b"\3\4\3\3"))]
    middle.sort(key=lambda _: entropy(4))      # a shuffle
    extensions = first + b"\0\0" + b"".join(_extension(kind, body) for kind, body in middle) + last + b"\0\1\0"
    body = b"\3\3" + entropy(32) + _block(1, entropy(32)) + _block(2, suites + _PROBE_SUITES) + b"\1\0"
    missing = HELLO_MIN - len(body) - len(extensions) - 6
    if missing > 0:                            # clients pad short hellos
        extensions += _extension(_EXT_PADDING, bytes(max(0, missing - 4)))
    body += _block(2, extensions)
    return b"\x16\3\1" + _block(2, b"\1" + _block(3, body))


def _block(width: int, body: bytes) -> bytes:
    """`body` behind its length of `width` bytes."""
    return len(body).to_bytes(width, "big") + body


def _extension(kind: int, body: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(body)) + body


def _share(group: int, key: bytes) -> bytes:
    return group.to_bytes(2, "big") + _block(2, key)


def _no_tls13() -> WireError:
    """A server that is no front for us, whatever it speaks."""
    return WireError(Reason.BAD_RECORD, "no TLS 1.3")


def parse_server_hello(message: bytes) -> ServerHello:
    """Return what a handshake message says that has to be a ServerHello and nothing more.  Raises WireError."""
    try:
        cursor = _Cursor(message, 0, len(message))
        kind, body = cursor.number(1), cursor.inner(3)
        version, random = body.data[body.skip(2):body.at], body.data[body.skip(32):body.at]
        session_id, suite, compression = body.inner(1).rest(), body.number(2), body.number(1)
        listed, extensions = body.inner(2), []
        while listed:
            extensions.append((listed.number(2), listed.inner(2).rest()))
    except WireError as error:
        raise _no_tls13() from error
    if kind != 2 or cursor or body or len(session_id) > 32:
        raise _no_tls13()
    return ServerHello(version, random, session_id, suite, compression, tuple(extensions))


def profile_of(hello: ServerHello) -> FrontProfile:
    """Return suite, group and order of a genuine TLS 1.3 answer, without flights.  Raises WireError with the reason (tls-front.md 9.2)."""
    kinds, found = [kind for kind, _ in hello.extensions], dict(hello.extensions)
    if hello.random == _RETRY_RANDOM:          # clients of Telegram do not answer a retry: nothing we could imitate
        raise WireError(Reason.BAD_RECORD, "hello retry")
    share = found.get(_EXT_SHARES, b"")
    group = int.from_bytes(share[:2], "big")
    if (found.get(_EXT_VERSIONS) != b"\3\4" or hello.suite not in _SUITES or hello.version != b"\3\3" or hello.compression
            or len(found) != len(kinds) or share[2:4] != _ANSWER_SIZE.get(group, 0).to_bytes(2, "big") or group not in _ANSWER_SIZE
            or len(share) != 4 + _ANSWER_SIZE[group]):
        raise _no_tls13()
    return FrontProfile((), hello.suite, group, tuple(kind for kind in kinds if kind in (_EXT_VERSIONS, _EXT_SHARES)))


class FlightReader:
    """Measures a server's answer to build_probe_hello: ServerHello, then how many encrypted bytes follow.

    feed() takes any cut of the stream and raises WireError, once the answer cannot be used, with `alert <n>`, `hello retry` or
    `no TLS 1.3`.  It keeps at most one record.
    """

    __slots__ = ("_data", "_seen", "hello", "flight")

    def __init__(self) -> None:
        self._data = bytearray()
        self._seen = 0
        self.hello: ServerHello | None = None
        self.flight = 0              # bytes of application-data records, complete ones

    @property
    def heard(self) -> bool:
        """True when anything arrived at all."""
        return bool(self._seen or self._data)

    @property
    def mid_record(self) -> bool:
        """True while a record is cut."""
        return bool(self._data)

    def feed(self, data: Bytes) -> None:
        """Take what arrived."""
        self._data += data
        at, box = 0, self._data
        while len(box) - at >= RECORD_HEADER:
            kind, version, length = _HEADER.unpack_from(box, at)
            if version not in (0x0301, 0x0303) or length > RECORD_IN_MAX or self._seen + RECORD_HEADER + length > _FLIGHT_IN_MAX:
                raise _no_tls13()
            if len(box) - at - RECORD_HEADER < length:
                break
            self._seen += RECORD_HEADER + length
            at += RECORD_HEADER
            self._take(kind, bytes(box[at:at + length]))
            at += length
        del box[:at]

    def _take(self, kind: int, body: bytes) -> None:
        if kind == _ALERT and len(body) == 2:
            raise WireError(Reason.BAD_RECORD, f"alert {body[1]}")
        if kind == _HANDSHAKE and self.hello is None:
            hello = parse_server_hello(body)
            profile_of(hello)
            self.hello = hello
        elif kind == _APPLICATION and self.hello is not None:
            self.flight += len(body)
        elif kind != _CCS[0] or self.hello is None:
            raise _no_tls13()


# -- the file of a profile, which telemt 3.2.1 can read (tls-front.md 2.1, 9.5)

def is_front_name(domain: str) -> bool:
    """True if a profile of `domain` may be kept in a file; such a name leads nowhere else."""
    return re.fullmatch(r"[A-Za-z0-9.-]{1,255}", domain) is not None


def build_front_file(domain: str, profile: FrontProfile, hello: ServerHello) -> bytes:
    """Return the text of the cache file: `profile` for us, the rest for telemt 3.2.1."""
    import json  # 0.4 MB that a proxy without a front does not need
    size = max(profile.flights)
    template = {
        "version": list(hello.version), "random": [0] * 32, "session_id": list(hello.session_id),
        "cipher_suite": list(hello.suite.to_bytes(2, "big")), "compression": hello.compression,
        "extensions": [{"ext_type": kind, "data": list(data)} for kind, data in hello.extensions],
    }
    return json.dumps({
        "server_hello_template": template, "cert_info": None, "cert_payload": None, "app_data_records_sizes": [size],
        "total_app_data_len": max(size, 1024), "domain": domain,
        "profile": {"v": 1, "suite": profile.suite, "group": profile.group, "order": list(profile.order),
                    "flights": list(profile.flights), "fetched_at": int(profile.fetched_wall),
                    "host": profile.host, **({"plain": list(profile.plain)} if profile.plain else {})},
    }, indent=2).encode()


def parse_front_file(data: bytes, written_wall: float) -> tuple[str, FrontProfile]:
    """Return (domain, profile) of a cache file, ours or of telemt 3.2.1.  written_wall: its mtime.

    Raises ValueError for anything that is neither.
    """
    import json
    if len(data) > FRONT_FILE_MAX:
        raise ValueError("too large")
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    domain, sizes = _expect(str, document, "domain"), _numbers(document, "app_data_records_sizes", _FLIGHT_IN_MAX, 64)
    _expect(int, document, "total_app_data_len")
    template = _expect(dict, document, "server_hello_template")
    hello = ServerHello(bytes(_numbers(template, "version", 255, 2)), bytes(_numbers(template, "random", 255, 32)),
                        bytes(_numbers(template, "session_id", 255, 32)),
                        int.from_bytes(bytes(_numbers(template, "cipher_suite", 255, 2)), "big"), _expect(int, template, "compression"),
                        tuple((_expect(int, entry, "ext_type"), bytes(_numbers(entry, "data", 255, 0xFFFF)))
                              for entry in _expect(list, template, "extensions")))
    payload = document.get("cert_payload")
    message = _numbers(payload, "certificate_message", 255, FRONT_FILE_MAX) if payload is not None else ()
    with contextlib.suppress(ValueError):      # not valid: only what 3.2.1 knows counts
        return domain, _parse_profile(document)
    try:
        looks = profile_of(hello)
    except WireError:
        looks = FrontProfile(())
    flight = max(sum(sizes), len(message) + _CERT_EXTRA if message else 0)
    return domain, looks._replace(flights=(flight,), fetched_wall=written_wall, source="file")


def _parse_profile(document: Any) -> FrontProfile:
    entry = _expect(dict, document, "profile")
    group = _expect(int, entry, "group") if "group" in entry else GROUP_X25519
    suite, order = _expect(int, entry, "suite"), _numbers(entry, "order", 0xFFFF, 2)
    flights, fetched_at = _numbers(entry, "flights", _FLIGHT_IN_MAX, FRONT_SAMPLES), _expect(int, entry, "fetched_at")
    if _expect(int, entry, "v") != 1 or suite not in _SUITES or group not in _ANSWER_SIZE or not flights or fetched_at < 0:
        raise ValueError("not a profile")
    if sorted(order) != [_EXT_VERSIONS, _EXT_SHARES] or fetched_at > 1 << 40:
        raise ValueError("not a profile")
    plain = _numbers(entry, "plain", _FLIGHT_IN_MAX, FRONT_SAMPLES) if "plain" in entry else ()
    host = _expect(str, entry, "host") if "host" in entry else ""
    return FrontProfile(flights, suite, group, order, float(fetched_at), "file", plain, host)


def _expect(kind: type[_T], table: Any, name: str) -> _T:
    """`table[name]`, which has to be there and of that type.  Raises ValueError."""
    value = table.get(name) if isinstance(table, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is missing or of the wrong type")
    return value


def _numbers(table: Any, name: str, high: int, most: int) -> tuple[int, ...]:
    """A list of at most `most` integers in 0..high.  Raises ValueError."""
    values = _expect(list, table, name)
    if len(values) > most or not all(isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= high for value in values):
        raise ValueError(f"{name} is not a list of at most {most} integers up to {high}")
    return tuple(values)


_HEADER: Final = struct.Struct(">BHH")           # type, version, length
_EXTENSION: Final = struct.Struct(">HH")         # type, length


# == 8. neighbours ===========================================================
# The small protocols of whoever stands next to us.
#
# PROXY protocol: one header in front of a connection that says who the client
# of a load balancer is.  We read it on our listeners and write it to a mask
# host.  Version 1 is a line of text, version 2 binary with a length:
#
#   PROXY TCP4 192.0.2.1 203.0.113.9 12345 443 CR LF          (at most 107 bytes)
#   0D 0A 0D 0A 00 0D 0A 51 55 49 54 0A | 2c | family | u16 n | addresses, TLVs
#
# Trap: n may be 65,535 bytes of TLVs; they are skipped, so a header never costs
# more memory than its addresses.
#
# SOCKS: a dialogue is a generator that yields what to send and how many bytes to
# read next, and returns the bound address.  It never asks for a byte too many:
# a server may send its last reply and the first bytes of the data centre in one
# segment, and what we do not read stays in the kernel for the relay.
# Trap: a refusal of SOCKS5 is judged after four bytes, some servers send no more.
#
# STUN: a server tells which address the world sees.  Anybody can answer a
# datagram, so only an answer with our cookie and transaction id counts.
#
# Source: client-protocol.md 3, 11.1 and D4; haproxy.org proxy-protocol.txt;
# upstream-and-relay.md 3.3, 4.4, 7.6, D13, D20; RFC 1928, 1929, 5389.

PROXY_HEAD_MAX: Final = 107              # longest line of version 1; version 2 says all we use in its first 52 bytes
_PROXY_V1: Final = b"PROXY "
_PROXY_V2: Final = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED: Final = struct.Struct(">12sBBH")      # signature, version and command, family, length of the rest
_V2_ADDRESSES: Final = {4: struct.Struct(">4s4sHH"), 6: struct.Struct(">16s16sHH")}
_V2_FAMILIES: Final = {1: 4, 2: 6}               # high nibble of the family byte -> IP version

Address: TypeAlias = "tuple[str, int]"           # IP without brackets, port


class ProxyHeader(NamedTuple):
    """What a PROXY header says; without addresses (a health check, an unknown family) the ends of the TCP connection hold."""

    version: int
    size: int                            # bytes of the whole header, TLVs included: they need not have arrived
    source: Address | None = None        # the client
    destination: Address | None = None   # where it connected to


def parse_proxy_header(head: bytes) -> ProxyHeader | None:
    """Return the PROXY header that `head` begins with, or None while it may still become one.

    No more than PROXY_HEAD_MAX bytes are looked at.  Raises WireError(PROXY_INVALID) as soon as it cannot be one.
    """
    if head.startswith(_PROXY_V1):
        return _parse_proxy_line(head)
    if head.startswith(_PROXY_V2):
        return _parse_proxy_block(head)
    if _PROXY_V1.startswith(head) or _PROXY_V2.startswith(head):
        return None
    raise WireError(Reason.PROXY_INVALID)


def _parse_proxy_line(head: bytes) -> ProxyHeader | None:
    end = head.find(b"\r\n", 0, PROXY_HEAD_MAX)
    if end < 0:
        if len(head) >= PROXY_HEAD_MAX:
            raise WireError(Reason.PROXY_INVALID)
        return None
    line = head[len(_PROXY_V1):end]
    if line == b"UNKNOWN" or line.startswith(b"UNKNOWN "):
        return ProxyHeader(1, end + 2)
    if not line.isascii():
        raise WireError(Reason.PROXY_INVALID)
    words = line.decode("ascii").split(" ")
    if len(words) != 5 or words[0] not in ("TCP4", "TCP6"):
        raise WireError(Reason.PROXY_INVALID)
    ports = [parse_port(word) for word in words[3:]]
    addresses = [parse_ip(word) for word in words[1:3]]
    if any(ip is None or ip.version != int(words[0][3]) for ip in addresses):
        raise WireError(Reason.PROXY_INVALID)
    if ports[0] is None or ports[1] is None:
        raise WireError(Reason.PROXY_INVALID)
    return ProxyHeader(1, end + 2, (_unmapped(addresses[0]), ports[0]), (_unmapped(addresses[1]), ports[1]))


def _parse_proxy_block(head: bytes) -> ProxyHeader | None:
    if len(head) < _V2_FIXED.size:
        return None
    _, command, family, length = _V2_FIXED.unpack_from(head)
    if command not in (0x20, 0x21):
        raise WireError(Reason.PROXY_INVALID)
    size = _V2_FIXED.size + length
    if command == 0x20 or family >> 4 == 0:        # LOCAL: the balancer speaks for itself; or a family it cannot name
        return ProxyHeader(2, size)
    layout = _V2_ADDRESSES.get(_V2_FAMILIES.get(family >> 4, 0))
    if layout is None or length < layout.size:
        raise WireError(Reason.PROXY_INVALID)
    if len(head) < _V2_FIXED.size + layout.size:
        return None
    source, destination, source_port, destination_port = layout.unpack_from(head, _V2_FIXED.size)
    return ProxyHeader(2, size, (_unmapped(ipaddress.ip_address(source)), source_port),
                       (_unmapped(ipaddress.ip_address(destination)), destination_port))


def _unmapped(address: IpAddress | None) -> str:
    """Text of an address, an IPv4-mapped one as IPv4."""
    return str(getattr(address, "ipv4_mapped", None) or address)


def build_proxy_header(version: int, source: Address | None, destination: Address | None) -> bytes:
    """Return the header that tells a mask host who the client is; a pair of mixed families, or none, is `unknown`.

    version: 1 or 2 (client-protocol.md 11.1 step 5).
    """
    families = {6 if ":" in end[0] else 4 for end in (source, destination) if end is not None}
    if source is None or destination is None or len(families) != 1:
        return b"PROXY UNKNOWN\r\n" if version == 1 else _V2_FIXED.pack(_PROXY_V2, 0x20, 0, 0)
    family = families.pop()
    if version == 1:
        return f"PROXY TCP{family} {source[0]} {destination[0]} {source[1]} {destination[1]}\r\n".encode()
    layout = _V2_ADDRESSES[family]
    ends = [ipaddress.ip_address(end[0]).packed for end in (source, destination)]
    return (_V2_FIXED.pack(_PROXY_V2, 0x21, 0x11 if family == 4 else 0x21, layout.size)
            + layout.pack(*ends, source[1], destination[1]))


# -- who is not public, SOCKS and STUN

Dialogue: TypeAlias = "Generator[tuple[bytes, int], bytes, Address]"

STUN_COOKIE: Final = 0x2112A442
STUN_ID_SIZE: Final = 12
STUN_MAX: Final = 2048                         # a longer datagram is cut, and then refused
STUN_TCP_MAX: Final = 20 + 1024                # of an answer over TCP: header and body
_STUN_HEADER: Final = struct.Struct(">HHI12s")
_STUN_REQUEST: Final = 0x0001
_STUN_SUCCESS: Final = 0x0101
_MAPPED_ADDRESS: Final = 0x0001
_XOR_MAPPED_ADDRESS: Final = 0x0020
_SOCKS4_GRANTED: Final = 90
_LOGIN_MAX: Final = 255                        # a length byte
_ADDRESS_SIZES: Final = {1: 4, 4: 16}          # SOCKS5 ATYP -> size of the address

# -- SOCKS

def _refused(text: str) -> RouteError:
    return RouteError(f"Proxy error: {text}")


def socks4_user(user_id: str | None) -> bytes:
    """Return the user id as it goes on the wire.  Raises RouteError (hard) for one that would end early."""
    user = (user_id or "").encode()
    if b"\0" in user:
        raise RouteError("Config error: SOCKS4 user id contains a NUL byte", hard=True)
    return user


def socks5_login(username: str | None, password: str | None) -> tuple[bytes, bytes | None] | None:
    """Return (user, password) as they go on the wire, or None if the login method is not to be offered.  Raises RouteError (hard)."""
    if username is None:
        return None
    user, secret = username.encode(), None if password is None else password.encode()
    if len(user) > _LOGIN_MAX or len(secret or b"") > _LOGIN_MAX:
        raise RouteError("Config error: SOCKS5 username or password is longer than 255 bytes", hard=True)
    return user, secret


def socks4_dialogue(target: Address, user: bytes) -> Dialogue:
    """CONNECT by SOCKS4; returns the bound address.  Raises RouteError."""
    ip = ipaddress.ip_address(target[0])
    if ip.version != 4:
        raise _refused("SOCKS4 does not support IPv6")
    reply = yield struct.pack(">BBH4s", 4, 1, target[1], ip.packed) + user + b"\0", 8
    if reply[1] != _SOCKS4_GRANTED:            # byte 0 is 0 by the book and 4 in the wild
        raise _refused(f"SOCKS4 request rejected: code {reply[1]}")
    return str(ipaddress.IPv4Address(reply[4:8])), int.from_bytes(reply[2:4], "big")


def socks5_dialogue(target: Address, login: tuple[bytes, bytes | None] | None) -> Dialogue:
    """CONNECT by SOCKS5, with the login if the server asks for it; returns the bound address.  Raises RouteError."""
    version, method = yield (b"\5\1\0" if login is None else b"\5\2\0\2"), 2
    if version != 5:
        raise _refused("Invalid SOCKS5 version")
    if method == 2:
        if login is None or login[1] is None:
            raise _refused("SOCKS5 server requires authentication")
        user, password = login[0], login[1]
        _, status = yield b"\1" + bytes([len(user)]) + user + bytes([len(password)]) + password, 2
        if status:
            raise _refused("SOCKS5 authentication failed")
    elif method:
        raise _refused("Unsupported SOCKS5 auth method")
    packed = ipaddress.ip_address(target[0]).packed
    kind = 1 if len(packed) == 4 else 4
    _, code, _, kind = yield b"\5\1\0" + bytes([kind]) + packed + target[1].to_bytes(2, "big"), 4
    if code:
        raise _refused(f"SOCKS5 request failed: code {code}")
    if kind == 3:                              # a name: nobody can use it
        size = (yield b"", 1)[0]
        return "0.0.0.0", int.from_bytes((yield b"", size + 2)[-2:], "big")
    if kind not in _ADDRESS_SIZES:
        raise _refused("Invalid address type in SOCKS5 response")
    bound = yield b"", _ADDRESS_SIZES[kind] + 2
    return str(ipaddress.ip_address(bound[:-2])), int.from_bytes(bound[-2:], "big")


# -- STUN

def build_stun_request(transaction_id: bytes) -> bytes:
    """Binding request without attributes, 20 bytes."""
    return _STUN_HEADER.pack(_STUN_REQUEST, 0, STUN_COOKIE, transaction_id)


def stun_size(header: bytes) -> int:
    """Size of the whole message that begins with these 20 bytes of a TCP stream."""
    return _STUN_HEADER.size + int.from_bytes(header[2:4], "big")


def parse_stun_response(data: bytes, transaction_id: bytes, version: int) -> Address | None:
    """Return our address and port as the server saw them, of IP `version`; None for anything but a usable answer to our request."""
    if len(data) < _STUN_HEADER.size:
        return None
    kind, length, cookie, echoed = _STUN_HEADER.unpack_from(data)
    end = _STUN_HEADER.size + length
    if kind != _STUN_SUCCESS or cookie != STUN_COOKIE or echoed != transaction_id or length % 4 or end > len(data):
        return None
    plain, at = None, _STUN_HEADER.size
    while at + 4 <= end:
        kind, size = struct.unpack_from(">HH", data, at)
        if at + 4 + size > end:
            break
        found = _stun_address(data[at + 4:at + 4 + size], data[4:20] if kind == _XOR_MAPPED_ADDRESS else bytes(16), version)
        if found is not None and kind == _XOR_MAPPED_ADDRESS:
            return found
        if found is not None and kind == _MAPPED_ADDRESS and plain is None:
            plain = found                      # routers rewrite it on the way, so the other kind is better
        at += 4 + (size + 3 & ~3)
    return plain


def _stun_address(value: bytes, mask: bytes, version: int) -> Address | None:
    """Read an address attribute; `mask` (16 bytes) is XORed over it."""
    size = 4 if version == 4 else 16
    if len(value) < 4 + size or value[1] != (1 if version == 4 else 2):
        return None
    ip = bytes(a ^ b for a, b in zip(value[4:4 + size], mask, strict=False))
    return str(ipaddress.ip_address(ip)), int.from_bytes(value[2:4], "big") ^ int.from_bytes(mask[:2], "big")


# == 9. rpc ==================================================================
# The protocol of a link to Telegram's middle end ("middle proxy").  We are its
# RPC client.  A link starts in clear (nonces), then both directions are one
# AES-256-CBC chain each.  A frame is
#
#   length u32 | seqno i32 | payload | checksum u32
#
# length counts everything; a word of 4 where a length belongs is padding.
# Sequence numbers start at -2 in each direction: nonce, handshake, then 0, 1, 2.
# Everything is little-endian, addresses inside the KDF even reversed.
#
# Decryption works on whole reads and parsing on the decrypted run: FrameReader
# returns places of payloads, not payloads.  Checksums are zlib's CRC-32, which
# the link asks for; CRC-32C (flag 0x800) is offered only where a native one is
# at hand, because in Python it takes 0.1 us a byte (D5).
# Traps: the handshake reply and the first frames may share a block; a frame may
# start in any word; the key buffer takes the client's time, not the server's.
# Source: middle-proxy-wire.md; `Dn` there is its section 16.

RPC_NONCE: Final = 0x7ACB87AA
RPC_HANDSHAKE: Final = 0x7682EEF5
RPC_HANDSHAKE_ERROR: Final = 0x6A27BEDA
RPC_PROXY_REQ: Final = 0x36CEF1EE
RPC_PROXY_ANS: Final = 0x4403DA0D
RPC_SIMPLE_ACK: Final = 0x3BAC409B
RPC_CLOSE_EXT: Final = 0x5EB634A2
RPC_CLOSE_CONN: Final = 0x1FCF425D
RPC_PING: Final = 0x5730A2DF
RPC_PONG: Final = 0x8430EAA7
RPC_FRAME_MIN: Final = 12
RPC_FRAME_MAX: Final = 1 << 24
ANSWER_HEAD: Final = 16                  # type, flags, conn id in front of an answer's data
CLIENT_FRAME_MAX: Final = RPC_FRAME_MAX - 96     # header with tag, data and checksum must fit a frame (D10)
FLAG_CRC32C: Final = 0x800
FLAG_PLAIN: Final = 0x2                  # of PROXY_REQ: the message is not encrypted
FLAG_TAG: Final = 0x8
FLAG_QUICK_ACK: Final = 0x8000_0000
FLAGS_OF: Final = {"abridged": 0x4002_1000, "intermediate": 0x2002_1000, "secure": 0x2802_1000}      # by Framing.name
SECRET_MIN: Final = 32
LIST_ENDPOINTS_MAX: Final = 128          # of a list: Telegram's have about thirty, and each one gets a link or three
LIST_DIRECTIVES_MAX: Final = 2048        # that are looked at: 13 ms; a megabyte of them would stop everybody for a third of a second
_AD_TAG: Final = bytes.fromhex("18000000 ae261edb 10")
_SCHEMA_AES: Final = 1
_SKEW_MAX_S: Final = 30
_SHAKE_MAX: Final = 4096                 # bytes of a frame before we know who talks; it has 44
_PAD_WORD: Final = b"\4\0\0\0"
_PADS: Final = tuple(_PAD_WORD * count for count in range(4))
_NO_KEY: Final = bytes(8)                # auth_key_id of an unencrypted message
_FRAME_HEAD: Final = struct.Struct("<Ii")
_NONCE_BODY: Final = struct.Struct("<IIII16s")
_SHAKE_BODY: Final = struct.Struct("<II12s12s")
_PID: Final = struct.Struct("<IHHI")
_TWO_WORDS: Final = struct.Struct("<II")
_CONN: Final = struct.Struct("<IQ")
_MAPPED_V4: Final = bytes(10) + b"\xff\xff"

Checksum: TypeAlias = "Callable[[Bytes, int], int]"      # data, value so far
Message: TypeAlias = "tuple[bytes, bytes]"               # payload of a frame in two halves: joining them would copy what a client sent


class RpcError(WireError):
    """A middle end broke the protocol; costs the link.  kind: length, crc, seq, handshake, rejected."""

    def __init__(self, kind: str, text: str, code: int = 0) -> None:
        super().__init__(Reason.BAD_RPC, text)
        self.kind, self.code = kind, code      # code of a refused handshake


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ 0x82F6_3B78 * (byte & 1)
        table.append(byte)
    return tuple(table)


def crc32c(data: Bytes, value: int = 0) -> int:
    """Return CRC-32C (Castagnoli) of `data`, continuing from `value`; 0.1 us a byte."""
    table, value = _crc32c_table(), value ^ 0xFFFF_FFFF
    for byte in memoryview(data):
        value = value >> 8 ^ table[(value ^ byte) & 0xFF]
    return value ^ 0xFFFF_FFFF


class FrameWriter:
    """Outgoing frames; sequence numbers and checksums are given when a frame is serialised (D16)."""

    __slots__ = ("seq", "checksum")

    def __init__(self, seq: int = -2, checksum: Checksum = binascii.crc32) -> None:
        self.seq, self.checksum = seq, checksum

    def add(self, out: list[bytes], queue: collections.deque[Message], room: int) -> int:
        """Move messages from `queue` to `out`, as frames, until they fill `room` bytes; return the bytes that were added."""
        checksum, pack, pack_sum, take = self.checksum, _FRAME_HEAD.pack, _LE32.pack, queue.popleft
        seq, added = self.seq, 0
        while queue and added < room:
            head, body = take()
            size = len(head) + len(body) + RPC_FRAME_MIN
            front = pack(size, seq) + head
            seq = seq + 1 if seq != 0x7FFF_FFFF else -0x8000_0000
            out += (front, body, pack_sum(checksum(body, checksum(front, 0))))
            added += size
        self.seq = seq
        return added

    def frame(self, payload: bytes) -> bytes:
        """One frame, without padding."""
        out: list[bytes] = []
        self.add(out, collections.deque([(payload, b"")]), RPC_FRAME_MAX)
        return b"".join(out)


def padding(size: int) -> bytes:
    """Padding words that bring `size` bytes, a multiple of 4, to whole blocks."""
    return _PADS[-size % BLOCK_SIZE >> 2]


class FrameReader:
    """Incoming frames of a decrypted stream."""

    __slots__ = ("seq", "checksum", "failed", "needs", "steps")

    def __init__(self, seq: int = 0, checksum: Checksum = binascii.crc32) -> None:
        self.seq, self.checksum = seq, checksum
        self.failed: RpcError | None = None    # why no further frame is looked at
        self.needs = 0                         # bytes of the incomplete frame that spans() stopped at, 0 = not known yet
        self.steps = 0                         # frames and padding words that spans() has just found: what they cost, not what they weigh

    def spans(self, view: memoryview, at: int, end: int) -> tuple[list[tuple[int, int]], int]:
        """Return ([(start, size) of each payload in view[at:end]], where the incomplete rest begins).

        After a fault `failed` is set and the good frames before it are returned.
        """
        found: list[tuple[int, int]] = []
        unpack, checksum, word = _FRAME_HEAD.unpack_from, self.checksum, _LE32.unpack_from
        seq, self.needs, words = self.seq, 0, 0
        while end - at >= 8:                   # both words: nothing shorter is a frame
            length, got = unpack(view, at)
            if length == 4:
                at += 4
                words += 1
                continue
            if length < RPC_FRAME_MIN or length > RPC_FRAME_MAX or length & 3:
                self.failed = RpcError("length", f"Bad RPC frame length: {length}")
                break
            tail = at + length - 4
            if tail > end - 4:
                self.needs = length
                break
            computed, received = checksum(view[at:tail], 0), word(view, tail)[0]
            if computed != received:
                self.failed = RpcError("crc", f"CRC mismatch: 0x{received:08x} vs 0x{computed:08x}")
                break
            if got != seq:
                self.failed = RpcError("seq", f"Expected seq={seq}, got {got}")
                break
            seq = seq + 1 if seq != 0x7FFF_FFFF else -0x8000_0000
            found.append((at + 8, length - RPC_FRAME_MIN))
            at = tail + 4
        if end - at >= 4 and self.failed is None and word(view, at)[0] == 4:       # padding at the very end
            at += 4
        self.seq, self.steps = seq, words + len(found)
        return found, at


# -- keys

class ProxySecret(NamedTuple):
    """What getProxySecret returned; not the secret of a user."""

    data: bytes

    @property
    def selector(self) -> int:
        """Its first four bytes name it on the wire."""
        return int.from_bytes(self.data[:4], "little") if len(self.data) >= 4 else 0


def check_secret_size(size: int, limit: int) -> None:
    """Raise WireError unless a proxy-secret of `size` bytes may be used."""
    text = ""
    if limit < SECRET_MIN:
        text = f"proxy-secret max length is invalid: {limit} bytes (must be >= {SECRET_MIN})"
    elif size < SECRET_MIN:
        text = f"proxy-secret too short: {size} bytes (need >= {SECRET_MIN})"
    elif size > limit:
        text = f"proxy-secret too long: {size} bytes (limit = {limit})"
    if text:
        raise WireError(Reason.BAD_RPC, f"Proxy error: {text}")


class LinkEnds(NamedTuple):
    """Both addresses of a link as the middle end sees them."""

    client_ip: str
    client_port: int
    server_ip: str
    server_port: int
    compat: bool = False         # SOCKS gave no usable address and me_socks_kdf_policy let that pass


_STRICT_TEXT: Final = "SOCKS route returned no valid BND tuple for ME KDF (strict policy)"
_MIXED_TEXT: Final = "mixed IPv4/IPv6 endpoints are not supported for ME key derivation"


def choose_link_ends(endpoint: tuple[str, int], local: tuple[str, int], *, socks: bool = False, bound: tuple[str, int] | None = None,
                     nat_ip: str = "", detected: str = "", strict: bool = True) -> LinkEnds:
    """Which addresses enter the key derivation (middle-proxy-wire.md D4).

    local: of our socket.  bound: what a SOCKS server said it sends from.  nat_ip, detected: configured and discovered public
    address of the endpoint's family, empty = none.  Raises RouteError.
    """
    v6 = ":" in endpoint[0]
    private = is_bogon(endpoint[0])
    compat = False
    if socks:
        if bound is not None and (":" in bound[0]) == v6 and bound[1] and bound[0] not in ("0.0.0.0", "::") \
                and (private or not is_bogon(bound[0])):
            return LinkEnds(*bound, *endpoint)
        if strict:
            raise RouteError(_STRICT_TEXT)
        compat = True
    ip = nat_ip or (local[0] if not is_bogon(local[0]) or private else detected or local[0])
    if (":" in ip) != v6:
        raise RouteError(_MIXED_TEXT)
    return LinkEnds(ip, local[1], *endpoint, compat)


def our_address(local_ip: str, nat_ip: str, detected: str) -> str:
    """The address of ours that PROXY_REQ carries; arguments as for choose_link_ends (D4)."""
    return nat_ip or (detected if detected and is_bogon(local_ip) else local_ip)


def pack_ip(ip: str) -> bytes:
    """The 4 or 16 bytes of an address, network order; IPv4-mapped counts as IPv4."""
    address = ipaddress.ip_address(ip)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).packed


def _reversed_v4(packed: bytes) -> bytes:
    """Octets of an IPv4 address as a little-endian word; zero for IPv6."""
    return packed[::-1] if len(packed) == 4 else bytes(4)


def key_material(purpose: bytes, server_nonce: bytes, client_nonce: bytes, client_ts: int, ends: LinkEnds, secret: bytes) -> bytes:
    """The buffer that keys are digests of (middle-proxy-wire.md 5.3); purpose: CLIENT for our writes, SERVER for our reads."""
    client, server = pack_ip(ends.client_ip), pack_ip(ends.server_ip)
    parts = [server_nonce, client_nonce, _LE32.pack(client_ts), _reversed_v4(server), ends.client_port.to_bytes(2, "little"),
             purpose, _reversed_v4(client), ends.server_port.to_bytes(2, "little"), secret, server_nonce]
    if len(client) == 16:
        parts += [client, server]
    return b"".join((*parts, client_nonce))


def derive_link_key(material: bytes) -> tuple[bytes, bytes]:
    """Return (key of 32 bytes, IV of 16) for one direction."""
    md5, sha1 = (functools.partial(make, usedforsecurity=False) for make in (hashlib.md5, hashlib.sha1))
    return md5(material[1:]).digest()[:12] + sha1(material).digest(), md5(material[2:]).digest()


# -- the handshake

class Origin(NamedTuple):
    """What a process brings to every handshake."""

    backend: Backend
    entropy: Entropy
    pid: int
    start_wall: int                              # unix seconds
    native_crc32c: Checksum | None = None        # offered if there is one


class LinkHandshake:
    """Client side of nonce and handshake exchange.  open(), then feed() until `done`; both return bytes to send."""

    __slots__ = ("origin", "secret", "ends", "client_ts", "nonce", "keyed", "done", "checksum", "encryptor", "decryptor", "_raw", "_plain")

    def __init__(self, origin: Origin, secret: ProxySecret, ends: LinkEnds, now_wall: int) -> None:
        self.origin, self.secret, self.ends = origin, secret, ends
        self.client_ts = now_wall
        self.nonce = origin.entropy(16)
        self.keyed = False                     # the server's nonce came: the second half has its own deadline
        self.done = False
        self.checksum: Checksum = binascii.crc32   # of both directions once done
        self.encryptor: AesCbc | None = None   # both go on from here, one chain for the life of the link
        self.decryptor: AesCbc | None = None
        self._raw = bytearray()                # as received: in clear, then ciphertext short of a block
        self._plain = bytearray()

    def open(self) -> bytes:
        """The first frame."""
        return FrameWriter(-2).frame(_NONCE_BODY.pack(RPC_NONCE, self.secret.selector, _SCHEMA_AES, self.client_ts, self.nonce))

    def feed(self, data: Bytes) -> bytes:
        """Take what the server sent; return what to answer.  Raises RpcError."""
        self._raw += data
        reply = b""
        if not self.keyed:
            reply = self._read_nonce()
        if self.keyed and not self.done:
            self._read_reply()
        return reply

    def take_rest(self) -> tuple[bytes, bytes]:
        """What came behind the handshake: (decrypted, not decrypted yet because it is no whole block)."""
        rest = bytes(self._plain), bytes(self._raw)
        self._plain.clear()
        self._raw.clear()
        return rest

    def _fail(self, text: str) -> RpcError:
        return RpcError("handshake", f"Invalid handshake: {text}")

    def _take_frame(self, buffer: bytearray, seq: int, names: tuple[str, str]) -> bytes | None:
        """Return the payload of the frame that `buffer` begins with, None while it is incomplete."""
        if len(buffer) < 4:
            return None
        length = _LE32.unpack_from(buffer)[0]
        if not RPC_FRAME_MIN <= length <= _SHAKE_MAX:
            raise self._fail(f"{names[0]}: {length}")
        if len(buffer) < length:
            return None
        frame = bytes(buffer[:length])
        del buffer[:length]
        computed, received = binascii.crc32(frame[:-4]), _LE32.unpack_from(frame, length - 4)[0]
        if computed != received:
            raise self._fail(f"{names[1]}: 0x{received:08x} vs 0x{computed:08x}")
        if (got := _FRAME_HEAD.unpack_from(frame)[1]) != seq:
            raise self._fail(f"Expected seq={seq}, got {got}")
        return frame[8:-4]

    def _read_nonce(self) -> bytes:
        payload = self._take_frame(self._raw, -2, ("Bad RPC frame length", "CRC mismatch"))
        if payload is None:
            return b""
        if len(payload) < _NONCE_BODY.size:
            raise self._fail(f"Nonce payload too short: {len(payload)} bytes")
        kind, selector, schema, server_ts, server_nonce = _NONCE_BODY.unpack_from(payload)
        if kind != RPC_NONCE:
            raise self._fail(f"Expected RPC_NONCE 0x{RPC_NONCE:08x}, got 0x{kind:08x}")
        if schema != _SCHEMA_AES:
            raise self._fail(f"Unsupported crypto schema: 0x{schema:x}")
        if selector != self.secret.selector:
            raise self._fail(f"Server key_select 0x{selector:08x} != client 0x{self.secret.selector:08x}")
        skew = abs(self.client_ts - server_ts)
        if skew > _SKEW_MAX_S:
            raise self._fail(f"nonce crypto_ts skew too large: client={self.client_ts}, server={server_ts}, skew={skew}s")
        self._make_keys(server_nonce)
        self.keyed = True
        return self._handshake()

    def _make_keys(self, server_nonce: bytes) -> None:
        """Set both ciphers from what the two nonces and the addresses give."""
        backend = self.origin.backend
        write, read = (derive_link_key(key_material(purpose, server_nonce, self.nonce, self.client_ts, self.ends, self.secret.data))
                       for purpose in (b"CLIENT", b"SERVER"))
        self.encryptor, self.decryptor = backend.cbc_encryptor(*write), backend.cbc_decryptor(*read)

    def _handshake(self) -> bytes:
        ends, origin = self.ends, self.origin
        flags = FLAG_CRC32C if origin.native_crc32c else 0
        ours = _reversed_v4(pack_ip(ends.client_ip)) + _PID.pack(0, ends.client_port, origin.pid & 0xFFFF, origin.start_wall)[4:]
        theirs = _reversed_v4(pack_ip(ends.server_ip)) + _PID.pack(0, ends.server_port, 0, 0)[4:]
        frame = FrameWriter(-1).frame(_SHAKE_BODY.pack(RPC_HANDSHAKE, flags, ours, theirs))
        assert self.encryptor is not None
        return self.encryptor.update(frame + padding(len(frame)))

    def _read_reply(self) -> None:
        whole = len(self._raw) & -BLOCK_SIZE
        if whole:
            assert self.decryptor is not None
            self._plain += self.decryptor.update(bytes(self._raw[:whole]))
            del self._raw[:whole]
        while self._plain[:4] == _PAD_WORD:
            del self._plain[:4]
        payload = self._take_frame(self._plain, -1, ("Bad HS response frame len", "HS CRC mismatch"))
        if payload is None:
            return
        if len(payload) < 4:
            raise self._fail("Handshake payload too short")
        kind = _LE32.unpack_from(payload)[0]
        if kind == RPC_HANDSHAKE_ERROR:
            code = int.from_bytes(payload[4:8], "little", signed=True) if len(payload) >= 8 else -1
            raise RpcError("rejected", f"Invalid handshake: ME rejected handshake (error={code})", code)
        if len(payload) != _SHAKE_BODY.size:
            raise self._fail(f"Bad handshake payload len: {len(payload)}")
        if kind != RPC_HANDSHAKE:
            raise self._fail(f"Expected HANDSHAKE 0x{RPC_HANDSHAKE:08x}, got 0x{kind:08x}")
        flags = _LE32.unpack_from(payload, 4)[0]
        if flags & 0xFF:
            raise self._fail(f"Unsupported handshake flags: 0x{flags:08x}")
        if flags & FLAG_CRC32C:
            if self.origin.native_crc32c is None:
                raise self._fail(f"Peer negotiated unsupported CRC flags: 0x{flags:08x}")
            self.checksum = self.origin.native_crc32c
        self.done = True


# -- requests

def _address(ip: str, port: int) -> bytes:
    packed = pack_ip(ip)
    return (packed if len(packed) == 16 else _MAPPED_V4 + packed) + _LE32.pack(port)


class RequestHead:
    """What stands in front of every message of one session: made once, two flags apart."""

    __slots__ = ("_flags", "_usual")

    def __init__(self, framing: str, conn_id: int, client: tuple[str, int], ours: tuple[str, int], ad_tag: bytes | None) -> None:
        self._flags = FLAGS_OF[framing] | (FLAG_TAG if ad_tag is not None else 0)
        extra = b"" if ad_tag is None else _AD_TAG + ad_tag + bytes(3)
        self._usual = b"".join((_TWO_WORDS.pack(RPC_PROXY_REQ, self._flags), conn_id.to_bytes(8, "little"), _address(*client),
                                _address(*ours), extra))

    def build(self, data: bytes, quick_ack: bool) -> bytes:
        """The RPC_PROXY_REQ up to where `data` follows."""
        plain = data.startswith(_NO_KEY)
        if not plain and not quick_ack:
            return self._usual
        flags = self._flags | (FLAG_QUICK_ACK if quick_ack else 0) | (FLAG_PLAIN if plain else 0)
        return _TWO_WORDS.pack(RPC_PROXY_REQ, flags) + self._usual[_TWO_WORDS.size:]


def build_close(conn_id: int) -> bytes:
    """RPC_CLOSE_CONN, the only close that goes this way (D12)."""
    return _CONN.pack(RPC_CLOSE_CONN, conn_id)


# -- the lists of middle ends

class ProxyList(NamedTuple):
    """What getProxyConfig or getProxyConfigV6 says."""

    endpoints: Mapping[int, tuple[tuple[str, int], ...]]       # signed DC -> (IP, port) in the order of the text
    default_dc: int | None
    lines: int                                   # accepted proxy_for lines, duplicates included
    cut: bool = False                            # it goes on behind the limits


def parse_proxy_config(text: str, family: int) -> ProxyList:
    """Read such a list; family: 4 or 6.  What does not parse is skipped (middle-proxy-wire.md D2), and what is too much."""
    endpoints: dict[int, list[tuple[str, int]]] = {}
    default_dc, lines, kept, cut = None, 0, 0, False
    directives = _directives(text)
    for words in itertools.islice(directives, LIST_DIRECTIVES_MAX):
        if words[0] == "default" and len(words) == 2 and default_dc is None:
            default_dc = _parse_dc(words[1])
        elif words[0] == "proxy_for" and len(words) == 3:
            dc, target = _parse_dc(words[1]), _parse_endpoint(words[2], family)
            if dc and target is not None:
                lines += 1
                known = endpoints.get(dc, [])
                if target in known:
                    continue
                if kept == LIST_ENDPOINTS_MAX:
                    cut = True
                    continue
                endpoints[dc] = [*known, target]
                kept += 1
    cut = cut or next(directives, None) is not None
    return ProxyList({dc: tuple(listed) for dc, listed in endpoints.items()}, default_dc, lines, cut)


def _directives(text: str) -> Iterator[list[str]]:
    """The words of each one."""
    for line in text.splitlines():
        yield from filter(None, map(str.split, line.partition("#")[0].split(";")))


def _parse_number(text: str) -> int | None:
    digits = text[1:] if text[:1] == "-" else text
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 10 else None


def _parse_dc(text: str) -> int | None:
    dc = _parse_number(text)
    return dc if dc is not None and -32768 <= dc <= 32767 else None


def _parse_endpoint(text: str, family: int) -> tuple[str, int] | None:
    host, _, digits = text.rpartition(":")
    port = _parse_number(digits)
    if host[:1] == "[" and host[-1:] == "]":
        host = host[1:-1]
    address = parse_ip(host)
    if address is None or port is None or not 0 < port < 65536 or address.version != family or "%" in host:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return None
    return str(address), port


_BUILTIN: Final = {
    4: """proxy_for 1 149.154.175.50:8888; proxy_for -1 149.154.175.50:8888; proxy_for 2 149.154.161.144:8888
          proxy_for -2 149.154.161.144:8888; proxy_for 3 149.154.175.100:8888; proxy_for -3 149.154.175.100:8888
          proxy_for 4 91.108.4.136:8888; proxy_for -4 149.154.165.109:8888
          proxy_for 5 91.108.56.183:8888; proxy_for -5 91.108.56.183:8888""",
    6: """proxy_for 1 [2001:b28:f23d:f001::d]:8888; proxy_for -1 [2001:b28:f23d:f001::d]:8888; proxy_for 2 [2001:67c:4e8:f002::d]:80
          proxy_for -2 [2001:67c:4e8:f002::d]:80; proxy_for 3 [2001:b28:f23d:f003::d]:8888; proxy_for -3 [2001:b28:f23d:f003::d]:8888
          proxy_for 4 [2001:67c:4e8:f004::d]:8888; proxy_for -4 [2001:67c:4e8:f004::d]:8888
          proxy_for 5 [2001:b28:f23f:f005::d]:8888; proxy_for -5 [2001:b28:f23f:f005::d]:8888"""}


def builtin_list(family: int) -> ProxyList:
    """What is used where no list can be had and no cache is left (middle-proxy-wire.md 2.3)."""
    return parse_proxy_config(_BUILTIN[family], family)


# == 10. stats ===============================================================
# Counters are plain integers that one thread adds to and any thread reads.
# A class that telemetry switched off stands still: an increment costs one test
# and one add, and nothing is added later for the time it was off (metrics.md 3, 8).
# What needs more than a plain integer goes out as a snapshot: a frozen value that
# the loop thread builds when the control plane asks (Sources), and then forgets.
# Source: metrics.md 3, 4, 8; api.md 9, 15.

DURATION_BOUNDS_MS: Final = (100, 500, 1000)
LEVELS: Final = ("silent", "normal", "debug")      # general.telemetry.me_level, by how much is counted
# Totals about the middle end by section of the API, in its order; the last section is for the metrics only.
# `!` marks class D: counted at level debug only.
ME_TOTALS: Final = {
    "middle_proxy": """
        keepalive_sent_total! keepalive_failed_total keepalive_pong_total! keepalive_timeout_total rpc_proxy_req_signal_sent_total
        rpc_proxy_req_signal_failed_total rpc_proxy_req_signal_skipped_no_meta_total rpc_proxy_req_signal_response_total
        rpc_proxy_req_signal_close_sent_total reconnect_attempt_total reconnect_success_total handshake_reject_total
        reader_eof_total idle_close_by_peer_total route_drop_no_conn_total route_drop_channel_closed_total
        route_drop_queue_full_total route_drop_queue_full_base_total route_drop_queue_full_high_total
        socks_kdf_strict_reject_total socks_kdf_compat_fallback_total! endpoint_quarantine_total kdf_drift_total
        kdf_port_only_drift_total! hardswap_pending_reuse_total! hardswap_pending_ttl_expired_total
        single_endpoint_outage_enter_total single_endpoint_outage_exit_total single_endpoint_outage_reconnect_attempt_total
        single_endpoint_outage_reconnect_success_total single_endpoint_quarantine_bypass_total
        single_endpoint_shadow_rotate_total single_endpoint_shadow_rotate_skipped_quarantine_total floor_mode_switch_total
        floor_mode_switch_static_to_adaptive_total floor_mode_switch_adaptive_to_static_total""",
    "pool": """
        pool_swap_total pool_force_close_total pool_stale_pick_total writer_removed_total! writer_removed_unexpected_total
        refill_triggered_total! refill_skipped_inflight_total! refill_failed_total writer_restored_same_endpoint_total
        writer_restored_fallback_total""",
    "desync": """
        secure_padding_invalid_total desync_total desync_full_logged_total desync_suppressed_total desync_frames_bucket_0
        desync_frames_bucket_1_2 desync_frames_bucket_3_10 desync_frames_bucket_gt_10""",
    "": "crc_mismatch_total seq_mismatch_total fallback_sessions_total",
}


_CODES_MAX: Final = 64                   # different codes of refused handshakes: about ten exist


class MeCounters:
    """Totals of classes N and D, by the names of ME_TOTALS (`general.telemetry.me_level`)."""

    __slots__ = ("level", "totals", "sections", "error_codes", "draining", "_needs")

    def __init__(self) -> None:
        self.level = LEVELS.index("normal")
        words = {section: text.split() for section, text in ME_TOTALS.items()}
        self._needs = {word.rstrip("!"): 2 if word.endswith("!") else 1 for section in words.values() for word in section}
        self.totals = dict.fromkeys(self._needs, 0)
        self.sections = {section: [word.rstrip("!") for word in names] for section, names in words.items()}
        self.error_codes: dict[int, int] = {}      # code of a refused RPC handshake -> how often
        self.draining = 0                          # writers that drain now: kept true always, shown at level debug

    def count(self, name: str, times: int = 1) -> None:
        """Something happened `times` times.  KeyError for a name that is not in ME_TOTALS."""
        if self.level >= self._needs[name]:
            self.totals[name] += times

    def handshake_rejected(self, code: int) -> None:
        """A middle end answered the RPC handshake with an error; code -1 = none given."""
        if self.level:
            self.totals["handshake_reject_total"] += 1
            if code in self.error_codes or len(self.error_codes) < _CODES_MAX:       # whoever invents codes fills no memory
                self.error_codes[code] = self.error_codes.get(code, 0) + 1

    def queue_full(self) -> None:
        """An answer was dropped behind a client that does not read; our profile is always `high`."""
        self.count("route_drop_queue_full_total")
        self.count("route_drop_queue_full_high_total")

    def desync(self, frames: int, full: bool) -> None:
        """A client's stream fell out of step after `frames` good frames; `full`: the report went out in full."""
        self.count("desync_total")
        self.count("desync_full_logged_total" if full else "desync_suppressed_total")
        self.count(f"desync_frames_bucket_{'0' if frames == 0 else '1_2' if frames <= 2 else '3_10' if frames <= 10 else 'gt_10'}")


class Counters:
    """Process-wide totals of class C (`general.telemetry.core_enabled`), names as in the API (metrics.md 4)."""

    __slots__ = ("enabled", "connections_total", "connections_bad_total", "handshake_timeouts_total", "bad_by_class",
                 "failures_by_class", "failures_by_stage", "connect_attempt_total", "connect_success_total", "connect_fail_total",
                 "connect_failfast_hard_error_total", "connect_attempts", "connect_success_ms", "connect_fail_ms", "me")

    def __init__(self) -> None:
        self.enabled = True
        self.me = MeCounters()
        self.connections_total = 0
        self.connections_bad_total = 0
        self.handshake_timeouts_total = 0
        self.bad_by_class: dict[Reason, int] = {}
        self.failures_by_class: dict[Reason, int] = {}
        self.failures_by_stage: dict[str, int] = {}
        self.connect_attempt_total = 0
        self.connect_success_total = 0
        self.connect_fail_total = 0
        self.connect_failfast_hard_error_total = 0
        self.connect_attempts = [0, 0, 0, 0]          # 1, 2, 3-4, more
        self.connect_success_ms = [0, 0, 0, 0]        # <=100, <=500, <=1000, more
        self.connect_fail_ms = [0, 0, 0, 0]

    def compact(self) -> None:
        """Leave the memory of a crowd: the numbers it counted lie all over it."""
        for name in self.__slots__:
            value = getattr(self, name)
            if type(value) is int:
                setattr(self, name, moved(value))
            elif type(value) is dict:          # in its place: other threads look at it
                value.update(zip(value, moved(list(value.values())), strict=True))

    def gate(self, core_enabled: bool, me_level: str) -> None:
        """Take [general.telemetry]; what was counted stays."""
        self.enabled = core_enabled
        self.me.level = LEVELS.index(me_level)

    def accepted(self) -> None:
        """A connection got its slot."""
        self.connections_total += self.enabled

    def bad(self, reason: Reason) -> None:
        """A connection turned out to be a stranger's; at most once per connection."""
        if self.enabled:
            self.connections_bad_total += 1
            self.bad_by_class[reason] = self.bad_by_class.get(reason, 0) + 1

    def failed(self, reason: Reason, stage: str) -> None:
        """A connection ended before an accepted header without being bad."""
        if self.enabled:
            self.handshake_timeouts_total += reason is Reason.TIMEOUT
            self.failures_by_class[reason] = self.failures_by_class.get(reason, 0) + 1
            self.failures_by_stage[stage] = self.failures_by_stage.get(stage, 0) + 1

    def attempt(self) -> None:
        """One connect attempt of a cycle begins."""
        self.connect_attempt_total += self.enabled

    def hard_error(self) -> None:
        """A hard error met `upstream_connect_failfast_hard_errors`."""
        self.connect_failfast_hard_error_total += self.enabled

    def cycle(self, ok: bool, attempts: int, duration_ms: int) -> None:
        """A connect cycle ended after `attempts` attempts (upstream-and-relay.md 7.4)."""
        if not self.enabled:
            return
        self.connect_success_total += ok
        self.connect_fail_total += not ok
        self.connect_attempts[0 if attempts <= 1 else 1 if attempts == 2 else 2 if attempts <= 4 else 3] += 1
        buckets = self.connect_success_ms if ok else self.connect_fail_ms
        buckets[bisect.bisect_left(DURATION_BOUNDS_MS, duration_ms)] += 1


class UserStats:
    """Published totals of one user, class U (`general.telemetry.user_enabled`), metrics.md 5."""

    __slots__ = ("connects", "current", "octets_from_client", "octets_to_client", "msgs_from_client", "msgs_to_client")

    def __init__(self) -> None:
        self.connects = 0
        self.current = 0                 # sessions in the relay phase, counted always, shown while class U is on
        self.octets_from_client = 0
        self.octets_to_client = 0
        self.msgs_from_client = 0
        self.msgs_to_client = 0


# -- snapshots.  Endpoints are texts, `ip:port` or `[ip6]:port`; ages are whole seconds.

class WriterRow(NamedTuple):
    """One link to a middle end (api.md 9.6)."""

    writer_id: int
    dc: int | None               # absolute; None = its endpoint is no longer mapped
    endpoint: str
    generation: int
    state: str                   # warm, active, draining
    draining: bool
    degraded: bool
    bound_clients: int
    idle_for_secs: int | None    # None while it has clients
    rtt_ema_ms: float | None


class DcRow(NamedTuple):
    """What one data centre has of links (api.md 9.7)."""

    dc: int
    endpoints: tuple[str, ...]   # IPv4 before IPv6, then by number
    available_endpoints: int     # with a writer that does not drain
    required_writers: int        # floor in force
    alive_writers: int
    rtt_ms: float | None
    load: int                    # client sessions


class PoolSnapshot(NamedTuple):
    """Everything about the links (api.md 9.5, 15.1)."""

    active_generation: int
    warm_generation: int                     # 0 = none
    pending_hardswap_generation: int         # 0 = none
    pending_hardswap_age_secs: int | None
    draining_generations: tuple[int, ...]
    writers: tuple[WriterRow, ...]           # by (dc, None last; endpoint; writer_id)
    dcs: tuple[DcRow, ...]                   # by dc
    quarantined: tuple[tuple[str, int], ...]         # (endpoint, remaining milliseconds), by address
    refills: tuple[tuple[int, str, int], ...]        # (dc, "V4" or "V6", refills under way)


class RouteSnapshot(NamedTuple):
    """Where new sessions go (api.md 15.1, runtime/gates); only with `use_middle_proxy`."""

    me_ready: bool               # the pool has a usable writer
    middle: bool                 # new sessions go through the middle end now
    direct_since_wall: int       # unix seconds since when they go direct; 0 = they do not
    was_ready: bool              # the middle end has been ready once
    down_dcs: tuple[int, ...]    # absolute, ascending
    fallback_sessions: int       # sessions on the direct way now although the middle end is wanted


class Sources:
    """Where the control plane gets its snapshots.  Rooms put a function in; None = there is no such thing here.

    Every function is called on the loop thread and has to be quick; it may return None when it has nothing yet.
    """

    __slots__ = ("pool", "upstreams", "path", "nat", "route", "beobachten", "stage", "accepting", "reloads", "reloaded_wall", "on_event")

    def __init__(self) -> None:
        self.pool: Callable[[], PoolSnapshot | None] | None = None
        self.upstreams: Callable[[], list[dict[str, object]]] | None = None      # rows of api.md 9.4
        self.path: Callable[[], list[dict[str, object]]] | None = None           # network_path of api.md 9.5
        self.nat: Callable[[], dict[str, object] | None] | None = None           # data of runtime/nat_stun (api.md 15.1)
        self.route: Callable[[], RouteSnapshot] | None = None
        self.beobachten: Callable[[], str] | None = None     # body of /beobachten
        self.stage = "config_load"                           # startup_stage of runtime/gates; `ready` at last
        self.accepting = False                               # listeners are open
        self.reloads = 0                                     # configurations made live since the start
        self.reloaded_wall = 0.0                             # unix seconds of the last one, 0 = none
        self.on_event: Callable[[str, str], None] | None = None          # somebody keeps the list of runtime/events

    def event(self, kind: str, context: str) -> None:
        """Something that an operator may want to know later: a type of api.md 15.1, and what about; never a secret."""
        if self.on_event is not None:
            self.on_event(kind, context)

    def admit(self, accepting: bool, context: str) -> None:
        """New clients are let in from now on, or are not."""
        self.accepting = accepting
        self.event("admission.state", f"accepting={str(accepting).lower()} {context}")

    def reloaded(self, now_wall: float) -> None:
        """A configuration went live."""
        self.reloads += 1
        self.reloaded_wall = now_wall
        self.event("config.reload.applied", f"count={self.reloads}")


# -- who knocked (client-protocol.md 12)

OBSERVATIONS_MAX: Final = 65_536         # (class, IP) pairs remembered
OTHER: Final = "other"                   # classes that do not follow from a stranger's bytes
EMPTY_HEADER: Final = "expected_64_got_0"
_HTTP_WORDS: Final = (b"GET ", b"POST", b"HEAD", b"PUT ", b"DELETE", b"OPTIONS", b"PATCH", b"CONNECT", b"TRACE", b"PRI ")


def classify_stranger(head: bytes) -> str:
    """Return the class of a peer that is no client, from all that it has said; the first rule that fits wins (12.1, D20)."""
    if len(head) > 4 and head.startswith(_HTTP_WORDS):
        return "HTTP"
    if len(head) > 3 and head.startswith(b"\x16\x03"):
        return "TLS-scanner"
    if head.startswith(b"SSH-"):
        return "SSH"
    return "port-scanner" if len(head) < 10 else "unknown"


class Observations:
    """Tries per (class, IP), in the order of the last one; what was not seen for a while is forgotten."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[int, float]] = {}     # (class, IP) -> tries, monotonic time of the last

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, kind: str, ip: str, now: float, keep_s: float) -> None:
        """One more try; at the limit the pair that was not seen for the longest time goes."""
        self.forget(now, keep_s)
        tries, _ = self._seen.pop((kind, ip), (0, now))
        self._seen[kind, ip] = tries + 1, now
        if len(self._seen) > OBSERVATIONS_MAX:
            del self._seen[next(iter(self._seen))]

    def forget(self, now: float, keep_s: float) -> None:
        """Drop what was last seen more than keep_s seconds ago."""
        while self._seen and now - next(iter(self._seen.values()))[1] > keep_s:
            del self._seen[next(iter(self._seen))]

    def compact(self) -> None:
        """Leave the memory of a crowd."""
        self._seen = moved(self._seen)

    def oldest_at(self) -> float:
        """Monotonic time of the last try that is the furthest back; infinity when there is none."""
        for _, seen_at in self._seen.values():
            return seen_at
        return INF

    def rows(self) -> list[tuple[str, str, int]]:
        """(class, IP, tries) of everybody, for format_observations."""
        return [(kind, ip, tries) for (kind, ip), (tries, _) in self._seen.items()]


def format_observations(rows: Iterable[tuple[str, str, int]]) -> str:
    """Return the text of file and page: classes in byte order, most tries first, then by address; `empty` without rows (12.2)."""
    lines: list[str] = []
    last = None
    for kind, ip, tries in sorted(rows, key=lambda row: (row[0].encode(), -row[2], row[1])):
        if kind != last:
            lines.append(f"[{kind}]")
            last = kind
        lines.append(f"{ip}-{tries}")
    return "\n".join(lines or ["empty"]) + "\n"


# == 11. access ==============================================================
# Who may come in, and how much.  What is enforced is counted here, always and
# apart from what telemetry publishes (metrics.md 8): switching telemetry off
# must not switch limits off.  A place is reserved in the same step that judges
# it, so a burst cannot pass a limit, and a Ticket gives it back exactly once.

UNLIMITED: Final = (1 << 63) - 1        # beyond any count that a session can reach
_HOME_CACHE: Final = 4096            # IPs whose last user is tried first (client-protocol.md D12)
RECENT_S: Final = 30.0               # an address counts as recent for so long after its last admission (client-protocol.md D18)
_RECENT_MAX: Final = 65_536          # of all users in that time: more than 2,000 a second, which no processor here can shake hands with


class User:
    """One configured user: secret, limits in force, and what it uses now."""

    __slots__ = ("name", "secret", "sign", "enabled", "expires_wall", "max_ips", "max_sessions", "quota", "sessions", "ips",
                 "recent", "used", "mark", "reset_wall", "stats")

    def __init__(self, name: str) -> None:
        self.name = name
        self.secret = b""
        self.sign = KeyedHmac(b"")
        self.enabled = True
        self.expires_wall = INF                # unix seconds
        self.max_ips = UNLIMITED
        self.max_sessions = UNLIMITED
        self.quota = UNLIMITED                 # bytes
        self.sessions = 0                      # reserved places, from admission to session end
        self.ips: dict[str, int] = {}          # client IP -> sessions from it
        self.recent: dict[str, float] = {}     # client IP -> monotonic time of its last admission, oldest first
        self.used = 0                          # octets both ways, what `quota` is compared with
        self.mark = 0                          # a relay asks quota_reached() once `used` is here: the quota, or 0 = at the next byte
        self.reset_wall = 0                    # unix seconds of the last reset of `used`, 0 = never
        self.stats = UserStats()

    def recent_ips(self, now: float) -> list[str]:
        """Addresses that were admitted within the last 30 s; for any thread."""
        return [ip for ip, at in list(self.recent.items()) if now - at <= RECENT_S]


class Ticket:
    """A reserved place of a user.  release() gives back the session and the IP, once."""

    __slots__ = ("user", "ip", "_open")

    def __init__(self, user: User, ip: str) -> None:
        self.user, self.ip, self._open = user, ip, True
        user.sessions += 1
        user.ips[ip] = user.ips.get(ip, 0) + 1

    def release(self) -> None:
        """May be called twice; counts once."""
        if not self._open:
            return
        self._open = False
        user = self.user
        user.sessions -= 1
        if user.ips[self.ip] == 1:
            del user.ips[self.ip]
        else:
            user.ips[self.ip] -= 1


def admit(user: User, ip: str, now_wall: float) -> Ticket:
    """Judge all limits of client-protocol.md 9, then reserve a place.

    Raises WireError(LIMIT) with the error text of the first limit that refuses.  A limit of 0 refuses everybody.
    """
    if not user.enabled:
        log_access.warn("Disabled user rejected", user=user.name)
        raise WireError(Reason.LIMIT, f"User {user.name} disabled")
    if now_wall > user.expires_wall:
        raise WireError(Reason.LIMIT, f"User {user.name} expired")
    if ip not in user.ips and len(user.ips) >= user.max_ips:
        reason = f"IP limit reached for user '{user.name}': {len(user.ips)}/{user.max_ips} unique IPs already connected"
        log_access.warn("IP limit exceeded", user=user.name, ip=ip, reason=reason)
        raise WireError(Reason.LIMIT, f"User {user.name} exceeded connection limit")
    if user.sessions >= user.max_sessions:
        raise WireError(Reason.LIMIT, f"User {user.name} exceeded connection limit")
    if user.used >= user.quota:
        raise WireError(Reason.LIMIT, f"User {user.name} exceeded data quota")
    return Ticket(user, ip)


class UserTable:
    """Every configured user, in file order; keeps what a user uses when the configuration changes."""

    def __init__(self) -> None:
        self.users: dict[str, User] = {}
        self._home: dict[str, User] = {}       # client IP -> the user it was last, oldest first
        self._recent: dict[tuple[User, str], float] = {}       # admitted in the last 30 s -> when for the last time, oldest first
        self.effort = Effort()

    def __iter__(self) -> Iterator[User]:
        return iter(self.users.values())

    def apply(self, access: Access) -> None:
        """Take secrets and limits from `access`; a user that stays keeps its counters."""
        before, users = self.users, dict[str, User]()
        for name, secret in access.users.items():
            user = users[name] = before.get(name) or User(name)
            key = bytes.fromhex(secret)
            if key != user.secret:
                user.secret, user.sign = key, KeyedHmac(key)
            until = access.user_expirations.get(name)
            user.enabled = access.user_enabled.get(name, True)
            user.expires_wall = INF if until is None else until.timestamp()
            user.max_ips = access.user_max_unique_ips.get(name, UNLIMITED)
            user.max_sessions = access.user_max_tcp_conns.get(name, UNLIMITED)
            user.quota = access.user_data_quota.get(name, UNLIMITED)
            if user.mark:
                user.mark = user.quota
        self.users = users                     # whole: other threads read it
        self._home = {ip: user for ip, user in self._home.items() if self.users.get(user.name) is user}

    def candidates(self, ip: str, now: float, each_s: float) -> Iterator[User]:
        """Users in the order to try them: the last one of this IP, then file order (client-protocol.md D12).

        each_s: what one trial costs, in seconds of the processor.  Where all are tried in vain, `effort` is charged; an IP that
        has no more of it gets its last user only.
        """
        home = self._home.get(ip)
        if home is not None:
            yield home
        cost_s = each_s * len(self.users)
        if cost_s > _CHEAP_S and self.effort.is_spent(ip, now):
            return
        for user in self.users.values():
            if user is not home:
                yield user
        if cost_s > _CHEAP_S:
            self.effort.charge(ip, now, cost_s)

    def note_admission(self, user: User, ip: str, now: float) -> None:
        """`ip` counts as recent for `user` from now on; what is too old is forgotten, whoever it was.  now: monotonic seconds."""
        user.recent.pop(ip, None)
        user.recent[ip] = now
        self._recent.pop((user, ip), None)
        self._recent[user, ip] = now
        while now - next(iter(self._recent.values())) > RECENT_S or len(self._recent) > _RECENT_MAX:
            who, where = next(iter(self._recent))
            del self._recent[who, where], who.recent[where]

    def compact(self) -> None:
        """Leave the memory of a crowd."""
        self._home = dict(zip(moved(list(self._home)), self._home.values(), strict=True))
        users, entries = [user for user, _ in self._recent], moved([(ip, at) for (_, ip), at in self._recent.items()])
        self._recent = {(user, ip): at for user, (ip, at) in zip(users, entries, strict=True)}
        tables: dict[User, dict[str, float]] = {user: {} for user in users}
        for (user, ip), at in self._recent.items():
            tables[user][ip] = at
        for user, table in tables.items():
            user.recent = table                # whole: other threads read it

    def remember(self, ip: str, user: User) -> None:
        """`user` authenticated from `ip`: try it first next time."""
        self._home.pop(ip, None)
        self._home[ip] = user
        if len(self._home) > _HOME_CACHE:
            del self._home[next(iter(self._home))]


class Effort:
    """What trying every secret in vain may cost per client IP (/64 of IPv6): a tenth of a processor, half a second at once.

    With 1,000 users one hello of 16 KB takes 10 ms: without a limit a stranger with 1.6 MB/s had the processor to himself.  Who
    shares his address and was here before is still served: the last user of an IP costs one trial, and that is always made.
    """

    __slots__ = ("_spent",)

    def __init__(self) -> None:
        self._spent: dict[str | int, tuple[float, float]] = {}     # address -> (seconds of processor, when that was), oldest first

    def is_spent(self, ip: str, now: float) -> bool:
        """True while the address must not cost more."""
        return bool(self._spent) and self._left_over(network_of(ip), now) >= _EFFORT_S

    def charge(self, ip: str, now: float, cost_s: float) -> None:
        """The address made us work in vain."""
        where = network_of(ip)
        spent = self._left_over(where, now) + cost_s
        self._spent.pop(where, None)
        self._spent[where] = spent, now
        if len(self._spent) > _EFFORT_CACHE:
            del self._spent[next(iter(self._spent))]

    def _left_over(self, where: str | int, now: float) -> float:
        spent, at = self._spent.get(where, (0.0, now))
        return max(0.0, spent - max(0.0, now - at) * _EFFORT_SHARE)


def network_of(ip: str) -> str | int:
    """What one customer of a provider has: an IPv4 address, or a /64 of IPv6."""
    return int(ipaddress.IPv6Address(ip)) >> 64 if ":" in ip else ip


_EFFORT_S: Final = 0.5
_EFFORT_SHARE: Final = 0.1
_EFFORT_CACHE: Final = 1_024
_CHEAP_S: Final = 1e-4               # less than that for all users is not counted
HELLO_TRIAL_S: Final = 1e-6          # one secret on a hello: so much, and for each byte
HELLO_BYTE_S: Final = 1e-9
HEADER_TRIAL_S: Final = 3e-6         # one secret on 64 bytes: a hash, a key schedule, a block


class ReplayWindow:
    """Keys seen before: at most `size` of them, forgotten after `age_s` seconds (0 = never by age).

    Least recently looked up goes first; a look-up does not renew the age (client-protocol.md 7, D15).  size 0 = off.

    An entry is a row of 32 bytes across six columns, and a key its 64-bit hash, for which Python draws a secret: of 10^14 new
    keys one passes for known in a full window.  Objects for keys and times took four times as much, and what is worse, each
    held on to a piece of the memory that a crowd left behind.  Rows form a ring in order of their last look-up, closed by row 0,
    which is no entry.  There are as many buckets as rows: a new row splits one (linear hashing), so that no client waits until all
    keys have found new places.
    """

    __slots__ = ("size", "age_s", "_count", "_last_at", "_hashes", "_born", "_older", "_newer", "_heads", "_next")

    def __init__(self, size: int, age_s: float) -> None:
        self.size, self.age_s = size, age_s
        self._clear()

    def _clear(self) -> None:
        self._count = 0                        # rows in use, without row 0
        self._last_at = -INF                   # monotonic time of the last insertion
        nothing = memoryview(b"")
        self._hashes = nothing.cast("q")
        self._born = nothing.cast("d")         # monotonic time of insertion
        self._older, self._newer = nothing.cast("I"), nothing.cast("I")    # neighbours in the ring
        self._heads, self._next = nothing.cast("I"), nothing.cast("I")     # first row of a bucket, next row of the same; 0 = none

    def __len__(self) -> int:
        return self._count

    def resize(self, size: int, age_s: float) -> None:
        """Take new limits; nothing is forgotten but what they exclude."""
        self.size, self.age_s = size, age_s
        if self._count <= size:
            return
        kept: list[tuple[int, float]] = []
        row = self._older[0] if size else 0
        while row and len(kept) < size:
            kept.append((self._hashes[row], self._born[row]))
            row = self._older[row]
        last_at = self._last_at
        self._clear()
        for hashed, born in reversed(kept):
            self._insert(hashed, born)
        self._last_at = last_at

    def is_replay(self, key: bytes, now: float) -> bool:
        """True if `key` was seen within the window; remembers it otherwise."""
        if not self.size:
            return False
        if self._is_old(self._last_at, now) and self._count:
            self._clear()                      # they all are
        hashed = hash(key)
        row = self._find(hashed)
        if not row:
            self._insert(hashed, now)
            return False
        self._part(row)
        self._append(row)
        if not self._is_old(self._born[row], now):
            return True
        self._born[row] = self._last_at = now
        return False

    def _is_old(self, born: float, now: float) -> bool:
        return bool(self.age_s) and now - born > self.age_s

    def _insert(self, hashed: int, now: float) -> None:
        """Put a new key into a new row, or into that of a key that has to go."""
        oldest = self._newer[0] if self._count else 0
        if oldest and (self._count >= self.size or self._is_old(self._born[oldest], now)):
            row = oldest
            self._part(row)
            self._leave_bucket(row)
        else:
            row = self._new_row()
        self._hashes[row], self._born[row], self._last_at = hashed, now, now
        bucket = self._bucket(hashed)
        self._next[row], self._heads[bucket] = self._heads[bucket], row
        self._append(row)

    # -- the ring

    def _part(self, row: int) -> None:
        older, newer = self._older[row], self._newer[row]
        self._newer[older], self._older[newer] = newer, older

    def _append(self, row: int) -> None:
        """It was looked up last."""
        last = self._older[0]
        self._older[row], self._newer[row] = last, 0
        self._newer[last] = self._older[0] = row

    # -- the buckets

    def _bucket(self, hashed: int) -> int:
        """Buckets are 0 to _count; a number beyond them belongs to the bucket that has not been split yet."""
        mask = (1 << self._count.bit_length()) - 1
        bucket = hashed & mask
        return bucket if bucket <= self._count else bucket & mask >> 1

    def _find(self, hashed: int) -> int:
        """Row of a key, or 0."""
        row = self._heads[self._bucket(hashed)] if self._count else 0
        while row and self._hashes[row] != hashed:
            row = self._next[row]
        return row

    def _leave_bucket(self, row: int) -> None:
        bucket = self._bucket(self._hashes[row])
        at = self._heads[bucket]
        if at == row:
            self._heads[bucket] = self._next[row]
            return
        while self._next[at] != row:
            at = self._next[at]
        self._next[at] = self._next[row]

    def _new_row(self) -> int:
        """One more row, and a bucket of the same number, which takes its share from the bucket it splits."""
        row = self._count + 1
        if row >= len(self._heads):
            self._grow()
        self._count = row
        mask = (1 << row.bit_length()) - 1
        split = row & mask >> 1
        at, self._heads[split], self._heads[row] = self._heads[split], 0, 0
        while at:
            bucket, after = split if self._hashes[at] & mask == split else row, self._next[at]
            self._next[at], self._heads[bucket] = self._heads[bucket], at
            at = after
        return row

    def _grow(self) -> None:
        """Room for an eighth more, so that each row is copied a few times at most."""
        self._move(min(self.size + 1, len(self._heads) + max(_REPLAY_ROWS, len(self._heads) // 8)))

    def compact(self) -> None:
        """Leave the memory of a crowd, and what is not needed of it."""
        if self._count:
            self._move(self._count + 1)

    def _move(self, rows: int) -> None:
        """Copy all columns, each with room for so many rows."""
        self._hashes, self._born = resized(self._hashes, rows).cast("q"), resized(self._born, rows).cast("d")
        self._older, self._newer = resized(self._older, rows).cast("I"), resized(self._newer, rows).cast("I")
        self._heads, self._next = resized(self._heads, rows).cast("I"), resized(self._next, rows).cast("I")


def resized(column: memoryview[int] | memoryview[float], rows: int) -> memoryview[int]:
    """The bytes of a copy of `column` with so many rows: cut off, or with zeros behind."""
    room, kept = memoryview(bytearray(rows * column.itemsize)), column[:rows]
    room[:kept.nbytes] = kept.cast("B")
    return room


_REPLAY_ROWS: Final = 256            # grown by so many at least: 8 KB of the 2 MB that 65,536 take


class Doorman:
    """Recognises users: secrets in the right order, replay tables, clock rules."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.users = UserTable()
        self.ignore_time_skew = False
        self.hellos = ReplayWindow(0, 0.0)           # age-limited: the clock rule bounds their reuse
        self.timeless_hellos = ReplayWindow(0, 0.0)  # boot clocks and ignored skew: no clock bounds them, so they never age
        self.headers = ReplayWindow(0, 0.0)

    def apply(self, access: Access) -> None:
        """Take users, limits and replay settings from `access`."""
        self.users.apply(access)
        self.ignore_time_skew = access.ignore_time_skew
        self.hellos.resize(access.replay_check_len, access.replay_window_secs)
        self.headers.resize(access.replay_check_len, access.replay_window_secs)
        self.timeless_hellos.resize(access.replay_check_len, 0.0)

    def find_hello(self, record: bytes, hello: ClientHello, ip: str, now_wall: float) -> tuple[User, bool]:
        """Return the user who signed a ClientHello record, and whether a clock bounds its reuse.

        Raises WireError(BAD_DIGEST), or WireError(CLOCK_SKEW) when a secret fits but its time does not.
        """
        message = without_random(record)
        skewed = False
        for user in self.users.candidates(ip, now_wall, HELLO_TRIAL_S + len(record) * HELLO_BYTE_S):
            timestamp = match_client_hello(hello.digest, user.sign.digest(message))
            if timestamp is None:
                continue
            if not is_boot_clock(timestamp) and is_clock_near(timestamp, now_wall):
                return user, True
            if self.ignore_time_skew or is_boot_clock(timestamp):
                return user, False
            skewed = True
        raise WireError(Reason.CLOCK_SKEW if skewed else Reason.BAD_DIGEST)

    def check_hello(self, hello: ClientHello, timed: bool, now: float) -> None:
        """Raise WireError(TLS_REPLAY) for a hello seen before; remember it otherwise."""
        window = self.hellos if timed else self.timeless_hellos
        if window.is_replay(hello.digest[:16], now):
            raise WireError(Reason.TLS_REPLAY)

    def candidates(self, ip: str, now_wall: float) -> Iterator[User]:
        """Users in the order to try them on a 64-byte header."""
        return self.users.candidates(ip, now_wall, HEADER_TRIAL_S)

    def find_header(self, block: bytes, candidates: Iterable[User], allowed: Container[Transport]) -> tuple[User, Preamble]:
        """Return the user whose secret opens a 64-byte header, with what it says.

        allowed: transports that the modes admit here (client-protocol.md 5.3).  Raises WireError(BAD_HEADER).
        """
        for user in candidates:
            try:
                preamble = parse_client_preamble(block, user.secret, self.backend)
            except WireError:
                continue
            if preamble.transport in allowed:
                return user, preamble
            log_access.debug("Mode not enabled", user=user.name, proto=preamble.transport.word)
        raise WireError(Reason.BAD_HEADER)

    def check_header(self, preamble: Preamble, reason: Reason, now: float) -> None:
        """Raise WireError(reason) for a header seen before; remember it otherwise."""
        if self.headers.is_replay(preamble.replay_key, now):
            raise WireError(reason)


log_access: Final = Log("access")


# == 12. planner =============================================================
# Which links to Telegram's middle end exist, when they are opened, replaced
# and closed, and which one a new session takes.  Deciding is not doing: the
# planner is told facts with the moment they happened, and plan(now) returns
# actions for the driver of room 16.  No clock, no chance, no I/O in here.
# A DC group is an absolute DC number; its endpoints are those of +dc and -dc.
# Source: middle-proxy-pool.md; [Dn] of its section 16 win.

Endpoint: TypeAlias = "tuple[str, int]"            # IP text in canonical form, port
EndpointMap: TypeAlias = "Mapping[int, Sequence[Endpoint]]"     # signed DC -> endpoints, as in the proxy map


class Phase(enum.Enum):
    """Where a link is in its life; the value is `state` of the API."""

    DIALLING = "dialling"
    WARM = "warm"              # reserve of the next generation: takes sessions only when nothing else is there
    ACTIVE = "active"
    DRAINING = "draining"      # no new sessions (but see me_bind_stale_mode); closed when empty or at its deadline


class Lost(enum.Enum):
    """Why a link that nobody asked to close is gone."""

    EOF = "eof"
    ERROR = "error"            # reset, write error, bad CRC, bad sequence number, bad length
    SILENT = "silent"          # given up by `beat` (D18)


class OpenLink(NamedTuple):
    """Dial; answer with on_link_ready or on_dial_failed under the same id."""

    link_id: int
    dc: int                    # group, for the upstream preference and the log
    endpoint: Endpoint
    generation: int


class PromoteLink(NamedTuple):
    """The link's generation became the active one."""

    link_id: int


class DrainLink(NamedTuple):
    """No new sessions; what is left at `until_at` (infinity: never) is cut."""

    link_id: int
    until_at: float


class CloseLink(NamedTuple):
    """Close it, with whatever sessions it has.  The planner has forgotten it: report nothing."""

    link_id: int


class CutSessions(NamedTuple):
    """Close so many sessions of the link, those that have been silent for the longest time first (D14)."""

    link_id: int
    sessions: int


class ServeWaiters(NamedTuple):
    """A link of group `dc` can be bound: route its waiting sessions again, oldest first (D6)."""

    dc: int


class Say(NamedTuple):
    """Log one line."""

    level: Level
    text: str


class WakeAt(NamedTuple):
    """Call plan() again at this moment, or after the next report."""

    at: float


Action: TypeAlias = "OpenLink | PromoteLink | DrainLink | CloseLink | CutSessions | ServeWaiters | Say | WakeAt"


class Bind(NamedTuple):
    """The session uses this link."""

    link_id: int


class Hold(NamedTuple):
    """The session waits in the queue of group `dc`; ask again at `until_at` with waited=True, or at ServeWaiters."""

    dc: int
    until_at: float


class GoDirect(NamedTuple):
    """The session goes to its data centre without the middle end (D2)."""


class Refuse(NamedTuple):
    """No link and no direct way allowed: close the client at once (wire D13)."""


Way: TypeAlias = "Bind | Hold | GoDirect | Refuse"


class Beat(NamedTuple):
    """What keepalive asks of one link now, and when to ask again."""

    ping: bool
    dead: bool                 # close it and report on_link_lost(SILENT); the rest does not count
    again_s: float


# -- facts

class Purpose(enum.Enum):
    """Why a link is dialled."""

    INIT = "init"              # first links of a group, before anything failed
    FLOOR = "floor"
    REFILL = "refill"          # one was lost (8.1)
    OUTAGE = "outage"          # the only endpoint of a group has no link (9.1)
    WARM = "warm"              # reserve of the next generation (10.3)
    REFRESH = "refresh"        # replaces a link that idles too long (9.2)
    ROTATE = "rotate"          # replaces a reserve link in turn (9.3)


_RECONNECTS: Final = frozenset((Purpose.FLOOR, Purpose.REFILL, Purpose.OUTAGE))       # in reconnect_*_total (D8)
_CONTOUR: Final = {Phase.ACTIVE: 0, Phase.WARM: 1, Phase.DRAINING: 2}
_REPLACING: Final = frozenset((Purpose.REFRESH, Purpose.ROTATE))

DIALS_MAX: Final = 32                # in flight, whole pool (D7)
FLAP_S: Final = 20.0                 # a link that lived no longer puts its endpoint into quarantine (8.2)
QUARANTINE_S: Final = 25.0
IDLE_REFRESH_S: Final = 45.0         # the middle end closes links without clients after about a minute (9.2)
IDLE_STALE_S: Final = 55.0
PENDING_TTL_S: Final = 1800.0        # a generation that is not promoted by then is dropped (10.2)
GATE_RETRY_S: Final = 60.0           # D13
DOWN_S: Final = 6.0                  # without a bindable link for so long a group is down (D2)
HOLD_S: Final = 3.0                  # a session waits so long for a link (D6)
_UNANSWERED_MAX: Final = 3           # pings, then a silent link is given up (D18)
_SILENT_S: Final = 30.0
_CUT_STEPS: Final = 20               # a drained link loses its sessions in so many portions, one a second (D14)
_REFILL_TRIES_MAX: Final = 20        # D9
_GROUP_MAX: Final = 32_767           # |dc| of a group fits 16 bits


class Due:
    """Collects the moments that a step waits for: `passed` answers, and remembers the earliest that has not come."""

    __slots__ = ("now", "at")

    def __init__(self, now: float) -> None:
        self.now, self.at = now, INF

    def passed(self, at: float) -> bool:
        """Whether `at` is now or was before."""
        if at <= self.now:
            return True
        if at < self.at:
            self.at = at
        return False


class Pace:
    """A back-off: after a failure wait `wait_s` plus up to half of it at random, then double, up to the cap (D7)."""

    __slots__ = ("wait_s", "next_at", "_marked_at")

    def __init__(self) -> None:
        self.wait_s = 0.0                      # 0: start at the base
        self.next_at = self._marked_at = -INF

    def failed(self, now: float, asked_at: float, base_s: float, cap_s: float, chance: float) -> None:
        """A dial of `asked_at` failed; one that began before the pause was set does not move it again."""
        if asked_at > self._marked_at:
            self.push(now, base_s, cap_s, chance)

    def push(self, now: float, base_s: float, cap_s: float, chance: float) -> None:
        """Start the next pause.  chance: in [0, 1)."""
        wait_s = min(max(self.wait_s, base_s), max(base_s, cap_s))
        self._marked_at = now
        self.next_at = now + wait_s + chance * max(0.001, wait_s / 2)
        self.wait_s = 2 * wait_s

    def reset(self) -> None:
        """All is well: nothing to wait for."""
        self.wait_s = 0.0
        self.next_at = self._marked_at = -INF


class Drain:
    """How a link drains."""

    __slots__ = ("started_at", "until_at", "fallback", "portion")

    def __init__(self, started_at: float, until_at: float, fallback: bool) -> None:
        self.started_at, self.until_at, self.fallback = started_at, until_at, fallback
        self.portion = 0                       # sessions to cut per second once `until_at` has passed


class Pulse:
    """Pings of one link and what they tell."""

    __slots__ = ("ema_ms", "base_ms", "degraded", "unanswered", "heard_at")

    def __init__(self) -> None:
        self.ema_ms: float | None = None
        self.base_ms = 0.0
        self.degraded = False
        self.unanswered = 0                    # in a row
        self.heard_at = -INF                   # so until the first `beat`


class LinkFacts:
    """What is known of one link, from its dial to its end."""

    __slots__ = ("link_id", "dc", "endpoint", "generation", "phase", "purpose", "replaces", "asked_at", "late", "ready_at", "sessions",
                 "idle_at", "drain", "pulse")

    def __init__(self, link_id: int, dc: int, endpoint: Endpoint, generation: int, purpose: Purpose, asked_at: float,
                 replaces: int) -> None:
        self.link_id, self.dc, self.endpoint, self.generation = link_id, dc, endpoint, generation
        self.phase = Phase.DIALLING
        self.purpose, self.asked_at, self.replaces = purpose, asked_at, replaces
        self.late = False                      # dialling for longer than timeouts.me_one_timeout_ms: counts as failed for pacing
        self.ready_at = self.idle_at = asked_at
        self.sessions = 0
        self.drain: Drain | None = None
        self.pulse = Pulse()

    @property
    def live(self) -> bool:
        """May carry new sessions, and is not being replaced."""
        return self.phase is Phase.ACTIVE or self.phase is Phase.WARM

    def threshold_at(self) -> float:
        """When it has idled for too long; spread over 6 s so that links of one age do not go together."""
        return self.idle_at + IDLE_REFRESH_S + self.link_id % 6 if not self.sessions else INF


class Episode:
    """The refill after one loss (D9)."""

    __slots__ = ("endpoint", "left", "tries", "next_at", "link_id")

    def __init__(self, endpoint: Endpoint, left: int) -> None:
        self.endpoint, self.left = endpoint, left
        self.tries = 0
        self.next_at = -INF
        self.link_id = 0                       # its dial under way, 0 = none that still counts


class Group:
    """One data centre: what it needs, what it has, and when something is to be done."""

    __slots__ = ("dc", "endpoints", "links", "pace", "outage_pace", "outage", "episode", "fails", "met", "stagger_at", "idle_next_at",
                 "shadow_at", "due_at", "dialled_at")

    def __init__(self, dc: int, shadow_at: float) -> None:
        self.dc = dc
        self.endpoints: tuple[Endpoint, ...] = ()          # in address order; empty: the group left the map
        self.links: dict[int, LinkFacts] = {}
        self.pace, self.outage_pace = Pace(), Pace()
        self.outage = False
        self.episode: Episode | None = None
        self.fails: dict[Endpoint, int] = {}   # dials that failed since the last one that did not
        self.met = False                       # its floor has been reached once
        self.stagger_at = self.idle_next_at = -INF
        self.shadow_at = shadow_at
        self.due_at = -INF
        self.dialled_at = -INF                 # begin of the last dial for its floor

    def count(self, phase: Phase) -> int:
        """Links of a phase on endpoints that are listed."""
        return sum(link.phase is phase and link.endpoint in self.endpoints for link in self.links.values())

    def young(self, purposes: Container[Purpose]) -> int:
        """Dials that still count as such."""
        return sum(link.phase is Phase.DIALLING and not link.late and link.purpose in purposes for link in self.links.values())

    def dialling(self) -> int:
        """All dials under way."""
        return sum(link.phase is Phase.DIALLING for link in self.links.values())

    def fresh(self, generation: int) -> int:
        """Live links of a generation on endpoints that are listed."""
        return sum(link.live and link.generation == generation and link.endpoint in self.endpoints for link in self.links.values())


def endpoint_order(endpoint: Endpoint) -> tuple[int, int, int]:
    """Sort key: IPv4 before IPv6, then the address as a number, then the port."""
    address = ipaddress.ip_address(endpoint[0])
    return address.version, int(address), endpoint[1]


def endpoint_text(endpoint: Endpoint) -> str:
    """`1.2.3.4:8888`, `[2001:db8::1]:80`."""
    return f"[{endpoint[0]}]:{endpoint[1]}" if ":" in endpoint[0] else f"{endpoint[0]}:{endpoint[1]}"


class ProxyMap:
    """The lists of middle ends as groups: negative twins added, families joined or chosen, order forgotten (D3, D4, D16)."""

    __slots__ = ("groups", "default_dc", "_exact")

    def __init__(self, v4: EndpointMap, v6: EndpointMap, default_dc: int, order: Sequence[int] = (4,), multipath: bool = False) -> None:
        """order: usable families, the preferred one first; without multipath a group has the endpoints of its first one."""
        self.default_dc = default_dc
        self.groups: dict[int, tuple[Endpoint, ...]] = {}
        self._exact: dict[int, frozenset[Endpoint]] = {}
        tables = [{4: v4, 6: v6}[family] for family in order]
        for dc in sorted({abs(key) for table in tables for key in table if 0 < abs(key) <= _GROUP_MAX}):
            known = [table for table in tables if table.get(dc) or table.get(-dc)]
            chosen = known if multipath else known[:1]
            plus = frozenset(endpoint for table in chosen for endpoint in table.get(dc, ()))
            minus = frozenset(endpoint for table in chosen for endpoint in (table[-dc] if -dc in table else table.get(dc, ())))
            self._exact[dc], self._exact[-dc] = plus, minus
            self.groups[dc] = tuple(sorted(plus | minus, key=endpoint_order))

    def group_of(self, dc: int) -> int:
        """Group that serves sessions for the signed `dc`."""
        return abs(dc) if abs(dc) in self.groups else abs(self.default_dc or 2)

    def exact(self, dc: int) -> frozenset[Endpoint]:
        """Endpoints listed for just this signed DC."""
        return self._exact.get(dc, frozenset())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProxyMap) and self.groups == other.groups and self._exact == other._exact

    def __hash__(self) -> int:
        return hash(tuple(self.groups.items()))


# -- organs

class Generations:
    """Numbers of the pool's generations (10.2).  `active` only grows; 0 = none for the other two."""

    __slots__ = ("last", "active", "pending", "started_at", "_listed")

    def __init__(self) -> None:
        self.last = self.active = 1
        self.pending = 0                       # being warmed up, or waiting for its gate
        self.started_at = 0.0
        self._listed: ProxyMap | None = None

    def reusable(self, now: float, listed: ProxyMap) -> bool:
        """Whether the pending generation was begun for this very list and is not too old."""
        return self.pending >= self.active and self._listed == listed and not self.expired(now)

    def expired(self, now: float) -> bool:
        """Whether there is a pending generation that is too old."""
        return bool(self.pending) and now - self.started_at > PENDING_TTL_S

    def begin(self, now: float, listed: ProxyMap) -> int:
        """Return the number of a new pending generation."""
        self.last += 1
        self.pending, self.started_at, self._listed = self.last, now, listed
        return self.pending

    def drop(self) -> None:
        """The pending generation is no more."""
        self.pending, self._listed = 0, None

    def outdate(self) -> None:
        """The pending generation may still be promoted, but not begun again: some of its links have an older secret."""
        self._listed = None

    def promote(self) -> None:
        """The pending generation is the active one."""
        self.active, self.pending, self._listed = self.pending, 0, None


class Quarantine:
    """Endpoints that lost a link right after its start are left alone for a while (8.2, D10)."""

    __slots__ = ("_until",)

    def __init__(self) -> None:
        self._until: dict[Endpoint, float] = {}

    def add(self, now: float, endpoint: Endpoint) -> None:
        """Start or restart the time of an endpoint; those whose time is over are forgotten, lists change for years."""
        self._until = {other: at for other, at in self._until.items() if at > now}
        self._until[endpoint] = now + QUARANTINE_S

    def until_at(self, now: float, endpoint: Endpoint) -> float:
        """Monotonic end of its quarantine; -infinity when it is free."""
        at = self._until.get(endpoint)
        if at is None:
            return -INF
        if at <= now:
            del self._until[endpoint]
            return -INF
        return at

    def rows(self, now: float) -> tuple[tuple[str, int], ...]:
        """(endpoint, remaining ms) of what is not expired, by address."""
        held = sorted((endpoint for endpoint, at in self._until.items() if at > now), key=endpoint_order)
        return tuple((endpoint_text(endpoint), int((self._until[endpoint] - now) * 1000)) for endpoint in held)


class Floors:
    """How many links a group is to have (7)."""

    __slots__ = ("general", "_idle_from")

    def __init__(self, general: General) -> None:
        self.general = general
        self._idle_from: dict[int, float] = {}         # group -> since when it counts as unused; in the future while in grace

    def apply(self, now: float, general: General) -> str:
        """Take new settings; return the counter of a change of mode, or ""."""
        old, self.general = self.general.me_floor_mode, general
        if old == general.me_floor_mode:
            return ""
        self._idle_from = dict.fromkeys(self._idle_from, now)
        return f"floor_mode_switch_{old}_to_{general.me_floor_mode}_total"

    def static(self, endpoints: int) -> int:
        """The floor without regard to use."""
        if endpoints == 1:
            return max(3, 1 + self.general.me_single_endpoint_shadow_writers)
        return max(3, endpoints) if endpoints else 0

    def used(self, now: float, dc: int) -> None:
        """A session of the group began or ended."""
        self._idle_from[dc] = now + self.general.me_adaptive_floor_recover_grace_secs

    def clear(self, now: float, dc: int) -> None:
        """Count idleness from now on."""
        self._idle_from[dc] = now

    def forget(self, dc: int) -> None:
        """The group is gone."""
        self._idle_from.pop(dc, None)

    def floor(self, group: Group, due: Due) -> int:
        """Floor in force now."""
        full = self.static(len(group.endpoints))
        general = self.general
        if general.me_floor_mode != "adaptive" or len(group.endpoints) != 1:
            return full
        idle_from = self._idle_from.setdefault(group.dc, due.now)
        if any(link.sessions and link.live for link in group.links.values()):
            return full
        if not due.passed(idle_from + general.me_adaptive_floor_idle_secs):
            return full
        return min(full, max(1, general.me_adaptive_floor_min_writers_single_endpoint))


class Roster:
    """All groups and links, and what is done to them: every organ acts through here."""

    __slots__ = ("general", "one_timeout_s", "counts", "draw", "groups", "links", "listed", "generations", "quarantine", "floors",
                 "may_dial", "touched", "actions", "_last_id", "_starved")

    def __init__(self, settings: Settings, counts: MeCounters, draw: Callable[[], float]) -> None:
        self.general, self.one_timeout_s = settings.general, settings.timeouts.me_one_timeout_ms / 1000
        self.counts, self.draw = counts, draw
        self.groups: dict[int, Group] = {}     # ascending
        self.links: dict[int, LinkFacts] = {}
        self.listed = ProxyMap({}, {}, 0, ())
        self.generations, self.quarantine, self.floors = Generations(), Quarantine(), Floors(settings.general)
        self.may_dial = False                  # there is a proxy secret
        self.touched: set[int] = set()         # groups to look at in this plan
        self.actions: list[Action] = []
        self._last_id = 0
        self._starved: set[int] = set()        # groups that found no place for a dial

    def say(self, level: Level, text: str) -> None:
        """Have a line logged."""
        self.actions.append(Say(level, text))

    def uniform(self, low: float, high: float) -> float:
        """Return a random number between them."""
        return low + self.draw() * (high - low)

    def has_place(self, group: Group) -> bool:
        """Whether `group` may dial once more; it is looked at again when a dial ends.

        A place is kept for every group that has no dial under way, so that dead data centres cannot starve a living one.
        """
        dials = [other.dialling() for other in self.groups.values() if other.endpoints]
        mine, total = group.dialling(), sum(dials)
        kept = min(dials.count(0), DIALS_MAX // 2) if mine else 0
        if self.may_dial and mine < max(1, self.general.me_reconnect_max_concurrent_per_dc) and total + kept < DIALS_MAX:
            return True
        self._starved.add(group.dc)
        return False

    def choose(self, group: Group, now: float, generation: int = 0) -> Endpoint | None:
        """The endpoint with the fewest links and dials (of `generation` if given) and the fewest recent failures; ties at random.

        None when all are in quarantine (D4, D10).
        """
        burden: dict[Endpoint, float] = {}
        for endpoint in group.endpoints:
            if self.quarantine.until_at(now, endpoint) == -INF:
                burden[endpoint] = group.fails.get(endpoint, 0) + self.draw()
        for link in group.links.values():
            if link.endpoint in burden and link.phase is not Phase.DRAINING and (not generation or link.generation == generation):
                burden[link.endpoint] += 1
        return min(burden, key=burden.__getitem__) if burden else None

    def release_at(self, group: Group, now: float) -> float:
        """When the first endpoint of the group leaves quarantine."""
        return min((self.quarantine.until_at(now, endpoint) for endpoint in group.endpoints), default=INF)

    def open(self, now: float, group: Group, endpoint: Endpoint, purpose: Purpose, generation: int = 0, replaces: int = 0) -> LinkFacts:
        """Dial; the caller has asked has_place()."""
        self._last_id += 1
        link = LinkFacts(self._last_id, group.dc, endpoint, generation or self.generations.active, purpose, now, replaces)
        self.links[link.link_id] = group.links[link.link_id] = link
        if purpose in _RECONNECTS:
            self.counts.count("reconnect_attempt_total")
        self.actions.append(OpenLink(link.link_id, group.dc, endpoint, link.generation))
        self.touched.add(group.dc)             # its lateness is a moment to wait for
        return link

    def forget(self, link: LinkFacts) -> None:
        """The link is no more, whoever ended it."""
        del self.links[link.link_id]
        del self.groups[link.dc].links[link.link_id]
        self.touched.add(link.dc)
        if link.phase is Phase.DIALLING:
            self.dial_ended()
            return
        self.counts.count("writer_removed_total")
        if link.phase is Phase.DRAINING:
            self.counts.draining -= 1
        else:
            self.counts.count("writer_removed_unexpected_total")

    def dial_ended(self) -> None:
        """There is a free place for a dial."""
        self.touched |= self._starved
        self._starved.clear()

    def drain(self, now: float, link: LinkFacts, fallback: bool = False) -> None:
        """No new sessions for this link; without any it is closed at once."""
        timeout_s = self.general.me_reinit_drain_timeout_secs
        link.drain = Drain(now, now + timeout_s if timeout_s else INF, fallback)
        link.phase = Phase.DRAINING
        self.counts.draining += 1
        self.touched.add(link.dc)
        if link.sessions:
            self.actions.append(DrainLink(link.link_id, link.drain.until_at))
        else:
            self.close(link)

    def close(self, link: LinkFacts) -> None:
        """Close a draining link."""
        self.actions.append(CloseLink(link.link_id))
        self.forget(link)

    def drain_step(self, link: LinkFacts, due: Due) -> None:
        """Cut sessions of a draining link whose deadline has passed: a twentieth of them every second (D14)."""
        drain = link.drain
        if drain is None or not due.passed(drain.until_at):
            return
        if not drain.portion:
            drain.portion = -(-link.sessions // _CUT_STEPS)
            self.counts.count("pool_force_close_total")
        self.actions.append(CutSessions(link.link_id, min(drain.portion, link.sessions)))
        drain.until_at = due.now + 1.0
        due.passed(drain.until_at)

    def bindable_until(self, link: LinkFacts) -> float:
        """Until when new sessions may take this link: -infinity never, infinity for good (6.3)."""
        if link.live:
            return INF
        drain, mode = link.drain, self.general.me_bind_stale_mode
        if drain is None or not drain.fallback or drain.portion or mode == "never":
            return -INF
        ttl_s = self.general.me_bind_stale_ttl_secs
        return drain.started_at + ttl_s if mode == "ttl" and ttl_s else INF


class Refill:
    """When a group dials: first links, floor, refill after a loss, outage of an only endpoint (7.3, 8.1, 9.1; D1, D7-D10)."""

    __slots__ = ("roster",)

    _FOR_FLOOR: ClassVar = frozenset((Purpose.INIT, Purpose.FLOOR, Purpose.REFILL, Purpose.OUTAGE))

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    def step(self, group: Group, need: int, due: Due) -> None:
        """Start the dials that are due."""
        for link in group.links.values():
            if link.phase is Phase.DIALLING and not link.late and due.passed(link.asked_at + self.roster.one_timeout_s):
                link.late = True
                self._pace(group, link, due.now)
        ready = group.count(Phase.ACTIVE)
        if self._outage(group, need, ready + group.count(Phase.WARM), due):
            return
        group.met = group.met or 0 < need <= ready
        if group.episode is not None and self._episode(group, group.episode, need, ready, due) and ready:
            return
        if ready < need:
            self._floor(group, need, ready, due)

    def _floor(self, group: Group, need: int, ready: int, due: Due) -> None:
        general, young = self.roster.general, group.young(self._FOR_FLOOR)
        missing = need - ready - young
        first = not group.met and not ready
        if first:                              # D1: two different endpoints at a time until one answers
            missing = min(2, len(group.endpoints)) - young
        stagger = not group.met and not first and general.me_warmup_stagger_enabled
        while missing > 0 and due.passed(group.pace.next_at) and (not stagger or due.passed(group.stagger_at)):
            endpoint = self._endpoint(group, due, others_only=first)
            if endpoint is None or not self.roster.has_place(group):
                return
            purpose = Purpose.FLOOR if group.met or group.fails else Purpose.INIT
            self.roster.open(due.now, group, endpoint, purpose)
            group.dialled_at = due.now
            if not group.met:
                step_ms = general.me_warmup_step_delay_ms + self.roster.uniform(0, general.me_warmup_step_jitter_ms)
                group.stagger_at = due.now + step_ms / 1000
            missing -= 1

    def _endpoint(self, group: Group, due: Due, others_only: bool = False) -> Endpoint | None:
        """Where to dial, or None; others_only: not where a dial is under way."""
        roster, only = self.roster, group.endpoints[0]
        if len(group.endpoints) == 1 and self._bypass() and roster.quarantine.until_at(due.now, only) > due.now:
            if not due.passed(group.outage_pace.next_at):
                return None
            self._push_outage(group, due.now)
            return only
        endpoint = roster.choose(group, due.now)
        if endpoint is None:
            due.passed(roster.release_at(group, due.now))
        elif others_only and any(link.phase is Phase.DIALLING and not link.late and link.endpoint == endpoint
                                 for link in group.links.values()):
            return None
        return endpoint

    def _bypass(self) -> bool:
        general = self.roster.general
        return general.me_single_endpoint_outage_mode_enabled and general.me_single_endpoint_outage_disable_quarantine

    def _outage(self, group: Group, need: int, live: int, due: Due) -> bool:
        """Whether the group is in outage; starts its dial when due."""
        roster, general = self.roster, self.roster.general
        if (not need or live or len(group.endpoints) != 1 or not general.me_single_endpoint_outage_mode_enabled
                or not (group.met or group.fails)):
            if group.outage:
                group.outage = False
                roster.counts.count("single_endpoint_outage_exit_total")
                roster.say(Level.INFO, f"DC {group.dc}: outage of its only Middle-End endpoint is over")
                group.idle_next_at, group.shadow_at = -INF, due.now + general.me_single_endpoint_shadow_rotate_every_secs
                roster.floors.clear(due.now, group.dc)
            return False
        endpoint = group.endpoints[0]
        held_until_at = roster.quarantine.until_at(due.now, endpoint)
        if not group.outage:
            group.outage, group.episode = True, None
            if held_until_at < due.now:
                group.outage_pace.reset()
            roster.counts.count("single_endpoint_outage_enter_total")
            roster.say(Level.WARN, f"DC {group.dc}: its only Middle-End endpoint {endpoint_text(endpoint)} has no link left")
        if group.young(self._FOR_FLOOR) or not due.passed(group.outage_pace.next_at):
            return True
        if (self._bypass() or due.passed(held_until_at)) and roster.has_place(group):
            roster.counts.count("single_endpoint_outage_reconnect_attempt_total")
            if self._bypass():
                roster.counts.count("single_endpoint_quarantine_bypass_total")
            roster.open(due.now, group, endpoint, Purpose.OUTAGE)
        return True

    def _episode(self, group: Group, episode: Episode, need: int, ready: int, due: Due) -> bool:
        """Start the next dial of a refill when it is due; False when the refill is over."""
        roster = self.roster
        if ready >= need:
            group.episode = None
            return False
        if episode.link_id:
            return True
        if not episode.left:
            group.episode = None
            roster.counts.count("refill_failed_total")
            roster.say(Level.WARN, f"DC {group.dc}: no new link after {episode.tries} tries, going on with pauses")
            group.pace.push(due.now, *self._health(), roster.draw())
            return False
        if due.passed(episode.next_at):
            endpoint: Endpoint | None = episode.endpoint
            if episode.tries or endpoint not in group.endpoints or roster.quarantine.until_at(due.now, episode.endpoint) > due.now:
                endpoint = self._endpoint(group, due)
            if endpoint is not None and roster.has_place(group):
                episode.link_id = roster.open(due.now, group, endpoint, Purpose.REFILL).link_id
                episode.left, episode.tries = episode.left - 1, episode.tries + 1
        return True

    def _health(self) -> tuple[float, float]:
        general = self.roster.general
        return general.me_reconnect_backoff_base_ms / 1000, general.me_reconnect_backoff_cap_ms / 1000

    def _push_outage(self, group: Group, now: float) -> None:
        general = self.roster.general
        group.outage_pace.push(now, general.me_single_endpoint_outage_backoff_min_ms / 1000,
                               general.me_single_endpoint_outage_backoff_max_ms / 1000, self.roster.draw())

    def _pace(self, group: Group, link: LinkFacts, now: float) -> None:
        """A dial failed or takes too long."""
        if link.purpose is Purpose.OUTAGE:
            self._push_outage(group, now)
        elif link.purpose is Purpose.REFILL:
            episode = group.episode
            if episode is not None and episode.link_id == link.link_id:
                episode.link_id = 0
                episode.next_at = now + self.roster.draw() * min(2.0, 0.05 * 2 ** (episode.tries - 1))
        elif link.purpose not in _REPLACING and link.purpose is not Purpose.WARM:
            group.pace.failed(now, link.asked_at, *self._health(), self.roster.draw())

    def on_failed(self, group: Group, link: LinkFacts, now: float) -> None:
        """A dial of the group failed."""
        group.fails[link.endpoint] = group.fails.get(link.endpoint, 0) + 1
        if not link.late:
            self._pace(group, link, now)

    def on_ready(self, group: Group, link: LinkFacts, now: float) -> None:
        """A dial of the group succeeded."""
        roster, counts = self.roster, self.roster.counts
        group.fails.pop(link.endpoint, None)
        held = roster.quarantine.until_at(now, link.endpoint) > now
        if link.purpose in _RECONNECTS:
            counts.count("reconnect_success_total")
        if link.purpose is Purpose.OUTAGE:
            counts.count("single_endpoint_outage_reconnect_success_total")
        if link.purpose in self._FOR_FLOOR and not held:
            group.pace.reset()
            group.outage_pace.reset()
        elif link.purpose is Purpose.OUTAGE and not link.late:
            self._push_outage(group, now)      # it may be gone again at once: keep the pace
        if link.purpose is Purpose.REFILL:
            episode = group.episode
            same = episode is not None and episode.endpoint == link.endpoint
            counts.count("writer_restored_same_endpoint_total" if same else "writer_restored_fallback_total")
            group.episode = None

    def on_lost(self, group: Group, link: LinkFacts, need: int, now: float) -> None:
        """A link that was in use is gone; the roster has forgotten it."""
        if link.phase is not Phase.ACTIVE or link.endpoint not in group.endpoints or group.count(Phase.ACTIVE) >= need:
            return
        if group.episode is not None:
            self.roster.counts.count("refill_skipped_inflight_total")
        elif len(group.endpoints) > 1 or self.roster.quarantine.until_at(now, link.endpoint) < now:
            self.roster.counts.count("refill_triggered_total")
            group.episode = Episode(link.endpoint, min(_REFILL_TRIES_MAX, max(1, self.roster.general.me_reconnect_fast_retry_count)))

    def hurry(self, group: Group, now: float) -> None:
        """Sessions wait: dial now instead of after the pause, but no faster than the shortest pause (D6)."""
        if not group.young(self._FOR_FLOOR):
            group.pace.next_at = min(group.pace.next_at, max(now, group.dialled_at + self._health()[0]))
            self.roster.touched.add(group.dc)


class Renewal:
    """In a group that has enough links: idle ones are replaced before the middle end closes them, surplus ones go (9.2, 9.3, D12)."""

    __slots__ = ("roster",)

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    def step(self, group: Group, need: int, due: Due) -> None:
        """Trim, or start one replacement dial."""
        ready = group.count(Phase.ACTIVE)
        while ready > need and (link := self._idlest(group, due, active_only=True)) is not None:
            self.roster.drain(due.now, link)
            ready -= 1
        if ready != need or not need or any(
                link.phase is Phase.DIALLING and link.purpose in _REPLACING for link in group.links.values()):
            return
        if not self._refresh(group, due):
            self._rotate(group, due)

    def _idlest(self, group: Group, due: Due, active_only: bool = False) -> LinkFacts | None:
        """The link that has idled longest beyond its threshold, on the fullest endpoint for a surplus one."""
        ripe = [link for link in group.links.values()
                if link.endpoint in group.endpoints and not link.sessions
                and (link.phase is Phase.ACTIVE or (link.phase is Phase.WARM and not active_only))
                and due.passed(link.threshold_at())]
        crowd = {link.endpoint: sum(other.live and other.endpoint == link.endpoint for other in group.links.values()) for link in ripe}
        return min(ripe, key=lambda link: (-crowd[link.endpoint] if active_only else 0, link.idle_at, link.link_id), default=None)

    def _refresh(self, group: Group, due: Due) -> bool:
        """Replace the longest idle link; True if its dial began."""
        if not due.passed(group.idle_next_at):
            return False
        link = self._idlest(group, due)
        if link is None or not due.passed(self.roster.quarantine.until_at(due.now, link.endpoint)) or not self.roster.has_place(group):
            return False
        self.roster.open(due.now, group, link.endpoint, Purpose.REFRESH, link.generation, link.link_id)
        return True

    def _rotate(self, group: Group, due: Due) -> None:
        every_s = self.roster.general.me_single_endpoint_shadow_rotate_every_secs
        if len(group.endpoints) != 1 or not every_s or not due.passed(group.shadow_at):
            return
        endpoint = group.endpoints[0]
        spare = self._spare(group)
        if self.roster.quarantine.until_at(due.now, endpoint) > due.now:
            self.roster.counts.count("single_endpoint_shadow_rotate_skipped_quarantine_total")
        elif spare is not None and self.roster.has_place(group):
            self.roster.open(due.now, group, endpoint, Purpose.ROTATE, spare.generation, spare.link_id)
            return
        group.shadow_at = due.now + 30
        due.passed(group.shadow_at)

    def _spare(self, group: Group, but: int = 0) -> LinkFacts | None:
        """The first live link without sessions."""
        return next((link for link in group.links.values() if link.live and not link.sessions and link.link_id != but), None)

    def on_failed(self, group: Group, link: LinkFacts, now: float) -> None:
        """A replacement dial failed."""
        if link.purpose is Purpose.REFRESH:
            group.idle_next_at = now + 8
        else:
            group.shadow_at = now + min(self.roster.general.me_single_endpoint_shadow_rotate_every_secs, 30)

    def on_ready(self, group: Group, link: LinkFacts, now: float) -> None:
        """A replacement is there: the old link goes, unless a session has come to it meanwhile."""
        old = self.roster.links.get(link.replaces)
        if old is not None and (not old.live or old.sessions):
            old = None
        if link.purpose is Purpose.REFRESH:
            group.idle_next_at = now + 5
        else:
            old = old or self._spare(group, link.link_id)
            group.shadow_at = now + self.roster.general.me_single_endpoint_shadow_rotate_every_secs
            if old is not None:
                self.roster.counts.count("single_endpoint_shadow_rotate_total")
        if old is not None:
            self.roster.drain(now, old)


class Trigger(enum.Enum):
    """Why the pool is renewed (10.1)."""

    PERIODIC = "periodic"
    MAP = "map-change"
    SECRET = "secret-change"


class Warmup:
    """One group on its way into the next generation (10.3)."""

    __slots__ = ("passes", "left", "next_at", "link_id", "done")

    def __init__(self) -> None:
        self.passes = 0                        # begun
        self.left = 0                          # dials of this pass still to start
        self.next_at = -INF
        self.link_id = 0                       # its dial under way
        self.done = False


class Swap:
    """Renewal of the whole pool: triggers, warm-up of the next generation, the gate, the swap (10, D13, D14)."""

    __slots__ = ("roster", "triggers", "warming", "retry_at", "periodic_at", "soft_until_at", "_open_at", "_period_s")

    def __init__(self, roster: Roster, now: float) -> None:
        self.roster = roster
        self.triggers: set[Trigger] = set()    # waiting for the coalesce window, or for the end of the warm-up
        self.warming: dict[int, Warmup] = {}
        self.retry_at = INF
        self.soft_until_at: float | None = None        # without hardswap: waiting for links to what is listed now, so long
        self._period_s = roster.general.me_reinit_every_secs
        self.periodic_at = now + self._period_s
        self._open_at = -INF

    def apply(self, now: float) -> None:
        """Take the roster's new settings."""
        period_s = self.roster.general.me_reinit_every_secs
        if period_s != self._period_s:
            self.periodic_at = now if period_s < self._period_s else now + period_s
            self._period_s = period_s
        if self.roster.general.hardswap:
            self.soft_until_at = None
        else:
            self.warming.clear()
            self._drop_pending(now)

    def trigger(self, now: float, why: Trigger) -> None:
        """Ask for a renewal.  What comes within the window is one; during a warm-up only changes are remembered."""
        if self.warming and why is Trigger.PERIODIC:
            return
        if not self.triggers:
            self._open_at = now + self.roster.general.me_reinit_coalesce_window_ms / 1000
        self.triggers.add(why)

    def step(self, due: Due) -> None:
        """Do what is due."""
        if due.passed(self.periodic_at):
            self.periodic_at = due.now + self._period_s
            due.passed(self.periodic_at)
            self.trigger(due.now, Trigger.PERIODIC)
        if due.passed(self.retry_at):
            self.retry_at = INF
            self.trigger(due.now, Trigger.PERIODIC)
        if self.warming:
            self._warm_up(due)
        if self.soft_until_at is not None:
            self._soft_swap(due, self.soft_until_at)
        if self.triggers and not self.warming and due.passed(self._open_at):
            self._begin(due)

    def _begin(self, due: Due) -> None:
        roster, generations = self.roster, self.roster.generations
        why = ", ".join(sorted(trigger.value for trigger in self.triggers))
        self.triggers.clear()
        self.retry_at, self.soft_until_at = INF, None
        desired = [group for group in roster.groups.values() if group.endpoints]
        if not desired or not roster.may_dial:
            roster.say(Level.WARN, f"Middle-End renewal ({why}) skipped: {'no proxy-secret' if desired else 'no endpoints'}")
            return
        for group in desired:
            group.fails.clear()
        if not roster.general.hardswap:
            generations.last += 1
            self._soft_swap(due, due.now + GATE_RETRY_S)
            return
        if generations.reusable(due.now, roster.listed):
            roster.counts.count("hardswap_pending_reuse_total")
        else:
            if generations.expired(due.now):
                roster.counts.count("hardswap_pending_ttl_expired_total")
                roster.say(Level.WARN, f"Middle-End generation {generations.pending} was not complete in time and is dropped")
            self._drop_pending(due.now)
            generations.begin(due.now, roster.listed)
        roster.say(Level.INFO, f"Middle-End renewal ({why}): warming up generation {generations.pending}")
        for group in desired:
            self.warming[group.dc] = Warmup()
        self._warm_up(due)

    def _delay_s(self) -> float:
        general = self.roster.general
        return self.roster.uniform(general.me_hardswap_warmup_delay_min_ms, general.me_hardswap_warmup_delay_max_ms) / 1000

    def _pass_pause_s(self, passes: int) -> float:
        """Pause after so many passes."""
        if not passes:
            return 0.0
        general = self.roster.general
        base_s = general.me_hardswap_warmup_pass_backoff_base_ms / 1000
        wait_s = min(base_s * 2.0 ** (passes - 1), max(general.me_reconnect_backoff_cap_ms / 1000, base_s))
        return wait_s + self.roster.draw() * max(0.001, wait_s / 2)

    def _drop_pending(self, now: float) -> None:
        generations = self.roster.generations
        if not generations.pending:
            return
        generations.drop()
        for group in self.roster.groups.values():
            needed = not any(link.phase is Phase.ACTIVE for link in group.links.values())
            for link in [link for link in group.links.values() if link.phase is Phase.WARM]:
                if needed:                     # nothing else works there
                    link.phase, link.generation = Phase.ACTIVE, generations.active
                    self.roster.actions.append(PromoteLink(link.link_id))
                else:
                    self.roster.drain(now, link)

    def _warm_up(self, due: Due) -> None:
        for dc, warmup in self.warming.items():
            group = self.roster.groups.get(dc)
            if group is None or not group.endpoints:
                warmup.done = True
            elif not warmup.done:
                self._warm_group(group, warmup, due)
        if all(warmup.done for warmup in self.warming.values()):
            self._gate(due)

    def _warm_group(self, group: Group, warmup: Warmup, due: Due) -> None:
        """One dial at a time, with pauses; a pass over what is missing, and further passes if that was not enough."""
        roster, general, generation = self.roster, self.roster.general, self.roster.generations.pending
        need = roster.floors.floor(group, due)
        while group.fresh(generation) < need:
            link = roster.links.get(warmup.link_id)
            if link is not None and link.phase is Phase.DIALLING and not due.passed(link.asked_at + roster.one_timeout_s):
                return
            if not warmup.left:
                if warmup.passes > min(10, general.me_hardswap_warmup_extra_passes):
                    roster.say(Level.WARN, f"DC {group.dc}: {group.fresh(generation)} of {need} links of generation {generation}")
                    break
                warmup.next_at = due.now + self._pass_pause_s(warmup.passes) + self._delay_s()
                warmup.passes += 1
                warmup.left = need - group.fresh(generation)
            if not due.passed(warmup.next_at):
                return
            endpoint = roster.choose(group, due.now, generation)
            if endpoint is not None:
                if not roster.has_place(group):
                    return
                warmup.link_id = roster.open(due.now, group, endpoint, Purpose.WARM, generation).link_id
            warmup.left -= 1
            warmup.next_at = due.now + self._delay_s()
        warmup.done = True

    def _gate(self, due: Due) -> None:
        roster, generation = self.roster, self.roster.generations.pending
        groups = [group for dc in self.warming if (group := roster.groups.get(dc)) is not None and group.endpoints]
        self.warming.clear()
        ready = sum(group.fresh(generation) >= roster.floors.floor(group, due) for group in groups)
        if groups and self._passes(due, ready, len(groups)):
            self._swap(due.now, generation)
        if self.triggers:                      # remembered during the warm-up
            self._open_at = due.now + roster.general.me_reinit_coalesce_window_ms / 1000

    def _passes(self, due: Due, ready: int, groups: int) -> bool:
        if ready / groups >= self.roster.general.me_pool_min_fresh_ratio - 1e-6:
            return True
        self.roster.say(Level.WARN, f"Middle-End renewal waits: {ready} of {groups} DC groups are complete")
        self.retry_at = due.now + GATE_RETRY_S
        due.passed(self.retry_at)
        return False

    def _swap(self, now: float, generation: int) -> None:
        roster = self.roster
        roster.generations.promote()
        old: list[LinkFacts] = []
        for group in roster.groups.values():
            replaced = not group.endpoints or bool(group.fresh(generation))
            live = [link for link in group.links.values() if link.live]
            for link in live:
                if replaced and (link.generation < generation or link.endpoint not in group.endpoints):
                    old.append(link)
                elif link.phase is Phase.WARM:
                    link.phase = Phase.ACTIVE
                    roster.actions.append(PromoteLink(link.link_id))
                else:
                    link.generation = generation           # nothing fresh here: what works goes on
            roster.touched.add(group.dc)
        self._retire(now, old, fallback=False)

    def _soft_swap(self, due: Due, until_at: float) -> None:
        """Without hardswap: once enough groups have links to what is listed, the others go; until then wait."""
        desired = [group for group in self.roster.groups.values() if group.endpoints]
        covered = [group for group in desired if group.count(Phase.ACTIVE)]
        waits = len(covered) < len(desired) * (self.roster.general.me_pool_min_fresh_ratio - 1e-6)
        self.soft_until_at = until_at if waits else None
        if not waits:
            gone = [group for group in self.roster.groups.values() if not group.endpoints]
            self._retire(due.now, [link for group in covered + gone for link in group.links.values()
                                   if link.live and link.endpoint not in group.endpoints], fallback=True)
        elif due.passed(until_at):
            self._passes(due, len(covered), len(desired))
            self.soft_until_at = None

    def _retire(self, now: float, links: list[LinkFacts], fallback: bool) -> None:
        for link in links:
            self.roster.drain(now, link, fallback)
        if links:
            self.roster.counts.count("pool_swap_total")
            self.roster.say(Level.INFO, f"Middle-End renewal done: generation {self.roster.generations.active}, {len(links)} links drain")


class Availability:
    """Whether the middle end is usable at all, and what a session does when it is not (D2)."""

    __slots__ = ("roster", "families", "degraded_at", "was_ready", "_down_since", "_warned_at", "_nothing_since", "_had")

    def __init__(self, roster: Roster, now: float) -> None:
        self.roster = roster
        self.families = False                  # an address family is usable
        self.degraded_at: float | None = None  # since when
        self.was_ready = False                 # every group has had a link
        self._down_since: dict[int, float] = {}        # groups without a bindable link
        self._warned_at: dict[int, float] = {}
        self._nothing_since = now              # no groups at all since then
        self._had: set[int] = set()            # groups that have had a link

    def look(self, group: Group, due: Due) -> None:
        """Note whether new sessions can use the group."""
        until_at = max((self.roster.bindable_until(link) for link in group.links.values()), default=-INF)
        if not group.endpoints:
            self._down_since.pop(group.dc, None)
        elif due.passed(until_at):
            self._down_since.setdefault(group.dc, min(due.now, self._nothing_since))
        else:
            self._down_since.pop(group.dc, None)
            self._had.add(group.dc)

    def forget(self, dc: int) -> None:
        """The group is gone."""
        self._down_since.pop(dc, None)
        self._warned_at.pop(dc, None)

    def down(self, due: Due) -> list[int]:
        """Groups that are down now, ascending."""
        return [dc for dc, since in sorted(self._down_since.items()) if due.passed(since + DOWN_S)]

    def step(self, due: Due) -> None:
        """Enter or leave degradation."""
        roster = self.roster
        groups = [group.dc for group in roster.groups.values() if group.endpoints]
        down = self.down(due)
        if groups:
            self._nothing_since = INF
            limit = max(1, min(roster.general.degradation_min_unavailable_dc_groups, len(groups)))
            degraded = len(down) >= limit
        else:
            self._nothing_since = min(self._nothing_since, due.now)
            degraded = due.passed(self._nothing_since + DOWN_S)
        if degraded and self.degraded_at is None:
            self.degraded_at = due.now
            what = "go direct; no ad tag, media of other DCs may not load" if roster.general.auto_degradation_enabled else "wait and close"
            roster.say(Level.WARN, f"Middle-End not usable ({self._reason(down, len(groups))}): new sessions {what}")
            roster.actions += [ServeWaiters(dc) for dc in groups]      # who waits may go direct at once
        elif not degraded and self.degraded_at is not None:
            roster.say(Level.INFO, f"Middle-End usable again after {round(due.now - self.degraded_at)} s")
            self.degraded_at = None
        if not self.was_ready and groups and self._had.issuperset(groups):
            self.was_ready = True
            roster.say(Level.INFO, f"Middle-End pool ready: {len(groups)} DC groups")

    def _reason(self, down: list[int], groups: int) -> str:
        if not self.roster.may_dial:
            return "no proxy-secret"
        return f"{len(down)} of {groups} DC groups down" if self.families and groups else "no usable address family"

    def may_go_direct(self, now: float, dc: int, waited: bool) -> bool:
        """Whether a session of group `dc` goes direct, now that it got no link."""
        if not self.roster.general.auto_degradation_enabled or not (waited or self.degraded_at is not None):
            return False
        if self.degraded_at is None and now - self._warned_at.get(dc, -INF) >= 60:
            self._warned_at[dc] = now
            self.roster.say(Level.WARN, f"DC {dc} has no Middle-End link: its new sessions go direct")
        return True


class Dispatch:
    """Which link a session takes, and what it does when there is none (6.2, D2, D4-D6)."""

    __slots__ = ("roster", "refill", "availability", "queued")

    def __init__(self, roster: Roster, refill: Refill, availability: Availability) -> None:
        self.roster, self.refill, self.availability = roster, refill, availability
        self.queued: Callable[[int], int] = lambda link_id: 0          # unsent bytes of a link

    def route(self, now: float, dc: int, has_direct: bool, waited: bool) -> Way:
        """Return the way of one session."""
        key = self.roster.listed.group_of(dc)
        link = self.pick(now, dc)
        if link is not None:
            return Bind(link.link_id)
        if has_direct and self.availability.may_go_direct(now, key, waited):
            return GoDirect()
        if waited:
            return Refuse()
        group = self.roster.groups.get(key)
        if group is not None:
            self.refill.hurry(group, now)
        return Hold(key, now + HOLD_S)

    def pick(self, now: float, dc: int) -> LinkFacts | None:
        """The best link for a session of the signed `dc` (D4, D5)."""
        roster = self.roster
        key = roster.listed.group_of(dc)
        group = roster.groups.get(key)
        if group is None:
            return None
        exact = roster.listed.exact(dc if key == abs(dc) else key)
        fixed, best, best_rank = roster.general.me_deterministic_writer_sort, None, None
        for link in group.links.values():
            if link.phase is Phase.DIALLING or roster.bindable_until(link) <= now:
                continue
            idle_s = now - link.idle_at if not link.sessions else 0.0
            rank = (link.endpoint not in exact, _CONTOUR[link.phase], link.generation < roster.generations.active, link.pulse.degraded,
                    2 if idle_s >= IDLE_STALE_S else 1 if idle_s >= IDLE_REFRESH_S else 0, link.sessions, self.queued(link.link_id),
                    0.0 if fixed else roster.draw(), link.endpoint if fixed else (), link.link_id)
            if best_rank is None or rank < best_rank:
                best, best_rank = link, rank
        return best


class Keepalive:
    """Pings: when, what they tell, and when a link is given up (5.4, 5.5, D18)."""

    __slots__ = ("roster",)

    def __init__(self, roster: Roster) -> None:
        self.roster = roster

    def interval_s(self, link: LinkFacts) -> tuple[float, float]:
        """Base pause and the most that is added at random, seconds."""
        general = self.roster.general
        if not general.me_keepalive_enabled:
            return 20.0, 10.0
        base_s = max(1.0, general.me_keepalive_interval_secs)
        if not link.sessions:
            base_s = min(base_s, 5.0)
        return base_s, max(0.001, min(general.me_keepalive_jitter_secs, base_s / 2))

    def beat(self, now: float, link: LinkFacts, heard: bool) -> Beat:
        """What to do with the link now."""
        pulse = link.pulse
        base_s, jitter_s = self.interval_s(link)
        again_s = base_s + self.roster.draw() * jitter_s
        if heard or pulse.heard_at == -INF:
            first, pulse.heard_at = pulse.heard_at == -INF, now
            if first:
                return Beat(False, False, again_s + self.roster.draw() * jitter_s)
        silent_s = max(_SILENT_S, 3 * max(1.0, self.roster.general.me_keepalive_interval_secs))
        if pulse.unanswered >= _UNANSWERED_MAX and now - pulse.heard_at >= silent_s:
            return Beat(False, True, again_s)
        pulse.unanswered += 1
        return Beat(True, False, again_s)

    def pong(self, now: float, link: LinkFacts, rtt_ms: float) -> None:
        """A ping was answered."""
        pulse = link.pulse
        pulse.unanswered, pulse.heard_at = 0, now
        if pulse.ema_ms is None:
            pulse.ema_ms = pulse.base_ms = rtt_ms
        else:
            pulse.ema_ms = 0.8 * pulse.ema_ms + 0.2 * rtt_ms
            pulse.base_ms = rtt_ms if rtt_ms < pulse.base_ms else 0.99 * pulse.base_ms + 0.01 * rtt_ms
        pulse.degraded = pulse.ema_ms > 2 * pulse.base_ms

    def signal_pause_s(self, first: bool) -> float | None:
        """Seconds until the next activity signal of a link, None = never."""
        period_s = self.roster.general.rpc_proxy_req_every
        if not period_s:
            return None
        jitter_s = self.roster.draw() * max(0.001, min(self.roster.general.me_keepalive_jitter_secs, period_s / 2))
        return jitter_s if first else period_s + jitter_s


# -- the planner

class PoolPlanner:
    """Composes the organs: reports in, plan() out.  After every report, and after route() said Hold or GoDirect, call plan()."""

    def __init__(self, settings: Settings, draw: Callable[[], float], now: float, counts: MeCounters | None = None) -> None:
        """draw: gives a random number in [0, 1).  counts: where what happens is counted."""
        self.roster = Roster(settings, counts or MeCounters(), draw)
        self.refill, self.renewal, self.swap = Refill(self.roster), Renewal(self.roster), Swap(self.roster, now)
        self.availability, self.keepalive = Availability(self.roster, now), Keepalive(self.roster)
        self.dispatch = Dispatch(self.roster, self.refill, self.availability)
        self.load: dict[int, int] = {}         # |dc| asked for -> sessions bound
        self._sources: tuple[EndpointMap, EndpointMap, int] = ({}, {}, 0)
        self._order: tuple[int, ...] = ()
        self._multipath = False
        self._epoch = 0

    # reports about the world

    def apply(self, now: float, settings: Settings) -> None:
        """Take new settings; links that exist stay as they are."""
        roster = self.roster
        roster.general, roster.one_timeout_s = settings.general, settings.timeouts.me_one_timeout_ms / 1000
        switched = roster.floors.apply(now, settings.general)
        if switched:
            roster.counts.count("floor_mode_switch_total")
            roster.counts.count(switched)
        self.swap.apply(now)
        for group in roster.groups.values():
            group.shadow_at = min(group.shadow_at, now + settings.general.me_single_endpoint_shadow_rotate_every_secs)
        roster.touched.update(roster.groups)

    @property
    def generation(self) -> int:
        """The number in force."""
        return self.roster.generations.active

    def on_map(self, now: float, v4: EndpointMap, v6: EndpointMap, default_dc: int) -> None:
        """New lists of middle ends.  Empty ones are refused: an empty list drains nothing."""
        if not any(map(len, v4.values())) and not any(map(len, v6.values())):
            self.roster.say(Level.WARN, "Middle-End list rejected: empty")
            return
        self._sources = v4, v6, default_dc
        self._relist(now)

    def on_families(self, now: float, order: Sequence[int], multipath: bool) -> None:
        """Address families that are usable for the middle end, the preferred one first."""
        self._order, self._multipath = tuple(order), multipath
        self.availability.families = bool(order)
        self._relist(now)

    def _relist(self, now: float) -> None:
        roster = self.roster
        listed = ProxyMap(*self._sources, self._order, self._multipath)
        if not listed.groups and roster.listed.groups:
            return                             # no family for the moment: keep what is there
        changed = listed != roster.listed
        if changed and roster.listed.groups:
            self.swap.trigger(now, Trigger.MAP)
        roster.listed = listed
        for dc in listed.groups:
            if dc not in roster.groups:
                roster.groups[dc] = Group(dc, now + roster.general.me_single_endpoint_shadow_rotate_every_secs)
        roster.groups = dict(sorted(roster.groups.items()))
        for dc, group in roster.groups.items():
            group.endpoints = listed.groups.get(dc, ())
            group.fails = {endpoint: fails for endpoint, fails in group.fails.items() if endpoint in group.endpoints}
            if not group.endpoints:
                group.episode = None
        roster.touched.update(roster.groups)

    def on_secret(self, now: float, epoch: int) -> None:
        """The proxy secret in force has this number; 0 = there is none, so nothing is dialled."""
        if self._epoch and epoch and epoch != self._epoch:
            self.roster.generations.outdate()
            self.swap.trigger(now, Trigger.SECRET)
        self._epoch, self.roster.may_dial = epoch, epoch != 0
        self.roster.touched.update(self.roster.groups)

    # reports about links

    def on_link_ready(self, now: float, link_id: int) -> None:
        """A dial succeeded."""
        roster = self.roster
        link = roster.links.get(link_id)
        if link is None or link.phase is not Phase.DIALLING:
            return
        group, active = roster.groups[link.dc], roster.generations.active
        link.ready_at = link.idle_at = now
        if link.generation < active or link.generation != roster.generations.pending:
            link.generation = active           # a swap overtook the dial, or its generation was dropped
        link.phase = Phase.WARM if link.generation > active else Phase.ACTIVE
        roster.dial_ended()
        roster.touched.add(link.dc)
        self.refill.on_ready(group, link, now)
        if link.purpose in _REPLACING:
            self.renewal.on_ready(group, link, now)
        if link.endpoint not in group.endpoints:
            roster.drain(now, link)
        else:
            roster.actions.append(ServeWaiters(link.dc))

    def on_dial_failed(self, now: float, link_id: int) -> None:
        """A dial failed, or was given up."""
        link = self.roster.links.get(link_id)
        if link is None or link.phase is not Phase.DIALLING:
            return
        group = self.roster.groups[link.dc]
        self.roster.forget(link)
        self.refill.on_failed(group, link, now)
        if link.purpose in _REPLACING:
            self.renewal.on_failed(group, link, now)

    def on_link_lost(self, now: float, link_id: int, why: Lost = Lost.ERROR) -> None:
        """A link ended that nobody asked to close."""
        roster = self.roster
        link = roster.links.get(link_id)
        if link is None or link.phase is Phase.DIALLING:
            return self.on_dial_failed(now, link_id)
        group = roster.groups[link.dc]
        roster.forget(link)
        if link.phase is Phase.DRAINING:
            return None
        if now - link.ready_at <= FLAP_S:
            roster.quarantine.add(now, link.endpoint)
            roster.counts.count("endpoint_quarantine_total")
            roster.say(Level.WARN, f"DC {link.dc}: endpoint {endpoint_text(link.endpoint)} rests {QUARANTINE_S:.0f} s, its link lived "
                       f"{now - link.ready_at:.1f} s ({why.value})")
        self.refill.on_lost(group, link, self._need(group, Due(now)), now)
        return None

    def on_bound(self, now: float, link_id: int, dc: int) -> None:
        """A session for the signed `dc` uses the link.  Every session is reported with on_unbound, also when its link is gone."""
        self.load[abs(dc)] = self.load.get(abs(dc), 0) + 1
        link = self.roster.links.get(link_id)
        if link is None:
            return
        link.sessions += 1
        self.roster.floors.used(now, link.dc)
        self.roster.touched.add(link.dc)
        if link.generation < self.roster.generations.active:
            self.roster.counts.count("pool_stale_pick_total")

    def on_unbound(self, now: float, link_id: int, dc: int) -> None:
        """A session ended."""
        left = self.load[abs(dc)] - 1
        if left:
            self.load[abs(dc)] = left
        else:
            del self.load[abs(dc)]
        link = self.roster.links.get(link_id)
        if link is None:
            return
        link.sessions -= 1
        if link.live:
            self.roster.floors.used(now, link.dc)
        if not link.sessions:
            link.idle_at = now
            self.roster.touched.add(link.dc)
            if link.phase is Phase.DRAINING:
                self.roster.close(link)

    def beat(self, now: float, link_id: int, heard: bool) -> Beat:
        """Keepalive of one link: call it when the link is ready and whenever `again_s` is over.  heard: any byte since the last call."""
        link = self.roster.links.get(link_id)
        if link is None:                       # its last session has just left, and the order to close it comes with the next plan
            return Beat(False, False, _SILENT_S)
        return self.keepalive.beat(now, link, heard)

    def on_pong(self, now: float, link_id: int, rtt_ms: float) -> None:
        """A ping of this link was answered."""
        link = self.roster.links.get(link_id)
        if link is not None:
            self.keepalive.pong(now, link, rtt_ms)

    def signal_pause(self, first: bool = False) -> float | None:
        """Seconds until the next activity signal of a link, None = no signals."""
        return self.keepalive.signal_pause_s(first)

    # questions

    @property
    def queued(self) -> Callable[[int], int]:
        """Unsent bytes of a link, as its driver tells."""
        return self.dispatch.queued

    @queued.setter
    def queued(self, queued: Callable[[int], int]) -> None:
        self.dispatch.queued = queued

    def route(self, now: float, dc: int, has_direct: bool, waited: bool = False) -> Way:
        """What a new session for the signed `dc` does.  waited: it has been held, and its time is over."""
        return self.dispatch.route(now, dc, has_direct, waited)

    def _need(self, group: Group, due: Due) -> int:
        return self.roster.floors.floor(group, due) if group.endpoints else 0

    # the plan

    def plan(self, now: float) -> list[Action]:
        """Return what is to be done now; the last action says when to ask again."""
        roster = self.roster
        due = Due(now)
        for group in roster.groups.values():
            if group.due_at <= now:
                roster.touched.add(group.dc)
        while True:
            while roster.touched:
                touched, roster.touched = sorted(roster.touched), set()
                for dc in touched:
                    if dc in roster.groups:
                        self._look(roster.groups[dc], now)
            due.at = INF
            self.swap.step(due)
            self.availability.step(due)
            if not roster.touched:
                break
        actions, roster.actions = roster.actions, []
        wake_at = min((group.due_at for group in roster.groups.values()), default=INF)
        return [*actions, WakeAt(min(wake_at, due.at))]

    def _look(self, group: Group, now: float) -> None:
        """Do what is due for one group."""
        due, roster = Due(now), self.roster
        for link in list(group.links.values()):
            if link.phase is Phase.DRAINING:
                roster.drain_step(link, due)
        if not group.endpoints and not group.links:
            del roster.groups[group.dc]
            roster.floors.forget(group.dc)
            self.availability.forget(group.dc)
            return
        if roster.may_dial:
            need = self._need(group, due)
            self.refill.step(group, need, due)
            if not group.outage:
                self.renewal.step(group, need, due)
        self.availability.look(group, due)
        group.due_at = due.at


# -- what the API shows of it (13)

def pool_snapshot(planner: PoolPlanner, now: float) -> PoolSnapshot:
    """Everything about groups and links at this moment."""
    roster = planner.roster
    generations, links = roster.generations, [link for link in roster.links.values() if link.phase is not Phase.DIALLING]
    return PoolSnapshot(
        active_generation=generations.active,
        warm_generation=generations.pending if planner.swap.warming else 0,
        pending_hardswap_generation=generations.pending,
        pending_hardswap_age_secs=int(now - generations.started_at) if generations.pending else None,
        draining_generations=tuple(sorted({link.generation for link in links if link.phase is Phase.DRAINING})),
        writers=tuple(sorted((_writer_row(roster, link, now) for link in links), key=_writer_order)),
        dcs=tuple(_dc_row(planner, group, now) for group in roster.groups.values() if group.dc in roster.listed.groups),
        quarantined=roster.quarantine.rows(now),
        refills=tuple((group.dc, "V6" if ":" in group.episode.endpoint[0] else "V4", 1)
                      for group in roster.groups.values() if group.episode is not None))


def _writer_row(roster: Roster, link: LinkFacts, now: float) -> WriterRow:
    group, ema_ms = roster.groups[link.dc], link.pulse.ema_ms
    return WriterRow(
        writer_id=link.link_id, dc=link.dc if link.endpoint in group.endpoints else None, endpoint=endpoint_text(link.endpoint),
        generation=link.generation, state=link.phase.value, draining=link.phase is Phase.DRAINING, degraded=link.pulse.degraded,
        bound_clients=link.sessions, idle_for_secs=None if link.sessions else max(0, int(now - link.idle_at)), rtt_ema_ms=ema_ms)


def _writer_order(row: WriterRow) -> tuple[int, tuple[int, int, int], int]:
    host, _, port = row.endpoint.rpartition(":")
    return _GROUP_MAX if row.dc is None else row.dc, endpoint_order((host.strip("[]"), int(port))), row.writer_id


def _dc_row(planner: PoolPlanner, group: Group, now: float) -> DcRow:
    live = [link for link in group.links.values() if link.live and link.endpoint in group.endpoints]
    known = [link.pulse.ema_ms for link in live if link.pulse.ema_ms is not None]
    return DcRow(
        dc=group.dc, endpoints=tuple(map(endpoint_text, group.endpoints)), available_endpoints=len({link.endpoint for link in live}),
        required_writers=planner.roster.floors.floor(group, Due(now)), alive_writers=len(live),
        rtt_ms=sum(known) / len(known) if known else None, load=planner.load.get(group.dc, 0))


def route_snapshot(planner: PoolPlanner, now: float, now_wall: float, fallback_sessions: int) -> RouteSnapshot:
    """Where new sessions go at this moment; fallback_sessions: how many are on the direct way now."""
    availability, roster = planner.availability, planner.roster
    direct_since_at = availability.degraded_at if roster.general.auto_degradation_enabled else None
    return RouteSnapshot(
        me_ready=any(roster.bindable_until(link) > now for link in roster.links.values()), middle=direct_since_at is None,
        direct_since_wall=0 if direct_since_at is None else int(now_wall - (now - direct_since_at)), was_ready=availability.was_ready,
        down_dcs=tuple(availability.down(Due(now))), fallback_sessions=fallback_sessions)


class DriftMemory:
    """What went into the keys of the last link to each endpoint: changes tell why handshakes fail (3, item 5).  Diagnostic only."""

    __slots__ = ("_seen",)

    _ENDPOINTS_MAX: ClassVar = 4096            # lists have tens of entries; whatever comes, this is enough to compare with

    def __init__(self) -> None:
        self._seen: dict[Endpoint, tuple[Hashable, int]] = {}

    def note(self, endpoint: Endpoint, fingerprint: Hashable, port: int) -> str | None:
        """Return `drift` when the addresses differ from last time, `port_only` when only our port does."""
        known = self._seen.pop(endpoint, None)
        self._seen[endpoint] = fingerprint, port
        if len(self._seen) > self._ENDPOINTS_MAX:
            del self._seen[next(iter(self._seen))]
        if known is None or known == (fingerprint, port):
            return None
        return "port_only" if known[0] == fingerprint else "drift"


# == 13. loop ================================================================
# One thread, one poller, level-triggered.  A turn: wait, call one handler per
# ready fd, run what is due, run what was deferred, close what was dropped.
#
# Timers.  A Lane is a FIFO of one fixed length, so its deadlines are monotonic
# and arming and cancelling cost one dict operation; `call_later` (a sorted
# list) is for odd moments.  Nothing is armed while nothing goes on: idle costs no wake-up.
#
# Traps.  epoll reports errors and hang-ups even for mask 0, so a stream that
# wants nothing is taken out of the poller.  A socket is closed only at the end
# of the turn: its fd number can then not be reused by an accept of the same
# batch, whose events would go to a stranger.  Python retries epoll_wait after a
# signal, so handlers are woken through a socket pair (signal.set_wakeup_fd).

READ: Final = 1            # EPOLLIN
WRITE: Final = 4           # EPOLLOUT; everything else epoll reports (ERR, HUP) reads as "go and look"
HANGUP: Final = 0x2000     # EPOLLRDHUP: only whether the peer left, bytes or not; `selectors` cannot tell and stays quiet
_NEVER: Final = INF
_PATIENCE_MAX_S: Final = 86_400.0     # epoll counts milliseconds in 31 bits; waking once a day costs nothing
_WORKERS: Final = 4        # helper threads for what blocks: name resolution, files, later https
_WORKER_IDLE_S: Final = 30.0

Handler: TypeAlias = "Callable[[int], None]"


class Poller(Protocol):
    """What the loop needs of a poller; masks are READ and WRITE."""

    name: str

    def register(self, fd: int, mask: int) -> None: ...
    def modify(self, fd: int, mask: int) -> None: ...
    def unregister(self, fd: int) -> None: ...
    def poll(self, timeout_s: float) -> list[tuple[int, int]]: ...


class EpollPoller:
    """epoll; its methods are the kernel's own, without a layer of ours."""

    name = "epoll"

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self.register = self._epoll.register
        self.modify = self._epoll.modify
        self.unregister = self._epoll.unregister
        self.poll = self._epoll.poll           # at most 1,023 ready fds at once; waits for ever when the time is negative
        self.fileno = self._epoll.fileno


class SelectorsPoller:
    """The best of `selectors`, where there is no epoll."""

    name = "selectors"

    def __init__(self) -> None:
        import selectors
        self._selector = selectors.DefaultSelector()
        self._read, self._write = selectors.EVENT_READ, selectors.EVENT_WRITE

    def fileno(self) -> int:
        """What is readable when something is ready."""
        return self._selector.fileno()

    def _events(self, mask: int) -> int:
        return (self._read if mask & READ else 0) | (self._write if mask & WRITE else 0)

    def register(self, fd: int, mask: int) -> None:
        """Watch `fd`."""
        if events := self._events(mask):
            self._selector.register(fd, events)

    def modify(self, fd: int, mask: int) -> None:
        """Change what is watched."""
        self.unregister(fd)
        self.register(fd, mask)

    def unregister(self, fd: int) -> None:
        """Stop watching."""
        with contextlib.suppress(KeyError):    # it wanted HANGUP only
            self._selector.unregister(fd)

    def poll(self, timeout_s: float) -> list[tuple[int, int]]:
        """Ready fds with their masks; waits for ever when timeout_s is negative."""
        ready = self._selector.select(None if timeout_s < 0 else timeout_s)
        return [(key.fd, (READ if events & self._read else 0) | (WRITE if events & self._write else 0))
                for key, events in ready]


class UvloopPoller:
    """libuv by way of uvloop, for who wants it: there the poller turns the loop, because it can only call back.

    uvloop's loop runs for ever and watches one descriptor: the epoll that holds ours.  Traps: given the sockets themselves libuv tells
    an error once and ends the watch, so bytes that came before a reset were the last that was heard of it, and it cannot watch for a
    hang-up alone; `run_forever` takes the wake-up descriptor of signals and gives it back, meanwhile handlers run as soon as it wakes.
    """

    name = "uvloop"

    def __init__(self) -> None:
        """Raises ImportError."""
        import uvloop
        self._loop = uvloop.new_event_loop()
        self._loop.set_exception_handler(self._on_exception)
        self._ours = ours = EpollPoller() if hasattr(select, "epoll") else SelectorsPoller()
        self.register, self.modify, self.unregister = ours.register, ours.modify, ours.unregister
        self._loop.add_reader(ours.fileno(), self._hurry)
        self._soon = False                     # the next turn is under way
        self._over = False                     # uvloop goes round once more after its stop(); we do not
        self._timer: Any = None
        self._timer_at = _NEVER
        self._error: BaseException | None = None
        self._turn: Callable[[list[tuple[int, int]]], None] = lambda events: None
        self._patience: Callable[[], float | None] = lambda: None

    def drive(self, turn: Callable[[list[tuple[int, int]]], None], patience: Callable[[], float | None]) -> None:
        """Call turn(ready fds with their masks) whenever something is ready or patience() is over, until that is None."""
        self._turn, self._patience, self._over = turn, patience, False
        self._plan()
        self._loop.run_forever()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """For tests: a process has one loop, which lives as long."""
        self._loop.close()

    def _hurry(self) -> None:
        if not self._soon:
            self._soon = True
            self._loop.call_soon(self._on_turn)

    def _on_turn(self) -> None:
        self._soon = False
        if self._over:
            return
        self._turn(self._ours.poll(0.0))
        self._plan()

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, _NEVER
        self._hurry()

    def _plan(self) -> None:
        """See to it that the next turn comes in time."""
        left_s = self._patience()
        if left_s is None:
            self._over = True
            self._loop.stop()
        elif left_s == 0.0:
            self._hurry()
        elif left_s > 0.0 and (at := time.monotonic() + left_s) < self._timer_at:        # one that is early only costs a turn
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_at = self._loop.call_later(-(-left_s * 1000 // 1) / 1000, self._on_timer), at     # rounded up

    def _on_exception(self, _loop: object, context: dict[str, Any]) -> None:
        """What leaves a turn ends the loop, as it does elsewhere."""
        self._error = context.get("exception") or InternalError(str(context.get("message")))
        self._loop.stop()


AnyPoller: TypeAlias = "Poller | UvloopPoller"


def pick_poller(wanted: str) -> AnyPoller:
    """Return the poller for `general.event_loop`; `auto` is epoll where there is one, and stands in where uvloop is missing."""
    if wanted == "uvloop":
        with contextlib.suppress(ImportError):
            return UvloopPoller()
    if wanted != "selectors" and hasattr(select, "epoll"):
        return EpollPoller()
    return SelectorsPoller()


class Timer:
    """One call in the future; cancel() is idempotent."""

    __slots__ = ("at", "callback")

    def __init__(self, at: float, callback: Callable[[], None]) -> None:
        self.at = at
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Never call it; the loop drops it when its time comes."""
        self.callback = None

    def __lt__(self, other: Timer) -> bool:
        return self.at < other.at


def draw_fraction() -> float:
    """Return an unpredictable number in [0, 1): jitter and weighted choice need no more than this of `random`."""
    return int.from_bytes(os.urandom(6), "big") / (1 << 48)


_Key = TypeVar("_Key", bound=Hashable)


def shrink(table: dict[Any, Any] | set[Any]) -> None:
    """Give back the room of what is no longer in `table`: a dict or set stays as large as it ever was."""
    kept = table.copy()
    table.clear()
    table.update(kept)


class Lane(Generic[_Key]):
    """Deadlines of one fixed length: `fire(key)` is called `seconds` after the last arm(key)."""

    __slots__ = ("loop", "seconds", "fire", "_due")

    def __init__(self, loop: Loop, seconds: float, fire: Callable[[_Key], None]) -> None:
        self.loop, self.seconds, self.fire = loop, seconds, fire
        self._due: dict[_Key, float] = {}      # in order of deadline, because the length is fixed

    def arm(self, key: _Key) -> None:
        """Start or restart the deadline of `key`."""
        self._due.pop(key, None)
        self._due[key] = at = self.loop.now + self.seconds
        if at < self.loop.wake_at:
            self.loop.wake_at = at

    def cancel(self, key: _Key) -> None:
        """Forget `key`; harmless when it is not armed."""
        self._due.pop(key, None)

    def shrink(self) -> None:
        """Give back the room of deadlines that are over."""
        shrink(self._due)

    def next_at(self) -> float:
        """Earliest deadline, or infinity."""
        for at in self._due.values():
            return at
        return INF

    def run(self, now: float) -> None:
        """Fire everything that is due."""
        while self._due:
            key = next(iter(self._due))
            if self._due[key] > now:
                return
            del self._due[key]
            self.loop.call(self.fire, key)


class Loop:
    """The one event loop of the process."""

    def __init__(self, poller: AnyPoller, clock: Clock) -> None:
        self.poller = poller
        self.clock = clock
        self.now = clock()                     # monotonic seconds at the start of this turn
        self.turns = 0
        self.ready = 0                         # sockets that were ready in this turn
        self.wake_at = INF                     # no deadline is earlier than this; may be too early, never too late
        self.handlers: dict[int, Handler] = {}
        self._lanes: list[Lane[Any]] = []
        self._timers: list[Timer] = []         # by deadline
        self._deferred: list[Callable[[], None]] = []
        self._graveyard: list[socket.socket] = []
        self._idle_jobs: collections.deque[Callable[[], bool]] = collections.deque()
        self._stopped = False
        self._workers: WorkerPool | None = None
        self.mailbox = Mailbox()
        self.watch(self.mailbox.fd, READ, self._on_mail)

    # -- fds

    def watch(self, fd: int, mask: int, handler: Handler) -> None:
        """Call handler(mask) whenever `fd` is ready; `mask` 0 = not now."""
        self.handlers[fd] = handler
        if mask:
            self.poller.register(fd, mask)

    def unwatch(self, fd: int, mask: int) -> None:
        """Forget `fd`, which stays open; `mask`: what it is registered for."""
        if self.handlers.pop(fd, None) is not None and mask:
            self.poller.unregister(fd)

    def drop(self, sock: socket.socket, mask: int) -> None:
        """Forget a socket (`mask`: what it is registered for) and close it at the end of the turn."""
        self.unwatch(sock.fileno(), mask)
        self._graveyard.append(sock)

    def shrink(self) -> None:
        """Give back the room of sockets and deadlines that are gone."""
        shrink(self.handlers)
        for lane in self._lanes:
            lane.shrink()

    # -- time

    def catch_up(self) -> None:
        """Count from this moment: for the start, which is longer than a turn and would be taken off the first time limits."""
        self.now = self.clock()

    def lane(self, seconds: float, fire: Callable[[_Key], None]) -> Lane[_Key]:
        """Return a new FIFO of deadlines of this length."""
        lane = Lane(self, seconds, fire)
        self._lanes.append(lane)
        return lane

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call back once, `delay_s` seconds from now."""
        timer = Timer(self.now + delay_s, callback)
        bisect.insort(self._timers, timer)
        self.wake_at = min(self.wake_at, timer.at)
        return timer

    def defer(self, callback: Callable[[], None]) -> None:
        """Call back at the end of this turn: for anything that may call upwards."""
        self._deferred.append(callback)

    def when_idle(self, job: Callable[[], bool]) -> None:
        """Run `job` while nothing else is to do, until it returns False."""
        self._idle_jobs.append(job)

    # -- other threads

    def call_from_thread(self, callback: Callable[[], None]) -> None:
        """Have the loop thread call back soon; the only method that other threads may use."""
        self.mailbox.post(callback)

    def offload(self, work: Callable[[], _T], done: Callable[[_T | Exception], None]) -> None:
        """Run `work` in a helper thread, then done(result or exception) on the loop thread."""
        if self._workers is None:
            self._workers = WorkerPool(self.call_from_thread)
        self._workers.submit(work, done)

    def on_signal(self, signum: int, handler: Callable[..., None]) -> None:
        """Run `handler` as soon as the process gets `signum`, between two steps of whatever runs; wakes the loop."""
        signal.set_wakeup_fd(self.mailbox.bell, warn_on_full_buffer=False)
        signal.signal(signum, handler)

    def _on_mail(self, _mask: int) -> None:
        for callback in self.mailbox.take():
            self.call(callback)

    # -- the turn

    def run(self) -> None:
        """Turn until stop()."""
        if isinstance(self.poller, UvloopPoller):
            self.poller.drive(self._turn, lambda: None if self._stopped else self._patience())
            return
        poll = self.poller.poll
        while not self._stopped:
            self._turn(poll(self._patience()))

    def stop(self) -> None:
        """Return from run() after this turn."""
        self._stopped = True

    def _patience(self) -> float:
        """Seconds to wait; negative = for ever."""
        if self._deferred or self._idle_jobs:
            return 0.0
        if self.wake_at == _NEVER:
            return -1.0
        left_s = self.wake_at - self.clock()
        return 0.0 if left_s < 0.0 else left_s if left_s < _PATIENCE_MAX_S else _PATIENCE_MAX_S

    def _turn(self, events: list[tuple[int, int]]) -> None:
        self.now = now = self.clock()
        self.turns += 1
        self.ready = len(events)
        handler_of = self.handlers.get
        for fd, mask in events:
            handler = handler_of(fd)
            if handler is not None:
                try:
                    handler(mask)
                except Exception as error:
                    self._blame(error, handler)
        if now >= self.wake_at:
            self._run_due(now)
        if self._deferred:
            todo, self._deferred = self._deferred, []
            for callback in todo:
                self.call(callback)
        if self._idle_jobs and not events:
            self._run_idle_job()
        if self._graveyard:
            for sock in self._graveyard:
                sock.close()
            self._graveyard.clear()

    def call(self, callback: Callable[..., object], *args: object) -> None:
        """Run one callback.  An exception that reaches this point is our fault: it costs what the callback belongs to, never the loop."""
        try:
            callback(*args)
        except Exception as error:
            self._blame(error, callback, *args)

    def _blame(self, error: Exception, callback: Callable[..., object], *args: object) -> None:
        """Log our error and end what it belongs to: the callback's owner, else its argument."""
        log_loop.error("Internal error in %s: %r", getattr(callback, "__qualname__", callback), error)
        where = error.__traceback__
        while where is not None:               # by hand: an import here would need a descriptor, which may be what is missing
            code = where.tb_frame.f_code
            log_loop.error("  Traceback: %s:%d in %s", code.co_filename, where.tb_lineno, code.co_qualname)
            where = where.tb_next
        # At once, not deferred: another event of this batch must not go on with a half-done step.
        inner = callback.func if isinstance(callback, functools.partial) else callback
        for owner in (getattr(inner, "__self__", None), *args):
            victim = getattr(owner, "on_crash", None)
            if victim is not None and victim != callback:
                self.call(victim)
                return

    def _run_due(self, now: float) -> None:
        for lane in self._lanes:
            lane.run(now)
        while self._timers and self._timers[0].at <= now:
            callback = self._timers.pop(0).callback
            if callback is not None:
                self.call(callback)
        first = self._timers[0].at if self._timers else INF
        self.wake_at = min([first, *(lane.next_at() for lane in self._lanes)])

    def _run_idle_job(self) -> None:
        job = self._idle_jobs.popleft()
        try:
            again = job()
        except Exception as error:
            log_loop.error("Internal error in an idle job: %r", error)
            again = False
        if again:
            self._idle_jobs.append(job)


class Mailbox:
    """Calls that other threads and signal handlers want made on the loop thread, and the pair of sockets that wakes it."""

    __slots__ = ("_mail", "_reader", "_writer", "fd", "bell")

    def __init__(self) -> None:
        self._mail: collections.deque[Callable[[], None]] = collections.deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self.fd = self._reader.fileno()        # readable when there is mail
        self.bell = self._writer.fileno()      # for signal.set_wakeup_fd

    def post(self, callback: Callable[[], None]) -> None:
        """Leave a call and ring; from any thread."""
        self._mail.append(callback)
        with contextlib.suppress(OSError):     # a full pipe rings already
            self._writer.send(b"\0")

    def take(self) -> Iterator[Callable[[], None]]:
        """Silence the bell and yield what was left."""
        with contextlib.suppress(BlockingIOError):
            while self._reader.recv(4096):
                pass
        while self._mail:
            yield self._mail.popleft()

    def close(self) -> None:
        """For tests: a process has one loop, which lives as long."""
        self._reader.close()
        self._writer.close()


class WorkerPool:
    """At most four daemon threads for calls that block; idle ones end after half a minute."""

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        import _queue  # their wrappers are a third of a megabyte
        import _thread
        self._post = post
        self._tasks: _queue.SimpleQueue[Callable[[], None]] = _queue.SimpleQueue()
        self._empty = _queue.Empty
        self._start = _thread.start_new_thread
        self._lock = _thread.allocate_lock()
        self._threads = 0
        self._free = 0

    def submit(self, work: Callable[[], _T], done: Callable[[_T | Exception], None]) -> None:
        """Queue `work`; a thread is started if none is free."""
        def task() -> None:
            try:
                result: _T | Exception = work()
            except Exception as error:
                result = error
            self._post(functools.partial(done, result))

        self._tasks.put(task)
        with self._lock:
            if self._free == 0 and self._threads < _WORKERS:
                self._threads += 1
                self._start(self._run, ())

    def _run(self) -> None:
        while True:
            with self._lock:
                self._free += 1
            try:
                task = self._tasks.get(timeout=_WORKER_IDLE_S)
            except self._empty:
                with self._lock:
                    self._free -= 1
                    if self._tasks.empty():
                        self._threads -= 1
                        return
                continue
            with self._lock:
                self._free -= 1
            task()
            del task                           # with all that it was given: the next one may be half a minute away


# -- files

def open_to_read(path: str, flags: int = 0) -> BinaryIO:
    """Open a file for reading.  Raises OSError.

    A pipe without a writer is not waited for, and a directory leaves no descriptor open, as it does with open(fd).
    """
    refuse_nul(path)
    return open(path, "rb", opener=lambda name, mode: os.open(name, mode | os.O_NONBLOCK | os.O_NOCTTY | flags))


def read_small_file(path: str, limit: int, flags: int = 0) -> bytes:
    """The whole content of a regular file of at most `limit` bytes.  Raises OSError."""
    with open_to_read(path, flags) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return data


def refuse_nul(path: str) -> None:
    """Raise OSError for what a configuration may call a path and no system does; Python's is a ValueError."""
    if "\0" in path:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def write_whole(path: str, text: str | bytes, *, replace: bool, mode: int | None = 0o600) -> None:
    """Put a file of this text at `path`: all of it is there, or what was there before.  Raises OSError.

    An empty configuration would start as an open proxy next time, so a full disk or a signal must not leave one.  An
    existing file keeps its owner, and a symbolic link stays one.  Without `replace` a file that exists is an error.
    mode: its permissions; None = those that it had, those of the umask for a new one.
    """
    refuse_nul(path)
    path = os.path.realpath(path)
    before = os.stat(path) if os.path.exists(path) else None
    if before is not None and not (replace and stat.S_ISREG(before.st_mode)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    draft = f"{path}.{os.getpid()}.new"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666 if mode is None else 0o600)
    try:
        with open(fd, "wb") as file:
            if mode is None and before is not None:
                mode = stat.S_IMODE(before.st_mode)
            if before is not None:
                with contextlib.suppress(OSError):             # not ours to give away
                    os.fchown(fd, before.st_uid, before.st_gid)
            if mode is not None:
                os.fchmod(fd, mode)
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(fd)
        os.replace(draft, path)
    except OSError:
        os.unlink(draft)
        raise


class Gate:
    """Lets at most `limit` jobs run at a time; the others wait in line."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._line: collections.deque[Callable[[], None]] = collections.deque()

    def enter(self, job: Callable[[], None]) -> None:
        """Start `job`, now or when a place is free; whatever it began calls leave() once."""
        if self._free:
            self._free -= 1
            job()
        else:
            self._line.append(job)

    def leave(self) -> None:
        """A job is over."""
        if self._line:
            self._line.popleft()()
        else:
            self._free += 1


log_loop: Final = Log("loop")


# == 14. streams =============================================================
# The only room that touches sockets.  A Stream is one connected socket with
# its place in the poller; a Flow copies one direction from a stream to another.
#
# The data path, measured (house.md, docs/performance.md):
# - One Arena for the whole process.  The loop is one thread, so every flow
#   reads into the same memory, transforms there, sends from there and forgets.
#   A connection owns bytes only while its peer is slow.
# - The quantum adapts: it grows while reads come back full and shrinks when
#   they do not.  One read per readiness event, so bulk cannot starve others.
# - Write first.  Only what the kernel did not take is copied and queued; the
#   other side is then paused, so a queue holds what one read left over.
# - Three flows.  CopyFlow: bytes as they are, by splice(2) while they are bulk.
#   WrapFlow: into FakeTLS records, read straight between record headers that
#   are already in place.  UnwrapFlow: out of records, decrypting each payload
#   from where it lies to its place in one run, which is encrypted in place.

QUANTA: Final = (16_384, 65_536, 262_144, 1_048_576)
_STRIDE: Final = RECORD_HEADER + RECORD_OUT_MAX
_WRAP_RECORDS: Final = (1, 8, 32, 128)         # 128 * 8209 bytes: about 1 MiB
_SLACK: Final = 64                             # spare bytes that ciphers ask for behind their output
_ARENA_SIZE: Final = _WRAP_RECORDS[-1] * _STRIDE + _SLACK
_PIPE_SIZE: Final = 1_048_576                  # /proc/sys/fs/pipe-max-size for everybody
_PIPES_MAX: Final = 16                         # beyond it a bulk flow copies; 16 MiB of pipe pages is what a router can spare
_SPLICE_MIN: Final = 65_536                    # smaller moves are cheaper by recv and send
_SPLICE_PATIENCE: Final = 8
_ACCEPT_BATCH: Final = 64
_OWN_PAGES_MIN: Final = 32_768
_BULK: Final = 3                               # the level from which a flow is bulk
_QUEUED_MUCH: Final = 16 << 20                 # what slow sinks may hold before every flow is modest: sixteen unlucky megabytes
_CROWD_S: Final = 0.002                        # over so long, so many events of others make bulk modest, or very modest
_CROWD: Final = 4
_THRONG: Final = 32
AGAIN: Final = -1                              # Flow.run(): nothing to read now
_LENGTH: Final = struct.Struct(">H")
_FULL_HEADER: Final = RECORD_HEAD + _LENGTH.pack(RECORD_OUT_MAX)
_LINGER_NOT: Final = struct.pack("ii", 1, 0)     # SO_LINGER 1, 0: close() sends RST
_NO_SPLICE: Final = frozenset((errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP))     # not here, rather than not now


class Pipe(NamedTuple):
    """A kernel pipe that splice(2) moves pages through; empty whenever the Arena has it."""

    read_fd: int
    write_fd: int


def _pages(size: int) -> mmap.mmap:
    """Private anonymous memory.  mmap's default is shared, which the kernel backs with small shmem pages."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def set_aside(*parts: Bytes) -> memoryview:
    """Return a copy of what lies in `parts` that is given back to the system when nobody needs it any more.

    malloc would keep it: after 300 stalled clients had left, 20-40 MB.  From 32 KiB on a mapping of its own costs little.
    """
    size = sum(map(len, parts))
    if size < _OWN_PAGES_MIN:
        return memoryview(b"".join(parts))
    try:
        copy = memoryview(_pages(size))
    except OSError:                            # 65,530 mappings are what a process may have
        return memoryview(b"".join(parts))
    at = 0
    for part in parts:
        copy[at:at + len(part)] = part
        at += len(part)
    return copy


class Crowd:
    """Knows how much others want the loop: a bulk flow then takes a quarter of a megabyte instead of a whole, or a sixteenth.

    A megabyte costs 0.3 ms, twice on the way of a message and back.  Counted are events that no bulk flow caused, of all turns
    within two milliseconds: chats come in waves, and between two of them a turn holds the bulk flow alone.  Bulk flows among
    themselves keep their megabyte: smaller reads cost more.
    """

    __slots__ = ("_turn", "_ready", "_bulk", "_others", "_until", "_steps")

    def __init__(self) -> None:
        self._turn = self._ready = self._bulk = self._others = self._steps = 0
        self._until = 0.0

    def presses(self, loop: Loop) -> int:
        """Called for every event of a bulk flow.  Returns how many levels it shall step back, 0 to 2; judged by the turns before."""
        if loop.turns != self._turn:
            self._others += self._ready - self._bulk
            self._turn, self._ready, self._bulk = loop.turns, loop.ready, 0
            steps = (self._others >= _CROWD) + (self._others >= _THRONG)
            if loop.now >= self._until:
                self._steps, self._others, self._until = steps, 0, loop.now + _CROWD_S
            elif steps > self._steps:          # who comes need not wait for the end of a period
                self._steps = steps
        self._bulk += 1
        return self._steps


class Arena:
    """Memory that every flow shares, made once: raw input, output, prepared records, pipes.

    pending: `general.crypto_pending_buffer`: after a sink was too slow, one read brings no more than this, so neither does a
    queue.  Only the read that finds out may be larger, up to a megabyte: it grew to that because everything before it was
    taken at once.  When such queues hold 16 MiB together, no read is larger any more.
    paths: words of TELEMT_PATHS, the test hook that forces fallbacks: `no-splice`, `no-scatter`, `no-one-pass`; `quick-checks`
    is for room 15.
    """

    def __init__(self, backend: Backend, pending: int = 262_144, paths: Container[str] = ()) -> None:
        self.apply(pending)
        self.input = backend.region(_pages(_ARENA_SIZE))
        self.output = backend.region(_pages(_ARENA_SIZE))
        self.records = backend.region(_pages(_ARENA_SIZE))          # record headers stand in it for good
        self.single = memoryview(bytearray(RECORD_HEAD.ljust(_STRIDE, b"\0")))
        self.single_payload = self.single[RECORD_HEADER:]
        self._scatter: dict[int, list[memoryview]] = {}
        self._parts: list[Bytes] = []          # header and payload of every record that output holds, as far as they were asked for
        self.can_scatter = hasattr(socket.socket, "recvmsg_into") and "no-scatter" not in paths
        self.can_splice = hasattr(os, "splice") and "no-splice" not in paths
        self.one_pass = "no-one-pass" not in paths     # else ciphers make new bytes, as a backend without Regions would
        self._pipes: list[Pipe] = []
        self._pipes_made = 0
        self.crowd = Crowd()
        self.queued = 0                        # bytes in the queues of all flows

    def apply(self, pending: int) -> None:
        """Take another `general.crypto_pending_buffer`, bytes; for every flow from its next read on."""
        self.patient_level = max(0, bisect.bisect_right(QUANTA, max(pending or 65_536, 4096)) - 1)

    def scatter(self, count: int) -> list[memoryview]:
        """Return the payload places of the first `count` records; their headers are written when first asked for.

        Not at start: 128 headers touch a megabyte of pages that a proxy without bulk never needs.
        """
        views = self._scatter.get(count)
        if views is None:
            longest = max(self._scatter.values(), key=len, default=[])
            views = self._scatter[count] = longest[:count]
            for at in range(len(views) * _STRIDE, count * _STRIDE, _STRIDE):
                self.records.view[at:at + RECORD_HEADER] = _FULL_HEADER
                views.append(self.records.view[at + RECORD_HEADER:at + _STRIDE])
        return views

    def as_records(self, size: int) -> list[Bytes]:
        """Return `size` bytes of output with record headers between them, as parts to be sent; the views are made once."""
        full, tail = divmod(size, RECORD_OUT_MAX)
        parts, view = self._parts, self.output.view
        for at in range(len(parts) // 2 * RECORD_OUT_MAX, full * RECORD_OUT_MAX, RECORD_OUT_MAX):
            parts += (_FULL_HEADER, view[at:at + RECORD_OUT_MAX])
        found = parts[:2 * full]
        if tail:
            found += (RECORD_HEAD + _LENGTH.pack(tail), view[size - tail:size])
        return found

    def take_pipe(self) -> Pipe | None:
        """Return an empty pipe of 1 MiB, or None when there are enough or the system has none left."""
        if self._pipes and self.can_splice:
            return self._pipes.pop()
        if not self.can_splice or self._pipes_made >= _PIPES_MAX:
            return None
        try:
            pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:
            return None
        self._pipes_made += 1
        with contextlib.suppress(OSError):     # an unprivileged user over the pipe-user-pages limit keeps 64 KiB
            fcntl.fcntl(pipe.write_fd, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        return pipe

    @property
    def pipes_held(self) -> int:
        """Pipes that carry bytes now."""
        return self._pipes_made - len(self._pipes)

    def give_pipe(self, pipe: Pipe, empty: bool) -> None:
        """Take a pipe back; one that still holds bytes is closed."""
        if empty:
            self._pipes.append(pipe)
            return
        self._pipes_made -= 1
        os.close(pipe.read_fd)
        os.close(pipe.write_fd)


class Stream:
    """One connected socket.  Owner: whoever last called watch()."""

    __slots__ = ("loop", "sock", "fd", "mask", "unread", "recv_into", "recvmsg_into", "send_some")

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self.loop, self.sock, self.fd = loop, sock, sock.fileno()
        self.mask = 0
        self.unread: Unread | None = None      # comes before what the socket has
        self.recv_into = sock.recv_into        # bound once: a flow calls them for every chunk
        self.recvmsg_into = sock.recvmsg_into
        self.send_some = sock.send

    def watch(self, mask: int, handler: Handler) -> None:
        """Become the owner: handler(mask) is called when the stream is ready for what is wanted."""
        self.loop.handlers[self.fd] = handler
        self.want(mask)

    def want(self, mask: int) -> None:
        """Wait for READ, WRITE, both, HANGUP, or with 0 for nothing (not even a hang-up)."""
        if mask == self.mask:
            return
        if self.unread is not None and mask & READ:
            self.unread.call_again()
        if not self.mask:
            self.loop.poller.register(self.fd, mask)
        elif mask:
            self.loop.poller.modify(self.fd, mask)
        else:
            self.loop.poller.unregister(self.fd)
        self.mask = mask

    def read(self, size: int) -> bytes | None:
        """Return up to `size` bytes, b"" at the end of the stream, None when there is nothing now.  Raises OSError."""
        try:
            return self.sock.recv(size)
        except BlockingIOError:
            return None

    def read_into(self, view: memoryview, size: int) -> int:
        """Put up to `size` bytes into `view`; return how many: 0 at the end of the stream, AGAIN for none now.  Raises OSError."""
        try:
            return self.recv_into(view, size)
        except BlockingIOError:
            return AGAIN

    def write(self, data: Bytes) -> int:
        """Send what the kernel takes now and return how much that was.  Raises OSError."""
        try:
            return self.send_some(data)
        except BlockingIOError:
            return 0

    def local_address(self) -> Address:
        """Our own (ip, port).  Raises OSError."""
        name = self.sock.getsockname()
        return plain_ip(str(name[0])), int(name[1])

    @property
    def is_unix(self) -> bool:
        """True for a unix socket, also when it is closed."""
        return self.sock.family == socket.AF_UNIX

    def release(self) -> socket.socket:
        """Give the socket away, out of the poller: whoever takes it closes it."""
        self.want(0)
        self.loop.handlers.pop(self.fd, None)
        self.fd = -1
        return self.sock

    def local_end(self) -> Address | None:
        """The same, or None for a unix socket and one that is gone."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return self.local_address()
        return None

    def finish(self) -> None:
        """Half-close: no more bytes from us."""
        with contextlib.suppress(OSError):     # already gone: the reader will notice
            self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST: what the other side of a relay did is done to this one."""
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
        self.close()

    def close(self) -> None:
        """Close at the end of the turn; may be called twice."""
        if self.fd >= 0:
            self.loop.drop(self.sock, self.mask)
            self.fd, self.mask = -1, 0
            if self.unread is not None:
                self.unread.forget()


class Unread:
    """What a read brought and nobody looked at: the owner of the stream is called again for it at the end of the turn.

    A read may hold 200,000 records of nothing.  After 1,024 of them (RECORDS_AT_ONCE) the others have their turn.
    """

    __slots__ = ("stream", "arena", "data", "_size", "_called")

    def __init__(self, stream: Stream, arena: Arena, data: memoryview) -> None:
        self.stream, self.arena = stream, arena
        self.data = set_aside(data)
        self._size = len(data)
        self._called = False
        stream.unread = self
        arena.queued += self._size
        self.call_again()

    def take(self) -> int:
        """Put the first bytes where a read would have put them; return how many, at most 16 KiB.  They stay until pass_by()."""
        size = min(len(self.data), QUANTA[0])
        self.arena.input.view[:size] = self.data[:size]
        return size

    def pass_by(self, size: int) -> None:
        """So many bytes have been looked at."""
        self.data = self.data[size:]
        if self.data:
            self.call_again()
        else:
            self.forget()

    def call_again(self) -> None:
        """See to it that the owner is called, unless it wants no bytes then: Stream.want() comes here when it does again."""
        if not self._called:
            self._called = True
            self.stream.loop.defer(self._call)

    def _call(self) -> None:
        self._called = False
        handler = self.stream.loop.handlers.get(self.stream.fd)
        if self.stream.unread is self and self.stream.mask & READ and handler is not None:
            self.stream.loop.call(handler, READ)

    def forget(self) -> None:
        """Nobody will look at the rest."""
        self.stream.unread = None
        self.arena.queued -= self._size
        self._size = 0


class Flow:
    """One direction of a session: source -> bytes -> sink.

    run() is called when the source is readable, flush() when the sink is writable again.  Both raise OSError; run()
    also raises WireError.
    """

    __slots__ = ("arena", "source", "sink", "level", "finished", "over", "sent", "_queue", "_at")

    def __init__(self, arena: Arena, source: Stream, sink: Stream) -> None:
        self.arena, self.source, self.sink = arena, source, sink
        self.level = 0                         # index into QUANTA
        self.finished = False                  # end() was called
        self.over = False                      # run() met an end inside the stream: nothing will follow
        self.sent = 0                          # bytes the sink took, ever
        self._queue: memoryview | None = None  # what the sink did not take yet
        self._at = 0

    def run(self) -> int:
        """Move one quantum.  Returns the payload bytes read, 0 at the end of the source, AGAIN when there was nothing."""
        raise NotImplementedError

    @property
    def pending(self) -> int:
        """Bytes that wait for the sink."""
        return len(self._queue) - self._at if self._queue is not None else 0

    def push(self, data: Bytes) -> None:
        """Send `data`; keep a copy of what the kernel does not take and pause the source."""
        try:
            sent = self.sink.send_some(data)
        except BlockingIOError:
            sent = 0
        self.sent += sent
        if sent != len(data):
            self._keep(data, sent)

    def _keep(self, data: Bytes, sent: int) -> None:
        """The kernel took only `sent` bytes of `data`: keep the rest and pause the source."""
        self._queue, self._at = set_aside(memoryview(data)[sent:]), 0
        self.arena.queued += len(self._queue)
        self._pause()

    def flush(self) -> bool:
        """Send what waits; True when nothing is left and the source runs again."""
        if self._queue is not None:
            self.arena.crowd.presses(self.sink.loop)       # no matter how much: it is bulk that comes too late
            try:
                sent = self.sink.send_some(self._queue[self._at:])
            except BlockingIOError:
                sent = 0
            self.sent += sent
            self._at += sent
            if self._at < len(self._queue):
                return False
            self._forget_queue()
        self._resume()
        return True

    def end(self) -> None:
        """The source ended: pass the end on, after what still waits."""
        self.finished = True
        self.source.want(self.source.mask & ~READ)
        if not self.pending:
            self.sink.finish()

    def close(self) -> None:
        """Give back what the flow holds; the streams belong to the relay."""
        self._forget_queue()

    def _forget_queue(self) -> None:
        if self._queue is not None:
            self.arena.queued -= len(self._queue)
            self._queue = None

    def _modest_level(self) -> int:
        """The level for this read: bulk steps back while others want the loop, or while slow sinks hold much memory already."""
        if self.arena.queued > _QUEUED_MUCH:
            return min(self.level, self.arena.patient_level)
        return self.level - self.arena.crowd.presses(self.source.loop)

    def _pause(self) -> None:
        self.level = min(self.level, self.arena.patient_level)
        self.source.want(self.source.mask & ~READ)
        self.sink.want(self.sink.mask | WRITE)

    def _resume(self) -> None:
        self.sink.want(self.sink.mask & ~WRITE)
        if self.finished:
            self.sink.finish()
        else:
            self.source.want(self.source.mask | READ)

    def _adapt(self, size: int, quantum: int) -> None:
        """Grow after a full read, shrink after one that a smaller quantum would have held."""
        if size == quantum:
            self.level = min(self.level + 1, _BULK)
        elif self.level and size << 2 < quantum:
            self.level -= 1


class CopyFlow(Flow):
    """Bytes go over as they are, or through two ciphers (fast_mode off); by splice(2) while they are bulk."""

    __slots__ = ("passes", "_pipe", "_piped", "_small")

    def __init__(self, arena: Arena, source: Stream, sink: Stream, passes: Sequence[AesCtr] = ()) -> None:
        super().__init__(arena, source, sink)
        self.passes = passes
        self._pipe: Pipe | None = None         # held only while it carries bytes
        self._piped = 0
        self._small = 0                        # splices in a row that were too small to pay

    def run(self) -> int:
        """Move one quantum."""
        level = self.level
        if level == _BULK:
            level = self._modest_level()
            if not self.passes and self._piped == 0:
                pipe = self.arena.take_pipe()
                if pipe is not None:
                    return self._splice(pipe, QUANTA[level])
        quantum = QUANTA[level]
        region = self.arena.input
        try:
            size = self.source.recv_into(region.view, quantum)
        except BlockingIOError:
            return AGAIN
        if size == 0:
            return 0
        if size == quantum or self.level:
            self._adapt(size, quantum)
        if self.passes and not self.arena.one_pass:
            self.push(self.passes[1].update(self.passes[0].update(region.view[:size])))
            return size
        if self.passes and not self.level:
            self.push(self.passes[0].recrypt(self.passes[1], region, 0, size, self.arena.output))
            return size
        for cipher in self.passes:
            cipher.crypt(region, 0, region, 0, size)
        self.push(region.view[:size])
        return size

    def _splice(self, pipe: Pipe, quantum: int) -> int:
        try:
            size = os.splice(self.source.fd, pipe.write_fd, quantum, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:                # readable, yet nothing to splice: an urgent byte, which recv steps over
            self.arena.give_pipe(pipe, True)
            self.level = 0
            return self.run()
        except OSError as error:
            self.arena.give_pipe(pipe, True)
            if error.errno not in _NO_SPLICE:
                raise
            self.arena.can_splice = False      # an odd kernel or a system call filter: copy from now on
            return self.run()
        self._small = self._small + 1 if size < _SPLICE_MIN else 0
        if self._small >= _SPLICE_PATIENCE:
            self._small, self.level = 0, 1
        self._pipe, self._piped = pipe, size
        if size and not self._drain_pipe():
            self._pause()
        elif not size:
            self._return_pipe()
        return size

    def _drain_pipe(self) -> bool:
        """Move the pipe's bytes on; True when it is empty (and given back)."""
        assert self._pipe is not None
        while self._piped:
            try:
                moved = os.splice(self._pipe.read_fd, self.sink.fd, self._piped, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in _NO_SPLICE:
                    raise
                self.arena.can_splice = False
                left = os.read(self._pipe.read_fd, self._piped)
                self._piped = 0
                self._return_pipe()
                self.push(left)
                return not self.pending
            self._piped -= moved
            self.sent += moved
        self._return_pipe()
        return True

    def _return_pipe(self) -> None:
        if self._pipe is not None:
            self.arena.give_pipe(self._pipe, self._piped == 0)
            self._pipe, self._piped = None, 0

    @property
    def pending(self) -> int:
        """Bytes that wait for the sink, in memory and in the pipe."""
        return super().pending + self._piped

    def flush(self) -> bool:
        """Send what waits; True when nothing is left and the source runs again."""
        if self._pipe is not None:
            self.arena.crowd.presses(self.sink.loop)
            if not self._drain_pipe():
                return False
        return super().flush()

    def close(self) -> None:
        """Give back queue and pipe."""
        super().close()
        self._return_pipe()


class WrapFlow(Flow):
    """Bytes go out as FakeTLS records of at most 8209 bytes, untouched (fast_mode) or through two ciphers."""

    __slots__ = ("passes",)

    def __init__(self, arena: Arena, source: Stream, sink: Stream, passes: Sequence[AesCtr] = ()) -> None:
        super().__init__(arena, source, sink)
        self.passes = passes

    def run(self) -> int:
        """Move one quantum; payload bytes are returned, headers are not counted."""
        if not self.level and not self.passes:         # chat: one record, no list of views, no header to put right again
            arena = self.arena
            try:
                size = self.source.recv_into(arena.single_payload)
            except BlockingIOError:
                return AGAIN
            if size:
                if size == RECORD_OUT_MAX:
                    self.level = 1
                _LENGTH.pack_into(arena.single, 3, size)
                data = arena.single[:RECORD_HEADER + size]
                try:                                   # push() in line: a call less for every message
                    sent = self.sink.send_some(data)
                except BlockingIOError:
                    sent = 0
                self.sent += sent
                if sent != size + RECORD_HEADER:
                    self._keep(data, sent)
            return size
        level = self.level if self.level < _BULK else self._modest_level()
        count = _WRAP_RECORDS[level]
        quantum = count * RECORD_OUT_MAX
        views = self.arena.scatter(count)
        try:
            if self.passes or not self.arena.can_scatter:
                size = self.source.recv_into(self.arena.input.view, quantum)
                self._place(size)
            else:
                size = self.source.recvmsg_into(views)[0]
        except BlockingIOError:
            return AGAIN
        if size == 0:
            return 0
        self._adapt(size, quantum)
        self._send_records(size)
        return size

    def _place(self, size: int) -> None:
        """Bring `size` bytes from the input region between the record headers, through the ciphers if there are any."""
        source, target = self.arena.input, self.arena.records
        if self.passes:
            self.passes[0].crypt(source, 0, source, 0, size)
        for at in range(0, size, RECORD_OUT_MAX):
            length = min(RECORD_OUT_MAX, size - at)
            to = at // RECORD_OUT_MAX * _STRIDE + RECORD_HEADER
            if self.passes:
                self.passes[1].crypt(source, at, target, to, length)
            else:
                target.view[to:to + length] = source.view[at:at + length]

    def _send_records(self, size: int) -> None:
        full, tail = divmod(size, RECORD_OUT_MAX)
        view = self.arena.records.view
        at = full * _STRIDE
        if not tail:
            self.push(view[:at])
            return
        _LENGTH.pack_into(view, at + 3, tail)
        try:
            self.push(view[:at + RECORD_HEADER + tail])
        finally:
            _LENGTH.pack_into(view, at + 3, RECORD_OUT_MAX)


class UnwrapFlow(Flow):
    """Payload of the client's FakeTLS records goes out re-encrypted for the data centre.

    What a read holds beyond 1,024 records is left for the end of the turn (Unread).
    """

    __slots__ = ("records", "decrypt", "encrypt")

    def __init__(self, arena: Arena, source: Stream, sink: Stream, records: RecordReader, passes: Sequence[AesCtr]) -> None:
        super().__init__(arena, source, sink)
        self.records = records                 # goes on where the handshake stopped, perhaps inside a record
        self.decrypt, self.encrypt = passes

    def run(self) -> int:
        """Move one quantum.  Returns payload bytes; AGAIN also for a read that held none."""
        source, unread = self.arena.input, self.source.unread
        if unread is not None:
            size = unread.take()
        else:
            quantum = QUANTA[self.level if self.level < _BULK else self._modest_level()]
            try:
                size = self.source.recv_into(source.view, quantum)
            except BlockingIOError:
                return AGAIN
            if size == 0:
                if self.records.mid_record and not self.over:
                    raise WireError(Reason.BAD_RECORD, "IO error: early eof")
                return 0
            if size == quantum or self.level:
                self._adapt(size, quantum)
            elif self.records.is_one_record(source.view, size) and self.arena.one_pass:
                size -= RECORD_HEADER
                self.push(self.decrypt.recrypt(self.encrypt, source, RECORD_HEADER, size, self.arena.output))
                return size
        spans = self.records.spans(source.view, size)
        if unread is not None:
            unread.pass_by(self.records.seen)
        elif self.records.seen < size:
            Unread(self.source, self.arena, source.view[self.records.seen:size])
            self.level = 0
        done = 0
        if not self.arena.one_pass:
            done = self._push_copies([source.view[at:at + length] for at, length in spans])
        elif len(spans) == 1:
            start, done = spans[0]
            self.push(self.decrypt.recrypt(self.encrypt, source, start, done, self.arena.output))
        elif spans:
            target = self.arena.output
            done = self.decrypt.gather(source, spans, target)
            self.encrypt.crypt(target, 0, target, 0, done)
            self.push(target.view[:done])
        if self.records.failed:
            raise self.records.failed
        self.over = self.records.closed
        return done or (0 if self.over else AGAIN)

    def _push_copies(self, pieces: list[memoryview]) -> int:
        """The plain way, on no machine the fast one: kept so that the other can be compared with it."""
        data = self.encrypt.update(self.decrypt.update(b"".join(pieces)))
        if data:
            self.push(data)
        return len(data)


# -- the two ends of a session whose frames are taken apart

_INLET_LEVEL: Final = 2                        # 256 KiB: beyond it the caches lose more than the system calls win
_OUTLET_CAPACITY: Final = _WRAP_RECORDS[-1] * RECORD_OUT_MAX
_CHUNK: Final = 65_536                         # small answers that wait are joined up to this size
_CHAT_MAX: Final = 2048                        # one message alone, up to which a copy costs less than doing without


class Inlet:
    """What a client says, in clear: out of its records, decrypted."""

    __slots__ = ("arena", "source", "records", "cipher", "level")

    def __init__(self, arena: Arena, source: Stream, records: RecordReader | None, cipher: AesCtr) -> None:
        self.arena, self.source, self.records, self.cipher = arena, source, records, cipher
        self.level = 0

    def run(self) -> Bytes | None:
        """Return what one read brought, until the next one valid; empty at the end, None when there was nothing.

        Raises OSError, and WireError for an end inside a record.  records.closed and records.failed are the caller's to ask.
        """
        quantum = QUANTA[self.level]
        source, records, unread = self.arena.input, self.records, self.source.unread
        if unread is not None:
            size = unread.take()
        else:
            try:
                size = self.source.recv_into(source.view, quantum)
            except BlockingIOError:
                return None
            if size == 0:
                if records is not None and records.mid_record and not records.closed:
                    raise WireError(Reason.BAD_RECORD, "IO error: early eof")
                return source.view[:0]
            if size == quantum:
                self.level = min(self.level + 1, _INLET_LEVEL)
            elif self.level and size << 2 < quantum:
                self.level -= 1
        if records is None:
            self.cipher.crypt(source, 0, source, 0, size)
            return source.view[:size]
        if size <= _CHAT_MAX and unread is None and records.is_one_record(source.view, size):
            return self.cipher.take(source, RECORD_HEADER, size - RECORD_HEADER, self.arena.output)
        spans = records.spans(source.view, size)
        if unread is not None:
            unread.pass_by(records.seen)
        elif records.seen < size:
            Unread(self.source, self.arena, source.view[records.seen:size])
            self.level = 0
        if len(spans) == 1:
            start, size = spans[0]
            self.cipher.crypt(source, start, source, start, size)
            return source.view[start:start + size]
        done = self.cipher.gather(source, spans, self.arena.output)
        return self.arena.output.view[:done] if done else None

    def discard(self) -> bool:
        """Read and forget; False at the end.  Raises OSError."""
        try:
            return self.source.recv_into(self.arena.input.view, QUANTA[-1]) > 0
        except BlockingIOError:
            return True


class Outlet:
    """What a client is told: pieces of a region, encrypted where they go, written together, kept while the client is slow.

    `pieces` collects the (start, size) of messages in a region, run() sends them.  `pending` bytes of `waiting` messages are kept.
    """

    __slots__ = ("arena", "sink", "cipher", "tls", "pieces", "pending", "waiting", "sent", "_chunks", "_at")

    def __init__(self, arena: Arena, sink: Stream, cipher: AesCtr, tls: bool) -> None:
        self.arena, self.sink, self.cipher, self.tls = arena, sink, cipher, tls
        self.pending = 0
        self.waiting = 0
        self.sent = 0                          # bytes the client took, ever
        self.pieces: list[tuple[int, int]] = []
        self._chunks: collections.deque[tuple[bytearray | memoryview, list[int]]] = collections.deque()    # with the number of messages
        self._at = 0                           # bytes of the first chunk that are sent

    def run(self, region: Region) -> None:
        """Send what was collected.  Raises OSError."""
        pieces = self.pieces
        if len(pieces) == 1:
            at, size = pieces[0]
            if size <= _CHAT_MAX:
                data = self.cipher.take(region, at, size, self.arena.output)
                pieces.clear()
                self._push(_HEADER.pack(0x17, 0x0303, size) + data if self.tls else data, 1)
                return
        if pieces:
            self.pieces = []
            self._run_all(region, pieces)

    def _run_all(self, region: Region, pieces: list[tuple[int, int]]) -> None:
        """Make one run of ciphertext of them; a piece that meets the end of a record goes on in the next."""
        target, crypt, to = self.arena.output, self.cipher.crypt, 0
        for at, size in pieces:
            while size > (room := _OUTLET_CAPACITY - to):
                crypt(region, at, target, to, room)
                self._push_run(_OUTLET_CAPACITY, 0)
                at, size, to = at + room, size - room, 0
            crypt(region, at, target, to, size)
            to += size
        self._push_run(to, len(pieces))

    def _push_run(self, size: int, messages: int) -> None:
        """Send the first `size` bytes of the output, as records if the client wants them."""
        if self.tls:
            self._push_parts(self.arena.as_records(size), messages)
        else:
            self._push(self.arena.output.view[:size], messages)

    def _push_parts(self, parts: list[Bytes], messages: int) -> None:
        """The same for what lies in several places: one call, no copy."""
        if not self.arena.can_scatter:
            self._push(b"".join(parts), messages)
            return
        sent = 0
        if not self._chunks:
            try:
                sent = self.sink.sock.sendmsg(parts)
            except BlockingIOError:
                sent = 0
            self.sent += sent
        if sent < sum(map(len, parts)):
            self._keep(parts, sent, messages)

    def _push(self, data: Bytes, messages: int) -> None:
        sent = 0
        if not self._chunks:
            try:
                sent = self.sink.send_some(data)
            except BlockingIOError:
                sent = 0
            self.sent += sent
            if sent == len(data):
                return
        self._keep([data], sent, messages)

    def _keep(self, parts: list[Bytes], sent: int, messages: int) -> None:
        """Queue what is left of them behind the first `sent` bytes: something is."""
        at = 0
        while sent >= len(parts[at]):
            sent -= len(parts[at])
            at += 1
        rest = [memoryview(parts[at])[sent:], *parts[at + 1:]]
        left = sum(map(len, rest))
        if not self._chunks:
            self.sink.want(self.sink.mask | WRITE)
        chunk, count = self._chunks[-1] if self._chunks else (b"", [0])
        if isinstance(chunk, bytearray) and len(chunk) + left <= _CHUNK:
            chunk += b"".join(rest)
            count[0] += messages
        else:
            self._chunks.append((bytearray(b"".join(rest)) if left < _CHUNK else set_aside(*rest), [messages]))
        self.pending += left
        self.waiting += messages
        self.arena.queued += left

    def flush(self) -> bool:
        """Send what waits; True when nothing is left.  Raises OSError."""
        while self._chunks:
            chunk, count = self._chunks[0]
            with memoryview(chunk) as view, view[self._at:] as rest:
                try:
                    sent = self.sink.send_some(rest)
                except BlockingIOError:
                    return False
            self.sent += sent
            self._at += sent
            self.pending -= sent
            self.arena.queued -= sent
            if self._at < len(chunk):
                return False
            self.waiting -= count[0]
            self._at = 0
            self._chunks.popleft()
        self.sink.want(self.sink.mask & ~WRITE)
        return True

    def close(self) -> None:
        """Forget what waits."""
        self.arena.queued -= self.pending
        self.pending = self.waiting = 0
        self._chunks.clear()
        self.pieces.clear()


# -- connecting and listening


class Dial:
    """One TCP connect.  done(stream or RouteError) is called once, unless abort() came first.

    deadlines: whose fire is Dial.on_timeout; None = the caller watches the time.  source_ip: local address to come from.
    """

    __slots__ = ("_stream", "_done", "_deadlines", "_where")

    def __init__(self, loop: Loop, ip: str, port: int, deadlines: Lane[Dial] | None, done: Callable[[Stream | RouteError], None],
                 source_ip: str = "") -> None:
        self._where = format_address(ip, port)
        self._done: Callable[[Stream | RouteError], None] | None = done
        self._stream: Stream | None = None
        self._deadlines = deadlines
        if deadlines is not None:
            deadlines.arm(self)
        try:
            self._stream = Stream(loop, _open_socket(ip, source_ip))
            code = self._stream.sock.connect_ex((ip, port))
            if code == errno.EINPROGRESS:
                self._stream.watch(WRITE, self._on_ready)
        except OSError as error:
            code = error.errno or errno.EIO
        if code == 0:                          # a data centre on this host
            loop.defer(functools.partial(self._on_ready, WRITE))
        elif code != errno.EINPROGRESS:
            loop.defer(functools.partial(self._fail, code))

    def abort(self) -> None:
        """Nobody waits any more."""
        self._done = None
        if self._deadlines is not None:
            self._deadlines.cancel(self)
        if self._stream is not None:
            self._stream.close()

    def local_end(self) -> Address | None:
        """Address that the connection comes from, while it is being made."""
        return self._stream.local_end() if self._stream is not None else None

    def on_crash(self) -> None:
        """Our own error while connecting."""
        self._fail(errno.EIO)

    def _on_ready(self, _mask: int) -> None:
        if self._stream is None or self._done is None:
            return
        code = self._stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._fail(code)
            return
        done, stream = self._done, self._stream
        self._done = self._stream = None
        if self._deadlines is not None:
            self._deadlines.cancel(self)
        done(stream)                           # its next owner says what to wait for

    def on_timeout(self) -> None:
        """Called by its lane."""
        self._report(RouteError(f"Connection timeout to {self._where}"))

    def _fail(self, code: int) -> None:
        self._report(RouteError(f"IO error: {os.strerror(code)} (os error {code})", code=code))

    def _report(self, error: RouteError) -> None:
        done = self._done
        self.abort()
        if done is not None:
            done(error)


_IP_BIND_ADDRESS_NO_PORT: Final = 24     # linux/in.h; the socket module names it from 3.12 on only
_DC_KEEPALIVE: Final = ((getattr(socket, "TCP_KEEPIDLE", 0), 40), (getattr(socket, "TCP_KEEPINTVL", 0), 40),
                        (getattr(socket, "TCP_KEEPCNT", 0), 5))           # upstream-and-relay.md D16


def _open_socket(ip: str, source_ip: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        set_option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        set_option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _DC_KEEPALIVE:
            if option:
                set_option(sock, socket.IPPROTO_TCP, option, value)
        if source_ip:
            if sys.platform == "linux":        # the port is chosen at connect, so one address serves 28,000 sessions per target
                set_option(sock, socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source_ip, 0))
    except OSError:
        sock.close()
        raise
    return sock


def set_option(sock: socket.socket, level: int, option: int, value: int) -> bool:
    """Set one socket option; False, and a debug line, where the system refuses it."""
    try:
        sock.setsockopt(level, option, value)
    except OSError as error:
        log_streams.debug("Failed to configure client socket", option=option, value=value, error=error)
        return False
    return True


def tune_client(sock: socket.socket, keepalive_s: int, ack_s: int) -> None:
    """Options of accepted TCP clients, each on its own (client-protocol.md 2.4).

    On Linux a listener's options are copied to what it accepts, which saves five system calls per connection.
    """
    set_option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    set_option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", keepalive_s), ("TCP_KEEPINTVL", keepalive_s), ("TCP_USER_TIMEOUT", ack_s * 1000)):
        if hasattr(socket, name):
            set_option(sock, socket.IPPROTO_TCP, getattr(socket, name), value)


def tune_link(sock: socket.socket) -> None:
    """Options of a link to the middle end (middle-proxy-wire.md 3)."""
    done = set_option(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    done &= set_option(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            done &= set_option(sock, socket.IPPROTO_TCP, getattr(socket, name), value)
    if not done:
        log_streams.warn("Failed to configure Middle-End socket")


OPTIONS_INHERITED: Final = sys.platform == "linux"


def format_address(ip: str, port: int) -> str:
    """`1.2.3.4:5` or `[2001:db8::1]:5`."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def plain_ip(ip: str) -> str:
    """An IPv4-mapped IPv6 address as IPv4; a zone id is cut off."""
    ip = ip.partition("%")[0]
    return ip[7:] if ip.startswith("::ffff:") and "." in ip else ip


class SpareDescriptor:
    """A descriptor kept for the moment when there are none: with it callers can at least be told to go (client-protocol.md D2)."""

    __slots__ = ("_like", "_fd")

    def __init__(self, like: int) -> None:
        self._like = like                      # any open one: its copy needs no file system
        self._fd = os.dup(like)

    def turn_away(self, sock: socket.socket) -> None:
        """Accept and close who waits at a listening socket; otherwise they would wait until they give up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):
            for _ in range(_ACCEPT_BATCH):
                os.close(sock._accept()[0])    # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            self._fd = os.dup(self._like)


class Listener:
    """One listening socket.  on_accept(socket, peer address) is called for each connection, at most 64 a turn."""

    __slots__ = ("loop", "sock", "fd", "address", "spare", "_on_accept", "_wanted", "_resting", "_active", "_starved")

    def __init__(self, loop: Loop, sock: socket.socket, on_accept: Callable[[socket.socket, Any], None],
                 spare: SpareDescriptor | None = None) -> None:
        self.loop, self.sock, self.fd = loop, sock, sock.fileno()
        self.address = sock.getsockname()
        self.spare = spare
        self._starved = False                  # no descriptor was left for the last one either
        self._on_accept = on_accept
        self._wanted = False                   # the owner wants connections
        self._resting = False                  # accept failed a moment ago
        self._active = False                   # in the poller: wanted and not resting
        loop.watch(self.fd, 0, self._on_ready)

    def resume(self) -> None:
        """Accept from now on."""
        self._wanted = True
        self._update()

    def pause(self) -> None:
        """Leave further connections in the kernel's backlog."""
        self._wanted = False
        self._update()

    def close(self) -> None:
        """Stop listening; may be called twice."""
        if self.fd >= 0:
            self.loop.drop(self.sock, READ if self._active else 0)
            self.fd, self._active, self._wanted = -1, False, False

    def _update(self) -> None:
        active = self._wanted and not self._resting
        if active != self._active and self.fd >= 0:
            self._active = active
            if active:
                self.loop.poller.register(self.fd, READ)
            else:
                self.loop.poller.unregister(self.fd)

    def _on_ready(self, _mask: int) -> None:
        for _ in range(_ACCEPT_BATCH):
            if not self._active:
                return
            try:
                fd, peer = self.sock._accept()  # type: ignore[attr-defined]
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._on_error(error)
                return
            self._starved = False
            sock = socket.socket(self.sock.family, self.sock.type, self.sock.proto, fd)
            sock.setblocking(False)
            self._on_accept(sock, peer)

    def _on_error(self, error: OSError) -> None:
        """Level-triggered, so go away for a moment; a shortage that lasts longer must not leave callers without an answer."""
        if _accept_error.ready():
            what = "Unix socket accept error" if isinstance(self.address, str) else "Accept error"
            log_streams.error("%s: IO error: %s (os error %s)", what, error.strerror, error.errno)
        if error.errno in (errno.EMFILE, errno.ENFILE):
            if self._starved and self.spare is not None:
                self.spare.turn_away(self.sock)
            self._starved = True
        self._resting = True
        self._update()
        self.loop.call_later(_ACCEPT_REST_S, self._on_rested)

    def _on_rested(self) -> None:
        self._resting = False
        self._update()


_ACCEPT_REST_S: Final = 0.1
_accept_error: Final = Throttle(5.0)


def bind_tcp(ip: str, port: int, reuse_port: bool) -> socket.socket:
    """Return a listening TCP socket (client-protocol.md 2.1).  Raises OSError."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setblocking(False)
        sock.bind((ip, port))
        sock.listen(1024)
    except OSError:
        sock.close()
        raise
    return sock


def resolve(loop: Loop, host: str, port: int, done: Callable[[list[str] | Exception], None]) -> None:
    """Look `host` up in a helper thread; done(IP addresses in the system's order, or the error) on the loop thread.

    The host goes to getaddrinfo as bytes: a str needs the idna codec, which the smallest routers lack (platform.md 1).
    """
    if not host.isascii():
        loop.defer(functools.partial(done, ConfigError(f"host name must be ASCII: {host}")))
        return

    def look_up() -> list[str]:
        rows = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(row[4][0]) for row in rows))

    loop.offload(look_up, done)


class Resolver:
    """Host names to IP addresses: overrides, then what was found lately, then the system in a helper thread (client-protocol.md D19).

    An answer is good for 60 s.  For ten minutes more it still serves, while a new one is asked for: a stranger must not feel
    our name server.  An error is remembered for 5 s and does not replace an answer.  One question per name at a time.
    """

    __slots__ = ("loop", "overrides", "_known", "_waiting")

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.overrides: Mapping[tuple[str, int], object] = {}        # (lower-case host, port) -> IP, of network.dns_overrides
        self._known: dict[str, tuple[float, list[str] | Exception]] = {}         # host -> good until, oldest first
        self._waiting: dict[str, list[Callable[[list[str] | Exception], None]]] = {}

    def lookup(self, host: str, port: int, done: Callable[[list[str] | Exception], None]) -> None:
        """Call done(addresses in the order to try them, or the error): at once where the answer is known."""
        host = host.lower()
        override = self.overrides.get((host, port))
        if override is not None:
            done([str(override)])
            return
        with contextlib.suppress(ValueError):
            done([str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))])
            return
        until, found = self._known.get(host, (0.0, None))
        fresh = self.loop.now < until
        if found is not None and (fresh or (isinstance(found, list) and self.loop.now < until + _NAME_STALE_S)):
            if not fresh:
                self._ask(host, port)
            done(found)
            return
        self._ask(host, port).append(done)

    def forget(self, host: str) -> None:
        """Its addresses do not answer: ask the system again the next time."""
        self._known.pop(host.lower(), None)

    def _ask(self, host: str, port: int) -> list[Callable[[list[str] | Exception], None]]:
        """Who waits for the answer about `host`; asks if nobody did yet."""
        waiting = self._waiting.get(host)
        if waiting is None:
            waiting = self._waiting[host] = []
            resolve(self.loop, host, port, functools.partial(self._on_answer, host))
        return waiting

    def _on_answer(self, host: str, result: list[str] | Exception) -> None:
        known = self._known.pop(host, (0.0, None))[1]
        failed = isinstance(result, Exception)
        kept = known if failed and isinstance(known, list) else result
        self._known[host] = self.loop.now + (_NAME_ERROR_S if failed else _NAME_GOOD_S), kept
        if len(self._known) > _NAMES_MAX:
            del self._known[next(iter(self._known))]
        for done in self._waiting.pop(host, ()):
            self.loop.call(done, kept)


_NAME_GOOD_S: Final = 60.0
_NAME_STALE_S: Final = 600.0
_NAME_ERROR_S: Final = 5.0
_NAMES_MAX: Final = 64                   # names come from the configuration only


def bind_unix(path: str) -> socket.socket:
    """Return a unix socket bound to `path`, not listening yet.  A live one there is an address in use; raises OSError.

    Only a dead socket is removed: whatever else lies there is somebody's file (config.md 8 item 18).
    """
    refuse_nul(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                if sock.connect_ex(path) != errno.ECONNREFUSED:      # EAGAIN: alive, and its backlog is full
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
                os.unlink(path)
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    return sock


def connect_unix(loop: Loop, path: str) -> Stream:
    """Return a stream to a unix socket, connected.  Raises BlockingIOError while its backlog is full, or OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return Stream(loop, sock)


def is_local_ip(ip: str) -> bool:
    """True for an address of this host."""
    try:
        with contextlib.closing(socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM)) as sock:
            sock.bind((ip, 0))
    except OSError:
        return False
    return True


def local_address_towards(ip: str) -> str | None:
    """IP that the system would send from towards `ip`, or None without a route.  Sends nothing (upstream-and-relay.md 3.1)."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with contextlib.closing(socket.socket(family, socket.SOCK_DGRAM)) as sock:
            sock.connect((ip, 80))
            return plain_ip(str(sock.getsockname()[0]))
    except OSError:
        return None


class Datagrams:
    """One UDP socket connected to its peer, so that the kernel lets nobody else answer.

    on_datagram(bytes, or the OSError that an ICMP message became).  The constructor raises OSError.
    """

    __slots__ = ("_loop", "_sock", "_on_datagram")

    def __init__(self, loop: Loop, peer: Address, source_ip: str, on_datagram: Callable[[bytes | OSError], None]) -> None:
        sock = socket.socket(socket.AF_INET6 if ":" in peer[0] else socket.AF_INET, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            if source_ip:
                sock.bind((source_ip, 0))
            sock.connect(peer)
        except OSError:
            sock.close()
            raise
        self._loop, self._sock, self._on_datagram = loop, sock, on_datagram
        loop.watch(sock.fileno(), READ, self._on_ready)

    def put(self, data: bytes) -> None:
        """Send one datagram, or lose it as the network would.  Raises OSError for what makes waiting pointless."""
        with contextlib.suppress(BlockingIOError):
            self._sock.send(data)

    def close(self) -> None:
        """Close at the end of the turn; may be called twice."""
        if self._sock.fileno() in self._loop.handlers:
            self._loop.drop(self._sock, READ)

    def _on_ready(self, _mask: int) -> None:
        try:
            data: bytes | OSError = self._sock.recv(STUN_MAX)
        except BlockingIOError:                # the checksum was wrong
            return
        except OSError as error:
            data = error
        self._on_datagram(data)


# -- addresses of an interface (platform.md 2)

_NLMSG: Final = struct.Struct("=IHHII")        # length, type, flags, sequence, pid
_IFADDR: Final = struct.Struct("=BBBBI")       # family, prefix length, flags, scope, interface
_RTM_GETADDR, _RTM_NEWADDR, _NLMSG_ERROR, _NLMSG_DONE = 22, 20, 2, 3
_NLM_F_REQUEST_DUMP: Final = 0x301
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_UNUSABLE: Final = 0x08 | 0x40           # duplicate found, duplicate detection not over
_SIOCGIFADDR, _SIOCGIFCONF = 0x8915, 0x8912
_ADDRESSES_MAX: Final = 1024             # IPv4 addresses of this host, all interfaces together


def interface_addresses(name: str) -> list[str]:
    """Addresses of an interface in the system's order, without IPv6 link-local ones; none for an unknown interface.

    By rtnetlink; where AF_NETLINK is forbidden, by ioctl (without ctypes the first IPv4 address only) and /proc/net/if_inet6.
    """
    try:
        refuse_nul(name)
        index = socket.if_nametoindex(name)
        return [ip for ip in _netlink_addresses(index) if not ip.startswith("fe80:")]
    except (OSError, AttributeError):
        return [ip for ip in _plain_addresses(name) if not ip.startswith("fe80:")]


def _netlink_addresses(index: int) -> list[str]:
    found: list[str] = []
    with contextlib.closing(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)) as sock:
        sock.settimeout(1.0)                   # the kernel answers at once or never
        sock.send(_NLMSG.pack(_NLMSG.size + _IFADDR.size, _RTM_GETADDR, _NLM_F_REQUEST_DUMP, 1, 0) + bytes(_IFADDR.size))
        while True:
            data, at = sock.recv(65_536), 0
            while at + _NLMSG.size <= len(data):
                size, kind = _NLMSG.unpack_from(data, at)[:2]
                if kind == _NLMSG_DONE:
                    return found
                if kind == _NLMSG_ERROR or size < _NLMSG.size:
                    raise OSError(errno.EPROTO, "rtnetlink refused")
                if kind == _RTM_NEWADDR:
                    found += _one_address(data[at + _NLMSG.size:at + size], index)
                at += size + 3 & ~3


def _one_address(message: bytes, index: int) -> list[str]:
    family, _, flags, _, owner = _IFADDR.unpack_from(message)
    if owner != index or flags & _IFA_F_UNUSABLE:
        return []
    values, at = {}, _IFADDR.size
    while at + 4 <= len(message):
        size, kind = struct.unpack_from("=HH", message, at)
        values[kind] = message[at + 4:at + size]
        at += max(4, size + 3 & ~3)
    packed = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS) or b""     # of a point-to-point link ADDRESS is the other end
    return [str(ipaddress.ip_address(packed))] if len(packed) == (16 if family == socket.AF_INET6 else 4) else []


def _plain_addresses(name: str) -> list[str]:
    found = []
    with contextlib.suppress(OSError, ValueError), contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        try:
            found += _ioctl_addresses(sock, name)
        except (ImportError, MemoryError):     # MemoryError: ctypes under a seccomp filter
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("16s24x", name.encode()[:15]))
            found.append(str(ipaddress.IPv4Address(answer[20:24])))
    with contextlib.suppress(OSError, ValueError), open("/proc/net/if_inet6", encoding="ascii") as rows:
        found += [str(ipaddress.IPv6Address(bytes.fromhex(row.split()[0]))) for row in rows if row.split()[-1] == name]
    return found


def _ioctl_addresses(sock: socket.socket, name: str) -> list[str]:
    """All IPv4 addresses of an interface, those with a label (`eth0:1`) too; the kernel writes them to a place it is told."""
    import ctypes
    row = 16 + (24 if struct.calcsize("P") == 8 else 16)       # struct ifreq: name, then a union
    room = ctypes.create_string_buffer(row * _ADDRESSES_MAX)
    used, _ = struct.unpack("iP", fcntl.ioctl(sock, _SIOCGIFCONF, struct.pack("iP", len(room), ctypes.addressof(room))))
    rows = [room.raw[at:at + row] for at in range(0, used, row)]
    return [str(ipaddress.IPv4Address(data[20:24])) for data in rows if data[:16].partition(b"\0")[0].partition(b":")[0] == name.encode()]


# -- HTTP, blocking: for helper threads.  Neither urllib nor str host names: the smallest routers lack them (platform.md 1)

_URL_PARTS: Final = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?(/[\x21-\x7e]*)?", re.IGNORECASE)
_ANSWER_HEAD_MAX: Final = 16_384
_REDIRECTS_MAX: Final = 5
_REDIRECTS: Final = (301, 302, 303, 307, 308)


class Url(NamedTuple):
    """Where to ask for what."""

    secure: bool
    host: str                                  # an IPv6 address without brackets
    port: int
    path: str


class HttpAnswer(NamedTuple):
    """The answer to a GET; `body` is cut at the limit, names of `headers` are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


def parse_url(text: str) -> Url:
    """Return the parts of an http or https URL.  Raises ValueError."""
    match = _URL_PARTS.fullmatch(text.partition("#")[0])
    if match is None:
        raise ValueError(f"not an http(s) URL: {text!a}")
    secure = match[1].lower() == "https"
    return Url(secure, match[2].strip("[]"), int(match[3] or (443 if secure else 80)), match[4] or "/")


def connect_blocking(ip: str, port: int, timeout_s: float) -> socket.socket:
    """A connected socket with this time limit, for helper threads.  Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        sock.connect((ip, port))
    except OSError:
        sock.close()
        raise
    return sock


def http_over(sock: socket.socket, url: Url, limit: int, deadline_at: float, agent: str) -> HttpAnswer:
    """Ask for `url` over a connected socket, with TLS and a verified certificate for https, and close it.

    limit: bytes of the body that are read.  deadline_at: time.monotonic().  Blocks.  Raises OSError, ValueError, ImportError
    (no ssl module).
    """
    most = _ANSWER_HEAD_MAX + 4 * limit + 65_536               # chunks have lines of their own
    with contextlib.closing(sock):
        sock.settimeout(_left(deadline_at))
        if url.secure:
            import ssl  # megabytes, and not on every router
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=url.host.encode("ascii"))
        with contextlib.closing(sock):
            host = format_address(url.host, url.port) if url.port not in (80, 443) else f"[{url.host}]" if ":" in url.host else url.host
            sock.sendall(f"GET {url.path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {agent}\r\nAccept: */*\r\n"
                         "Connection: close\r\n\r\n".encode("ascii"))
            data = b""
            while (answer := parse_http(data, limit, False)) is None:
                sock.settimeout(_left(deadline_at))
                piece = sock.recv(65_536)
                if not piece:
                    answer = parse_http(data, limit, True)
                    assert answer is not None
                    break
                data += piece
                if len(data) > most:           # all of it is parsed again for each piece
                    raise ValueError("the HTTP answer is too long")
    return answer


def _left(deadline_at: float) -> float:
    left = deadline_at - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def parse_http(data: bytes, limit: int, ended: bool) -> HttpAnswer | None:
    """Return the answer in `data`, or None while more has to come; `ended`: the peer has closed.  Raises ValueError."""
    head, gap, rest = data.partition(b"\r\n\r\n")
    if not gap:
        if ended or len(data) > _ANSWER_HEAD_MAX:
            raise ValueError("not an HTTP answer")
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if not words[0].startswith("HTTP/1.") or len(words) < 2 or not re.fullmatch("[1-5][0-9][0-9]", words[1]):
        raise ValueError("not an HTTP answer")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body, whole = _unchunk(rest, limit)
    else:
        size = headers.get("content-length", "")
        body, whole = rest, len(rest) >= (int(size) if size.isascii() and size.isdigit() and len(size) < 10 else limit)
        if ended and size and not whole and len(rest) < limit:
            raise ValueError("the HTTP answer is cut short")
    if not (whole or ended or len(body) >= limit):
        return None
    return HttpAnswer(int(words[1]), headers, body[:limit])


def _unchunk(rest: bytes, limit: int) -> tuple[bytes, bool]:
    """(body as far as it came, True if that is all)."""
    body = b""
    while len(body) < limit:
        line, gap, rest = rest.partition(b"\r\n")
        if not gap:
            return body, False
        size = int(line.partition(b";")[0], 16)
        if not 0 < size < 1 << 32:
            return body, True
        body += rest[:size]
        if len(rest) < size + 2:
            return body, False
        rest = rest[size + 2:]
    return body, True


def fetch_url(text: str, limit: int, timeout_s: float, agent: str = "telemt") -> HttpAnswer:
    """Ask for an URL over IPv4, directly, within `timeout_s`; redirects are followed.  Blocks.  Raises as http_over()."""
    deadline_at = time.monotonic() + timeout_s
    url = parse_url(text)
    for _ in range(_REDIRECTS_MAX):
        ip = socket.getaddrinfo(url.host.encode("ascii"), url.port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        answer = http_over(connect_blocking(str(ip), url.port, _left(deadline_at)), url, limit, deadline_at, agent)
        if answer.status not in _REDIRECTS:
            return answer
        where = answer.headers.get("location", "")
        if where.startswith("/") and not where.startswith("//"):
            scheme = "https" if url.secure else "http"
            where = f"{scheme}://{format_address(url.host, url.port)}{where}"
        url = parse_url(where)
    raise ValueError("too many redirects")


log_streams: Final = Log("streams")


# == 15. discovery ============================================================
# Our own addresses, and what the world sees of them.  Links to the middle end
# are keyed with the address that Telegram sees, and tg:// links name it; behind
# NAT nobody tells us.  So STUN servers are asked by UDP and by TCP, then web
# sites, then the cache file.  Who needs an answer gets what is known by now.
#
#   NetworkView  the addresses, and who is told when one changes
#   StunRound    all servers at once; two of a kind are believed (Votes)
#
# Source: upstream-and-relay.md 3, 4, 5, D11, D13-D15.

_STUN_LIMIT_S: Final = 5.0                     # one server, one family
_STUN_AGAIN_S: Final = 4.0                     # when it is asked a second time: 3 s of patience, 1 s of pause
_STUN_TCP_LIMIT_S: Final = 3.0                 # to connect, and again to answer
_STUN_TCP_SERVERS: Final = 3
_STUN_LOOKUPS: Final = 2                       # names at a time: half of the helper threads stay free for others
_STUN_FRESH_S: Final = 600.0                   # how long an answer is good
_STUN_RETRY_S: Final = 60.0                    # pause after a round that found nothing; doubles up to an hour
_WISHES_MAX: Final = 16                        # source addresses we keep an eye on
_SITE_LIMIT_S: Final = 3.0
_SITE_BODY_MAX: Final = 256
_READERS_WAIT_S: Final = 5.0                   # links are printed after so long at the latest (config.md 8 item 14)

Target: TypeAlias = "tuple[str, int]"          # IP without brackets, port


class Families(NamedTuple):
    """Which address families we use, and which first (upstream-and-relay.md 3.2)."""

    ipv4: bool
    ipv6: bool
    prefer_v6: bool


def decide_families(network: Network, detected_v4: str | None, detected_v6: str | None) -> Families:
    """Combine what is configured with what the host has a route for.

    No route of a configured family counts as all of them usable: a late uplink must not keep us from trying (D15).
    """
    ipv4 = network.ipv4 and detected_v4 is not None
    ipv6 = network.ipv6 and detected_v6 is not None
    if not (ipv4 or ipv6):
        ipv4, ipv6 = network.ipv4, network.ipv6
    if network.prefer == 6 and not ipv6:
        log_network.warn("prefer=6 requested but IPv6 unavailable; falling back to IPv4")
    return Families(ipv4, ipv6, network.prefer == 6 and ipv6)


@functools.lru_cache(64)                     # overrides and bind addresses are read for every session, and there are few
def parse_target(text: str) -> Target:
    """Return (ip, port) of `ip:port` or `[ip6]:port`; ValueError for anything else."""
    found = parse_ip_port(text)
    if found is None:
        raise ValueError(f"not an IP:PORT: {text!r}")
    return str(found[0]), found[1]


def parse_host_port(text: str) -> tuple[str, int]:
    """Return (host, port) of `host:port`, `ip:port` or `[ip6]:port`; ValueError for anything else."""
    found = parse_ip_port(text)
    if found is not None:
        return str(found[0]), found[1]
    host, _, digits = text.rpartition(":")
    port = parse_port(digits)
    if not host or ":" in host or port is None:
        raise ValueError(f"not a HOST:PORT: {text!r}")
    return host, port


Wish: TypeAlias = "tuple[int, str]"            # IP version, source address; empty = the system's choice


class StunQuestion:
    """One STUN server is asked one wish.  done(question, our address or None) is called once, unless abort() came first."""

    __slots__ = ("place", "wish", "_id", "_done", "_timers")

    def __init__(self, loop: Loop, place: int, wish: Wish, done: Callable[[StunQuestion, Target | None], None], limit_s: float) -> None:
        self.place, self.wish = place, wish    # place: of the server in the list
        self._id = os.urandom(STUN_ID_SIZE)
        self._done: Callable[[StunQuestion, Target | None], None] | None = done
        self._timers = [loop.call_later(limit_s, self.give_up)]

    def give_up(self) -> None:
        """End without an answer."""
        self._end(None)

    def abort(self) -> None:
        """Nobody wants to know any more."""
        self._done = None
        for timer in self._timers:
            timer.cancel()

    def _end(self, found: Target | None) -> None:
        done = self._done
        self.abort()
        if done is not None:
            done(self, found)


class StunByUdp(StunQuestion):
    """Asks again when nothing came.  What is no answer to our question is as if it had never come (D13)."""

    __slots__ = ("_socket",)

    def __init__(self, loop: Loop, server: Target, place: int, wish: Wish, done: Callable[[StunQuestion, Target | None], None]) -> None:
        super().__init__(loop, place, wish, done, _STUN_LIMIT_S)
        self._timers += [loop.call_later(0.0, self._ask), loop.call_later(_STUN_AGAIN_S, self._ask)]
        self._socket: Datagrams | None = None
        with contextlib.suppress(OSError):
            self._socket = Datagrams(loop, server, wish[1], self._on_datagram)

    def abort(self) -> None:
        """Nobody wants to know any more."""
        super().abort()
        if self._socket is not None:
            self._socket.close()

    def _ask(self) -> None:
        try:
            if self._socket is None:           # no route, or not our address
                raise OSError
            self._socket.put(build_stun_request(self._id))
        except OSError:
            self.give_up()

    def _on_datagram(self, data: bytes | OSError) -> None:
        if isinstance(data, OSError):          # nobody listens there
            self.give_up()
        elif self._done is not None and (found := parse_stun_response(data, self._id, self.wish[0])):
            self._end(found)


class StunByTcp(StunQuestion):
    """The same over TCP, where UDP gets through to nobody (D14)."""

    __slots__ = ("_dial", "_stream", "_got")

    def __init__(self, loop: Loop, server: Target, place: int, wish: Wish, done: Callable[[StunQuestion, Target | None], None]) -> None:
        super().__init__(loop, place, wish, done, _STUN_TCP_LIMIT_S)
        self._got = b""
        self._stream: Stream | None = None
        self._dial = Dial(loop, *server, None, self._on_dialled, wish[1])

    def abort(self) -> None:
        """Nobody wants to know any more."""
        super().abort()
        self._dial.abort()
        if self._stream is not None:
            self._stream.close()

    def _on_dialled(self, result: Stream | RouteError) -> None:
        if isinstance(result, RouteError):
            self.give_up()
            return
        self._stream = result
        self._timers.append(result.loop.call_later(_STUN_TCP_LIMIT_S, self.give_up))
        self._timers.pop(0).cancel()
        try:
            result.write(build_stun_request(self._id))
        except OSError:
            self.give_up()
        else:
            result.watch(READ, self._on_readable)

    def _on_readable(self, _mask: int) -> None:
        if self._stream is None or self._done is None:
            return
        try:
            data = self._stream.read(STUN_TCP_MAX)
        except OSError:
            data = b""
        if data is None:
            return
        self._got += data
        size = stun_size(self._got)
        if not data or size > STUN_TCP_MAX:
            self.give_up()
        elif len(self._got) >= size:
            self._end(parse_stun_response(self._got[:size], self._id, self.wish[0]))


class Votes:
    """What STUN servers say about one wish: the address that most of them see wins (4.2, D13)."""

    def __init__(self) -> None:
        self._seen: dict[int, Target] = {}     # place of the server in the list -> what it said

    def add(self, place: int, found: Target) -> None:
        """A server answered."""
        self._seen[place] = found

    def winner(self) -> Target | None:
        """The address with most votes, at a draw that of the first server; one is enough unless another server disagrees."""
        said = [self._seen[place] for place in sorted(self._seen)]
        ips = [ip for ip, _ in said]
        best = max(dict.fromkeys(ips), key=ips.count, default="")
        if len(set(ips)) > 1 and ips.count(best) < 2:
            return None
        return next((found for found in said if found[0] == best), None)

    def silent(self) -> bool:
        """True while nobody has answered."""
        return not self._seen

    def decided(self, servers: int) -> bool:
        """True when the servers that are still to answer cannot change the winner."""
        ips = [ip for ip, _ in self._seen.values()]
        return any(ips.count(ip) * 2 > servers for ip in set(ips))


class StunRound:
    """All servers are asked all wishes, some servers at a time; done({wish: address}, servers that answered), never at once."""

    def __init__(self, loop: Loop, names: Resolver, settings: Settings, wishes: Sequence[Wish],
                 done: Callable[[dict[Wish, Target], list[str]], None]) -> None:
        self._loop, self._names, self._done = loop, names, done
        self._servers, self._tcp_next = settings.network.stun_servers, settings.network.stun_tcp_fallback
        self._gate, self._name_gate = Gate(settings.general.stun_nat_probe_concurrency), Gate(_STUN_LOOKUPS)
        self._votes = {wish: Votes() for wish in wishes}
        self._ask: type[StunByUdp] | type[StunByTcp] = StunByUdp
        self._asked = len(self._servers)       # servers in this pass
        self._left = self._asked               # of them, those that are not done
        self._open: dict[int, set[StunQuestion]] = {}        # per server
        self._live: set[int] = set()
        loop.defer(self._begin)

    def _begin(self) -> None:
        for place in range(self._left):
            self._gate.enter(functools.partial(self._name_gate.enter, functools.partial(self._find, place)))

    def _wanted(self) -> list[Wish]:
        return [wish for wish, votes in self._votes.items()
                if not votes.decided(self._asked) and (self._ask is StunByUdp or votes.silent())]

    def _find(self, place: int) -> None:
        """Look the server's name up."""
        try:
            host, port = parse_host_port(self._servers[place])
        except ValueError:
            self._loop.defer(functools.partial(self._on_found, place, 0, []))
            return
        if self._wanted():
            self._names.lookup(host, port, lambda found: self._loop.defer(functools.partial(self._on_found, place, port, found)))
        else:
            self._loop.defer(functools.partial(self._on_found, place, port, []))

    def _on_found(self, place: int, port: int, found: list[str] | Exception) -> None:
        self._name_gate.leave()
        questions = self._open[place] = set[StunQuestion]()
        ips = found if isinstance(found, list) else []
        for wish in self._wanted():
            ip = next((ip for ip in ips if (":" in ip) == (wish[0] == 6)), None)
            if ip is not None:
                questions.add(self._ask(self._loop, (ip, port), place, wish, self._on_answer))
        if not questions:
            self._on_server_done(place)

    def _on_answer(self, question: StunQuestion, found: Target | None) -> None:
        votes, mates = self._votes[question.wish], self._open[question.place]
        mates.discard(question)
        if found is not None:
            votes.add(question.place, found)
            self._live.add(question.place)
        if not mates:
            self._on_server_done(question.place)
        if found is not None and votes.decided(self._asked):
            for other in [other for questions in self._open.values() for other in questions if other.wish == question.wish]:
                other.give_up()

    def _on_server_done(self, place: int) -> None:
        del self._open[place]
        self._left -= 1
        self._gate.leave()
        if self._left:
            return
        if self._ask is StunByUdp and self._tcp_next and any(votes.silent() for votes in self._votes.values()):
            self._ask, self._asked = StunByTcp, min(_STUN_TCP_SERVERS, len(self._servers))
            self._left = self._asked
            self._loop.defer(self._begin)
        else:
            found = {wish: winner for wish, votes in self._votes.items() if (winner := votes.winner()) is not None}
            self._done(found, [self._servers[place] for place in sorted(self._live)])


class Reflection(NamedTuple):
    """Our address as somebody outside saw it."""

    address: Target
    seen_at: float                             # monotonic seconds


def ask_sites(urls: Sequence[str], cache_path: str) -> tuple[str, bool] | None:
    """(our public IPv4, True if a site told it), else what the cache file holds, else None.  Blocks: for a helper thread (5, D14)."""
    for url in urls:
        try:
            answer = fetch_url(url, _SITE_BODY_MAX, _SITE_LIMIT_S)
        except (OSError, ValueError, LookupError, ImportError) as error:
            log_network.debug("Public IP site failed", url=url, error=error)
            continue
        if answer.status == 200 and (ip := _public_v4(answer.body.decode("latin-1"))):
            return ip, True
    try:
        with open(cache_path, encoding="latin-1") as file:
            ip = _public_v4(file.read(_SITE_BODY_MAX))
    except (OSError, ValueError):
        return None
    return (ip, False) if ip else None


def _public_v4(text: str) -> str:
    ip = parse_ip(text.strip())
    return str(ip) if ip is not None and ip.version == 4 and not is_bogon(str(ip)) else ""


def keep_public_ip(path: str, ip: str) -> None:
    """Write the cache file, for a helper thread; nothing depends on it."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_whole(path, ip + "\n", replace=True, mode=None)
    except (OSError, ValueError) as error:
        log_network.debug("Public IP cache cannot be written", path=ascii(path), error=error)


class NetworkView:
    """Our addresses: those of our interfaces, and where those are private what the world sees instead.

    The world is asked in the background, and only about families whose address is private and not configured
    (`general.middle_proxy_nat_ip`): STUN by UDP, by TCP, then web sites, then the cache file.  With the middle end the answer is
    refreshed every ten minutes; who asks gets what is known.
    """

    def __init__(self, loop: Loop, settings: Settings, names: Resolver, local: tuple[str | None, str | None]) -> None:
        self.loop, self.settings, self._names = loop, settings, names
        self.local = {4: local[0], 6: local[1]}
        self.families = decide_families(settings.network, *local)
        self.watchers: list[Callable[[], None]] = []         # called when a reflected address becomes known or another one
        self._found: dict[Wish, Reflection] = {}
        self._wishes: dict[Wish, None] = {}    # everything that is asked, in order
        self._asking: list[Wish] = []          # in the round that runs now
        self._rounds = self._failures = 0
        self._missed = False                   # the last round found not everything
        self._live: list[str] = []
        self._again: Timer | None = None
        self._readers: list[Callable[[], None]] = []         # wait for the first round

    # -- what is known

    def reflected(self, version: int, source_ip: str = "") -> str | None:
        """Our public address of a family as the world sees it, from `source_ip` if that is not the system's choice.

        None if nobody knows (yet): then it is asked for, and the watchers are called.
        """
        wish = version, "" if source_ip == self.local[version] else source_ip
        if wish in self._found:
            return self._found[wish].address[0]
        if wish not in self._wishes and self._is_private(wish) and len(self._wishes) < _WISHES_MAX:
            self._wishes[wish] = None
            if not self._asking:
                self._ask([wish])
        return None

    def seen(self) -> tuple[str | None, str | None]:
        """IPv4 and IPv6 that clients can reach us at, as far as known (config.md 8 item 14); the configured one is not in it."""
        v4, v6 = (self._found[version, ""].address[0] if (version, "") in self._found and self._is_bogon(version) else ip
                  for version, ip in self.local.items())
        return v4, v6

    def public_ip(self, version: int) -> str | None:
        """Our public address of a family: local, configured, reflected; None if none of them is known."""
        local, nat_ip = self.local[version], self.settings.general.middle_proxy_nat_ip
        if local is not None and not is_bogon(local):
            return local
        return str(nat_ip) if nat_ip is not None and nat_ip.version == version else self.reflected(version)

    def me_families(self) -> tuple[int, ...]:
        """IP versions that the middle end can be reached by, the preferred first (3.2)."""
        network, nat_ip = self.settings.network, self.settings.general.middle_proxy_nat_ip
        usable = []
        for version, on, here in ((4, network.ipv4, self.families.ipv4), (6, network.ipv6, self.families.ipv6)):
            outside = not self._is_bogon(version) or (version, "") in self._found
            if (here and outside) or (on and nat_ip is not None and nat_ip.version == version):
                usable.append(version)
        return tuple(sorted(usable, reverse=self._prefers_v6(6 in usable)))

    def multipath(self) -> bool:
        """Whether the middle end is used over both families."""
        return self.settings.network.multipath and len(self.me_families()) == 2

    def report(self) -> None:
        """Log what was resolved (3.2)."""
        order = self.me_families()
        shown = {f"reflected_v{version}": format_address(*self._found[version, ""].address) if (version, "") in self._found else "-"
                 for version in (4, 6)}
        words = {"ipv4_bogon": self._is_bogon(4), "ipv6_bogon": self._is_bogon(6), "ipv4_me": 4 in order, "ipv6_me": 6 in order,
                 "ipv4_dc": self.families.ipv4, "ipv6_dc": self.families.ipv6}
        log_network.info("Network capabilities resolved", ipv4=self.local[4] or "-", ipv6=self.local[6] or "-", **shown,
                         **{name: str(value).lower() for name, value in words.items()},
                         prefer=6 if self._prefers_v6(6 in order) else 4, multipath=str(self.multipath()).lower())

    def row(self) -> dict[str, Any]:
        """What runtime/nat_stun shows (api.md 15.1)."""
        now = self.loop.now
        reflection = {f"v{version}": {"addr": format_address(*self._found[version, ""].address),
                                      "age_secs": int(now - self._found[version, ""].seen_at)}
                      for version in (4, 6) if (version, "") in self._found}
        found: dict[str, Any] = {
            "flags": {"nat_probe_enabled": self.settings.general.middle_proxy_nat_probe, "nat_probe_disabled_runtime": False,
                      "nat_probe_attempts": self._rounds},
            "servers": {"configured": list(self.settings.network.stun_servers), "live": self._live, "live_total": len(self._live)},
            "reflection": reflection}
        if self._missed and self._again is not None:
            found["stun_backoff_remaining_ms"] = max(0, int((self._again.at - now) * 1000))
        return found

    # -- asking

    def start(self) -> None:
        """Ask about the families that need it."""
        self._wishes |= {wish: None for wish in ((4, ""), (6, "")) if self._is_private(wish)}
        if self._wishes and not self._asking:
            self._ask(list(self._wishes))

    def when_known(self, version: int, reader: Callable[[], None]) -> None:
        """Call `reader` when the answer about a family is there, or is not to be waited for any longer; at once if nobody asks."""
        if self._rounds == 1 and (version, "") in self._asking:
            if not self._readers:
                self.loop.call_later(_READERS_WAIT_S, self._release_readers)
            self._readers.append(reader)
        else:
            reader()

    def _prefers_v6(self, me_v6: bool) -> bool:
        """Whether IPv6 is preferred and there: `effective_prefer` of 3.2."""
        return self.settings.network.prefer == 6 and (me_v6 or self.families.ipv6)

    def _is_bogon(self, version: int) -> bool:
        ip = self.local[version]
        return ip is not None and is_bogon(ip)

    def _is_private(self, wish: Wish) -> bool:
        """Whether the world has to be asked about it."""
        general, network, version = self.settings.general, self.settings.network, wish[0]
        if not general.middle_proxy_nat_probe or not (network.ipv4 if version == 4 else network.ipv6):
            return False
        if general.middle_proxy_nat_ip is not None and general.middle_proxy_nat_ip.version == version:
            return False
        return is_bogon(wish[1]) if wish[1] else self._is_bogon(version)

    def _ask(self, wishes: list[Wish]) -> None:
        """Begin a round; there is one at a time."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self._rounds += 1
        self._asking = wishes
        network = self.settings.network
        if network.stun_use and network.stun_servers:
            StunRound(self.loop, self._names, self.settings, wishes, self._on_stun)
            return
        if self._rounds == 1 and network.stun_use:
            log_network.warn("STUN probe is enabled but network.stun_servers is empty")
        elif self._rounds == 1:
            log_network.info("STUN probe is disabled by network.stun_use=false")
        self.loop.defer(functools.partial(self._on_stun, {}, []))

    def _on_stun(self, found: dict[Wish, Target], live: list[str]) -> None:
        self._live = live
        for address in found.values():
            log_network.info("STUN-Quorum reached, IP: %s", address[0])
        network = self.settings.network
        if (4, "") in self._asking and (4, "") not in found:
            self.loop.offload(functools.partial(ask_sites, network.http_ip_detect_urls, network.cache_public_ip_path),
                              functools.partial(self._on_sites, found))
        else:
            self._end_round(found)

    def _on_sites(self, found: dict[Wish, Target], told: tuple[str, bool] | Exception | None) -> None:
        if isinstance(told, Exception):
            log_network.debug("Public IP detection failed", error=told)
        elif told is not None:
            found[4, ""] = told[0], 0
            log_network.info("STUN unavailable, using HTTP public IPv4 fallback" if told[1]
                             else "STUN and HTTP unavailable, using the public IPv4 of the cache file", ip=told[0])
        self._end_round(found)

    def _end_round(self, found: dict[Wish, Target]) -> None:
        missing, self._asking = [wish for wish in self._asking if wish not in found], []
        before = {wish: reflection.address[0] for wish, reflection in self._found.items()}
        self._found |= {wish: Reflection(address, self.loop.now) for wish, address in found.items()}
        path, ip = self.settings.network.cache_public_ip_path, found.get((4, ""), ("",))[0]
        if path and ip and ip != before.get((4, "")):
            self.loop.offload(functools.partial(keep_public_ip, path, ip), lambda _: None)
        self._failures, self._missed = self._failures + 1 if missing else 0, bool(missing)
        untried = [wish for wish in self._wishes if wish not in self._found and wish not in missing]
        if untried:
            self._ask(untried)
        elif missing or (self.settings.general.use_middle_proxy and self._wishes):
            pause_s = _STUN_RETRY_S * 2 ** min(self._failures - 1, 6) if missing else _STUN_FRESH_S
            self._again = self.loop.call_later(pause_s, self._on_again)
        if any(before.get(wish) != address[0] for wish, address in found.items()):
            self.report()
            for watcher in self.watchers:
                self.loop.call(watcher)
        self._release_readers()

    def _on_again(self) -> None:
        self._again = None
        if self._wishes:
            self._ask(list(self._wishes))

    def retire(self) -> None:
        """Ask no more."""
        self._wishes.clear()
        if self._again is not None:
            self._again.cancel()

    def forgive(self) -> None:
        """Begin the back-off anew; the pause under way stays (middle-proxy-pool.md 3)."""
        self._failures = 0

    def _release_readers(self) -> None:
        readers, self._readers = self._readers, []
        for reader in readers:
            self.loop.call(reader)


log_network: Final = Log("network")


# == 16. upstreams ===========================================================
# Which address a data-centre index means, and how to get there.  The index is
# signed: negative is the media cluster of the same data centre, 203 is the CDN,
# 10000+n are test centres.  An unknown one goes to the default cluster, but the
# preamble always carries what the client asked for.  In this order:
#
#   DcDirectory  index -> Destination
#   Route        one [[upstreams]] entry: where from, with which credentials, and
#                what we know about it: healthy or not, latency, families that work
#   Passage      one attempt: name, TCP and SOCKS dialogue, before one deadline
#   Cycle        one request for a connection: several Passages, each on a Route
#                not tried yet while a healthy one is left
#   Health       checks every route each half minute
#   Survey       the connectivity table after the start
#   Upstreams    all of them; connect_dc() and connect() start a Cycle
#
# Trap: a way that accepts and never answers costs a whole timeout.  So a silent
# attempt is not waited for: after a quarter of its time the next route starts
# beside it, and the first that is through wins.
# Source: upstream-and-relay.md 2, 7, 12, 13, 16.

DC_PORT: Final = 443
DC_TABLE: Final = {
    1: ("149.154.175.50", "2001:b28:f23d:f001::a"),
    2: ("149.154.167.51", "2001:67c:4e8:f002::a"),
    3: ("149.154.175.100", "2001:b28:f23d:f003::a"),
    4: ("149.154.167.91", "2001:67c:4e8:f004::a"),
    5: ("149.154.171.5", "2001:b28:f23f:f005::a"),
}
_DEFAULT_DC: Final = 2
_CDN_DC: Final = "203"
_CDN_V4: Final = ("91.105.192.100:443",)       # what loading fills in (config.md 1.3 step 19)
_CDN_V6: Final = "[2a0a:f280:203:a:5000::100]:443"
_UNKNOWN_DCS_MAX: Final = 1024                 # indices remembered and logged per process (upstream-and-relay.md D18)
_EMA_NEW: Final = 0.3                          # weight of a new latency sample
_INTERFACE_KEPT_S: Final = 10.0                # addresses of an interface are looked up this often at most
_SILENT_PART: Final = 4                        # an attempt that took a quarter of its time is silent
CHECKS: Final = (30.0, 10.0)                   # pause between two checks of a route, limit of one attempt in them; seconds
QUICK_CHECKS: Final = (1.0, 1.0)               # for tests: TELEMT_PATHS
_CHECK_SOCKETS: Final = 16                     # at a time, over all routes (D12)
_GROUPS_NEEDED: Final = 3                      # data centres that a healthy route reaches, or all if there are fewer
_PING_S: Final = 5.0                           # one attempt of the table after the start
_PING_SOCKETS: Final = 64
_RULE: Final = "=" * 60


# -- directory: where to

class Destination(NamedTuple):
    """Where a cycle wants to go: addresses that somebody named, else a row of DC_TABLE."""

    named: tuple[Target, ...]
    row: int = 0
    slot: int = 0                              # |dc| if it is 1..5: whose latency a connection tells about (D6)

    def targets(self, families: Families, leaning: str = "unknown") -> list[Target]:
        """Addresses in the order to try them; `leaning` is what Path.label() learned and overrules what is preferred."""
        prefer_v6 = families.prefer_v6
        if self.named:                         # stable: preferred family first, file order inside a family
            return sorted(self.named, key=lambda target: (":" in target[0]) != prefer_v6)
        v4, v6 = DC_TABLE[self.row]
        usable = [ip for ip, on in ((v4, families.ipv4), (v6, families.ipv6)) if on]
        if leaning == "prefer_v6" or (prefer_v6 and leaning != "prefer_v4"):
            usable.reverse()
        return [(ip, DC_PORT) for ip in usable]


class DcDirectory:
    """Data-centre index -> destination, as configuration and table have it."""

    def __init__(self, families: Families) -> None:
        self.families = families               # of direct ways
        self._unknown: set[int] = set()
        self._path_refused = False

    def find(self, dc: int, settings: Settings) -> Destination:
        """Where `dc` (signed) is: there is always an answer."""
        slot = abs(dc) if abs(dc) in DC_TABLE else 0
        named = self.overrides(str(dc), settings, log_upstreams.warn)
        if named or slot:
            return Destination(named, slot, slot)
        fallback = settings.default_dc if settings.default_dc in DC_TABLE else _DEFAULT_DC
        if str(dc) not in settings.dc_overrides:
            log_upstreams.warn("Requested non-standard DC with no override; falling back to default cluster", dc=dc)
            self._note_unknown(dc, settings.general.unknown_dc_log_path)
        log_upstreams.info("Special DC ---> default_cluster", dc=dc, default_dc=fallback)
        return Destination((), fallback)

    @staticmethod
    def overrides(name: str, settings: Settings, complain: Callable[..., None]) -> tuple[Target, ...]:
        """Addresses that the configuration has for the index written as `name`."""
        texts = settings.dc_overrides.get(name, ())
        if name == _CDN_DC and tuple(texts) == _CDN_V4 and not settings.network.ipv4:
            texts = (_CDN_V6,)                 # D22
        found = []
        for text in texts:
            try:
                found.append(parse_target(text))
            except ValueError:
                complain("Invalid DC override address in config, ignoring", dc=name, addr=text)
        return tuple(found)

    def _note_unknown(self, dc: int, path: str) -> None:
        """Append the index to the unknown-DC file, once per index and process (2.4, D18)."""
        if dc in self._unknown or len(self._unknown) >= _UNKNOWN_DCS_MAX or not path:
            return
        self._unknown.add(dc)
        if ".." in path.split("/"):
            if not self._path_refused:
                log_upstreams.warn("general.unknown_dc_log_path must not contain '..'; unknown DCs are not written", path=path)
            self._path_refused = True
            return
        try:                                   # O_NONBLOCK: a FIFO nobody reads must not hold up the loop
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
            with open(fd, "wb", buffering=0) as file:
                file.write(b"dc_idx=%d\n" % dc)
        except (OSError, ValueError) as error:
            if not self._path_refused:
                log_upstreams.warn("general.unknown_dc_log_path cannot be written", path=ascii(path), error=error)
            self._path_refused = True


# -- routes: one way out

class Path:
    """What one route knows about one data centre: latency, and which families of its table address work."""

    __slots__ = ("ema_ms", "works_v4", "works_v6")

    def __init__(self) -> None:
        self.ema_ms: float | None = None
        self.works_v4: bool | None = None      # None = never seen
        self.works_v6: bool | None = None

    def feed(self, sample_ms: float) -> None:
        """Take a connect time into the moving average."""
        self.ema_ms = sample_ms if self.ema_ms is None else (1 - _EMA_NEW) * self.ema_ms + _EMA_NEW * sample_ms

    def note(self, target: Target, works: bool) -> None:
        """A connect to an address of the table worked, or did not."""
        if ":" in target[0]:
            self.works_v6 = works
        else:
            self.works_v4 = works

    def label(self) -> str:
        """`unknown`, `both_work`, `prefer_v6`, `prefer_v4` or `unavailable` (D3)."""
        if self.works_v4 is None and self.works_v6 is None:
            return "unknown"
        if self.works_v4 and self.works_v6:
            return "both_work"
        return "prefer_v4" if self.works_v4 else "prefer_v6" if self.works_v6 else "unavailable"


class Tools(NamedTuple):
    """What every route and attempt needs."""

    loop: Loop
    names: Resolver
    counters: Counters
    own_addresses: Callable[[str], list[str]]  # of an interface


class Route:
    """One enabled `[[upstreams]]` entry, and what is known about it."""

    __slots__ = ("tools", "entry", "kind", "families", "server", "healthy", "fails", "checked_at", "paths", "_next_bind", "_warned")

    def __init__(self, entry: Upstream, tools: Tools, families: Families) -> None:
        self.tools, self.entry, self.kind = tools, entry, entry.type
        self.families = families               # what it may carry; a SOCKS server's world is not ours (D12)
        self.server: tuple[str, int] | None = None
        if self.kind != "direct":
            with contextlib.suppress(ValueError):
                self.server = parse_host_port(entry.address)
        self.healthy = True
        self.fails = 0                         # failed cycles and checks in a row
        self.checked_at = tools.loop.now
        self.paths = {dc: Path() for dc in DC_TABLE}
        self._next_bind = 0
        self._warned: set[str] = set()

    @property
    def address(self) -> str:
        """As the API shows it: never with credentials."""
        return "direct" if self.kind == "direct" else self.entry.address

    def admits(self, scope: str) -> bool:
        """True if a request of this scope may use the entry (7.2): unscoped requests only unscoped entries."""
        if not scope:
            return self.entry.scopes == ""
        return scope in self.scope_tokens()

    def scope_tokens(self) -> list[str]:
        """The scopes it serves, none for the world."""
        return [token for token in map(str.strip, self.entry.scopes.split(",")) if token]

    def targets(self, to: Destination) -> list[Target]:
        """Addresses of `to` that this route can try, best first; none if it cannot serve it (SOCKS4 and IPv6, D5)."""
        if self.kind == "socks4":
            found = to.targets(self.families._replace(ipv4=True, ipv6=False, prefer_v6=False))
            return [target for target in found if ":" not in target[0]]
        return to.targets(self.families, self.paths[to.slot].label() if to.slot else "unknown")

    def carries(self, v6: bool) -> bool:
        """True if it may be used for addresses of this family."""
        return (self.families.ipv6 and self.kind != "socks4") if v6 else self.families.ipv4 or self.kind == "socks4"

    def rule_out(self, path: Path) -> None:
        """Families it may not use do not work (D3)."""
        if not self.carries(False):
            path.works_v4 = False
        if not self.carries(True):
            path.works_v6 = False

    def dialogue(self, target: Target, scope: str) -> Dialogue | None:
        """What to say to the SOCKS server, None for a direct way.  A scope replaces the credentials (7.2).  Raises RouteError."""
        if self.kind == "direct":
            return None
        if self.server is None:
            raise RouteError(f"Config error: invalid SOCKS server address: {self.entry.address}", hard=True)
        if self.kind == "socks4":
            return socks4_dialogue(target, socks4_user(scope or self.entry.user_id))
        login = (scope, scope) if scope else (self.entry.username, self.entry.password)
        return socks5_dialogue(target, socks5_login(*login))

    def source_ip(self, target: Target) -> str:
        """Local address to connect from, empty = the system's choice.

        Raises RouteError when a configured binding cannot be met: never leave through another address (D4).
        """
        v6, interface = ":" in target[0], self.entry.interface
        literal = bool(interface) and parse_ip(interface) is not None
        if self.entry.bind_addresses:
            pool = [ip for ip in self.entry.bind_addresses if _is_family(ip, v6)]
            if interface and not literal:
                own = self.tools.own_addresses(interface)
                pool = [ip for ip in pool if str(ipaddress.ip_address(ip)) in own]
            if pool:
                self._next_bind += 1
                return pool[(self._next_bind - 1) % len(pool)]
            if not (literal and interface and _is_family(interface, v6)):
                raise self._unbound("No valid bind_addresses", target)
        if not interface:
            return ""
        for ip in [interface] if literal else self.tools.own_addresses(interface):
            if _is_family(ip, v6):
                return ip
        raise self._unbound(f"No usable address on interface {interface}", target)

    def _unbound(self, why: str, target: Target) -> RouteError:
        """The error of a binding that cannot be met; warns once per reason."""
        reason = f"{why} for IPv{6 if ':' in target[0] else 4}"
        if reason not in self._warned:
            self._warned.add(reason)
            log_upstreams.warn("%s: connections of this upstream fail", reason, upstream=self.name())
        return RouteError(f"{why} for target family {format_address(*target)}", hard=True)

    def name(self) -> str:
        """As the connectivity table shows it."""
        if self.kind != "direct":
            return f"{self.kind}://{self.entry.address}"
        parts = [f"dev={self.entry.interface}"] if self.entry.interface else []
        parts += [f"src={','.join(self.entry.bind_addresses)}"] if self.entry.bind_addresses else []
        return " ".join(["direct", *parts])

    # -- what happened

    def latency_ms(self, slot: int) -> float | None:
        """Moving average of the connect time to a data centre, else the mean of those known, else None."""
        if slot and self.paths[slot].ema_ms is not None:
            return self.paths[slot].ema_ms
        known = [path.ema_ms for path in self.paths.values() if path.ema_ms is not None]
        return sum(known) / len(known) if known else None

    def succeeded(self, to: Destination, target: Target, took_ms: float) -> None:
        """A real connection came through."""
        self.healthy, self.fails = True, 0
        if to.slot:
            self.paths[to.slot].feed(took_ms)
            if not to.named:
                self.paths[to.slot].note(target, True)

    def failed(self, threshold: int) -> bool:
        """A cycle or check found it wanting; True when that makes it unhealthy."""
        self.fails += 1
        lost = self.healthy and self.fails >= threshold
        self.healthy = self.healthy and not lost
        return lost

    def row(self, index: int, now: float) -> dict[str, Any]:
        """What the API shows of it (api.md 9.4)."""
        return {"upstream_id": index, "route_kind": self.kind, "address": self.address, "weight": self.entry.weight,
                "scopes": self.entry.scopes, "healthy": self.healthy, "fails": self.fails,
                "last_check_age_secs": int(now - self.checked_at), "effective_latency_ms": self.latency_ms(0),
                "dc": [{"dc": dc, "latency_ema_ms": path.ema_ms, "ip_preference": path.label()} for dc, path in self.paths.items()]}


@functools.lru_cache(64)
def _is_family(text: str, v6: bool) -> bool:
    try:
        return ipaddress.ip_address(text).version == (6 if v6 else 4)
    except ValueError:
        return False


class OwnAddresses:
    """Addresses of interfaces, looked up at most every 10 s (D4)."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._known: dict[str, tuple[float, list[str]]] = {}     # as many as the configuration names

    def of(self, interface: str) -> list[str]:
        """Addresses in the system's order; none for an unknown interface."""
        until, found = self._known.get(interface, (-INF, []))
        if self._loop.now >= until:
            found = interface_addresses(interface)
            self._known[interface] = self._loop.now + _INTERFACE_KEPT_S, found
        return found


# -- passages: one attempt

class Connected(NamedTuple):
    """A connection through an upstream.  `bound`: address that a SOCKS server gave as its own."""

    stream: Stream
    kind: str = "direct"
    bound: Target | None = None

    @property
    def local(self) -> Target:
        """Our own (ip, port); through SOCKS that of the connection to the server.  Raises OSError."""
        return self.stream.local_address()


class Passage:
    """One try to reach `target` through `route`: name, TCP and SOCKS dialogue before one deadline (D2).

    done(attempt, Connected | RouteError) is called once, unless abort() came first, and never before the constructor returned.
    """

    __slots__ = ("route", "target", "began_at", "_done", "_deadlines", "_servers", "_where", "_dial", "_stream", "_answer", "_need", "_got")

    def __init__(self, route: Route, target: Target, scope: str, deadlines: Lane[Passage],
                 done: Callable[[Passage, Connected | RouteError], None]) -> None:
        self.route, self.target, self.began_at = route, target, route.tools.loop.clock()
        self._done: Callable[[Passage, Connected | RouteError], None] | None = done
        self._deadlines = deadlines
        self._servers: list[Target] = []       # whom to connect to, in order
        self._where = target                   # what we wait for now
        self._dial: Dial | None = None
        self._stream: Stream | None = None
        self._answer: Callable[[Any], tuple[bytes, int]] | None = None
        self._need, self._got = 0, b""
        deadlines.arm(self)
        try:
            dialogue = route.dialogue(target, scope)
        except RouteError as error:
            self._report_later(error)
            return
        if dialogue is not None:
            assert route.server is not None
            self._where, self._answer = route.server, dialogue.send
            if parse_ip(route.server[0]) is None:
                route.tools.names.lookup(*route.server, self._on_found)
                return
        self._servers = [self._where]
        if (unbound := self._dial_next(None)) is not None:
            self._report_later(unbound)

    @property
    def took_ms(self) -> float:
        """Milliseconds since it began."""
        return (self.route.tools.loop.clock() - self.began_at) * 1000

    def abort(self) -> None:
        """Nobody waits any more."""
        self._done = None
        self._deadlines.cancel(self)
        if self._dial is not None:
            self._dial.abort()
        if self._stream is not None:
            self._stream.close()

    def on_timeout(self) -> None:
        """Called by its lane."""
        self._report(RouteError(f"Connection timeout to {format_address(*self._where)}"))

    def on_crash(self) -> None:
        """Our own error in a step."""
        self._report(RouteError("internal error"))

    def _on_found(self, found: list[str] | Exception) -> None:
        """The SOCKS server's name was looked up, perhaps at once."""
        self.route.tools.loop.defer(functools.partial(self._on_addresses, found))

    def _on_addresses(self, found: list[str] | Exception) -> None:
        assert self.route.server is not None
        if isinstance(found, ConfigError):
            self._report(RouteError(str(found), hard=True))
        elif isinstance(found, Exception):
            text = found.strerror if isinstance(found, OSError) else found
            self._report(RouteError(f"IO error: failed to lookup address information: {text}"))
        elif self._done is not None:
            self._servers = [(ip, self.route.server[1]) for ip in found]
            self._go_on(RouteError("IO error: failed to lookup address information: no address"))

    def _go_on(self, error: RouteError) -> None:
        """Try the next address, or give up with what the last one said."""
        last = self._dial_next(error)
        if last is not None:
            self._report(last)

    def _dial_next(self, error: RouteError | None) -> RouteError | None:
        """Connect to the next address that we can go to; without one return the last error."""
        while self._servers:
            self._where = self._servers.pop(0)
            try:
                source_ip = self.route.source_ip(self._where)
            except RouteError as unbound:
                error = unbound
                continue
            self._dial = Dial(self.route.tools.loop, *self._where, None, self._on_dialled, source_ip)
            return None
        return error

    def _on_dialled(self, result: Stream | RouteError) -> None:
        self._dial = None
        if isinstance(result, RouteError):
            if not self._servers and self.route.server is not None:
                self.route.tools.names.forget(self.route.server[0])
            self._go_on(result)
        elif self._done is None:
            result.close()
        elif self._answer is None:
            self._report(Connected(result))
        else:
            self._stream, self._where = result, self.target
            result.watch(0, self._on_readable)
            self._say(None)

    def _say(self, answer: bytes | None) -> None:
        """Give the dialogue what it asked for, and send what it says to that."""
        assert self._stream is not None and self._answer is not None
        try:
            out, self._need = self._answer(answer)
            self._got = b""
            if self._stream.write(out) != len(out):        # at most 515 bytes into an empty buffer
                raise RouteError("IO error: the SOCKS request does not fit the socket buffer")
            self._stream.want(READ)
        except StopIteration as end:
            stream, self._stream = self._stream, None
            stream.want(0)                     # what else has arrived is for the next owner
            self._report(Connected(stream, self.route.kind, end.value))
        except RouteError as error:
            self._report(error)
        except OSError as error:
            self._report(_io_error(error))

    def _on_readable(self, _mask: int) -> None:
        if self._stream is None or self._done is None:
            return
        try:
            data = self._stream.read(self._need - len(self._got))      # never a byte too many
        except OSError as error:
            self._report(_io_error(error))
            return
        if data is None:
            return
        self._got += data
        if not data:
            self._report(RouteError("IO error: early eof"))
        elif len(self._got) == self._need:
            self._say(self._got)

    def _report_later(self, error: RouteError) -> None:
        self.route.tools.loop.defer(functools.partial(self._report, error))

    def _report(self, result: Connected | RouteError) -> None:
        done = self._done
        self.abort()
        if done is not None:
            done(self, result)
        elif isinstance(result, Connected):
            result.stream.close()


def _io_error(error: OSError) -> RouteError:
    return RouteError(describe(error), code=error.errno or 0)


# -- cycles: one request for a connection

class Cycle:
    """Up to `upstream_connect_retry_attempts` attempts for one connection (7.4, D7).

    Every further attempt goes through a healthy route that this cycle has not tried, while there is one: at once when the last
    has failed, beside it when it has been silent for a quarter of its time.  Else the same route again, after a pause.
    """

    __slots__ = ("_up", "_to", "_scope", "_blame", "_done", "_began_at", "_attempts", "_tried", "_errors", "_closed", "_racing", "_timer",
                 "where")

    def __init__(self, upstreams: Upstreams, to: Destination, scope: str, blame: bool,
                 done: Callable[[Connected | RouteError], None]) -> None:
        self._up, self._to, self._scope = upstreams, to, scope
        self._blame = blame                    # whether it tells about the routes' health (D12)
        self._done: Callable[[Connected | RouteError], None] | None = done
        self._began_at = upstreams.loop.now
        self._attempts = 0
        self._tried: dict[Route, int] = {}     # attempts per route
        self._errors: dict[Route, RouteError] = {}
        self._closed: set[Route] = set()       # met a hard error under failfast
        self._racing: dict[Passage, None] = {}
        self._timer: Timer | None = None
        self.where = to.targets(upstreams.directory.families)[0]     # address of the latest attempt
        try:
            self._launch(upstreams.pick(scope, to))
        except RouteError as error:            # no route is no cycle: nothing is counted (7.2)
            upstreams.loop.defer(functools.partial(self._finish, error))

    def abort(self) -> None:
        """The client left: stop, count nothing more."""
        self._done = None
        for attempt in self._racing:
            attempt.abort()
        self._racing.clear()
        self._up.silences.cancel(self)
        if self._timer is not None:
            self._timer.cancel()

    def on_silence(self) -> None:
        """Called by its lane: the attempts under way take long."""
        self._launch_elsewhere()

    def on_crash(self) -> None:
        """Our own error in a step of the cycle."""
        self._finish(RouteError("internal error"))

    def _launch(self, route: Route) -> None:
        """Begin the next attempt through `route`.  Raises RouteError if it cannot serve the destination at all."""
        self._timer = None
        targets = route.targets(self._to)
        if not targets:
            raise _refused("SOCKS4 does not support IPv6")
        before = self._attempts if self._to.named else self._tried.get(route, 0)
        self.where = targets[before % len(targets)]
        self._attempts += 1
        self._tried[route] = self._tried.get(route, 0) + 1
        self._up.counters.attempt()
        self._racing[Passage(route, self.where, self._scope, self._up.deadlines, self._on_attempt)] = None
        if self._budget_left() and self._up.untried(self._scope, self._to, self._tried):
            self._up.silences.arm(self)

    def _budget_left(self) -> bool:
        return self._attempts < self._up.general.upstream_connect_retry_attempts

    def _launch_elsewhere(self) -> bool:
        """Begin an attempt through a healthy route not tried yet; False if there is none or the budget is spent."""
        others = self._up.untried(self._scope, self._to, self._tried) if self._budget_left() else []
        if others:
            self._launch(self._up.draw(others, self._to.slot))
        return bool(others)

    def _on_attempt(self, attempt: Passage, result: Connected | RouteError) -> None:
        self._racing.pop(attempt, None)
        if self._done is None:
            if isinstance(result, Connected):
                result.stream.close()
            return
        if isinstance(result, Connected):
            if self._blame:
                attempt.route.succeeded(self._to, attempt.target, attempt.took_ms)
                self._errors.pop(attempt.route, None)
            self._end_cycle(result)
            return
        self._errors[attempt.route] = result
        if result.hard and self._up.general.upstream_connect_failfast_hard_errors:
            if not self._closed:
                self._up.counters.hard_error()
            self._closed.add(attempt.route)
        if self._launch_elsewhere() or self._racing:
            return
        if attempt.route in self._closed or not self._budget_left():
            self._end_cycle(result)
            return
        backoff = self._up.general.upstream_connect_retry_backoff_ms
        pause_ms = backoff + int(draw_fraction() * (max(1, backoff // 2) + 1)) if backoff else 0
        self._timer = self._up.loop.call_later(pause_ms / 1000, functools.partial(self._launch, attempt.route))

    def _end_cycle(self, result: Connected | RouteError) -> None:
        self._up.counters.cycle(isinstance(result, Connected), self._attempts, int((self._up.loop.now - self._began_at) * 1000))
        for route, error in self._errors.items():
            self._up.blame(route if self._blame else None, error, self._tried[route])
        self._finish(result)

    def _finish(self, result: Connected | RouteError) -> None:
        done = self._done
        self.abort()
        if done is not None:                   # through the loop: an error in there is its owner's, not ours
            self._up.loop.call(done, result)


# -- health: is it alive

def is_listed(target: Target, dc: int) -> bool:
    """True if `target` is what DC_TABLE has for `dc`."""
    return target[1] == DC_PORT and target[0] in DC_TABLE.get(dc, ())


def positive_overrides(settings: Settings, complain: Callable[..., None], zero_too: bool) -> list[tuple[int, Target]]:
    """(dc, address) of every override whose key is a positive index, ascending (2.3).  zero_too: other numbers are complained about too."""
    found: dict[int, list[Target]] = {}
    for name in settings.dc_overrides:
        dc = int(name) if re.fullmatch(r"[+-]?[0-9]{1,8}", name) else None
        if dc is not None and 0 < dc < 1 << 15:
            found.setdefault(dc, []).extend(DcDirectory.overrides(name, settings, complain))
        elif zero_too or dc is None:
            complain("Invalid dc_overrides key%s, skipping", " for health-check" if zero_too else "", key=name)
    return [(dc, target) for dc in sorted(found) for target in dict.fromkeys(found[dc])]


class GroupCheck:
    """Whether a route reaches one data centre: its addresses one after the other until one answers."""

    __slots__ = ("_health", "_route", "dc", "_line", "_done")

    def __init__(self, health: Health, route: Route, dc: int, line: list[Target], done: Callable[[bool], None]) -> None:
        self._health, self._route, self.dc, self._line, self._done = health, route, dc, line, done
        health.gate.enter(self._next)

    def _next(self) -> None:
        tokens = self._route.scope_tokens()
        Passage(self._route, self._line.pop(0), tokens[0] if tokens else "", self._health.deadlines, self._on_passage)

    def _on_passage(self, passage: Passage, result: Connected | RouteError) -> None:
        works = isinstance(result, Connected)
        path = self._route.paths.get(self.dc)
        if isinstance(result, Connected):
            result.stream.close()
            self._health.worked(self._route, self.dc, passage.target)
        if path is not None and works:
            path.feed(passage.took_ms)
        if path is not None and is_listed(passage.target, self.dc):
            path.note(passage.target, works)
        if works or not self._line:
            self._health.gate.leave()
            self._done(works)
        else:
            self._next()


class Health:
    """Asks every way out each half minute whether it still reaches Telegram (7.8).

    A route that is still being asked when the next turn comes is left out of it, so that a dead one holds up nobody.
    """

    def __init__(self, upstreams: Upstreams, period_s: float, limit_s: float) -> None:
        self._up, self._period_s = upstreams, period_s
        self.deadlines: Lane[Passage] = upstreams.loop.lane(limit_s, Passage.on_timeout)
        self.gate = Gate(_CHECK_SOCKETS)
        self._groups: dict[int, list[Target]] = {}
        self._start_at: dict[tuple[Route, int, bool], int] = {}      # where in a group's addresses the next check begins
        self._left: dict[Route, tuple[int, int, int]] = {}           # under way: groups, groups to come, groups reached

    def apply(self, settings: Settings) -> None:
        """Ask these addresses from the next turn on: table and overrides of every data centre."""
        groups = {dc: {(ip, DC_PORT) for ip in ips} for dc, ips in DC_TABLE.items()}
        for dc, target in positive_overrides(settings, log_upstreams.warn, True):
            groups.setdefault(dc, set()).add(target)
        self._groups = {dc: sorted(targets, key=_address_order) for dc, targets in sorted(groups.items())}

    def start(self) -> None:
        """Check for ever, first after a pause."""
        if self._up.routes:
            self._up.loop.call_later(self._period_s, self._on_timer)

    def retire(self) -> None:
        """Check no more."""
        self._period_s = INF

    def worked(self, route: Route, dc: int, target: Target) -> None:
        """An address answered: the next check of its group begins behind it."""
        v6 = ":" in target[0]
        mates = [mate for mate in self._groups.get(dc, ()) if (":" in mate[0]) == v6]
        if target in mates:
            self._start_at[route, dc, v6] = mates.index(target) + 1

    def _on_timer(self) -> None:
        if self._period_s == INF:
            return
        self._up.loop.call_later(self._period_s, self._on_timer)
        for route in self._up.routes:
            if route not in self._left:
                self._check(route)

    def _check(self, route: Route) -> None:
        lines = {dc: line for dc in self._groups if (line := self._line(route, dc))}
        self._left[route] = len(lines), len(lines), 0
        for path in route.paths.values():
            route.rule_out(path)
        for dc, line in lines.items():
            GroupCheck(self, route, dc, line, functools.partial(self._on_group, route))

    def _line(self, route: Route, dc: int) -> list[Target]:
        """Addresses of a group in the order to ask them: preferred family first, each from where its turn is."""
        line: list[Target] = []
        for v6 in (route.families.prefer_v6, not route.families.prefer_v6):
            mates = [target for target in self._groups[dc] if (":" in target[0]) == v6 and route.carries(v6)]
            if mates:
                at = self._start_at.get((route, dc, v6), 0) % len(mates)
                self._start_at[route, dc, v6] = at + 1
                line += mates[at:] + mates[:at]
        return line

    def _on_group(self, route: Route, reached: bool) -> None:
        groups, left, good = self._left[route]
        self._left[route] = groups, left - 1, good + reached
        if left == 1:
            del self._left[route]
            self._judge(route, good + reached, min(_GROUPS_NEEDED, groups))

    def _judge(self, route: Route, reachable: int, required: int) -> None:
        route.checked_at = self._up.loop.now
        if reachable >= required:
            if not route.healthy:
                log_upstreams.info("Upstream recovered by DC-group health threshold", upstream=route.name(), reachable=reachable,
                                   required=required)
            route.healthy, route.fails = True, 0
            return
        threshold = self._up.general.upstream_unhealthy_fail_threshold
        route.failed(threshold)
        (log_upstreams.debug if route.healthy else log_upstreams.warn)(
            "Upstream unhealthy (insufficient reachable DC groups)" if not route.healthy else "Upstream check failed",
            upstream=route.name(), fails=route.fails, threshold=threshold, reachable=reachable, required=required)


def _address_order(target: Target) -> tuple[int, int, int]:
    ip = ipaddress.ip_address(target[0])
    return ip.version, int(ip), target[1]


class Ping(NamedTuple):
    """One line of the connectivity table."""

    dc: int
    target: Target
    took_ms: float | None
    error: str

    def text(self) -> str:
        """As it is printed (12); the extra colon is 3.2.1's."""
        end = f"FAIL ({self.error})" if self.took_ms is None else f"{self.took_ms:.0f} ms"
        ip, port = self.target
        if ":" in ip:
            return f"    DC{self.dc} [IPv6] {ip}:{port} - {end}"
        return f"    DC{self.dc} [IPv4] {ip}:{port}{':' if self.took_ms is None else ''}\t\t\t\t{end}"


class Survey:
    """The connectivity table after the start: every address of every entry is tried once, all in parallel, 5 s each (12, D11)."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._up = upstreams
        self._deadlines: Lane[Passage] = upstreams.loop.lane(_PING_S, Passage.on_timeout)
        self._gate = Gate(_PING_SOCKETS)
        self._pings: dict[Route, list[Ping | None]] = {}
        self._left = 0

    def start(self) -> None:
        """Ask; the table is printed when the last answer is there."""
        overrides = positive_overrides(self._up.settings, log_upstreams.warn, False)
        asked = []
        for route in self._up.routes:
            wanted = [(dc, (ips[v6], DC_PORT)) for v6 in (True, False) if route.carries(v6) for dc, ips in DC_TABLE.items()]
            wanted += [(dc, target) for dc, target in overrides if route.carries(":" in target[0])]
            self._pings[route] = [None] * len(wanted)
            asked += [(route, index, dc, target) for index, (dc, target) in enumerate(wanted)]
        self._left = len(asked)
        for row in asked:
            self._gate.enter(functools.partial(self._ask, *row))

    def _ask(self, route: Route, index: int, dc: int, target: Target) -> None:
        tokens = route.scope_tokens()
        Passage(route, target, tokens[0] if tokens else "", self._deadlines, functools.partial(self._on_passage, index, dc))

    def _on_passage(self, index: int, dc: int, passage: Passage, result: Connected | RouteError) -> None:
        self._gate.leave()
        error = "timeout" if str(result).startswith("Connection timeout") else str(result)
        works = isinstance(result, Connected)
        if isinstance(result, Connected):
            result.stream.close()
        self._pings[passage.route][index] = Ping(dc, passage.target, passage.took_ms if works else None, error)
        self._left -= 1
        if not self._left:
            self._finish()

    def _finish(self) -> None:
        log_upstreams.info("================= Telegram DC Connectivity =================")
        for route, found in self._pings.items():
            pings = [ping for ping in found if ping is not None]
            self._learn(route, [ping for ping in pings if is_listed(ping.target, ping.dc)])
            self._print(route, pings)

    @staticmethod
    def _learn(route: Route, pings: list[Ping]) -> None:
        """Take over what the addresses of the table said: families that work, and the time of the better one (D6)."""
        for dc, path in route.paths.items():
            mine = [ping for ping in pings if ping.dc == dc]
            route.rule_out(path)
            for ping in mine:
                path.note(ping.target, ping.took_ms is not None)
            times = {":" in ping.target[0]: ping.took_ms for ping in mine if ping.took_ms is not None}
            if times:
                path.feed(times.get(route.families.prefer_v6, next(iter(times.values()))))

    @staticmethod
    def _print(route: Route, pings: list[Ping]) -> None:
        works = {v6: any(ping.took_ms is not None for ping in pings if (":" in ping.target[0]) == v6) for v6 in (True, False)}
        first, second = ("IPv6", "IPv4") if route.families.prefer_v6 else ("IPv4", "IPv6")
        if all(works.values()):
            log_upstreams.info("  %s in use / %s is fallback", first, second)
        elif any(works.values()):
            log_upstreams.info("  IPv6 only / IPv4 unavailable" if works[True] else "  IPv4 only / IPv6 unavailable")
        else:
            log_upstreams.info("  No DC connectivity")
        log_upstreams.info("  via %s", route.name())
        log_upstreams.info("%s", _RULE)
        for v6 in (True, False):
            for ping in pings if works[v6] else ():
                if (":" in ping.target[0]) == v6:
                    log_upstreams.info("%s", ping.text())
            if works[v6]:
                log_upstreams.info("%s", _RULE)


# -- all of them

class Upstreams:
    """The ways out, and the connect cycles that use them."""

    def __init__(self, loop: Loop, settings: Settings, counters: Counters, families: Families, names: Resolver,
                 checks: tuple[float, float] = CHECKS) -> None:
        self.loop, self.counters = loop, counters
        self.general = settings.general        # upstream_* need a restart
        self.directory = DcDirectory(families)
        patience_s = max(1, settings.timeouts.tg_connect)
        self.deadlines: Lane[Passage] = loop.lane(patience_s, Passage.on_timeout)
        self.silences: Lane[Cycle] = loop.lane(patience_s / _SILENT_PART, Cycle.on_silence)
        tools = Tools(loop, names, counters, OwnAddresses(loop).of)
        network = settings.network
        beyond = Families(network.ipv4, network.ipv6, network.prefer == 6 and network.ipv6)
        self.routes = [Route(entry, tools, families if entry.type == "direct" else beyond)
                       for entry in settings.upstreams if entry.enabled]
        for route in self.routes:
            self._examine(route)
        self.health = Health(self, *checks)
        self.settings = settings
        self.health.apply(settings)

    @staticmethod
    def _examine(route: Route) -> None:
        """Warn once, at start, about an entry that cannot work (D20)."""
        try:
            route.dialogue((DC_TABLE[_DEFAULT_DC][0], DC_PORT), "")
        except RouteError as error:
            log_upstreams.warn("%s: connections of this upstream fail", error, upstream=route.name())

    def apply(self, settings: Settings) -> None:
        """Take over the hot keys: dc_overrides for the checks; connections bring their own settings."""
        if settings.dc_overrides != self.settings.dc_overrides:
            self.health.apply(settings)
        self.settings = settings

    def start(self) -> None:
        """Begin what runs by itself: the connectivity table now, checks for ever."""
        Survey(self).start()
        self.health.start()

    # -- choosing

    def candidates(self, scope: str, to: Destination) -> list[Route]:
        """Routes that the scope admits; SOCKS4 ones not for IPv6 if another is there (D5)."""
        admitted = [route for route in self.routes if route.admits(scope)]
        if any(route.kind == "socks4" for route in admitted) and ":" in to.targets(self.directory.families)[0][0]:
            return [route for route in admitted if route.kind != "socks4"] or admitted
        return admitted

    def untried(self, scope: str, to: Destination, tried: Container[Route]) -> list[Route]:
        """Healthy routes that a cycle may go on with."""
        if len(self.routes) == 1:
            return []
        return [route for route in self.candidates(scope, to) if route.healthy and route not in tried]

    def pick(self, scope: str, to: Destination) -> Route:
        """Draw the first route of a cycle (7.3).  Raises RouteError when none admits the scope."""
        found = self.candidates(scope, to)
        if not found:
            if self.routes and _no_upstream.ready():
                log_upstreams.warn("No upstreams available! Using first (direct?)", scope=scope)
            raise RouteError("Config error: No upstreams available", hard=True)
        healthy = [route for route in found if route.healthy]
        if healthy:
            return self.draw(healthy, to.slot)
        if _none_healthy.ready():
            log_upstreams.warn("No healthy upstreams available! Using random.")
        return found[int(draw_fraction() * len(found))]

    @staticmethod
    def draw(routes: Sequence[Route], slot: int) -> Route:
        """Draw one by weight, faster ones more often."""
        if len(routes) == 1:
            return routes[0]
        weights = []
        for route in routes:
            latency = route.latency_ms(slot)
            weights.append(route.entry.weight * (1.0 if latency is None else 1000.0 / max(latency, 1.0)))
        bounds = list(itertools.accumulate(weights if any(weights) else [1.0] * len(routes)))
        at = bisect.bisect_right(bounds, draw_fraction() * bounds[-1])
        return routes[at if at < len(routes) else 0]

    # -- connecting

    def connect_dc(self, dc: int, settings: Settings, scope: str, done: Callable[[Connected | RouteError], None]) -> Cycle:
        """Start one cycle towards `dc`; done(Connected or RouteError) is called once, never before this returns."""
        return Cycle(self, self.directory.find(dc, settings), scope, True, done)

    def connect(self, targets: Sequence[Target], done: Callable[[Connected | RouteError], None], *, dc: int = 0, scope: str = "",
                blame: bool = True) -> Cycle:
        """Start one cycle towards the first of `targets` that answers, one per attempt.

        dc: index whose latency it tells about, 0 = none.  blame: whether failure and success tell about the upstreams' health.
        """
        return Cycle(self, Destination(tuple(targets), slot=abs(dc) if abs(dc) in DC_TABLE else 0), scope, blame, done)

    def blame(self, route: Route | None, error: RouteError, attempts: int) -> None:
        """A cycle failed through `route`; None = whose health that says nothing about."""
        if route is None:
            log_upstreams.debug("Upstream failed after retries: %s", error, attempts=attempts)
            return
        threshold = self.general.upstream_unhealthy_fail_threshold
        lost = route.failed(threshold)
        log_upstreams.warn("Upstream failed after retries: %s", error, fails=route.fails, attempts=attempts)
        if lost:
            log_upstreams.warn("Upstream marked unhealthy", upstream=route.name(), fails=route.fails, threshold=threshold)

    # -- what the API shows

    def rows(self) -> list[dict[str, Any]]:
        """Enabled upstreams in the order of the configuration (api.md 9.4)."""
        return [route.row(index, self.loop.now) for index, route in enumerate(self.routes)]

    def summary(self) -> dict[str, int]:
        """How many there are of what (api.md 9.4)."""
        kinds = [route.kind for route in self.routes]
        healthy = sum(route.healthy for route in self.routes)
        return {"configured_total": len(kinds), "healthy_total": healthy, "unhealthy_total": len(kinds) - healthy,
                **{f"{kind}_total": kinds.count(kind) for kind in ("direct", "socks4", "socks5")}}

    def network_path(self) -> list[dict[str, Any]]:
        """The table's addresses and what the first upstream knows about them (13.2)."""
        first = self.routes[0] if self.routes else None
        return [{"dc": dc, "ip_preference": first.paths[dc].label().removesuffix("_work") if first else None,
                 "selected_addr_v4": format_address(v4, DC_PORT), "selected_addr_v6": format_address(v6, DC_PORT)}
                for dc, (v4, v6) in DC_TABLE.items()]


_no_upstream: Final = Throttle(5.0)
_none_healthy: Final = Throttle(5.0)
log_upstreams: Final = Log("upstreams")


# == 17. links ===============================================================
# Links to the middle end, and who uses them.  Three layers: rpc knows bytes,
# the planner decides, this room does.
#
#   MeLink     one link: dial, nonce, handshake, then a few thousand sessions.
#              LinkIn decrypts whole reads and finds frames in them, LinkOut
#              serialises what a turn has queued into one write, Heart pings
#   Pool       performs the planner's actions, reports what happens, knows which
#              session has which connection id and who waits for a link
#   Directory  proxy-secret and endpoint lists: downloads in a helper thread,
#              cache files, the rule of stable snapshots
#
# A link belongs to many sessions, so nothing that one client does may stop it:
# its reader never waits.  An answer is framed where it lies in the decrypted
# run, encrypted from there and sent; what the client does not take is its
# session's own trouble.  The other way sessions stop reading their clients
# while a link has more unsent than LINK_HIGH.
# Traps: a session may end while its link's read is being handled; a frame may
# be larger than the arena (it then grows in memory of its own); connection ids
# never repeat, so an answer can be for a session that is gone.
# Source: middle-proxy-wire.md 2, 3, 6-12 and D1-D20; middle-proxy-pool.md 5, 17.

LINK_HIGH: Final = 4 << 20               # unsent bytes of a link at which its clients are not read any more (D15)
LINK_LOW: Final = 1 << 20                # and from which they are again
LINK_LIMIT: Final = 8 << 20              # where even the answers to pings stop: the peer is broken
_AHEAD: Final = 256 << 10                # serialised ahead of the socket (D16)
_LINK_LEVEL: Final = 2                   # QUANTA of one read: 256 KiB
_LINK_ROOM: Final = 512 << 10            # a frame that needs more does not go through the arena
_FRAME_LARGE: Final = 16_384             # from here on the end of a read is worth a thought
_BEHIND: Final = 64                      # bytes behind a frame that are read too, because there may be padding between frames
_STEPS_AT_ONCE: Final = 1024             # frames of a read beyond which the next ones are as small as can be
_LINK_PHASE_S: Final = 10.0                   # nonce and handshake, each (D5)
_PING_OLD_S: Final = 120.0
_SIGNAL_S: Final = 0.7
_TOLD_MAX: Final = 1024                  # ids per link and beat: more than have answers under way at a time
_ANSWER: Final = struct.Struct("<IIQ")
_LE64: Final = struct.Struct("<Q")


class Bound(Protocol):
    """A session, as its link sees it.  None of these calls raises; the last three may end the session."""

    last_at: float

    @property
    def conn_id(self) -> int:
        """Its name on the link."""

    @property
    def dc(self) -> int:
        """Signed DC that it asked for."""

    def on_answer(self, region: Region, at: int, size: int) -> None:
        """Data for the client at region[at:at + size], to be sent at on_run_end; FRAME_SPARE bytes around it are free."""

    def on_ack(self, region: Region, at: int) -> None:
        """Four bytes of a quick-ack token."""

    def on_run_end(self, region: Region) -> None:
        """The read that brought answers is done."""

    def on_middle_closed(self, region: Region | None) -> None:
        """The middle end closed the session, or the link is gone (None)."""

    def pace(self) -> None:
        """The link is `holding` now, or not any more: read the client as that allows."""


class Meta(NamedTuple):
    """What the requests of a session say about it, connection id apart."""

    framing: str                 # Framing.name
    client: tuple[str, int]
    ours: tuple[str, int]
    ad_tag: bytes | None


class LinkIn:
    """The receiving half of a link: whole reads are decrypted in one call, frames found in the result."""

    __slots__ = ("arena", "backend", "stream", "decryptor", "reader", "level", "_frame", "_plain", "_cipher", "_big")

    def __init__(self, arena: Arena, backend: Backend, stream: Stream, shake: LinkHandshake) -> None:
        assert shake.decryptor is not None
        self.arena, self.backend, self.stream = arena, backend, stream
        self.decryptor = shake.decryptor
        self.reader = FrameReader(0, shake.checksum)
        self.level = 0
        self._frame = 0                        # bytes of the last frame
        self._plain, self._cipher = shake.take_rest()      # an incomplete frame; fewer than 16 bytes of ciphertext
        self._big: bytearray | None = None     # a frame beyond _LINK_ROOM, as far as it came

    def rest(self) -> tuple[Region, list[tuple[int, int]]]:
        """Frames that came in one piece with the handshake."""
        return self._find(self.arena.input, self._place_plain())

    def run(self) -> tuple[Region, list[tuple[int, int]]] | None:
        """Return (region, [(start, size) of payloads in it]) of one read, None at the end.  Raises OSError."""
        region, quantum = self.arena.input, self._quantum()
        base = 0 if self._big is not None else self._place_plain()
        view, start = region.view, base + len(self._cipher)
        if self._cipher:
            view[base:start] = self._cipher
        size = self.stream.read_into(view[start:] if start else view, quantum)
        if size <= 0:
            return None if size == 0 else (region, [])
        if size == quantum:
            if self.reader.steps << 2 <= _STEPS_AT_ONCE:
                self.level = min(self.level + 1, _LINK_LEVEL)
        whole = start - base + size & -BLOCK_SIZE
        end = base + whole
        if whole:
            self.decryptor.crypt(region, base, region, base, whole)
        self._cipher = bytes(view[end:start + size]) if end != start + size else b""
        if self._big is not None:
            return self._grow(view[:end])
        return self._find(region, end)

    def _quantum(self) -> int:
        """How much to read.  Large frames are mostly alike, so bulk is read up to just behind one: what is kept is copied twice."""
        quantum, frame = QUANTA[self.level], self._frame
        if self.level < _LINK_LEVEL or frame < _FRAME_LARGE or frame > _LINK_ROOM or self._big is not None:
            return quantum
        return max(1, (quantum + (frame >> 1)) // frame) * frame - len(self._plain) + _BEHIND

    def _place_plain(self) -> int:
        size = len(self._plain)
        if size:
            self.arena.input.view[:size] = self._plain
        return size

    def _find(self, region: Region, end: int) -> tuple[Region, list[tuple[int, int]]]:
        spans, rest = self.reader.spans(region.view, 0, end)
        self._plain = bytes(region.view[rest:end]) if rest < end else b""
        if spans:
            self._frame = spans[-1][1] + RPC_FRAME_MIN
        if self.reader.steps > _STEPS_AT_ONCE:
            self.level = 0                     # very many very small frames: others have their turn between fewer of them
        if self.reader.needs > _LINK_ROOM:
            self._big, self._plain = bytearray(self._plain), b""
        return region, spans

    def _grow(self, data: memoryview) -> tuple[Region, list[tuple[int, int]]]:
        """Add to the big frame; it is looked at when it is complete."""
        big = self._big
        assert big is not None
        big += data
        if len(big) < self.reader.needs:
            return self.arena.input, []
        self._big, size = None, len(big)
        big += bytes(CRYPT_SLACK)
        return self._find(self.backend.region(big), size)


class LinkOut:
    """The sending half of a link.  push() queues; once a turn everything queued is numbered, padded and encrypted together."""

    __slots__ = ("stream", "queued", "writer", "encryptor", "_on_due", "_urgent", "_queue", "_unsent", "_at", "_due")

    def __init__(self, stream: Stream, on_due: Callable[[], None]) -> None:
        self.stream = stream
        self._on_due = on_due                  # called at the end of a turn that queued something: it calls flush(), handles OSError
        self.queued = 0                        # bytes that the socket has not taken, serialised or not
        self.writer = FrameWriter(0)
        self.encryptor: AesCbc | None = None
        self._urgent = collections.deque[Message]()    # PING and PONG overtake what is not serialised yet (D16)
        self._queue = collections.deque[Message]()
        self._unsent = b""
        self._at = 0                           # bytes of _unsent that the socket took
        self._due = False                      # a flush is under way: deferred, or the socket is waited for

    def start(self, shake: LinkHandshake) -> None:
        """From here on everything is encrypted."""
        self.encryptor = shake.encryptor
        self.writer.checksum = shake.checksum

    def raw(self, data: bytes) -> None:
        """Send bytes of the handshake.  Raises OSError."""
        self._unsent = self._unsent[self._at:] + data
        self._at = 0
        self.queued += len(data)
        self.flush()

    def push(self, head: bytes, body: bytes) -> int:
        """Queue one message; return the bytes that wait now."""
        self._queue.append((head, body))
        self.queued = queued = self.queued + len(head) + len(body)
        if not self._due:
            self._due = True
            self.stream.loop.defer(self._on_due)
        return queued

    def push_urgent(self, payload: bytes) -> None:
        """Queue a PING or PONG."""
        self._urgent.append((payload, b""))
        self.queued += len(payload)
        if not self._due:
            self._due = True
            self.stream.loop.defer(self._on_due)

    def flush(self) -> bool:
        """Serialise and send; True when nothing is left.  Raises OSError."""
        while True:
            if self._unsent:
                sent = self.stream.write(memoryview(self._unsent)[self._at:] if self._at else self._unsent)
                self.queued -= sent
                self._at += sent
                if self._at < len(self._unsent):
                    self._due = True
                    self.stream.want(self.stream.mask | WRITE)
                    return False
                self._unsent, self._at = b"", 0
            if not self._queue and not self._urgent:
                self._due = False
                if self.stream.mask & WRITE:
                    self.stream.want(self.stream.mask & ~WRITE)
                return True
            self._serialise()

    def _serialise(self) -> None:
        out: list[bytes] = []
        waiting = len(self._urgent) + len(self._queue)
        size = self.writer.add(out, self._urgent, _AHEAD)
        size += self.writer.add(out, self._queue, _AHEAD - size)
        out.append(padding(size))
        assert self.encryptor is not None
        self._unsent = self.encryptor.update(b"".join(out))
        frames = waiting - len(self._urgent) - len(self._queue)
        self.queued += len(self._unsent) - size + frames * RPC_FRAME_MIN       # what waited had no frames around it


class Told:
    """Ids that were told to the peer in this beat of the link and in the one before, seconds ago; older ones are forgotten."""

    __slots__ = ("_fresh", "_old")

    def __init__(self) -> None:
        self._fresh = set[int]()
        self._old = set[int]()

    def __contains__(self, conn_id: int) -> bool:
        return conn_id in self._fresh or conn_id in self._old

    def __len__(self) -> int:
        return len(self._fresh) + len(self._old)

    def add(self, conn_id: int) -> None:
        """Remember one more."""
        if len(self._fresh) == _TOLD_MAX:
            self.age()
        self._fresh.add(conn_id)

    def age(self) -> None:
        """A beat has passed."""
        self._fresh, self._old = set(), self._fresh


class Heart:
    """Pings of one link; when and whether is the planner's to say."""

    __slots__ = ("heard", "timer", "next_id", "_sent")

    def __init__(self) -> None:
        self.heard = True                      # any byte since the last beat
        self.timer: Timer | None = None
        self.next_id = int.from_bytes(os.urandom(8), "little")
        self._sent: dict[int, float] = {}

    def expire(self, now: float) -> int:
        """Forget pings that nobody will answer; return how many."""
        old = [number for number, at in self._sent.items() if now - at > _PING_OLD_S]
        for number in old:
            del self._sent[number]
        return len(old)

    def build(self, now: float) -> bytes:
        """The next ping."""
        self.next_id = (self.next_id + 1) % (1 << 64)
        self._sent[self.next_id] = now
        return _CONN.pack(RPC_PING, self.next_id)

    def answered(self, number: int, now: float) -> float | None:
        """Round trip in ms of a ping that is known."""
        at = self._sent.pop(number, None)
        return None if at is None else (now - at) * 1000


class Signal:
    """Activity signals of one link: empty requests in the name of its last session (middle-proxy-wire.md 12, D17)."""

    __slots__ = ("link", "meta", "conn_id", "timer", "patience")

    def __init__(self, link: MeLink) -> None:
        self.link = link
        self.meta: Meta | None = None          # of the last session
        self.conn_id = -1                      # of the signal under way; route-only, it is no session (D19)
        self.timer: Timer | None = None        # the next one
        self.patience: Timer | None = None     # with the one under way

    def plan(self, first: bool = False) -> None:
        """Arm the next one, if the planner wants any."""
        pause_s = self.link.pool.planner.signal_pause(first)
        self.timer = None if pause_s is None else self.link.pool.loop.call_later(pause_s, self.send)

    def send(self) -> None:
        """Ask for a sign of life."""
        pool = self.link.pool
        self.plan()
        if self.meta is None:
            pool.me.count("rpc_proxy_req_signal_skipped_no_meta_total")
        elif self.link.holding or self.conn_id >= 0:
            pool.me.count("rpc_proxy_req_signal_failed_total")
        else:
            framing, client, ours, ad_tag = self.meta
            self.conn_id = pool.bindings.new_id()
            self.link.push(RequestHead(framing, self.conn_id, client, ours, ad_tag).build(b"", False))
            pool.me.count("rpc_proxy_req_signal_sent_total")
            self.patience = pool.loop.call_later(_SIGNAL_S, self.end)

    def end(self, answered: bool = False, closed: bool = False) -> None:
        """An answer came (closed: it was a close), or the time for one is over."""
        count = self.link.pool.me.count
        if self.patience is not None:
            self.patience.cancel()
        count("rpc_proxy_req_signal_response_total", answered)
        if not closed:
            self.link.push_close(self.conn_id)
            count("rpc_proxy_req_signal_close_sent_total")
        self.conn_id = -1

    def cancel(self) -> None:
        """The link ends."""
        for timer in (self.timer, self.patience):
            if timer is not None:
                timer.cancel()


class MeLink:
    """One link to a middle end.  Ends in exactly one of pool.on_dial_failed, pool.on_link_lost and close()."""

    __slots__ = ("pool", "id", "dc", "endpoint", "cycle", "stream", "shake", "inlet", "out", "heart", "bound", "holding", "ready_at",
                 "signal", "told")

    def __init__(self, pool: Pool, order: OpenLink) -> None:
        self.pool, self.id, self.dc, self.endpoint = pool, order.link_id, order.dc, order.endpoint
        self.stream: Stream | None = None      # None: being dialled, or ended
        self.shake: LinkHandshake | None = None
        self.inlet: LinkIn | None = None       # set once ready
        self.out: LinkOut | None = None
        self.heart = Heart()
        self.bound: dict[int, Bound] = {}      # by connection id
        self.holding = False                   # its clients are not read
        self.ready_at = INF
        self.signal = Signal(self)
        self.told = Told()                     # ids that we closed lately: answers under way earn no other close
        self.cycle: Cycle | None = pool.dial(self.endpoint, self.dc, self._on_connected)

    # -- coming up

    def _on_connected(self, result: Connected | RouteError) -> None:
        self.cycle = None
        if isinstance(result, RouteError):
            self._fail(result)
            return
        self.stream = stream = result.stream
        self.pool.notes.first.connected(self.id, self.pool.loop.now)
        tune_link(stream.sock)
        self.out = LinkOut(stream, self.flush)
        try:
            ends = self.pool.choose_ends(self.endpoint, result)
            self.shake = LinkHandshake(self.pool.origin, self.pool.secret, ends, int(time.time()))
            stream.watch(READ, self.on_ready)
            self.pool.phases.arm(self)
            self.out.raw(self.shake.open())
        except (OSError, RouteError) as error:
            self._fail(error)

    def on_ready(self, mask: int) -> None:
        """The socket is ready."""
        try:
            if self.stream is not None and self.stream.mask & WRITE and mask & ~READ:
                self.flush()
            if self.stream is not None and mask & ~WRITE:
                if self.inlet is not None:
                    self._run(self.inlet.run())
                else:
                    self._shake_hands()
        except (OSError, RpcError) as error:
            self._fail(error)

    def _shake_hands(self) -> None:
        stream, shake, out = self.stream, self.shake, self.out
        assert stream is not None and shake is not None and out is not None
        data = stream.read(QUANTA[0])
        if data is None:
            return
        if not data:
            raise RpcError("handshake", "IO error: ME closed during handshake")
        keyed = shake.keyed
        if reply := shake.feed(data):
            out.raw(reply)
        if shake.done:
            self._come_up()
        elif shake.keyed != keyed:
            self.pool.phases.arm(self)         # the second half has its own ten seconds

    def _come_up(self) -> None:
        pool, shake, stream, out = self.pool, self.shake, self.stream, self.out
        assert shake is not None and stream is not None and out is not None
        pool.phases.cancel(self)
        out.start(shake)
        self.inlet = LinkIn(pool.arena, pool.origin.backend, stream, shake)
        self.shake = None
        self.ready_at = pool.loop.now
        pool.on_link_ready(self, shake.ends)
        self.beat()
        self.signal.plan(True)
        self._run(self.inlet.rest())

    # -- messages

    def _run(self, found: tuple[Region, list[tuple[int, int]]] | None) -> None:
        """Hand the messages of one read to whom they are for."""
        if found is None:
            self.pool.end_link(self, Lost.EOF, None)
            return
        region, spans = found
        view, bound, unpack = region.view, self.bound, _ANSWER.unpack_from
        touched: dict[Bound, None] = {}
        self.heart.heard = True
        for start, size in spans:
            if size >= ANSWER_HEAD:
                kind, _flags, conn_id = unpack(view, start)
                if kind == RPC_PROXY_ANS:
                    session = bound.get(conn_id)
                    if session is None:
                        self._on_stray(conn_id)
                    elif size > ANSWER_HEAD:
                        session.on_answer(region, start + ANSWER_HEAD, size - ANSWER_HEAD)
                        touched[session] = None
                    continue
            if size >= 12:
                self._on_message(region, start, size, touched)
        call = self.pool.loop.call
        for session in touched:
            call(session.on_run_end, region)
        failed = self.inlet.reader.failed if self.inlet is not None else None
        if failed is not None:
            raise failed

    def _on_message(self, region: Region, start: int, size: int, touched: dict[Bound, None]) -> None:
        """Everything but an answer."""
        view = region.view
        kind, number = _CONN.unpack_from(view, start)
        if kind == RPC_SIMPLE_ACK and size >= ANSWER_HEAD:
            session = self.bound.get(number)
            if session is None:
                self._on_stray(number)
            else:
                session.on_ack(region, start + 12)
                touched[session] = None
        elif kind in (RPC_CLOSE_EXT, RPC_CLOSE_CONN):
            session = self.bound.get(number)
            if number == self.signal.conn_id:
                self.signal.end(answered=True, closed=True)
            if session is not None:
                touched.pop(session, None)
                self.unbind(session)
                self.pool.loop.call(session.on_middle_closed, region)
        elif kind == RPC_PING:
            self.push_urgent(_CONN.pack(RPC_PONG, number))
        elif kind == RPC_PONG:
            self.pool.on_pong(self, number)
        else:
            log_me.debug("Unknown RPC", link=self.id, kind=f"0x{kind:08x}", size=size)

    def _on_stray(self, conn_id: int) -> None:
        """An answer for nobody: its session has ended, perhaps a moment ago; or for a signal."""
        if conn_id == self.signal.conn_id:
            self.signal.end(answered=True)
            return
        self.pool.me.count("route_drop_no_conn_total")
        if conn_id not in self.told and not self.holding:      # somebody who does not read need not be told
            self.push_close(conn_id)

    def push(self, head: bytes, body: bytes = b"") -> None:
        """Queue one payload for this turn's write."""
        if self.out is not None and self.out.push(head, body) > LINK_HIGH and not self.holding:
            self.pool.hold(self, True)

    def push_close(self, conn_id: int) -> None:
        """Say that a session is over, behind everything that it has said."""
        self.told.add(conn_id)
        self.push(build_close(conn_id))

    def push_urgent(self, payload: bytes) -> None:
        """Queue a PING or PONG.  Raises RpcError for a peer that asks and asks and does not read."""
        out = self.out
        if out is None:
            return
        if out.queued > LINK_LIMIT:
            raise RpcError("length", "the middle end does not read what it asks for")
        out.push_urgent(payload)

    def flush(self) -> None:
        """Write what is queued; the end of a turn, or the socket is writable again."""
        out = self.out
        if out is None:
            return
        try:
            out.flush()
        except OSError as error:
            self._fail(error)
            return
        if self.holding and out.queued < LINK_LOW:
            self.pool.hold(self, False)

    # -- sessions

    def bind(self, session: Bound, meta: Meta) -> None:
        """A session uses this link from now on."""
        self.bound[session.conn_id] = session
        self.signal.meta = meta
        self.pool.planner.on_bound(self.pool.loop.now, self.id, session.dc)
        if self.holding:
            session.pace()

    def unbind(self, session: Bound) -> None:
        """And no longer; may be called twice."""
        if self.bound.pop(session.conn_id, None) is not None and self.stream is not None:
            self.pool.on_unbound(self, session.dc)

    def cut(self, session: Bound) -> None:
        """End one session from our side: the middle end is told, the client gets what there is."""
        self.push_close(session.conn_id)
        self.unbind(session)
        self.pool.loop.call(session.on_middle_closed, None)

    # -- keepalive

    def beat(self) -> None:
        """Ask the planner what is due: a ping, the end, and when to ask again."""
        pool, heart = self.pool, self.heart
        self.told.age()
        beat = pool.planner.beat(pool.loop.now, self.id, heart.heard)
        heart.heard, heart.timer = False, None
        if beat.dead:
            pool.end_link(self, Lost.SILENT, None)
            return
        heart.timer = pool.loop.call_later(beat.again_s, self.beat)
        if beat.ping:
            pool.me.count("keepalive_timeout_total", heart.expire(pool.loop.now))
            pool.me.count("keepalive_sent_total")
            self.push_urgent(heart.build(pool.loop.now))

    # -- the end

    def _fail(self, error: Exception) -> None:
        if self.inlet is None:
            self.pool.fail_dial(self, error)
        else:
            self.pool.end_link(self, Lost.ERROR, error)

    def on_crash(self) -> None:
        """Our own error in a handler: it cost this link."""
        self._fail(InternalError("internal error"))

    def close(self) -> None:
        """Close the socket and end every session; reports nothing; may be called twice."""
        self.pool.phases.cancel(self)
        if self.cycle is not None:
            self.cycle.abort()
            self.cycle = None
        self.signal.cancel()
        if self.heart.timer is not None:
            self.heart.timer.cancel()
        if self.stream is not None:
            self.stream.close()
        self.stream = self.out = self.shake = None
        sessions, self.bound = self.bound, {}
        for session in sessions.values():
            self.pool.on_unbound(self, session.dc)
            self.pool.loop.call(session.on_middle_closed, None)


class Planner(Protocol):
    """The policy of a pool, as its driver sees it: PoolPlanner of room 12, or a small one in tests."""

    queued: Callable[[int], int]         # bytes that wait for a link's socket; the driver's

    @property
    def generation(self) -> int: ...
    def apply(self, now: float, settings: Settings) -> None: ...
    def on_map(self, now: float, v4: EndpointMap, v6: EndpointMap, default_dc: int) -> None: ...
    def on_families(self, now: float, order: Sequence[int], multipath: bool) -> None: ...
    def on_secret(self, now: float, epoch: int) -> None: ...
    def on_link_ready(self, now: float, link_id: int) -> None: ...
    def on_dial_failed(self, now: float, link_id: int) -> None: ...
    def on_link_lost(self, now: float, link_id: int, why: Lost) -> None: ...
    def on_bound(self, now: float, link_id: int, dc: int) -> None: ...
    def on_unbound(self, now: float, link_id: int, dc: int) -> None: ...
    def on_pong(self, now: float, link_id: int, rtt_ms: float) -> None: ...
    def beat(self, now: float, link_id: int, heard: bool) -> Beat: ...
    def signal_pause(self, first: bool = False) -> float | None: ...
    def route(self, now: float, dc: int, has_direct: bool, waited: bool = False) -> Way: ...
    def plan(self, now: float) -> list[Action]: ...


class PublicAddresses(Protocol):
    """What the pool has to know of our own public addresses."""

    def reflected(self, version: int) -> str | None:
        """How others see us in this family, None = not known."""

    def me_families(self) -> tuple[int, ...]:
        """Families that links may use at present, the preferred one first."""

    def multipath(self) -> bool:
        """Whether links use both."""

    def forgive(self) -> None:
        """A cycle of downloads is over: the next failure to find an address counts as the first."""


class Waiting:
    """A session without a link, in the queue of its group (D6)."""

    __slots__ = ("dc", "group", "has_direct", "on_way", "timer")

    def __init__(self, dc: int, group: int, has_direct: bool, on_way: Callable[[Way], None]) -> None:
        self.dc, self.group, self.has_direct, self.on_way = dc, group, has_direct, on_way
        self.timer: Timer | None = None


class Bindings:
    """Connection ids, never used twice, and the queues of sessions that wait for a link."""

    def __init__(self, draw: int) -> None:
        self._next = draw | 1
        self.queues: dict[int, dict[Waiting, None]] = {}       # by group, oldest first

    def new_id(self) -> int:
        """A connection id, unique over all links."""
        self._next = (self._next + 1) % (1 << 64)
        return self._next

    def join(self, waiting: Waiting) -> None:
        """Stand at the end of the group's queue."""
        self.queues.setdefault(waiting.group, {})[waiting] = None

    def leave(self, waiting: Waiting) -> None:
        """Stop waiting; may be called twice."""
        if waiting.timer is not None:
            waiting.timer.cancel()
            waiting.timer = None
        queue = self.queues.get(waiting.group, {})
        queue.pop(waiting, None)
        if not queue:
            self.queues.pop(waiting.group, None)


class FirstTry(NamedTuple):
    """How the first dial of an endpoint ended: milliseconds to the connection and to the ready link, None = not reached."""

    dc: int
    endpoint: Endpoint
    connect_ms: float | None
    ready_ms: float | None
    error: str

    def text(self) -> str:
        """One line of the block (middle-proxy-wire.md 13)."""
        ip, port = self.endpoint
        head = f"     {'-' if self.dc < 0 else '+'} {ip}:{port}\tPing: "
        if self.connect_ms is None:
            return f"{head}FAIL ({self.error})"
        end = f"FAIL ({self.error})" if self.ready_ms is None else f"{self.ready_ms:.0f} ms / OK"
        return f"{head}{self.connect_ms:.0f} ms / RPC: {end}"


class FirstTries:
    """The block "Telegram ME Connectivity": printed once, when the dials of the first plans have all ended (13, pool D1)."""

    def __init__(self, via: str) -> None:
        self._via = via
        self._open: dict[int, list[float]] | None = {}       # moments of each dial under way; None: it is printed
        self._found: dict[tuple[int, Endpoint], FirstTry] = {}

    def expect(self, link_id: int, now: float) -> None:
        """A link is dialled."""
        if self._open is not None:
            self._open[link_id] = [now]

    def connected(self, link_id: int, now: float) -> None:
        """Its connection stands, the handshake begins."""
        if self._open is not None and link_id in self._open:
            self._open[link_id].append(now)

    def ended(self, link: MeLink, now: float, error: Exception | None) -> None:
        """The dial is over, and the link is ready where `error` is None."""
        if self._open is None or link.id not in self._open:
            return
        began, *connected = self._open.pop(link.id)
        took = [(at - began) * 1000 for at in connected]
        ready_ms = (now - connected[0]) * 1000 if connected and error is None else None
        self._found.setdefault((link.dc, link.endpoint), FirstTry(
            link.dc, link.endpoint, took[0] if took else None, ready_ms, _why_not(error, bool(took))))
        if not self._open:
            self._open = None
            for line in self.lines():
                log_me.info("%s", line)

    def lines(self) -> Iterator[str]:
        """The block."""
        yield "================= Telegram ME Connectivity ================="
        usable = {":" in row.endpoint[0] for row in self._found.values() if row.ready_ms is not None}
        yield "  " + {(True, True): "IPv4 and IPv6 available", (True, False): "IPv4 only / IPv6 unavailable",
                      (False, True): "IPv6 only / IPv4 unavailable", (False, False): "No ME connectivity"}[False in usable, True in usable]
        yield f"  via {self._via}"
        yield _RULE
        group = None
        for row in sorted(self._found.values(), key=lambda row: (abs(row.dc), ":" in row.endpoint[0], row.dc, row.endpoint)):
            if group != (group := (abs(row.dc), ":" in row.endpoint[0])):
                yield f"    DC{group[0]} [IPv{6 if group[1] else 4}]"
            yield row.text()
        yield _RULE
        self._found.clear()


def _why_not(error: Exception | None, connected: bool) -> str:
    """Reason of a failed dial as the block words it; "" for None."""
    match error:
        case None:
            return ""
        case RpcError():
            return "handshake timeout" if str(error) == _PHASE_TEXT else f"bad handshake: {str(error).removeprefix('Invalid handshake: ')}"
        case OSError():
            return f"io: {error.strerror}"
    text = str(error)
    if text.startswith("Connection timeout"):
        return "connect timeout"
    kind, _, rest = text.partition(": ")
    if kind in ("IO error", "Proxy error") and rest:
        return f"{'io' if kind == 'IO error' else 'proxy'}: {rest}"
    return f"crypto: {text}" if connected else f"proxy: {text}"      # connected, but there are no addresses to make keys of


class DialNotes(NamedTuple):
    """What a pool remembers of its dials."""

    drift: DriftMemory
    first: FirstTries


class Pool:
    """The driver: performs what the planner says and tells it what happened.  No policy in here."""

    def __init__(self, loop: Loop, settings: Settings, counters: Counters, arena: Arena, upstreams: Upstreams, network: PublicAddresses,
                 origin: Origin, planner: Planner) -> None:
        self.loop, self.settings, self.me = loop, settings, counters.me
        self.arena, self.upstreams, self.network, self.origin = arena, upstreams, network, origin
        self.secret = ProxySecret(b"")
        self.planner = planner
        planner.queued = self._queued
        self.links: dict[int, MeLink] = {}
        self.bindings = Bindings(int.from_bytes(origin.entropy(8), "little"))
        self.phases: Lane[MeLink] = loop.lane(_LINK_PHASE_S, self._on_phase_timeout)
        self.notes = DialNotes(DriftMemory(), FirstTries(", ".join(route.name() for route in upstreams.routes) or "no upstream"))
        self._planned = False
        self._wake: Timer | None = None

    def apply(self, settings: Settings) -> None:
        """Take the hot keys of a reload."""
        self.settings = settings
        self.planner.apply(self.loop.now, settings)
        self.replan()

    def on_secret(self, secret: ProxySecret, epoch: int) -> None:
        """A proxy-secret is in force; links that stand keep their keys."""
        self.secret = secret
        self.planner.on_secret(self.loop.now, epoch)
        self.replan()

    def on_map(self, v4: EndpointMap, v6: EndpointMap, default_dc: int) -> None:
        """These endpoints are in force."""
        self.planner.on_map(self.loop.now, v4, v6, default_dc)
        self.replan()

    def on_families(self) -> None:
        """What we know of our own addresses changed."""
        self.planner.on_families(self.loop.now, self.network.me_families(), self.network.multipath())
        self.replan()

    # -- sessions

    def route(self, dc: int, has_direct: bool, waited: bool = False) -> Way:
        """Where a session for `dc` (signed) goes; a Bind is followed by MeLink.bind in the same turn, a Hold by wait()."""
        way = self.planner.route(self.loop.now, dc, has_direct, waited)
        self.replan()
        return way

    def wait(self, hold: Hold, dc: int, has_direct: bool, on_way: Callable[[Way], None]) -> Waiting:
        """Call on_way once, when there is a link or the patience of `hold` is over; bindings.leave() takes it back."""
        waiting = Waiting(dc, hold.dc, has_direct, on_way)
        waiting.timer = self.loop.call_later(max(0.0, hold.until_at - self.loop.now), functools.partial(self._on_waited, waiting))
        self.bindings.join(waiting)
        return waiting

    def _on_waited(self, waiting: Waiting) -> None:
        self.bindings.leave(waiting)
        waiting.on_way(self.route(waiting.dc, waiting.has_direct, waited=True))

    def _serve_waiters(self, group: int) -> None:
        for waiting in list(self.bindings.queues.get(group, ())):
            way = self.route(waiting.dc, waiting.has_direct)
            if isinstance(way, Hold):
                return
            self.bindings.leave(waiting)
            self.loop.call(waiting.on_way, way)

    # -- actions

    def replan(self) -> None:
        """Ask the planner at the end of this turn."""
        if not self._planned:
            self._planned = True
            self.loop.defer(self._plan)

    def _plan(self) -> None:
        self._planned = False
        for action in self.planner.plan(self.loop.now):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case OpenLink():
                self.notes.first.expect(action.link_id, self.loop.now)
                self.links[action.link_id] = MeLink(self, action)
            case CloseLink(link_id):
                if (link := self.links.pop(link_id, None)) is not None:
                    log_me.info("Middle-End link closed", link=link_id, dc=link.dc)
                    link.flush()               # the close of its last session may still be queued
                    link.close()
            case CutSessions(link_id, sessions):
                if (link := self.links.get(link_id)) is not None:
                    for session in sorted(link.bound.values(), key=_last_heard)[:sessions]:
                        link.cut(session)
            case PromoteLink(link_id) | DrainLink(link_id, _):
                log_me.debug("Middle-End link %s", "promoted" if isinstance(action, PromoteLink) else "drains", link=link_id)
            case ServeWaiters(dc):
                self._serve_waiters(dc)
            case Say(level, text):
                (log_me.info if level is Level.INFO else log_me.warn if level is Level.WARN else log_me.debug)("%s", text)
            case WakeAt(at):
                self._wake_at(at)
            case _:
                assert_never(action)

    def _wake_at(self, at: float) -> None:
        if self._wake is not None:
            if self._wake.callback is not None and self._wake.at == at:
                return
            self._wake.cancel()
        self._wake = self.loop.call_later(max(0.0, at - self.loop.now), self.replan)

    # -- what links report

    def dial(self, endpoint: Endpoint, dc: int, done: Callable[[Connected | RouteError], None]) -> Cycle:
        """Connect to a middle end; `dc` is what the upstreams book the latency under."""
        return self.upstreams.connect([endpoint], done, dc=dc)

    def choose_ends(self, endpoint: Endpoint, connected: Connected) -> LinkEnds:
        """The addresses that make the keys of a link.  Raises RouteError."""
        general, (local_ip, local_port) = self.settings.general, connected.local
        version = 6 if ":" in endpoint[0] else 4
        strict = general.me_socks_kdf_policy == "strict"
        try:
            ends = choose_link_ends(
                endpoint, (plain_ip(local_ip), local_port), socks=connected.kind != "direct", bound=connected.bound,
                nat_ip=self.nat_ip(version), detected=self.network.reflected(version) or "", strict=strict)
        except RouteError:
            self.me.count("socks_kdf_strict_reject_total", connected.kind != "direct" and strict)
            raise
        self.me.count("socks_kdf_compat_fallback_total", ends.compat)
        return ends

    def our_ip(self, local_ip: str) -> str:
        """The address of ours that requests carry."""
        version = 6 if ":" in local_ip else 4
        return our_address(local_ip, self.nat_ip(version), self.network.reflected(version) or "")

    def nat_ip(self, version: int) -> str:
        """`general.middle_proxy_nat_ip` if it is of this family."""
        nat_ip = self.settings.general.middle_proxy_nat_ip
        return str(nat_ip) if nat_ip is not None and nat_ip.version == version else ""

    def _on_phase_timeout(self, link: MeLink) -> None:
        self.fail_dial(link, RpcError("handshake", _PHASE_TEXT))

    def on_link_ready(self, link: MeLink, ends: LinkEnds) -> None:
        """A handshake is done."""
        self.notes.first.ended(link, self.loop.now, None)
        log_me.info("Middle-End link up", link=link.id, dc=link.dc, endpoint=format_address(*link.endpoint))
        match self.notes.drift.note(link.endpoint, (ends.client_ip, ends.server_ip, ends.compat), ends.client_port):
            case "drift":
                self.me.count("kdf_drift_total")
                log_me.warn("ME KDF input drift detected", endpoint=format_address(*link.endpoint))
            case "port_only":
                self.me.count("kdf_port_only_drift_total")
                log_me.debug("ME KDF client port changed", endpoint=format_address(*link.endpoint))
        self.planner.on_link_ready(self.loop.now, link.id)
        self.replan()

    def fail_dial(self, link: MeLink, error: Exception) -> None:
        """A link did not come up."""
        if self.links.get(link.id) is not link:
            return
        del self.links[link.id]
        link.close()
        self.notes.first.ended(link, self.loop.now, error)
        if isinstance(error, RpcError) and error.kind == "rejected":
            self.me.handshake_rejected(error.code)
        log = log_me.warn if _dial_failed.ready() else log_me.debug
        log("Middle-End link failed: %s", describe(error), dc=link.dc, endpoint=format_address(*link.endpoint))
        self.planner.on_dial_failed(self.loop.now, link.id)
        self.replan()

    def end_link(self, link: MeLink, why: Lost, error: Exception | None) -> None:
        """A link that was ready is gone."""
        if self.links.get(link.id) is not link:
            return
        del self.links[link.id]
        if isinstance(error, RpcError):
            self.me.count("crc_mismatch_total", error.kind == "crc")
            self.me.count("seq_mismatch_total", error.kind == "seq")
        if why is Lost.EOF:
            self.me.count("reader_eof_total")
            self.me.count("idle_close_by_peer_total", not link.bound)
        quiet = why is Lost.EOF and not link.bound
        (log_me.info if quiet else log_me.warn)("Middle-End link lost: %s", describe(error) if error else why.value, link=link.id,
                                                     dc=link.dc, sessions=len(link.bound), up_s=int(self.loop.now - link.ready_at))
        self.planner.on_link_lost(self.loop.now, link.id, why)
        link.close()
        self.replan()

    def hold(self, link: MeLink, on: bool) -> None:
        """Stop reading the clients of a link that has too much unsent, or go on (D15)."""
        link.holding = on
        for session in list(link.bound.values()):
            session.pace()

    def on_unbound(self, link: MeLink, dc: int) -> None:
        """A session left a link."""
        self.planner.on_unbound(self.loop.now, link.id, dc)
        self.replan()

    def on_pong(self, link: MeLink, number: int) -> None:
        """A ping came back."""
        self.me.count("keepalive_pong_total")
        rtt_ms = link.heart.answered(number, self.loop.now)
        if rtt_ms is not None:
            self.planner.on_pong(self.loop.now, link.id, rtt_ms)

    def retire(self) -> None:
        """Neither open nor replace links any more; those without sessions stay for the clients that are shaking hands."""
        self._planned = True                   # for ever: nobody plans
        if self._wake is not None:
            self._wake.cancel()
        self.loop.call_later(self.settings.timeouts.client_handshake, self._close_idle)

    def _close_idle(self) -> None:
        for link_id, link in list(self.links.items()):
            if not link.bound:
                del self.links[link_id]
                self.planner.on_link_lost(self.loop.now, link_id, Lost.EOF)
                link.close()

    def is_warm(self) -> bool:
        """True if a link is ready."""
        return any(link.inlet is not None for link in self.links.values())

    def _queued(self, link_id: int) -> int:
        link = self.links.get(link_id)
        return link.out.queued if link is not None and link.out is not None else 0

    def close(self) -> None:
        """The process stops: what sessions have queued, their closes included, goes out as far as sockets take it at once."""
        for link in list(self.links.values()):
            link.flush()
            link.close()
        self.links.clear()


# -- the directory: what Telegram says about its middle ends

SECRET_URL: Final = "https://core.telegram.org/getProxySecret"
LIST_URLS: Final = {4: "https://core.telegram.org/getProxyConfig", 6: "https://core.telegram.org/getProxyConfigV6"}
SECRET_BODY_MAX: Final = 64 << 10
LIST_BODY_MAX: Final = 1 << 20
_SECRET_RETRY_S: Final = 5.0              # without any secret (middle-proxy-wire.md D1)
_SECRET_RETRY_MAX_S: Final = 300.0
_LIST_PAUSES_S: Final = (1.0, 5.0)       # between the attempts of one cycle
_DOWNLOAD_S: Final = 15.0
_USER_AGENT: Final = "telemt-middle-proxy/1"
_NO_SSL: Final = ("no ssl module: proxy-secret and getProxyConfig cannot be downloaded"
                  " (OpenWrt: python3-openssl ca-certificates)")


class Download(NamedTuple):
    """Answer of a web server."""

    status: int
    body: bytes
    date_wall: float | None = None       # of its Date header, unix seconds


FetchUrl: TypeAlias = "Callable[[str, int, Callable[[Download | Exception], None]], None]"      # url, limit of the body, done


class StableRule:
    """Something downloaded counts when it came the same several times in a row (middle-proxy-wire.md 2.4)."""

    __slots__ = ("applied", "_candidate", "_hits")

    def __init__(self) -> None:
        self.applied: Hashable = None
        self._candidate: Hashable = None
        self._hits = 0

    def see(self, content: Hashable, needed: int) -> str:
        """Return candidate, already_applied or ready; the caller sets `applied` when it applied it."""
        if content == self._candidate:
            self._hits = min(self._hits + 1, 255)
        else:
            self._candidate, self._hits = content, 1
        if self._hits < needed:
            return "candidate"
        return "already_applied" if content == self.applied else "ready"


def list_content(found: ProxyList) -> Hashable:
    """What two lists must have in common to be the same: the order of addresses does not count."""
    return found.default_dc, tuple((dc, tuple(sorted(found.endpoints[dc]))) for dc in sorted(found.endpoints))


class Directory:
    """Proxy-secret and lists: fetched, judged, cached, handed to the pool."""

    def __init__(self, loop: Loop, settings: Settings, fetch: FetchUrl, families: Sequence[int], pool: Pool) -> None:
        self.loop, self.general, self.fetch, self.pool = loop, settings.general, fetch, pool
        self.secret_rule = StableRule()
        self.rules = {family: StableRule() for family in families}
        self.lists: dict[int, ProxyList] = {}          # in force, by family
        self._epoch = 0
        self._retry_s = _SECRET_RETRY_S
        self._told_no_ssl = False
        self._applied_at = -INF
        self._timer: Timer | None = None
        self._cycle: dict[int, tuple[ProxyList, bytes] | None] | None = None     # answers of the cycle under way, with their texts
        self._period_s = self._wanted_period()

    # -- start

    def start(self) -> None:
        """Fetch everything; what cannot be had comes from its cache, lists at last from the built-in table."""
        self._get_secret()
        for family in self.rules:
            self.fetch(self._list_url(family), LIST_BODY_MAX, functools.partial(self._on_first_list, family))
        self._arm()

    def retire(self) -> None:
        """Fetch no more."""
        self.fetch = _fetch_nothing
        if self._timer is not None:
            self._timer.cancel()

    def _get_secret(self) -> None:
        self.fetch(self.general.proxy_secret_url or SECRET_URL, SECRET_BODY_MAX, self._on_first_secret)

    def _list_url(self, family: int) -> str:
        general = self.general
        return (general.proxy_config_v4_url if family == 4 else general.proxy_config_v6_url) or LIST_URLS[family]

    def _on_first_secret(self, result: Download | Exception) -> None:
        try:
            data = self._judge_secret(result)
        except (TelemtError, OSError, ImportError) as error:
            self._complain(error, "proxy-secret download failed: %s; trying the cache file", describe(error))
            path = self.general.proxy_secret_path
            self.loop.offload(lambda: read_small_file(path, SECRET_BODY_MAX), self._on_cached_secret)
            return
        self.secret_rule.applied = data
        self._use_secret(data)
        self._keep(self.general.proxy_secret_path, data, 0o600, "proxy-secret")

    def _on_cached_secret(self, result: bytes | Exception) -> None:
        try:
            if isinstance(result, Exception):
                raise RouteError(f"Failed to read proxy-secret cache after download failure: {describe(result)}")
            check_secret_size(len(result), self.general.proxy_secret_len_max)
        except TelemtError as error:
            log_me.error("Failed to fetch proxy-secret, next attempt in %d s: %s", self._retry_s, error)
            self.loop.call_later(self._retry_s, self._get_secret)
            self._retry_s = min(2 * self._retry_s, _SECRET_RETRY_MAX_S)
            return
        log_me.info("proxy-secret taken from its cache file", size=len(result))
        self._use_secret(result)

    def _judge_secret(self, result: Download | Exception) -> bytes:
        if isinstance(result, Exception):
            raise result
        self._check_clock(result)
        check_secret_answer(result.status, result.body, self.general.proxy_secret_len_max)
        return result.body

    def _use_secret(self, data: bytes) -> None:
        self._epoch += 1
        self.pool.on_secret(ProxySecret(data), self._epoch)

    def _on_first_list(self, family: int, result: Download | Exception) -> None:
        found = self._judge_list(family, result)
        if found is not None:
            self.rules[family].applied = list_content(found)       # D3: not to be applied again by the first cycles
            self._keep(self._list_path(family), self._body_of(result), None, "proxy list")
            self._settle(family, found)
            return
        path = self._list_path(family)
        self.loop.offload(lambda: read_small_file(path, LIST_BODY_MAX), functools.partial(self._on_cached_list, family))

    def _on_cached_list(self, family: int, result: bytes | Exception) -> None:
        found = None if isinstance(result, Exception) else parse_proxy_config(result.decode("utf-8", "replace"), family)
        if found is not None and found.endpoints:
            log_me.info("proxy list of IPv%d taken from its cache file", family)
        else:
            log_me.warn("proxy list of IPv%d not available, using the built-in one", family)
            found = builtin_list(family)
        self._settle(family, found)

    def _settle(self, family: int, found: ProxyList) -> None:
        """The first list of a family; the pool is told when all are there."""
        self.lists[family] = found
        if len(self.lists) == len(self.rules):
            self._tell()

    def _tell(self) -> None:
        leading = self.lists.get(4) or self.lists[6]
        v4, v6 = (self.lists[family].endpoints if family in self.lists else {} for family in (4, 6))
        self.pool.on_map(v4, v6, leading.default_dc or 0)

    # -- judging

    @staticmethod
    def _body_of(result: Download | Exception) -> bytes:
        return result.body if isinstance(result, Download) else b""

    def _judge_list(self, family: int, result: Download | Exception) -> ProxyList | None:
        """The list of a download that may be used, else None and a warning."""
        general = self.general
        if isinstance(result, Exception):
            self._complain(result, "fetch_proxy_config failed", family=family, error=describe(result))
            return None
        self._check_clock(result)
        found = parse_proxy_config(result.body.decode("utf-8", "replace"), family)
        first = family not in self.lists
        if not 200 <= result.status <= 299 and (first or general.me_snapshot_require_http_2xx):
            log_me.warn("proxy list rejected: HTTP %d", result.status, family=family)
            return None
        if found.lines < general.me_snapshot_min_proxy_for_lines or not found.endpoints:
            log_me.warn("proxy list rejected: %d proxy_for lines, at least %d wanted", found.lines,
                        general.me_snapshot_min_proxy_for_lines, family=family)
            return None
        if found.cut:
            log_me.warn("proxy list cut: only its first %d endpoints count", LIST_ENDPOINTS_MAX, family=family)
        return found

    def _complain(self, why: Exception, text: str, *args: object, **fields: object) -> None:
        """Warn about a failed download; without the ssl module all of them fail, and one line says so (platform.md 2)."""
        if not isinstance(why, ImportError):
            log_me.warn(text, *args, **fields)
        elif not self._told_no_ssl:
            self._told_no_ssl = True
            log_me.warn(_NO_SSL)

    def _check_clock(self, result: Download) -> None:
        """A wrong clock makes every handshake fail: say so early."""
        if result.date_wall is not None:
            skew = abs(time.time() - result.date_wall)
            if skew > 30:
                log_me.warn("Time skew >%ds: the middle end refuses a clock that is 30 s off", 60 if skew > 60 else 30, skew_s=int(skew))

    # -- cycles

    def apply(self, settings: Settings) -> None:
        """Take the hot keys; a shorter period starts a cycle at once, a longer one waits anew."""
        self.general = settings.general
        before, self._period_s = self._period_s, self._wanted_period()
        if self._period_s < before:
            self._run()
        if self._period_s != before:
            self._arm()

    def _wanted_period(self) -> int:
        general = self.general
        if general.update_every is not None:
            return general.update_every
        return max(1, min(general.proxy_secret_auto_reload_secs, general.proxy_config_auto_reload_secs))

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self._period_s, self._on_timer)

    def _on_timer(self) -> None:
        self._arm()
        self._run()

    def _run(self) -> None:
        """One cycle; not while another is under way, or before the first lists are there."""
        if self._cycle is None and len(self.lists) == len(self.rules):
            self._cycle = {}
            for family in self.rules:
                self._try_list(family, 0)

    def _try_list(self, family: int, attempt: int) -> None:
        self.fetch(self._list_url(family), LIST_BODY_MAX, functools.partial(self._on_list, family, attempt))

    def _on_list(self, family: int, attempt: int, result: Download | Exception) -> None:
        if isinstance(result, Exception) and attempt < len(_LIST_PAUSES_S):
            self.loop.call_later(_LIST_PAUSES_S[attempt], functools.partial(self._try_list, family, attempt + 1))
            return
        assert self._cycle is not None
        found = self._judge_list(family, result)
        self._cycle[family] = (found, self._body_of(result)) if found is not None else None
        if len(self._cycle) == len(self.rules):
            answers, self._cycle = self._cycle, None
            self._apply_lists(answers)
            self.pool.network.forgive()
            if self.general.proxy_secret_rotate_runtime and self._epoch:
                self.fetch(self.general.proxy_secret_url or SECRET_URL, SECRET_BODY_MAX, self._on_secret)

    def _apply_lists(self, answers: Mapping[int, tuple[ProxyList, bytes] | None]) -> None:
        general = self.general
        needed = general.me_config_stable_snapshots
        ready = {family: answer for family, answer in answers.items()
                 if answer is not None and self.rules[family].see(list_content(answer[0]), needed) == "ready"}
        if not ready:
            return
        if self.loop.now - self._applied_at < general.me_config_apply_cooldown_secs:
            log_me.debug("proxy list change deferred by cooldown", families=sorted(ready))
            return
        self._applied_at = self.loop.now
        for family, (found, body) in ready.items():
            self.rules[family].applied = list_content(found)
            self.lists[family] = found
            self._keep(self._list_path(family), body, None, "proxy list")
        log_me.info("proxy lists updated", families=sorted(ready))
        self._tell()

    def _on_secret(self, result: Download | Exception) -> None:
        try:
            data = self._judge_secret(result)
        except (TelemtError, OSError, ImportError) as error:
            self._complain(error, "proxy-secret update failed: %s", describe(error))
            return
        if self.secret_rule.see(data, self.general.proxy_secret_stable_snapshots) != "ready":
            return
        self.secret_rule.applied = data
        if data != self.pool.secret.data:
            log_me.info("proxy-secret updated", size=len(data))
            self._use_secret(data)
            self._keep(self.general.proxy_secret_path, data, 0o600, "proxy-secret")

    # -- files

    def _list_path(self, family: int) -> str:
        return self.general.proxy_config_v4_cache_path if family == 4 else self.general.proxy_config_v6_cache_path

    def _keep(self, path: str, data: bytes, mode: int | None, what: str) -> None:
        """Write a cache file in a helper thread; a failure is worth a warning and no more."""
        def work() -> None:
            folder = os.path.dirname(path)
            if folder:
                os.makedirs(folder, exist_ok=True)
            write_whole(path, data, replace=True, mode=mode)

        def done(result: Exception | None) -> None:
            if result is not None:
                log_me.warn("Failed to cache %s (non-fatal): %s", what, describe(result), path=path)

        if path and data:
            self.loop.offload(work, done)


def check_secret_answer(status: int, body: bytes, limit: int) -> None:
    """Raise RouteError or WireError unless this answer to a request is a proxy-secret that may be used."""
    if not 200 <= status <= 299:
        raise RouteError(f"proxy-secret download HTTP {status}")
    check_secret_size(len(body), limit)


def _fetch_nothing(_url: str, _limit: int, _done: Callable[[Download | Exception], None]) -> None:
    """For a directory that is not read any more."""


class Downloads:
    """Fetches small files over the configured ways out; the blocking half runs in a helper thread (middle-proxy-wire.md D1)."""

    def __init__(self, loop: Loop, upstreams: Upstreams) -> None:
        self.loop, self.upstreams = loop, upstreams

    def fetch(self, text: str, limit: int, done: Callable[[Download | Exception], None]) -> None:
        """Call done(answer or the error) once.  network.dns_overrides do not apply (upstream-and-relay.md 6)."""
        url, deadline_at = parse_url(text), time.monotonic() + _DOWNLOAD_S

        def on_names(found: list[str] | Exception) -> None:
            if isinstance(found, Exception):
                done(found)
            else:
                self.upstreams.connect([(ip, url.port) for ip in found], on_connected, blame=False)

        def on_connected(result: Connected | RouteError) -> None:
            if isinstance(result, RouteError):
                done(result)
            else:
                sock = result.stream.release()
                self.loop.offload(lambda: download(sock, url, limit, deadline_at), done)

        resolve(self.loop, url.host, url.port, on_names)


def download(sock: socket.socket, url: Url, limit: int, deadline_at: float) -> Download:
    """The answer to a GET over a connected socket, which is closed; for helper threads.  Raises OSError, RouteError, ImportError."""
    try:
        answer = http_over(sock, url, limit + 1, deadline_at, _USER_AGENT)
    except ValueError as error:
        raise RouteError(str(error)) from None
    if len(answer.body) > limit:
        raise RouteError(f"{url.host} sent more than {limit} bytes")
    return Download(answer.status, answer.body, parse_http_date(answer.headers.get("date", "")))


_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def parse_http_date(text: str) -> float | None:
    """Unix seconds of `Tue, 15 Nov 1994 08:12:31 GMT`, None for anything else; `email` would cost a megabyte."""
    import datetime
    words = text.replace(":", " ").split()
    try:
        _day, day, month, year, hour, minute, second, zone = words
        moment = datetime.datetime(int(year), _MONTHS.index(month) + 1, int(day), int(hour), int(minute), int(second), tzinfo=datetime.UTC)
    except (ValueError, OverflowError):          # numbers of any length
        return None
    return moment.timestamp() if zone == "GMT" else None


def _last_heard(session: Bound) -> float:
    return session.last_at


_dial_failed: Final = Throttle(1.0)
_PHASE_TEXT: Final = "Telegram handshake timeout"
log_me: Final = Log("middle")


# == 18. masking =============================================================
# What a stranger meets: the real site.  Whoever is no client of ours is joined
# to the mask host with the bytes that were read so far, and from then on sees
# nothing of us: bytes, ends and resets go over as they come, by the same flows
# that carry sessions.
#
#   ClientSession --stranger--> MaskDial --connected--> MaskRelay
#                                  '------failed------> read and discard until the deadline
#
# Traps.  The mask host may be ourselves, behind a name, a forwarding rule or a
# load balancer: a connection would then feed itself until nothing is left.
# A limit on time or volume is a fingerprint; only silence ends a masked one.
#
# Fronts.  Our answer to a client must look like the mask host's answer to the
# same hello, so that host is asked now and then (every four to eight hours) with
# a hello of ours: a Fetch makes up to three Probes one after another, at most
# four domains at a time.  A Front is one configured domain with its profile and
# its timer; FrontProfiles holds them all and the stock of key shares.  Clients
# never wait for any of it: a default, then the file of the last run, then what
# was measured.
# Source: client-protocol.md 11, D7, D9, D19; tls-front.md 9.

MASK_CONNECT_S: Final = 5.0              # name, addresses, connecting: all together
MASK_SILENCE_S: Final = 120.0            # no byte in either direction
MASK_ENDING_S: Final = 30.0              # the same once one side has ended
_MASK_RETRY_S: Final = 0.05              # the backlog of a unix socket was full
_LOOP: Final = "Mask target is this proxy"
_HEAD_KEPT: Final = 64                   # bytes by which a connection of ours is recognised
_MASK_LEVEL: Final = QUANTA.index(65_536)          # of a read into memory
_MASK_PIPES: Final = 8                   # that strangers may fill
_LAST_WORDS: Final = 16                  # reads of what a side said before it reset the connection


class Masks:
    """What all masked connections share: the way to the mask host, their number, the guard against loops."""

    def __init__(self, loop: Loop, arena: Arena, resolver: Resolver, observer: Observer, cap: int,
                 ended: Callable[[MaskRelay], None]) -> None:
        self.loop, self.arena, self.resolver, self.observer = loop, arena, resolver, observer
        self.share = max(64, cap // 4)         # of the connection slots (client-protocol.md D2)
        self.busy = 0                          # strangers that have, or are getting, a connection to the mask host
        self.ended = ended
        self.ends: dict[Address, bytes] = {}   # local ends of our connections to the mask host, and how each of them began
        self.listeners: list[Address] = []     # addresses that lead to us
        self.listen_path = ""                  # path that leads to us
        self.dials: Lane[Dial] = loop.lane(MASK_CONNECT_S, Dial.on_timeout)
        self.deadlines: Lane[MaskDial] = loop.lane(MASK_CONNECT_S, MaskDial.on_timeout)
        self.silent: Lane[MaskRelay] = loop.lane(MASK_SILENCE_S, MaskRelay.on_silence)
        self.ending: Lane[MaskRelay] = loop.lane(MASK_ENDING_S, MaskRelay.on_silence)
        self._loop_seen = Throttle(60.0)

    def enter(self) -> bool:
        """Take one of the places for strangers; False = none left, the mask host counts as unreachable."""
        if self.busy >= self.share:
            return False
        self.busy += 1
        return True

    def leave(self) -> None:
        """Give the place back."""
        self.busy -= 1

    def refuse_ourselves(self, target: Address | str, ours: Address | None) -> None:
        """Raise RouteError if `target` (an address, or the path of a unix socket) leads to us.

        ours: local address of the connection that is to be masked.
        """
        if isinstance(target, str):
            loops = bool(self.listen_path) and os.path.realpath(target) == os.path.realpath(self.listen_path)
        else:
            loops = target == ours or any(target == end or (end[1] == target[1] and end[0] in ("0.0.0.0", "::") and is_local_ip(target[0]))
                                          for end in self.listeners)
        if loops:
            if self._loop_seen.ready():
                log_masking.error("Mask target is this proxy", target=target if isinstance(target, str) else format_address(*target))
            raise RouteError(_LOOP, hard=True)

    def is_ours(self, peer: Address, head: bytes) -> bool:
        """True if a peer that began with `head` is one of our own connections to the mask host, come back through somebody else.

        Its address alone does not say so: a client on this host, say the load balancer, may be given the same port.
        """
        said = self.ends.get(peer, b"")[:len(head)]
        return bool(said) and head.startswith(said)


class MaskStream(Stream):
    """A stream to the mask host; its local end is known as ours until it is closed."""

    __slots__ = ("_masks", "_end")

    def __init__(self, masks: Masks, stream: Stream, end: Address | None) -> None:
        super().__init__(stream.loop, stream.sock)
        self.mask = stream.mask                # as the dial left it in the poller
        self._masks, self._end = masks, end

    def close(self) -> None:
        """Close at the end of the turn; may be called twice."""
        super().close()
        if self._end is not None:
            self._masks.ends.pop(self._end, None)


class MaskDial:
    """One way to the mask host, direct, never through an upstream.  done(stream or RouteError) is called once, after this returned."""

    __slots__ = ("_masks", "_cert", "_ours", "_done", "_ips", "_share_s", "_dial", "_end", "_timer")

    def __init__(self, masks: Masks, cert: Censorship, ours: Address | None, done: Callable[[Stream | RouteError], None]) -> None:
        self._masks, self._cert, self._ours = masks, cert, ours
        self._done: Callable[[Stream | RouteError], None] | None = done
        self._ips: list[str] = []
        self._share_s = MASK_CONNECT_S         # of the time, for each address
        self._dial: Dial | None = None
        self._end: Address | None = None       # local end of the current attempt
        self._timer: Timer | None = None
        masks.deadlines.arm(self)
        if cert.mask_unix_sock:
            self._connect_unix()
        else:
            masks.resolver.lookup(self._host, cert.mask_port, self._on_names)

    @property
    def _host(self) -> str:
        return self._cert.mask_host or self._cert.tls_domain

    def abort(self) -> None:
        """Nobody waits any more."""
        self._done = None
        self._masks.deadlines.cancel(self)
        self._drop_attempt()

    def on_crash(self) -> None:
        """Our own error while connecting."""
        self._finish(RouteError("internal error"))

    def on_timeout(self) -> None:
        """Called by the lane: five seconds are over."""
        log_masking.debug("Timeout connecting to mask %s", "unix socket" if self._cert.mask_unix_sock else "host", target=self._target())
        self._finish(RouteError("timeout"))

    def _target(self) -> str:
        return self._cert.mask_unix_sock or f"{self._host}:{self._cert.mask_port}"

    def _connect_unix(self) -> None:
        masks, path = self._masks, self._cert.mask_unix_sock or ""
        try:
            masks.refuse_ourselves(path, self._ours)
            stream = connect_unix(masks.loop, path)
        except BlockingIOError:
            self._timer = masks.loop.call_later(_MASK_RETRY_S, self._connect_unix)
        except (OSError, RouteError) as error:
            masks.loop.defer(functools.partial(self._fail, error))
        else:
            masks.loop.defer(functools.partial(self._finish, stream))

    def _on_names(self, result: list[str] | Exception) -> None:
        if self._done is None:
            return
        if isinstance(result, Exception) or not result:
            self._masks.loop.defer(functools.partial(self._fail, result if isinstance(result, Exception) else RouteError("no address")))
            return
        self._ips = list(result)
        self._share_s = MASK_CONNECT_S / len(result)
        self._connect_next()

    def _connect_next(self) -> None:
        masks, ip, port = self._masks, self._ips.pop(0), self._cert.mask_port
        try:
            masks.refuse_ourselves((ip, port), self._ours)
        except RouteError as error:
            masks.loop.defer(functools.partial(self._fail, error))
            return
        self._dial = Dial(masks.loop, ip, port, masks.dials, self._on_dialled)
        self._end = self._dial.local_end()
        if self._end is not None:
            masks.ends[self._end] = b""
        if self._ips:                          # one that swallows SYNs must leave time for the others
            self._timer = masks.loop.call_later(self._share_s, self._overtake)

    def _overtake(self) -> None:
        self._drop_attempt()
        self._connect_next()

    def _on_dialled(self, result: Stream | RouteError) -> None:
        if isinstance(result, Stream):
            end, self._dial, self._end = self._end, None, None
            self._finish(MaskStream(self._masks, result, end))
            return
        self._drop_attempt()
        if self._ips:
            self._connect_next()
        else:
            self._fail(result)

    def _drop_attempt(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._dial is not None:
            self._dial.abort()
        if self._end is not None:
            self._masks.ends.pop(self._end, None)
        self._dial = self._end = None

    def _fail(self, error: Exception) -> None:
        if self._done is not None:
            log_masking.debug("Failed to connect to mask %s", "unix socket" if self._cert.mask_unix_sock else "host", target=self._target(),
                              error=error)
            self._finish(error if isinstance(error, RouteError) else RouteError(str(error)))

    def _finish(self, result: Stream | RouteError) -> None:
        done = self._done
        self.abort()
        if done is None:
            if isinstance(result, Stream):
                result.close()
        else:                                  # through the loop: an error in there is its owner's, not ours
            self._masks.loop.call(done, result)


class MaskFlow(CopyFlow):
    """One direction of a masked connection: 64 KiB of a stranger's bytes in our memory are enough (D9); bulk goes through a pipe.

    A pipe that a slow stranger fills is his until he reads, so half of them are left to clients.
    """

    __slots__ = ()

    def run(self) -> int:
        """Move one quantum."""
        if self.level > _MASK_LEVEL:
            pipe = self.arena.take_pipe() if self._piped == 0 and self.arena.pipes_held < _MASK_PIPES else None
            if pipe is not None:
                return self._splice(pipe, QUANTA[-1])
            self.level = _MASK_LEVEL
        return super().run()


class MaskRelay:
    """A stranger and the mask host, joined: owner of both streams until one of them has had enough."""

    __slots__ = ("masks", "peer", "client", "mask", "up", "down", "last_at", "closed")

    def __init__(self, masks: Masks, peer: str, client: Stream, mask: Stream) -> None:
        self.masks, self.peer, self.client, self.mask = masks, peer, client, mask
        self.up, self.down = MaskFlow(masks.arena, client, mask), MaskFlow(masks.arena, mask, client)
        self.last_at = masks.loop.now          # last byte in either direction
        self.closed = False

    def start(self, opening: bytes, ended: bool) -> None:
        """Send `opening` (a PROXY header where one is wanted, and all that the stranger said) and go.

        ended: the stranger said nothing more after it.
        """
        self.client.watch(READ, self.on_client)
        self.mask.watch(READ, self.on_mask)
        self.masks.silent.arm(self)
        end = self.mask.local_end()
        if end in self.masks.ends:
            self.masks.ends[end] = opening[:_HEAD_KEPT]
        try:
            self.up.push(opening)
            if ended:
                self._pass_end(self.up, self.down)
        except OSError as error:
            self._lose(self.down, error)

    # -- the two handlers

    def on_client(self, mask: int) -> None:
        """The stranger's socket is ready."""
        self._serve(mask, self.client, self.up, self.down)

    def on_mask(self, mask: int) -> None:
        """The mask host's socket is ready."""
        self._serve(mask, self.mask, self.down, self.up)

    def _serve(self, mask: int, side: Stream, away: Flow, back: Flow) -> None:
        """`side` is ready: `back` ends in it, `away` begins there."""
        wanted = side.mask
        try:
            if wanted & WRITE and mask & ~READ:
                before = back.sent
                done = back.flush()
                if back.sent > before:
                    self.last_at = self.masks.loop.now
                if done and back.finished and away.finished and not away.pending:
                    self.close(None)
            if wanted & READ and mask & ~WRITE and not self.closed:
                size = away.run()
                if size > 0:
                    self.last_at = self.masks.loop.now
                elif size == 0:
                    self._pass_end(away, back)
        except OSError as error:
            self._lose(back, error)

    def on_crash(self) -> None:
        """Our own error in a handler: it cost this connection."""
        self.close(InternalError("internal error"))

    # -- the end

    def _pass_end(self, away: Flow, back: Flow) -> None:
        if back.finished and not back.pending and not away.pending:
            self.close(None)
            return
        away.end()
        self.last_at = self.masks.loop.now
        self.masks.silent.cancel(self)
        self.masks.ending.arm(self)

    def _lose(self, back: Flow, error: OSError) -> None:
        """One side is gone.  What it said before still goes over, then the other side sees a reset as well.

        A server that refuses says why and resets: the reason must not be lost because writing to it failed first.
        """
        with contextlib.suppress(OSError):
            for _ in range(_LAST_WORDS):
                if back.pending or back.run() <= 0:
                    break
        self.client.reset()
        self.mask.reset()
        self.close(error)

    def on_silence(self) -> None:
        """Called by a lane: end it unless a byte moved meanwhile."""
        if self.closed:
            return
        limit_s = MASK_ENDING_S if self.up.finished or self.down.finished else MASK_SILENCE_S
        left_s = self.last_at + limit_s - self.masks.loop.now
        if left_s > 0:
            self.masks.loop.call_later(left_s, self.on_silence)
        else:
            self.close(None)

    def close(self, error: Exception | None) -> None:
        """Close both streams and give everything back; may be called twice."""
        if self.closed:
            return
        self.closed = True
        self.masks.silent.cancel(self)
        self.masks.ending.cancel(self)
        self.up.close()
        self.down.close()
        self.client.close()
        self.mask.close()
        self.masks.leave()
        log_masking.debug("Masked connection ended", peer=self.peer, error=error)
        self.masks.ended(self)


class Observer:
    """Notes who knocks, for /beobachten and its file (client-protocol.md 12.2).

    The file is written at start, `beobachten_flush_secs` after something changed, and when entries expire: an idle proxy does
    not wake up to write what is there already.  A helper thread writes, one file at a time.
    """

    def __init__(self, loop: Loop, settings: Settings) -> None:
        self.loop, self.general = loop, settings.general
        self.seen = Observations()
        self._timer: Timer | None = None
        self._due_at = INF
        self._writing = False
        self._failed = False                   # said once until a write succeeds again

    def apply(self, settings: Settings) -> None:
        """Take new settings."""
        before, self.general = self.general, settings.general
        if self.general.beobachten and (before.beobachten, before.beobachten_file) != (True, self.general.beobachten_file):
            self._arm(0.0)

    def note(self, kind: str, ip: str) -> None:
        """Somebody of this class came from `ip`."""
        if self.general.beobachten:
            self.seen.note(kind, ip, self.loop.now, self.general.beobachten_minutes * 60)
            self._arm(self.general.beobachten_flush_secs)

    def text(self) -> str:
        """Body of /beobachten (metrics.md 6)."""
        if not self.general.beobachten:
            return "beobachten disabled\n"
        self._forget()
        return format_observations(self.seen.rows())

    def flush(self) -> None:
        """Write the file now, in this thread: at start and at stop."""
        if self.general.beobachten:
            self._forget()
            try:
                self._write(self.general.beobachten_file, self.seen.rows())
            except OSError as error:
                self._report(error)

    def retire(self) -> None:
        """Write no more: the file is another's."""
        self._due_at = -INF
        if self._timer is not None:
            self._timer.cancel()

    def _forget(self) -> None:
        self.seen.forget(self.loop.now, self.general.beobachten_minutes * 60)

    def _arm(self, delay_s: float) -> None:
        """Have the file written in `delay_s` seconds, or earlier if that was wanted already."""
        if self.loop.now + delay_s < self._due_at:
            if self._timer is not None:
                self._timer.cancel()
            self._due_at = self.loop.now + delay_s
            self._timer = self.loop.call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._due_at = None, INF
        if not self.general.beobachten:
            return
        if self._writing:                      # a disk that takes longer than the period: the next turn is early enough
            self._arm(self.general.beobachten_flush_secs)
            return
        self._writing = True
        self._forget()
        self.loop.offload(functools.partial(self._write, self.general.beobachten_file, self.seen.rows()), self._on_written)

    @staticmethod
    def _write(path: str, rows: list[tuple[str, str, int]]) -> None:
        refuse_nul(path)
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write_whole(path, format_observations(rows), replace=True, mode=None)

    def _on_written(self, result: Exception | None) -> None:
        self._writing = False
        self._report(result)
        if len(self.seen):                     # next change without a visitor: somebody is forgotten
            self._arm(max(self.general.beobachten_flush_secs,
                          self.seen.oldest_at() + self.general.beobachten_minutes * 60 - self.loop.now + 1))

    def _report(self, error: Exception | None) -> None:
        if error is not None and not self._failed:
            log_masking.warn("Failed to flush beobachten snapshot", path=ascii(self.general.beobachten_file), error=error)
        self._failed = error is not None


# -- the front: what the mask host answers to a hello, measured

PROBE_ANSWER_S: Final = 5.0          # for the whole answer (tls-front.md 9.2)
_PROBE_QUIET_S: Final = 0.4          # so long without a byte: the server waits for our Finished
_PROBE_READ: Final = 16_384
_FETCHES_MAX: Final = 4              # domains at once
_FRONT_FRESH_S: Final = 4 * 3600.0   # a file this young is not checked at start
_FRONT_STALE_S: Final = 72 * 3600.0
_FRONT_OLD_S: Final = 30 * 86_400.0
_REFRESH_S: Final = (14_400.0, 7_200.0, 7_200.0)     # at least, and two uniform draws upon it
_RETRY_S: Final = 900.0              # after a failure; without a profile from 15 s on, doubled
_RETRY_FIRST_S: Final = 15.0
_FRONT_PATIENCE_S: Final = 5.0       # then a domain without a profile is worth a warning
_UNRECOGNISED_NAME: Final = "alert 112"
KEY_STOCK: Final = 64                # client-protocol.md D13
_HYBRID_STOCK: Final = 16


class Abortable(Protocol):
    """A connection on its way; nobody is called after abort()."""

    def abort(self) -> None: ...


Connect: TypeAlias = "Callable[[Callable[[Stream | RouteError], None]], Abortable]"


class FrontDial:
    """A connection for a probe: as strangers get theirs, and where that fails once more through the upstreams (tls-front.md D6).

    That counts as a connect, but says nothing about the upstreams' health.  done(stream or RouteError) is called once, after
    this returned; the error is that of the direct way.
    """

    __slots__ = ("_masks", "_upstreams", "_cert", "_done", "_way", "_timer", "_error")

    def __init__(self, masks: Masks, upstreams: Upstreams, settings: Settings, done: Callable[[Stream | RouteError], None]) -> None:
        self._masks, self._upstreams, self._cert = masks, upstreams, settings.censorship
        self._done: Callable[[Stream | RouteError], None] | None = done
        self._timer: Timer | None = None
        self._error = RouteError("")
        self._way: Abortable | None = MaskDial(masks, self._cert, None, self._on_direct)

    def abort(self) -> None:
        """Nobody waits any more."""
        self._done = None
        if self._way is not None:
            self._way.abort()
        if self._timer is not None:
            self._timer.cancel()

    def on_crash(self) -> None:
        """Our own error in a step."""
        self._finish(RouteError("internal error"))

    def _on_direct(self, result: Stream | RouteError) -> None:
        self._way = None
        # A plain direct upstream is the way that has just failed; a unix socket is on this machine, and so are we.
        detour = any(route.kind != "direct" or route.entry.interface or route.entry.bind_addresses for route in self._upstreams.routes)
        if isinstance(result, Stream) or not detour or self._cert.mask_unix_sock or str(result) == _LOOP:
            self._finish(result)
            return
        self._error = result
        self._masks.resolver.lookup(self._cert.mask_host or self._cert.tls_domain, self._cert.mask_port, self._on_names)

    def _on_names(self, result: list[str] | Exception) -> None:
        if self._done is None:
            return
        if isinstance(result, Exception):
            self._finish(self._error)
            return
        self._timer = self._masks.loop.call_later(MASK_CONNECT_S, self._on_late)
        self._way = self._upstreams.connect([(ip, self._cert.mask_port) for ip in result], self._on_detour, blame=False)

    def _on_late(self) -> None:
        self._finish(self._error)

    def _on_detour(self, result: Connected | RouteError) -> None:
        self._way = None
        self._finish(self._error if isinstance(result, RouteError) else result.stream)

    def _finish(self, result: Stream | RouteError) -> None:
        done = self._done
        self.abort()
        if done is not None:
            self._masks.loop.call(done, result)
        elif isinstance(result, Stream):
            result.close()


class Probe:
    """One hello to the mask host and the measure of what comes back: `reader`, and `error`, empty when the answer can be used."""

    __slots__ = ("loop", "reader", "error", "connected", "_dial", "_stream", "_unsent", "_limit", "_quiet", "_done")

    def __init__(self, loop: Loop, connect: Connect, opening: bytes, done: Callable[[Probe], None]) -> None:
        self.loop = loop
        self.reader = FlightReader()
        self.error = ""                        # the word for the log (tls-front.md 9.2)
        self.connected = False
        self._stream: Stream | None = None
        self._unsent = opening
        self._limit: Timer | None = None
        self._quiet: Timer | None = None
        self._done: Callable[[Probe], None] | None = done
        self._dial: Abortable | None = connect(self._on_connected)

    def abort(self) -> None:
        """Close everything; done() is not called any more."""
        self._done = None
        for timer in (self._limit, self._quiet):
            if timer is not None:
                timer.cancel()
        if self._dial is not None:
            self._dial.abort()
        if self._stream is not None:
            self._stream.close()
        self._limit = self._quiet = self._dial = self._stream = None

    def _on_connected(self, result: Stream | RouteError) -> None:
        self._dial = None
        if isinstance(result, RouteError):
            self._finish(str(result))
            return
        self.connected, self._stream = True, result
        self._limit = self.loop.call_later(PROBE_ANSWER_S, self._on_limit)
        result.watch(WRITE, self._on_ready)

    def _on_ready(self, _mask: int) -> None:
        assert self._stream is not None
        try:
            if self._unsent:
                self._unsent = self._unsent[self._stream.write(self._unsent):]
                self._stream.want(WRITE if self._unsent else READ)
                return
            data = self._stream.read(_PROBE_READ)
            if data:
                self.reader.feed(data)
                self._rest()
            elif data == b"":
                self._end("closed")
        except OSError:                        # reset: it ends like any other way to hang up
            self._end("closed")
        except WireError as error:
            self._finish(str(error))

    def _rest(self) -> None:
        """Start to wait for silence, once there is something to measure and no record is cut."""
        if self._quiet is not None:
            self._quiet.cancel()
        self._quiet = self.loop.call_later(_PROBE_QUIET_S, self._on_limit) if self.reader.flight and not self.reader.mid_record else None

    def _on_limit(self) -> None:
        self._end("timeout")

    def _end(self, word: str) -> None:
        self._finish("" if self.reader.flight else word)

    def on_crash(self) -> None:
        """Our own error in a step."""
        self._finish("internal error")

    def _finish(self, error: str) -> None:
        done = self._done
        self.error = error
        self.abort()
        if done is not None:
            self.loop.call(done, self)         # through the loop: an error in there is its owner's


class Fetch:
    """Up to three probes for one domain.  done(fetch) comes once; `samples` is empty if none could be used, `error` says why.

    Where the host prefers X25519MLKEM768, the last one asks without it, as older clients do: `plain` is the sample of that.
    """

    __slots__ = ("samples", "plain", "hello", "error", "host", "_fronts", "_domain", "_header", "_probe", "_left", "_hybrid", "_done")

    def __init__(self, fronts: FrontProfiles, domain: str, header: bytes, done: Callable[[Fetch], None]) -> None:
        self.samples: list[int] = []
        self.plain: list[int] = []
        self.hello: ServerHello | None = None  # of the last usable answer
        self.error = ""
        self.host = fronts.host                # whom it asks
        self._fronts, self._domain, self._header = fronts, domain, header
        self._left = FRONT_SAMPLES
        self._hybrid = True
        self._done: Callable[[Fetch], None] | None = done
        self._probe: Probe | None = None
        self._ask()

    def abort(self) -> None:
        """Forget it."""
        self._done = None
        if self._probe is not None:
            self._probe.abort()

    def on_crash(self) -> None:
        """Our own error in a step."""
        self._finish("internal error")

    def _ask(self) -> None:
        fronts = self._fronts
        hello = build_probe_hello(self._domain, fronts.make_key, fronts.entropy, self._hybrid and not self._asks_plainly)
        self._probe = Probe(fronts.loop, fronts.connect, self._header + hello, self._on_answer)

    @property
    def _asks_plainly(self) -> bool:
        """True for the probe that leaves out the group which the host prefers."""
        return self._left == 1 and self.hello is not None and profile_of(self.hello).group == GROUP_HYBRID

    def _on_answer(self, probe: Probe) -> None:
        plainly = self._asks_plainly
        self._left -= 1
        if plainly:
            self.plain += [probe.reader.flight] if not probe.error else []
        elif not probe.error:
            assert probe.reader.hello is not None
            self.samples.append(probe.reader.flight)
            self.hello = probe.reader.hello
        elif not self.samples:
            if self._hybrid and probe.connected and not probe.reader.heard and probe.error in ("closed", "timeout"):
                self._hybrid = False           # perhaps something on the way cannot take a hello of two segments
                self._left += 1
            else:
                self._finish(probe.error)
                return
        if self._left:
            self._ask()
        else:
            self._finish("")

    def _finish(self, error: str) -> None:
        done, self._done = self._done, None
        self.error = error
        if done is not None:
            self._fronts.loop.call(done, self)


class Front:
    """One configured domain: its profile, and when it is measured again."""

    __slots__ = ("domain", "profile", "fetch", "failures", "fetched", "_fronts", "_default", "_timer", "_told")

    def __init__(self, fronts: FrontProfiles, domain: str, default: FrontProfile) -> None:
        self.domain, self._fronts = domain, fronts
        self.profile = self._default = default
        self.fetch: Fetch | None = None
        self.failures = 0                      # fetches in a row
        self.fetched = False                   # at least one worked in this process
        self._timer: Timer | None = None
        self._told: set[str] = set()           # warnings that come once per domain

    def load(self, directory: str, now_wall: float) -> bool:
        """Take the profile of an earlier run, if there is one and it is not too old."""
        if not is_front_name(self.domain):
            return False
        path = os.path.join(directory, f"{self.domain}.json")
        try:
            named, profile = parse_front_file(*read_front_file(path))
        except (OSError, ValueError):          # none, or none that we understand
            return False
        if not is_front_name(named):
            log_masking.warn("Skipping TLS cache entry with invalid domain", file=ascii(path))
        elif named.lower() == self.domain.lower():
            if now_wall - profile.fetched_wall <= _FRONT_OLD_S:
                self._take(profile)
                return True
            log_masking.warn("Skipping stale TLS cache entry (>72h)", domain=named)
        return False

    def age(self, now_wall: float) -> float:
        """Seconds since the profile was measured; infinite without one, or if it is another host's.  Time that ran back is no time."""
        profile = self.profile
        if profile.source == "default" or profile.host not in ("", self._fronts.host):
            return INF
        return max(0.0, now_wall - profile.fetched_wall)

    def schedule(self, delay_s: float) -> None:
        """Fetch in `delay_s` seconds."""
        self.rest()
        self._timer = self._fronts.loop.call_later(delay_s, self._on_due)

    def rest(self) -> None:
        """No fetch any more, until somebody says so."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.fetch is not None:
            self.fetch.abort()
            self.fetch = None

    def begin(self, header: bytes) -> None:
        """Ask the mask host now."""
        self.fetch = Fetch(self._fronts, self.domain, header, self._on_fetched)

    def on_crash(self) -> None:
        """Our own error in a step: try again, as after any other failure."""
        self.rest()
        self._fronts.ended(self)
        self.schedule(_RETRY_S)

    def _on_due(self) -> None:
        self._timer = None
        self._fronts.enqueue(self)

    def _on_fetched(self, fetch: Fetch) -> None:
        self.fetch = None
        if fetch.samples:
            self._measured(fetch)
        else:
            self._failed(fetch.error)
        self._fronts.ended(self)

    def _measured(self, fetch: Fetch) -> None:
        assert fetch.hello is not None
        fronts = self._fronts
        self.fetched, self.failures = True, 0
        self._take(profile_of(fetch.hello)._replace(flights=tuple(fetch.samples), plain=tuple(fetch.plain),
                                                     fetched_wall=fronts.wall(), source="probe", host=fetch.host))
        log_masking.debug("TLS cache updated", domain=self.domain, len=max(fetch.samples))
        if is_front_name(self.domain):
            text = build_front_file(self.domain, self.profile, fetch.hello).decode()
            fronts.loop.offload(functools.partial(write_front_file, fronts.directory, self.domain, text), self._on_written)
        self.schedule(fronts.refresh_s())

    def _take(self, profile: FrontProfile) -> None:
        self.profile = profile
        largest = max(profile.flights)
        if largest > FLIGHT_MAX:
            self._warn_once(f"front flight of {largest} bytes is more than clients accept; using {FLIGHT_MAX}", domain=self.domain)

    def _on_written(self, result: object) -> None:
        if isinstance(result, Exception):
            self._warn_once("TLS cache write failed", domain=self.domain, error=result)

    def _failed(self, error: str) -> None:
        self.failures += 1
        log_masking.warn("TLS emulation %s failed", "refresh" if self.fetched else "initial fetch", domain=self.domain, error=error)
        if error == _UNRECOGNISED_NAME:        # what we remember is no longer what strangers see
            log_masking.warn("front server does not know %s", self.domain)
            self.profile = self._default
        fronts = self._fronts
        if self.profile.source != "default":
            if self.failures == 3:
                hours = self.age(fronts.wall()) / 3600
                log_masking.warn("TLS front profile of %s is %.0f h old: three fetches in a row failed", self.domain, hours)
            self.schedule(_RETRY_S)
        else:
            pause_s = min(_RETRY_S, _RETRY_FIRST_S * 2 ** min(self.failures - 1, 10))
            self.schedule(pause_s * (0.8 + 0.4 * fronts.draw()))

    def _warn_once(self, text: str, **fields: object) -> None:
        word = text.partition(" of ")[0]
        if word not in self._told:
            self._told.add(word)
            log_masking.warn("%s", text, **fields)


class Stock:
    """Values of one length that take a while to make, kept ready: filled in idle moments once somebody asked.

    They lie behind one another, not as an object each, which would stay scattered over the memory of the crowd that asked.
    """

    __slots__ = ("size", "_make", "_when_idle", "_ready", "_length", "_filling")

    def __init__(self, size: int, make: Callable[[], bytes], when_idle: Callable[[Callable[[], bool]], None]) -> None:
        self.size, self._make, self._when_idle = size, make, when_idle
        self._ready = bytearray()
        self._length = 1                       # of one value; known from the first on
        self._filling = False                  # starts with the first client: a stock nobody asks for costs memory

    def __len__(self) -> int:
        return len(self._ready) // self._length

    def take(self) -> bytes:
        """One of them; made on the spot when there is none."""
        if self._ready:
            value = bytes(self._ready[-self._length:])
            del self._ready[-self._length:]
        else:
            value = self._make()
        if len(self) < self.size // 2 and not self._filling:
            self._filling = True
            self._when_idle(self._fill)
        return value

    def clear(self) -> None:
        """Nobody will ask for a while."""
        self._ready.clear()

    def _fill(self) -> bool:
        self._filling = False                  # should this raise, the next client tries again
        value = self._make()
        self._length = len(value)
        self._ready += value
        self._filling = len(self) < self.size
        return self._filling


class FrontProfiles:
    """How our ServerHello looks for each domain, and the key shares for it (tls-front.md 9)."""

    def __init__(self, settings: Settings, loop: Loop, make_key: Callable[[], bytes], entropy: Entropy, connect: Callable[..., Abortable],
                 wall: Clock = time.time) -> None:
        """connect(settings, done): starts one connection to the mask host.  make_key: gives X25519 public keys."""
        self.loop, self.make_key, self.entropy, self.wall = loop, make_key, entropy, wall
        self._settings = settings
        self._connect = connect
        cert = settings.censorship
        self.directory = cert.tls_front_dir
        self._fronts: dict[str, Front] = {}
        for domain in (cert.tls_domain, *cert.tls_domains):
            self._fronts.setdefault(_front_key(domain), Front(self, domain, FrontProfile((self._default_size(cert),))))
        self._primary = self._fronts[_front_key(cert.tls_domain)]
        self._keys = Stock(KEY_STOCK, make_key, loop.when_idle)
        self._hybrids = Stock(_HYBRID_STOCK, functools.partial(make_mlkem_ciphertext, entropy), loop.when_idle)
        self._waiting: collections.deque[Front] = collections.deque()
        self._running: set[Front] = set()
        self._started = False
        if cert.tls_emulation:
            count = sum([front.load(self.directory, wall()) for front in self._fronts.values()])
            if count:
                log_masking.info("Loaded TLS cache entries from disk", count=count)

    def _default_size(self, cert: Censorship) -> int:
        size = float(cert.fake_cert_len)
        if cert.tls_emulation:                 # +-3 %, drawn once per process and domain
            size *= 0.97 + 0.06 * self.draw()
        return min(max(round(size), FLIGHT_MIN), FLIGHT_MAX)

    # -- for the session

    def shape(self, server_name: str | None, hybrid: bool = True) -> FrontShape:
        """Looks of one answer for a server name; unknown or missing: the primary domain's.  hybrid: with that share in the hello."""
        return self._fronts.get(_front_key(server_name or ""), self._primary).profile.shape(self.entropy, hybrid)

    def share(self, group: int) -> bytes:
        """A fresh server share: 32 bytes for X25519, 1120 for X25519MLKEM768 (the ciphertext first)."""
        return self._hybrids.take() + self._keys.take() if group == GROUP_HYBRID else self._keys.take()

    # -- the schedule

    def start(self) -> None:
        """Begin to measure; returns at once."""
        self._started = True
        if self._wanted():
            self._plan()
            self.loop.call_later(_FRONT_PATIENCE_S, self._on_patience)

    def apply(self, settings: Settings) -> None:
        """Take what a fetch uses and may change while we run: the mask target, and whether FakeTLS is wanted at all."""
        before, was_wanted = self._target(), self._wanted()
        self._settings = settings
        if not self._started or (before == self._target() and was_wanted == self._wanted()):
            return
        for front in self._fronts.values():
            front.rest()
        self._waiting.clear()
        self._running.clear()
        if self._wanted():
            self._plan(at_once=before != self._target())

    def close(self) -> None:
        """Stop everything that is under way."""
        self._started = False
        self._waiting.clear()
        for front in self._fronts.values():
            front.rest()

    def enqueue(self, front: Front) -> None:
        """`front` wants to be measured as soon as others are done."""
        self._waiting.append(front)
        self._next()

    def ended(self, front: Front) -> None:
        """A fetch came to its end."""
        self._running.discard(front)
        if all(one.profile.group != GROUP_HYBRID for one in self._fronts.values()):
            self._hybrids.clear()
        self._next()

    def connect(self, done: Callable[[Stream | RouteError], None]) -> Abortable:
        """Start one connection to the mask host as it is configured now."""
        return self._connect(self._settings, done)

    @property
    def host(self) -> str:
        """The mask host as it is configured now."""
        cert = self._settings.censorship
        return f"unix:{cert.mask_unix_sock}" if cert.mask_unix_sock else f"{cert.mask_host}:{cert.mask_port}"

    def refresh_s(self) -> float:
        """Seconds until a profile is measured again."""
        least, first, second = _REFRESH_S
        return least + first * self.draw() + second * self.draw()

    def draw(self) -> float:
        """A number in [0, 1)."""
        return int.from_bytes(self.entropy(4), "big") / (1 << 32)

    def _wanted(self) -> bool:
        return self._settings.censorship.tls_emulation and self._settings.general.modes.tls

    def _target(self) -> tuple[object, ...]:
        cert = self._settings.censorship
        override = parse_dns_overrides(self._settings.network.dns_overrides).get(((cert.mask_host or "").lower(), cert.mask_port))
        return cert.mask_host, cert.mask_port, cert.mask_unix_sock, bool(cert.mask_proxy_protocol), override

    def _plan(self, at_once: bool = False) -> None:
        """Give every domain the time of its next fetch: those that have nothing, or nothing recent, come first."""
        ages = [(front.age(self.wall()), front) for front in self._fronts.values() if len(front.domain.encode()) <= 255]
        for age, front in sorted(ages, key=lambda row: row[0] <= _FRONT_STALE_S):
            front.schedule(self.refresh_s() - age if age < _FRONT_FRESH_S and not at_once else 0.0)

    def _next(self) -> None:
        while self._waiting and len(self._running) < _FETCHES_MAX:
            front = self._waiting.popleft()
            self._running.add(front)
            version = self._settings.censorship.mask_proxy_protocol
            front.begin(build_proxy_header(2 if version == 2 else 1, None, None) if version else b"")

    def _on_patience(self) -> None:
        for front in self._fronts.values():
            if front.profile.source == "default" and self._wanted():
                log_masking.warn("TLS-front fetch not ready within timeout; using cache/default fake cert fallback", domain=front.domain,
                                 timeout_secs=int(_FRONT_PATIENCE_S), fake_cert_len=self._settings.censorship.fake_cert_len)


def _front_key(domain: str) -> str:
    """Name by which a domain is found: lower case, no trailing dot (tls-front.md D4)."""
    return domain.lower().rstrip(".")


def read_front_file(path: str) -> tuple[bytes, float]:
    """Return (content, mtime) of a cache file.  Raises OSError, ValueError for what is none."""
    with open_to_read(path) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > FRONT_FILE_MAX:
            raise ValueError("not a file of at most 1 MiB")
        return file.read(FRONT_FILE_MAX + 1), facts.st_mtime


def write_front_file(directory: str, domain: str, text: str) -> None:
    """Write the cache file of `domain` (is_front_name) whole or not at all; runs in a helper thread.  Raises OSError."""
    refuse_nul(directory)
    os.makedirs(directory or ".", exist_ok=True)
    write_whole(os.path.join(directory, f"{domain}.json"), text, replace=True)


log_masking: Final = Log("masking")


# == 19. relay ===============================================================
# A session that has both its ends.  It is straight code: two flows of room 14,
# one handler per socket, and after each chunk the bookkeeping that limits,
# statistics and the idle rule need.  No state test, no event object, no log
# call per chunk.
# Source: upstream-and-relay.md 9, D8, D16, D21, D23.

IDLE_LIMIT_S: Final = 1800               # no client-side byte for so long ends the session
HALF_CLOSED_S: Final = 60                # one side ended: the other may be silent for so long (D16)
_MSG_BITS: Final = 13                    # 8192 bytes are what 3.2.1 reads at once: msgs counters count in this unit (D21)
_MSG_LESS_ONE: Final = (1 << _MSG_BITS) - 1


class RelayHost(Protocol):
    """What a relay needs of the server."""

    loop: Loop
    count_users: bool                    # general.telemetry.user_enabled
    half_closed: Lane[DirectRelay]

    def quota_reached(self, user: User) -> bool:
        """`user.used` came to `user.mark`: True if its quota is used up."""

    def ended(self, owner: Connection) -> None:
        """`owner` closed its streams: give back its place."""


class Connection(Protocol):
    """Whoever owns a client at the moment: a ClientSession, then a Routing, then a relay."""

    def close(self, error: Exception | None) -> None:
        """Close and give everything back; may be called twice.  None = in good order."""


class DirectRelay:
    """Owner of a client and a data-centre stream from hand-over to end."""

    __slots__ = ("host", "ticket", "user", "peer", "client", "dc", "up", "down", "octets_up", "octets_down", "last_at", "ended")

    def __init__(self, host: RelayHost, ticket: Ticket, peer: str, client: Stream, dc: Stream, up: Flow, down: Flow) -> None:
        self.host, self.ticket, self.user, self.peer = host, ticket, ticket.user, peer
        self.client, self.dc = client, dc
        self.up, self.down = up, down          # client -> dc, dc -> client
        self.octets_up = self.octets_down = 0  # payload, without our preamble and TLS headers
        self.last_at = host.loop.now           # last byte on the client's side
        self.ended = False

    def start(self, opening: bytes, early: int) -> None:
        """Send `opening` (preamble and `early` bytes of the client, in one write) and go."""
        self.user.stats.current += 1
        self.client.watch(READ, self.on_client)
        self.dc.watch(READ, self.on_dc)
        try:
            self.up.push(opening)
        except OSError as error:
            self.close(error)
            return
        if self.host.count_users:              # not before the preamble is on its way (9.1)
            self.user.stats.connects += 1
        if early:
            self._count_up(early)

    # -- the two handlers

    def on_client(self, mask: int) -> None:
        """The client's socket is ready."""
        wanted = self.client.mask
        try:
            if wanted & WRITE and mask & ~READ:
                self._flush(self.down)
            if wanted & READ and mask & ~WRITE and not self.ended:
                up = self.up
                size = up.run()
                if size > 0:
                    self._count_up(size)
                if (size == 0 or up.over) and not self.ended:
                    self._half_close(up)
        except (OSError, WireError) as error:
            self.close(error)

    def on_dc(self, mask: int) -> None:
        """The data centre's socket is ready."""
        wanted = self.dc.mask
        try:
            if wanted & WRITE and mask & ~READ:
                self._flush(self.up)
            if wanted & READ and mask & ~WRITE and not self.ended:
                size = self.down.run()
                if size > 0:
                    self._count_down(size)
                elif size == 0:
                    self._half_close(self.down)
        except OSError as error:
            self.close(error)

    def on_crash(self) -> None:
        """Our own error in a handler: it cost this session."""
        self.close(InternalError("internal error"))

    # -- bookkeeping

    def _count_up(self, size: int) -> None:
        host, user = self.host, self.user
        self.last_at = host.loop.now
        self.octets_up += size
        user.used = used = user.used + size
        if host.count_users:
            stats = user.stats
            stats.octets_from_client += size
            stats.msgs_from_client += (size + _MSG_LESS_ONE) >> _MSG_BITS
        if used >= user.mark and host.quota_reached(user):
            self._over_quota()

    def _count_down(self, size: int) -> None:
        host, user = self.host, self.user
        self.last_at = host.loop.now
        self.octets_down += size
        user.used = used = user.used + size
        if host.count_users:
            stats = user.stats
            stats.octets_to_client += size
            stats.msgs_to_client += (size + _MSG_LESS_ONE) >> _MSG_BITS
        if used >= user.mark and host.quota_reached(user):
            self._over_quota()

    def _over_quota(self) -> None:
        log_relay.warn("User data quota reached, closing relay", user=self.user.name)
        self.close(None)

    # -- the end

    def _flush(self, flow: Flow) -> None:
        before = flow.sent
        done = flow.flush()
        if flow is self.down and flow.sent > before:
            self.last_at = self.host.loop.now
        if done and flow.finished:
            self._check_finished()

    def _half_close(self, flow: Flow) -> None:
        other = self.down if flow is self.up else self.up
        if other.finished and not other.pending and not flow.pending:
            self.close(None)
            return
        flow.end()
        self.last_at = self.host.loop.now
        self.host.half_closed.arm(self)

    def _check_finished(self) -> None:
        if self.up.finished and self.down.finished and not self.up.pending and not self.down.pending:
            self.close(None)

    def on_half_closed_timeout(self) -> None:
        """One side ended a while ago; end the session unless the other still talks."""
        if self.ended:
            return
        left = self.last_at + HALF_CLOSED_S - self.host.loop.now
        if left <= 0:
            self.close(None)
        else:
            self.host.loop.call_later(left, self.on_half_closed_timeout)

    def expire_idle(self, now: float) -> None:
        """Called by the sweep when the idle limit has passed."""
        log_relay.warn("Activity timeout", user=self.user.name, c2s_bytes=self.octets_up, s2c_bytes=self.octets_down,
                       idle_secs=int(now - self.last_at))
        self.close(None)

    def drain(self) -> None:
        """The process stops: read nothing more, let what waits for the client go out."""
        self.dc.want(0)
        self.client.want(WRITE if self.down.pending else 0)
        self.up.finished = self.down.finished = True
        if not self.down.pending:
            self.close(None)

    def close(self, error: Exception | None) -> None:
        """Close both streams and give everything back; may be called twice."""
        if self.ended:
            return
        self.ended = True
        self.host.half_closed.cancel(self)
        self.up.close()
        self.down.close()
        self.client.close()
        self.dc.close()
        self.user.stats.current -= 1
        self.ticket.release()
        report_end(error, self.client, peer=self.peer, user=self.user.name)
        log_relay.debug("Relay finished", user=self.user.name, c2s_bytes=self.octets_up, s2c_bytes=self.octets_down)
        self.host.ended(self)


# -- through the middle end

ANSWERS_MAX: Final = 4096                # messages that wait for one client, at which it counts as full (middle-proxy-wire.md D14)
ANSWER_BYTES_MAX: Final = 16 << 20       # and bytes
_BUDGET_MAX: Final = 512 << 20           # for all clients together, or a quarter of the memory there is
_FLUSH_S: Final = 5.0                    # the middle end closed: answers may still go out for so long (D13)
_LINGER_S: Final = 2.0                   # and then the client may take so long to see the end
_DESYNC_WINDOW_S: Final = 60
_DESYNC_KEYS_MAX: Final = 65_536


class MiddleHost(RelayHost, Protocol):
    """What a relay through the middle end needs besides."""

    settings: Settings
    answers: AnswerBudget
    desyncs: DesyncLog


class RelayStage(enum.Enum):
    """Where a middle-end session is; every stage may also move to ENDED."""

    OPEN = "open"
    FLUSHING = "flushing"                # the middle end is gone, answers are not
    LINGERING = "lingering"              # our end is closed; what the client says is discarded
    ENDED = "ended"


# Members by names of their own: looking one up in its class takes 0.06 us, and every message asks five times.
_OPEN: Final = RelayStage.OPEN
_FLUSHING: Final = RelayStage.FLUSHING
_LINGERING: Final = RelayStage.LINGERING
_ENDED: Final = RelayStage.ENDED


class Noise:
    """Random bytes for padding, drawn from the system 4 KiB at a time."""

    def __init__(self) -> None:
        self._pool, self._at = b"", 0

    def take(self) -> bytes:
        """Four bytes, never the same twice."""
        if self._at == len(self._pool):
            self._pool, self._at = os.urandom(4096), 0
        self._at += 4
        return self._pool[self._at - 4:self._at]


class AnswerBudget:
    """What all clients that do not read may hold together, and who holds most."""

    __slots__ = ("limit", "holders")

    def __init__(self, memory_bytes: int) -> None:
        self.limit = min(_BUDGET_MAX, memory_bytes // 4) if memory_bytes else _BUDGET_MAX
        self.holders: dict[MiddleRelay, None] = {}

    def judge(self, relay: MiddleRelay) -> float:
        """How full a queue is: below 1 fine, from 1 on full, from 2 on too much (D14); it has grown or shrunk."""
        outlet = relay.outlet
        if not outlet.pending:
            self.holders.pop(relay, None)
            return 0.0
        self.holders[relay] = None
        size = outlet.pending if outlet.waiting > 1 else 0       # one message is always admitted
        fill = max(outlet.waiting / ANSWERS_MAX, size / ANSWER_BYTES_MAX)
        if fill < 1 and outlet.arena.queued > self.limit:        # of all flows: only then it is worth adding up
            held = [other.outlet.pending for other in self.holders]
            if sum(held) > self.limit and outlet.pending >= max(held):
                return 1.0
        return fill


class DesyncLog:
    """Reports of client streams that fell out of step: in full once a minute per client (middle-proxy-wire.md 9, D18)."""

    __slots__ = ("counters", "_key", "_seen")

    def __init__(self, counters: MeCounters) -> None:
        self.counters = counters
        self._key = KeyedHmac(os.urandom(32))  # hashes of IPv4 addresses without a key could be undone
        self._seen: dict[tuple[str, bytes, str], float] = {}       # -> end of the window; oldest first

    def judge(self, relay: MiddleRelay, error: FrameError) -> FrameError:
        """Count and log a frame that cannot be; return what its session ends with, never its link (middle-proxy-wire.md D9)."""
        if error.kind == "too_large":
            return self._report(relay, error, relay.host.settings.general)
        if error.kind == "too_small":
            log_relay.warn("Frame too small \u2014 corrupt or probe", user=relay.user.name, conn_id=relay.conn_id, size=error.length)
            self.counters.count("secure_padding_invalid_total", relay.framing.name == "secure")
        return error

    def _report(self, relay: MiddleRelay, error: FrameError, general: General) -> FrameError:
        framing, seat, now = relay.framing, relay.seat, relay.host.loop.now
        ip_hash = self._key.digest(relay.ticket.ip.encode())[:8]
        first = self._first((relay.user.name, ip_hash, framing.name), now)
        full = general.desync_all_full or first
        self.counters.desync(framing.frames, full)
        if full:
            raw = error.length.to_bytes(4, "little") if framing.name == "abridged" else error.prefix
            log_relay.warn(
                "Frame too large \u2014 crypto desync forensics", trace_id=f"{seat.conn_id:016x}", conn_id=seat.conn_id,
                user=relay.user.name, peer_hash=ip_hash.hex(), proto=framing.name, mode="middle_proxy",
                is_tls=str(relay.inlet.records is not None).lower(), duration_ms=int((now - relay.started_at) * 1000),
                bytes_c2me=relay.octets_up, bytes_me2c=relay.octets_down, raw_len=error.length, raw_len_hex=f"0x{error.length:08x}",
                raw_bytes=raw.hex(), max_frame=framing.limit, tls_like=str(framing.name != "abridged" and raw[:2] == b"\x16\x03").lower(),
                http_like=str(framing.name != "abridged" and raw[:1] in (b"G", b"P", b"H", b"C", b"D")).lower(),
                frames_ok=framing.frames, dedup_window_secs=_DESYNC_WINDOW_S, desync_all_full=str(general.desync_all_full).lower(),
                full_reason="desync_all_full" if general.desync_all_full else "first_in_dedup_window",
                error_class="frame_too_large_crypto_desync")
            log_relay.debug("Frame too large \u2014 crypto desync forensics", trace_id=f"{seat.conn_id:016x}", peer=relay.peer)
        else:
            log_relay.debug("Frame too large \u2014 crypto desync forensic suppressed", trace_id=f"{seat.conn_id:016x}",
                            user=relay.user.name, frames_ok=framing.frames)
        return FrameError(error.kind, f"Frame too large: {error.length} (max {framing.limit}), frames_ok={framing.frames}, "
                                      f"conn_id={seat.conn_id}, trace_id=0x{seat.conn_id:016x}", error.length)

    def _first(self, key: tuple[str, bytes, str], now: float) -> bool:
        """True if no window of `key` is open; opens one."""
        seen = self._seen
        if seen.get(key, -INF) > now:
            return False
        seen.pop(key, None)
        seen[key] = now + _DESYNC_WINDOW_S
        while len(seen) > _DESYNC_KEYS_MAX or seen[next(iter(seen))] <= now:
            del seen[next(iter(seen))]
        return True


class Seat:
    """A session's place on a link: where its messages go, and how it leaves."""

    __slots__ = ("conn_id", "dc", "link", "_head")

    def __init__(self, link: MeLink, dc: int, conn_id: int, meta: Meta) -> None:
        self.conn_id, self.dc = conn_id, dc
        self.link: MeLink | None = link        # None: the middle end ended it
        self._head = RequestHead(meta.framing, conn_id, meta.client, meta.ours, meta.ad_tag)

    def send(self, payload: Bytes, quick_ack: bool) -> None:
        """One message of the client; copied."""
        link = self.link
        if link is not None:
            body = bytes(payload)
            link.push(self._head.build(body, quick_ack), body)

    def leave(self, session: Bound) -> None:
        """Say goodbye, behind everything that was sent; may be called twice."""
        link, self.link = self.link, None
        if link is not None:
            link.push_close(self.conn_id)
            link.unbind(session)


class MiddleRelay:
    """Owner of a client from hand-over to end whose messages go through a link."""

    __slots__ = ("host", "ticket", "user", "peer", "client", "inlet", "framing", "outlet", "seat", "octets_up", "octets_down",
                 "last_at", "started_at", "stage", "alarm")

    def __init__(self, host: MiddleHost, ticket: Ticket, peer: str, inlet: Inlet, framing: Framing, outlet: Outlet, seat: Seat) -> None:
        self.host, self.ticket, self.user, self.peer = host, ticket, ticket.user, peer
        self.client = inlet.source
        self.inlet, self.framing, self.outlet, self.seat = inlet, framing, outlet, seat
        self.octets_up = self.octets_down = 0  # messages without their framing
        self.last_at = self.started_at = host.loop.now
        self.stage = _OPEN
        self.alarm: Timer | None = None        # a full queue, or the end of a stage

    @property
    def conn_id(self) -> int:
        """The name of the session on its link."""
        return self.seat.conn_id

    @property
    def dc(self) -> int:
        """The data centre it asked for."""
        return self.seat.dc

    def start(self, early: bytes, meta: Meta) -> None:
        """Take the seat and go; `early`: what the client has said already, in clear."""
        link = self.seat.link
        assert link is not None
        self.user.stats.current += 1
        if self.host.count_users:
            self.user.stats.connects += 1
        self.client.watch(READ, self.on_client)
        link.bind(self, meta)
        if early:
            self._take(early)

    # -- the client's socket

    def on_client(self, mask: int) -> None:
        """It is ready."""
        wanted = self.client.mask
        try:
            if wanted & WRITE and mask & ~READ:
                self._flush()
            if mask & ~WRITE and self.stage is not _ENDED:
                if self.stage is not _OPEN:
                    if not self.inlet.discard():
                        self.close(None)
                elif wanted & READ:
                    self._read()
                else:                          # not read at the moment, and gone
                    self.close(_GONE_CLIENT)
        except (OSError, WireError) as error:
            self.close(error)

    def _read(self) -> None:
        data, records = self.inlet.run(), self.inlet.records
        if data is not None:
            if not data:
                self.close(_GONE_CLIENT if self.framing.inside_frame else None)
                return
            self._take(data)
        if records is not None and self.stage is _OPEN:
            if records.failed is not None:
                self.close(records.failed)
            elif records.closed:
                self.close(None)

    def _take(self, data: Bytes) -> None:
        """Pass on the messages that are complete."""
        self.last_at = self.host.loop.now
        frames, send = self.framing.feed(data), self.seat.send
        if frames:
            user, octets, messages, over = self.user, 0, 0, False
            for payload, quick_ack in frames:
                size = len(payload)
                octets += size
                messages += (size + _MSG_LESS_ONE) >> _MSG_BITS
                user.used += size
                send(payload, quick_ack)
                if user.used >= user.mark and self.host.quota_reached(user):
                    over = True                # what follows it in the same read is not sent any more (D22)
                    break
            self.octets_up += octets
            if self.host.count_users:
                user.stats.octets_from_client += octets
                user.stats.msgs_from_client += messages
            if over:
                self._over_quota()
        if self.framing.failed is not None and self.stage is _OPEN:
            self.close(self.host.desyncs.judge(self, self.framing.failed))
        elif self.framing.rest and self.stage is _OPEN:
            self.pace()
            self.host.loop.defer(self._take_rest)

    def _take_rest(self) -> None:
        """Go on with a read that held very many messages."""
        if self.stage is _OPEN:
            self._take(self.framing.rest)
            if not self.framing.rest:
                self.pace()

    def _over_quota(self) -> None:
        log_relay.warn("User data quota reached, closing relay", user=self.user.name)
        self.close(None)

    # -- what the link calls

    def pace(self) -> None:
        """Read the client, or not for now: its last read is not done with, or its link has too much unsent."""
        if self.stage is _OPEN:
            link = self.seat.link
            mask = 0 if self.framing.rest else HANGUP if link is not None and link.holding else READ
            self.client.want(mask | self.client.mask & WRITE)

    def on_answer(self, region: Region, at: int, size: int) -> None:
        """Data for the client; it is framed where it lies."""
        user = self.user
        if self.stage is not _OPEN or (user.used >= user.mark and self.host.quota_reached(user)):      # the latter ends at on_run_end
            return
        try:
            self.outlet.pieces.append(self.framing.enclose(region.view, at, size, _noise.take()))
        except FrameError as error:
            log_relay.warn("Answer of the middle end cannot be framed: %s", error, user=self.user.name, conn_id=self.conn_id)
            self.seat.leave(self)
            self.stage = _FLUSHING   # what came before it is sent at the end of this read
            return
        self.octets_down += size
        user.used += size
        if self.host.count_users:
            user.stats.octets_to_client += size
            user.stats.msgs_to_client += (size + _MSG_LESS_ONE) >> _MSG_BITS

    def on_ack(self, region: Region, at: int) -> None:
        """A quick-ack token for the client."""
        self.framing.ack(region.view, at)
        self.outlet.pieces.append((at, 4))

    def on_run_end(self, region: Region) -> None:
        """Write everything that one read of the link brought."""
        outlet, user, before = self.outlet, self.user, self.outlet.sent
        if self.stage is _ENDED:
            return
        try:
            outlet.run(region)
        except OSError as error:
            self.close(error)
            return
        if outlet.sent != before:
            self.last_at = self.host.loop.now
        if user.used >= user.mark and self.host.quota_reached(user):
            self._over_quota()
        elif self.stage is _FLUSHING:
            self._wind_up()
        elif outlet.pending:
            self._judge_queue()

    def on_middle_closed(self, region: Region | None) -> None:
        """Nothing will come any more: let the client have what there is, then the end."""
        self.seat.link = None
        if region is not None:
            self.on_run_end(region)
        if self.stage is _OPEN:
            self._wind_up()

    def on_crash(self) -> None:
        """Our own error in a handler: it cost this session."""
        self.close(InternalError("internal error"))

    # -- a client that does not read

    def _judge_queue(self) -> None:
        """Start, keep or stop the patience with a full queue (D14)."""
        fill = self.host.answers.judge(self)
        if fill >= 2:
            self._on_stalled()
        elif fill < 1:
            self._disarm()
        elif self.alarm is None:
            wait_ms = self.host.settings.general.me_route_backpressure_high_timeout_ms
            self.alarm = self.host.loop.call_later(wait_ms / 1000, self._on_stalled)

    def _on_stalled(self) -> None:
        self.host.desyncs.counters.queue_full()
        log_relay.debug("Answer queue full, session dropped", user=self.user.name, conn_id=self.conn_id, bytes=self.outlet.pending)
        self.close(None)

    def _flush(self) -> None:
        outlet = self.outlet
        before = outlet.sent
        done = outlet.flush()
        if outlet.sent != before:
            self.last_at = self.host.loop.now
        if self.stage is _OPEN:
            self._judge_queue()
        elif done and self.stage is _FLUSHING:
            self._linger()

    def _disarm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None

    # -- the end

    def _wind_up(self) -> None:
        """No link any more: flush, half-close, wait for the client's end (D13)."""
        self._disarm()
        self.stage = _FLUSHING
        self.client.want(READ | self.client.mask & WRITE)      # reading on avoids a reset that would destroy data in flight
        self.alarm = self.host.loop.call_later(_FLUSH_S, functools.partial(self.close, None))
        if not self.outlet.pending:
            self._linger()

    def _linger(self) -> None:
        self._disarm()
        self.stage = _LINGERING
        self.client.finish()
        self.alarm = self.host.loop.call_later(_LINGER_S, functools.partial(self.close, None))

    def expire_idle(self, now: float) -> None:
        """Called by the sweep when the idle limit has passed."""
        log_relay.warn("Activity timeout", user=self.user.name, c2s_bytes=self.octets_up, s2c_bytes=self.octets_down,
                       idle_secs=int(now - self.last_at))
        self.close(None)

    def drain(self) -> None:
        """The process stops: say goodbye to the middle end, let what waits for the client go out."""
        self.seat.leave(self)
        if self.outlet.pending and self.stage is not _ENDED:
            self._wind_up()
        else:
            self.close(None)

    def close(self, error: Exception | None) -> None:
        """Close the client and give everything back; may be called twice."""
        if self.stage is _ENDED:
            return
        self.stage = _ENDED
        self._disarm()
        self.seat.leave(self)
        self.host.answers.holders.pop(self, None)
        self.outlet.close()
        self.client.close()
        self.user.stats.current -= 1
        self.ticket.release()
        report_end(error, self.client, peer=self.peer, user=self.user.name)
        log_relay.debug("ME relay cleanup", user=self.user.name, conn_id=self.conn_id, c2s_bytes=self.octets_up, s2c_bytes=self.octets_down)
        self.host.ended(self)


FRAMINGS: Final[Mapping[str, type[Framing]]] = {framing.name: framing for framing in (Abridged, Intermediate, Secure)}
_noise: Final = Noise()
_GONE_CLIENT: Final = ConnectionResetError(errno.ECONNRESET, "client left")


def report_end(error: Exception | None, client: Stream, **fields: object) -> None:
    """Log why a connection ended, as client-protocol.md 2.2 and 2.5 word it; None = in good order."""
    if error is None:
        return
    if client.is_unix:                         # somebody on this host, mostly our own load balancer
        log_relay.debug("Unix socket connection error", **fields, error=describe(error))
        return
    if (error.errno if isinstance(error, OSError) else getattr(error, "code", 0)) in _GONE:
        log_relay.debug("Connection closed by client", **fields)
        return
    log_relay.warn("Connection closed with error", **fields, error=describe(error))


_GONE: Final = frozenset((errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ENOTCONN))
log_relay: Final = Log("relay")


# == 20. session =============================================================
# From an accepted socket to a relay.  A state machine, because a client may cut
# its bytes anywhere and leave at any point:
#
#   (ProxyGate) --> SNIFF --16 03 01--> HELLO --signed--> DELAY --> INNER --64 bytes--.
#                     '----anything else----> PLAIN --64 bytes------------------------+--> Routing --> relay
#   SNIFF, PLAIN, HELLO --no client--> MASKING --connected--> MaskRelay
#
# Up to here the peer may turn out to be a stranger: that is decided and counted
# in one place (`_stranger`), from where it meets the mask host with the bytes
# read so far; only after our ServerHello it gets an alert instead.  LEAVING:
# whoever gets nothing more from us is read and discarded.  One deadline runs
# from accept to the accepted 64-byte header or the connected mask host.  A
# Routing then holds the client while its limits are judged and its data centre
# is dialled.
# Source: client-protocol.md 3-11, 14.

_EARLY_MAX: Final = 65_536               # client bytes kept while the data centre is being connected (upstream-and-relay.md D10)
_FIRST_MAX: Final = RECORD_HEADER + HELLO_MAX      # read of somebody we do not know: no more than can matter, the rest waits in the kernel
_INBOX_LIMIT: Final = RECORD_HEADER + HELLO_MAX + _EARLY_MAX
_PROXY_HEADER_S: Final = 5               # a load balancer sends its header at once (D4)
_GATE_READ: Final = 4096                 # bytes read at a time while the PROXY header is not complete


class S(enum.Enum):
    """Where a client is on its way in."""

    SNIFF = enum.auto()
    PLAIN = enum.auto()
    HELLO = enum.auto()
    DELAY = enum.auto()
    INNER = enum.auto()
    MASKING = enum.auto()
    LEAVING = enum.auto()
    CLOSED = enum.auto()


_MOVES: Final = {
    S.SNIFF: {S.PLAIN, S.HELLO, S.MASKING}, S.PLAIN: {S.MASKING}, S.HELLO: {S.DELAY, S.MASKING}, S.DELAY: {S.INNER}, S.INNER: {S.LEAVING},
    S.MASKING: {S.LEAVING}, S.LEAVING: set[S](), S.CLOSED: set[S](),
}                                        # every state may also move to CLOSED
_STAGE: Final = {S.SNIFF: "first_packet_prelude", S.PLAIN: "direct_mtproto", S.HELLO: "tls_clienthello_body",
                 S.DELAY: "tls_core", S.INNER: "tls_post_serverhello_mtproto"}
_TLS_START: Final = b"\x16\x03\x01"
_EVERY_TRANSPORT: Final = tuple(Transport)   # inside FakeTLS the modes are not asked (client-protocol.md 5.3)


class Core(MiddleHost, Protocol):
    """What every session shares; the server provides it."""

    arena: Arena
    counters: Counters
    doorman: Doorman
    upstreams: Upstreams
    pool: Pool | None                    # None: every session is direct
    fronts: FrontProfiles
    handshakes: Handshakes
    masks: Masks

    def hand_over(self, old: Connection, new: Connection) -> None:
        """`new` takes over the streams and the place of `old`."""


class Handshakes:
    """Everybody between accept and an accepted header: one deadline for all of it, and not too many of one address.

    A client is here for a round trip or two.  Many thousand from one address are a flood, or a load balancer whose header we
    were not told to read: the oldest makes room for the newest.  An IPv6 attacker owns a /64, so that counts as one address.
    """

    def __init__(self, loop: Loop, settings: Settings, cap: int) -> None:
        self.loop = loop
        self.per_address = max(64, cap // 4)
        self._lanes: dict[int, Lane[ClientSession]] = {}         # seconds -> deadlines; connections keep what they began with (D21)
        self._gates: dict[int, Lane[ProxyGate]] = {}
        self._crowds: dict[str | int, dict[ClientSession, None]] = {}  # address -> its sessions, oldest first
        self.apply(settings)

    def apply(self, settings: Settings) -> None:
        """Take a new `timeouts.client_handshake` for connections to come."""
        seconds = settings.timeouts.client_handshake
        gate_s = min(_PROXY_HEADER_S, seconds)
        if gate_s not in self._gates:          # before the other: where both are due, the missing header is the reason
            self._gates[gate_s] = self.loop.lane(gate_s, ProxyGate.on_deadline)
        if seconds not in self._lanes:
            self._lanes[seconds] = self.loop.lane(seconds, ClientSession.on_deadline)
        self._lane = self._lanes[seconds]
        self.gates = self._gates[gate_s]

    def arm(self, session: ClientSession) -> None:
        """A connection was accepted."""
        self._lane.arm(session)
        self._join(session)

    def cancel(self, session: ClientSession) -> None:
        """It is known who that is, or over; harmless when it was not armed."""
        for lane in self._lanes.values():
            lane.cancel(session)
        self._part(session)

    def rename(self, session: ClientSession, end: Address) -> None:
        """A PROXY header tells who the client is."""
        self._part(session)
        session.ip, session.port = end
        self._join(session)

    def _join(self, session: ClientSession) -> None:
        crowd = self._crowds.setdefault(network_of(session.ip), {})
        crowd[session] = None
        if len(crowd) > self.per_address:
            next(iter(crowd)).fail(Reason.CROWDED_OUT)

    def _part(self, session: ClientSession) -> None:
        network = network_of(session.ip)
        crowd = self._crowds.get(network)
        if crowd is not None:
            crowd.pop(session, None)
            if not crowd:
                del self._crowds[network]


class ClientSession:
    """One accepted connection until its 64-byte header is accepted, a mask host has taken it, or it is closed."""

    __slots__ = ("core", "settings", "stream", "ip", "port", "local", "state", "inbox", "records", "user", "record_body", "answer",
                 "dial")

    def __init__(self, core: Core, stream: Stream, ip: str, port: int, local: Address | None = None) -> None:
        self.core = core
        self.settings = core.settings          # a connection keeps the snapshot it was accepted under (D21)
        self.stream = stream
        self.ip, self.port = ip, port          # of the client, as far as we know it
        self.local = local                     # where it connected to; None: ask the socket
        self.state = S.SNIFF
        self.inbox = Inbox(_INBOX_LIMIT)
        self.records: RecordReader | None = None     # set once the client speaks FakeTLS
        self.record_body = 0
        self.user: User | None = None          # who signed the ClientHello
        self.answer: Answer | None = None      # our flight, while it is not sent
        self.dial: MaskDial | None = None      # the way to the mask host, while it is being made

    @property
    def peer(self) -> str:
        """Address of the client for the log."""
        return format_address(self.ip, self.port)

    def local_end(self) -> Address | None:
        """Address that the client connected to: what a PROXY header says, else the socket's."""
        return self.local or self.stream.local_end()

    def start(self) -> None:
        """Begin to read; the deadline of the whole handshake runs from here."""
        self.core.handshakes.arm(self)
        self.stream.watch(READ, self.on_readable)

    def _enter(self, new: S) -> None:
        if new is not S.CLOSED and new not in _MOVES[self.state]:
            raise InternalError(f"session: {self.state.name} -> {new.name}")
        self.state = new

    # -- bytes in

    def on_readable(self, _mask: int) -> None:
        """Called by the loop."""
        limit = QUANTA[0] if self.records is not None or self.state is S.LEAVING else _FIRST_MAX - len(self.inbox)
        try:
            data = self.stream.read(limit)
        except OSError as error:
            self.fail(Reason.RESET if error.errno in _GONE else Reason.IO_ERROR)
            return
        if data == b"":
            self._on_eof()
        elif data is not None and self.state is not S.LEAVING:
            self.take(data)

    def take(self, data: bytes) -> None:
        """The client said this."""
        try:
            self._feed(data)
        except WireError as error:
            self._stranger(error)

    def _feed(self, data: bytes) -> None:
        if self.records is None:
            self.inbox.append(data)
        else:
            self.inbox.append(self.records.payload(data))
        while (step := _STEPS.get(self.state)) is not None and step(self):
            pass                               # every step that the bytes at hand allow
        if self.records is not None and self.state is S.INNER:     # what precedes a bad record or an alert counts first
            if self.records.failed:
                raise self.records.failed
            if self.records.closed:
                self._on_eof()

    # -- steps: True = state changed, look again

    def _sniff(self) -> bool:
        head = self.inbox.peek(RECORD_HEADER)
        if not _TLS_START.startswith(head[:3]):
            self._enter(S.PLAIN)
            return True
        if len(head) >= 3 and not self.settings.general.modes.tls:
            raise WireError(Reason.TLS_DISABLED)
        if len(head) < RECORD_HEADER:
            return False
        self.record_body = int.from_bytes(head[3:5], "big")
        if not HELLO_MIN <= self.record_body <= HELLO_MAX:
            raise WireError(Reason.HELLO_LENGTH)
        self._enter(S.HELLO)
        return True

    def _plain(self) -> bool:
        modes = self.settings.general.modes
        if not (modes.classic or modes.secure):
            log_session.debug("Non-TLS modes disabled", peer=self.peer)
            raise WireError(Reason.PLAIN_DISABLED)
        if has_reserved_prefix(self.inbox.peek(8)):
            raise WireError(Reason.RESERVED_PREFIX)
        if len(self.inbox) < PREAMBLE_SIZE:
            return False
        self._accept_header(self.core.doorman.candidates(self.ip, time.time()), plain_transports(modes), Reason.PLAIN_REPLAY)
        return False

    def _hello(self) -> bool:
        size = RECORD_HEADER + self.record_body
        if len(self.inbox) < size:
            return False
        self.user, flight = answer_hello(self.core, self.inbox.peek(size), self.ip, self.peer)
        self.inbox.take(size)                  # a stranger's stays: masking replays it
        self._enter(S.DELAY)
        self.answer = Answer(self, flight)
        self.answer.start()
        return True

    def on_answered(self) -> None:
        """The whole flight is on its way."""
        assert self.user is not None
        log_session.info("TLS handshake successful", peer=self.peer, user=self.user.name)
        self._enter(S.INNER)
        self.records = RecordReader()
        self.stream.watch(READ, self.on_readable)
        self.take(self.inbox.take_all())       # what came behind the hello already

    def _inner(self) -> bool:
        if len(self.inbox) < PREAMBLE_SIZE:
            return False
        assert self.user is not None
        try:
            self._accept_header((self.user,), _EVERY_TRANSPORT, Reason.INNER_REPLAY)
        except WireError as error:
            if error.reason is Reason.BAD_HEADER:
                raise WireError(Reason.BAD_INNER) from error
            raise
        return False

    def _accept_header(self, candidates: Iterable[User], allowed: Container[Transport], replay: Reason) -> None:
        core = self.core
        user, preamble = recognise_header(core, self.inbox.peek(PREAMBLE_SIZE), candidates, allowed, replay, self.peer)
        self.inbox.take(PREAMBLE_SIZE)
        core.doorman.users.remember(self.ip, user)
        log_session.info("MTProto handshake successful", peer=self.peer, user=user.name, dc=preamble.dc, proto=preamble.transport.word,
                         tls=str(self.records is not None).lower())
        core.handshakes.cancel(self)
        self._enter(S.CLOSED)                  # this session owns nothing any more
        routing = Routing(self, user, preamble)
        core.hand_over(self, routing)
        core.loop.call(routing.start)          # through the loop: an error in there is its own, not ours

    # -- strangers

    def _stranger(self, error: WireError, ended: bool = False) -> None:
        """The peer is no client of ours: the one place where that is counted.  ended: it has said all that it will."""
        if self.core.masks.is_ours((self.ip, self.port), self.inbox.peek(PREAMBLE_SIZE)):
            self.close(None)                   # masking it would feed it to itself (D19)
            return
        reason = Reason.BAD_INNER if error.reason is Reason.BAD_RECORD else error.reason
        self.core.counters.bad(reason)
        log_session.debug("Refused", peer=self.peer, reason=reason.value)
        if self.state is S.INNER:
            log_session.debug("Valid TLS but invalid MTProto handshake", peer=self.peer, error=error)
            self._say_goodbye()
            return
        self.core.masks.observer.note(classify_stranger(self.inbox.peek(16)), self.ip)
        self._enter(S.MASKING)
        if not (self.settings.censorship.mask and self.core.masks.enter()):
            self._discard(ended)
            return
        self.stream.want(0)                    # the rest waits in the kernel until somebody can take it
        self.dial = MaskDial(self.core.masks, self.settings.censorship, self.local_end(), functools.partial(self._on_mask, ended))

    def _on_mask(self, ended: bool, result: Stream | RouteError) -> None:
        core = self.core
        if isinstance(result, RouteError):
            self.dial = None
            core.masks.leave()
            self._discard(ended)
            return
        version = self.settings.censorship.mask_proxy_protocol
        opening = build_proxy_header(version, (self.ip, self.port), self.local_end()) if version else b""
        core.handshakes.cancel(self)
        relay = MaskRelay(core.masks, self.peer, self.stream, result)
        self._enter(S.CLOSED)                  # this session owns nothing any more
        core.hand_over(self, relay)
        core.loop.call(relay.start, opening + self.inbox.take_all(), ended)

    def _discard(self, ended: bool) -> None:
        """Nobody takes the stranger: silence until it ends or the deadline passes (11.1 step 2)."""
        if ended:
            self.close(None)
            return
        self._enter(S.LEAVING)
        self.inbox.take_all()
        self.stream.watch(READ, self.on_readable)

    def _say_goodbye(self) -> None:
        """After our ServerHello: a fatal alert and FIN, as far as anybody can see (D10)."""
        try:
            self.stream.write(build_fake_alert(os.urandom))
        except OSError:
            self.close(None)
            return
        self._discard(False)                   # and not just close: unread bytes would turn alert and FIN into a RST
        self.stream.finish()

    # -- the ways to end

    def _on_eof(self) -> None:
        if len(self.inbox) and self.state in (S.SNIFF, S.PLAIN, S.HELLO):
            hello = self.state is not S.PLAIN and self.inbox.peek(1) == _TLS_START[:1]
            self._stranger(WireError(Reason.HELLO_TRUNCATED if hello else Reason.PLAIN_TRUNCATED), ended=True)
        else:
            self.fail(Reason.EOF)

    def on_deadline(self) -> None:
        """`timeouts.client_handshake` seconds passed since accept."""
        if self.state not in _COUNTED:
            log_session.debug("Handshake timeout", peer=self.peer)
        self.fail(Reason.TIMEOUT)

    def fail(self, reason: Reason) -> None:
        """End without an accepted header, and without being bad (metrics.md 4.1)."""
        if self.state not in _COUNTED:
            self.core.counters.failed(reason, _STAGE[self.state])
            if reason is not Reason.TIMEOUT:
                log_session.debug("Handshake failed" if reason is Reason.IO_ERROR else "Connection closed by client", peer=self.peer)
            if len(self.inbox) or self.state is not S.SNIFF or reason not in _QUIET:      # a health check is nobody's business (D3)
                left = self.state is S.INNER and not len(self.inbox) and reason is not Reason.TIMEOUT
                self.core.masks.observer.note(EMPTY_HEADER if left else OTHER, self.ip)
        self.close(None)

    def on_crash(self) -> None:
        """Our own error in a handler: it cost this connection."""
        self.close(InternalError("internal error"))

    def close(self, error: Exception | None) -> None:
        """Close and give everything back; may be called twice."""
        if self.state is S.CLOSED:
            return
        self._enter(S.CLOSED)
        self.core.handshakes.cancel(self)
        if self.answer is not None:
            self.answer.abort()
        if self.dial is not None:
            self.dial.abort()
            self.core.masks.leave()
        self.stream.close()
        report_end(error, self.stream, peer=self.peer)
        self.core.ended(self)


class Answer:
    """Our flight on its way to a client: after the delay of `server_hello_delay_*`, in pieces where the kernel is short of memory."""

    __slots__ = ("session", "stream", "flight", "_timer")

    def __init__(self, session: ClientSession, flight: bytes) -> None:
        self.session, self.stream, self.flight = session, session.stream, flight
        self._timer: Timer | None = None

    def start(self) -> None:
        """Send now, or when the delay is over."""
        cert = self.session.settings.censorship
        low, high = cert.server_hello_delay_min_ms, cert.server_hello_delay_max_ms
        if high <= 0:
            self.on_writable(0)
            return
        self.stream.want(0)                    # a client says nothing before our flight
        delay_ms = low + draw_fraction() * max(0, high - low)
        self._timer = self.session.core.loop.call_later(delay_ms / 1000, functools.partial(self.on_writable, 0))

    def on_writable(self, _mask: int) -> None:
        """Called by the loop while a part of the flight waits."""
        try:
            self.flight = self.flight[self.stream.write(self.flight):]
        except OSError as error:
            log_session.warn("Failed to write TLS ServerHello", peer=self.session.peer)
            self.session.fail(Reason.RESET if error.errno in _GONE else Reason.IO_ERROR)
            return
        if self.flight:
            self.stream.watch(WRITE, self.on_writable)
            return
        self.session.answer = None
        self.session.on_answered()

    def abort(self) -> None:
        """The client is gone."""
        if self._timer is not None:
            self._timer.cancel()

    def on_crash(self) -> None:
        """Our own error in a handler: it cost this connection."""
        self.session.on_crash()


_COUNTED: Final = (S.MASKING, S.LEAVING, S.CLOSED)         # a stranger: whatever happens now, it was counted
_QUIET: Final = (Reason.EOF, Reason.RESET)


def answer_hello(core: Core, record: bytes, ip: str, peer: str) -> tuple[User, bytes]:
    """Return the user who signed a ClientHello record and the flight that answers it.  Raises WireError for a stranger's."""
    hello = parse_client_hello(record)
    doorman = core.doorman
    try:
        user, timed = doorman.find_hello(record, hello, ip, time.time())
    except WireError:
        log_session.debug("TLS handshake validation failed - no matching user or time skew", peer=peer)
        raise
    shape = core.fronts.shape(hello.server_name, GROUP_HYBRID in hello.groups)
    group = choose_group(hello, shape.group)
    try:
        doorman.check_hello(hello, timed, core.loop.now)
    except WireError:
        log_session.warn("TLS replay attack detected (duplicate digest)", peer=peer)
        raise
    return user, build_server_hello(hello, shape, group, core.fronts.share(group), user.sign, os.urandom)


def recognise_header(core: Core, block: bytes, candidates: Iterable[User], allowed: Container[Transport], replay: Reason,
                     peer: str) -> tuple[User, Preamble]:
    """Return whose 64-byte header that is and what it says.  Raises WireError: BAD_HEADER, or `replay` for one seen before."""
    try:
        user, preamble = core.doorman.find_header(block, candidates, allowed)
    except WireError:
        log_session.debug("MTProto handshake: no matching user found", peer=peer)
        raise
    try:
        core.doorman.check_header(preamble, replay, core.loop.now)
    except WireError:
        log_session.warn("MTProto replay attack detected", peer=peer)
        raise
    return user, preamble


class ProxyGate:
    """Reads the PROXY header that a listener demands; then its session begins, with the true addresses (client-protocol.md 3).

    The session exists from accept on: its deadline and its place count from there.  A bad header is never masked: whoever
    connects here is a load balancer or somebody who found a door that is not for him.
    """

    __slots__ = ("core", "session", "stream", "head", "header", "left", "_heard")

    def __init__(self, session: ClientSession) -> None:
        self.core, self.session, self.stream = session.core, session, session.stream
        self.head = b""
        self.header: ProxyHeader | None = None
        self.left = 0                          # bytes of the header still to come: TLVs that nobody keeps
        self._heard = False

    def start(self, trusted: bool) -> None:
        """Begin to read; trusted: this peer may say who others are."""
        self.core.handshakes.arm(self.session)
        if not trusted:
            self._refuse(Reason.PROXY_UNTRUSTED)
            return
        self.core.handshakes.gates.arm(self)
        self.stream.watch(READ, self.on_readable)

    def on_readable(self, _mask: int) -> None:
        """Called by the loop."""
        try:
            data = self.stream.read(_GATE_READ)
        except OSError as error:
            self._end(Reason.RESET if error.errno in _GONE else Reason.IO_ERROR)
            return
        if data == b"":
            self._end(Reason.EOF)
        elif data is not None:
            self._heard = True
            try:
                self._feed(data)
            except WireError as error:
                self._refuse(error.reason)

    def _feed(self, data: bytes) -> None:
        if self.header is None:
            self.head += data                  # at most _GATE_READ: what is no header within its first bytes has raised
            self.header = parse_proxy_header(self.head)
            if self.header is None:
                return
            data, self.head, self.left = self.head, b"", self.header.size
        rest = data[self.left:]
        self.left -= len(data) - len(rest)
        if not self.left:
            self.core.handshakes.gates.cancel(self)
            self._let_in(self.header, rest)

    def _let_in(self, header: ProxyHeader, rest: bytes) -> None:
        """The session begins; `rest`: what the client said already."""
        core, session, sender = self.core, self.session, self.session.peer
        if header.source is not None:
            core.handshakes.rename(session, header.source)
            session.local = header.destination
        log_session.debug("PROXY protocol header parsed", peer=sender, client=session.peer, version=header.version)
        self.stream.watch(READ, session.on_readable)
        if rest:
            core.loop.call(session.take, rest)

    def on_deadline(self) -> None:
        """Called by the lane: the header took too long."""
        if self.session.state is S.SNIFF and self.stream.fd >= 0:
            self._refuse(Reason.PROXY_TIMEOUT)

    def _end(self, reason: Reason) -> None:
        """The peer left.  Without a byte it was a health check."""
        if self._heard:
            self._refuse(Reason.PROXY_INVALID)
        else:
            self.core.handshakes.gates.cancel(self)
            self.session.fail(reason)

    def _refuse(self, reason: Reason) -> None:
        self.core.handshakes.gates.cancel(self)
        self.core.counters.bad(reason)
        log_session.warn("Invalid PROXY protocol header", peer=self.session.peer, reason=reason.value)
        self.core.masks.observer.note(OTHER, self.session.ip)
        self.session.close(None)

    def on_crash(self) -> None:
        """Our own error in a handler: it cost this connection."""
        self.session.on_crash()


def plain_transports(modes: Modes) -> list[Transport]:
    """Transports that a plain connection may speak (client-protocol.md 5.3, D8)."""
    allowed = [Transport.ABRIDGED, Transport.INTERMEDIATE] if modes.classic else []
    return [*allowed, Transport.PADDED] if modes.secure else allowed


_STEPS: Final[dict[S, Callable[[ClientSession], bool]]] = {
    S.SNIFF: ClientSession._sniff, S.PLAIN: ClientSession._plain, S.HELLO: ClientSession._hello, S.INNER: ClientSession._inner,
}


_LEFT: Final = ConnectionResetError(errno.ECONNRESET, "client left")


class Routing:
    """An authenticated client until its data centre is connected.  Owns the client's stream and its ticket."""

    __slots__ = ("core", "settings", "stream", "peer", "ip", "port", "local", "user", "preamble", "records", "early", "ticket", "cycle",
                 "waiting", "closed")

    def __init__(self, session: ClientSession, user: User, preamble: Preamble) -> None:
        self.core, self.settings, self.stream = session.core, session.settings, session.stream
        self.peer, self.ip, self.port, self.local = session.peer, session.ip, session.port, session.local
        self.user, self.preamble = user, preamble
        self.records, self.early = session.records, session.inbox    # what the client says before its data centre listens
        self.ticket: Ticket | None = None
        self.cycle: Cycle | None = None
        self.waiting: Waiting | None = None    # for a link to the middle end
        self.closed = False

    def start(self) -> None:
        """Judge the user's limits and choose a way."""
        name, pool = self.user.name, self.core.pool
        self.stream.watch(READ if len(self.early) < _EARLY_MAX else HANGUP, self.on_readable)
        if self.records is not None and (self.records.failed or self.records.closed):
            self.close(self.records.failed or _LEFT)
            return
        try:
            self.ticket = self._admit()
        except WireError as error:
            log_session.warn("User limit exceeded", user=name, error=error)
            self.close(error)
            return
        if pool is None:
            self._go_direct()
        else:
            self._on_way(pool.route(self.preamble.dc, True))

    def _on_way(self, way: Way) -> None:
        """What the pool says, at once or after waiting for a link."""
        pool, self.waiting = self.core.pool, None
        assert pool is not None
        if isinstance(way, Bind):
            self._join_link(pool.links[way.link_id])
        elif isinstance(way, Hold):
            self.waiting = pool.wait(way, self.preamble.dc, True, self._on_way)
        elif isinstance(way, GoDirect):
            self.core.counters.me.count("fallback_sessions_total")
            self._go_direct()
        else:
            self.close(RouteError("No ME writers available for target DC"))

    def _go_direct(self) -> None:
        """Dial the data centre itself."""
        name, dc = self.user.name, self.preamble.dc
        scope = name[len("scope_"):] if name.startswith("scope_") else ""
        self.cycle = self.core.upstreams.connect_dc(dc, self.settings, scope, self._on_dc)
        if log_session.enabled(Level.INFO):
            log_session.info("Connecting to Telegram DC", user=name, peer=self.peer, dc=dc,
                             dc_addr=format_address(*self.cycle.where), proto=self.preamble.transport.word, mode="direct")

    def _admit(self) -> Ticket:
        table = self.core.doorman.users
        if table.users.get(self.user.name) is not self.user:         # removed while shaking hands
            raise WireError(Reason.LIMIT, f"User {self.user.name} disabled")
        ticket = admit(self.user, self.ip, time.time())
        table.note_admission(self.user, self.ip, self.core.loop.now)
        return ticket

    def on_readable(self, _mask: int) -> None:
        """The client goes on talking, or leaves: then nobody needs the data centre any more."""
        try:
            data = b"" if self.stream.mask == HANGUP else self.stream.read(min(QUANTA[0], _EARLY_MAX - len(self.early)))
            if data is None:
                return
            if self.records is None:
                self.early.append(data)
            else:
                self.early.append(self.records.payload(data))
        except OSError as error:
            self.close(error)
            return
        if self.records is not None and self.records.failed:
            self.close(self.records.failed)
        elif not data or (self.records is not None and self.records.closed):
            self.close(_LEFT)
        elif len(self.early) >= _EARLY_MAX:
            self.stream.want(HANGUP)

    def _on_dc(self, result: Connected | RouteError) -> None:
        if isinstance(result, RouteError):
            self.close(result)
        else:
            self._hand_over(result.stream)

    def _hand_over(self, dc: Stream) -> None:
        """Join both streams in a relay; from here it closes both."""
        core, preamble, client, backend = self.core, self.preamble, self.stream, self.core.doorman.backend
        assert self.ticket is not None
        fast = self.settings.general.fast_mode
        answer_key = preamble.to_client_key + preamble.to_client_iv if fast else b""
        opening = make_dc_preamble(preamble.transport, preamble.dc, backend, os.urandom, answer_key)
        passes_up = (preamble.from_client, opening.to_dc)
        passes_down = () if fast else (backend.ctr(opening.from_dc_key, opening.from_dc_iv),
                                       backend.ctr(preamble.to_client_key, preamble.to_client_iv))
        up: Flow
        down: Flow
        if self.records is None:
            up, down = CopyFlow(core.arena, client, dc, passes_up), CopyFlow(core.arena, dc, client, passes_down)
        else:
            up = UnwrapFlow(core.arena, client, dc, self.records, passes_up)
            down = WrapFlow(core.arena, dc, client, passes_down)
        early = opening.to_dc.update(preamble.from_client.update(self.early.take_all()))
        relay = DirectRelay(core, self.ticket, self.peer, client, dc, up, down)
        self.closed = True
        core.hand_over(self, relay)
        core.loop.call(relay.start, opening.block + early, len(early))

    def _join_link(self, link: MeLink) -> None:
        """Give the client to a relay through the middle end; from here that one closes it."""
        core, preamble, general, backend = self.core, self.preamble, self.settings.general, self.core.doorman.backend
        assert self.ticket is not None and core.pool is not None
        framing = FRAMINGS[preamble.transport.word](min(general.max_client_frame, CLIENT_FRAME_MAX))
        ours, our_port = self.local or self.stream.local_end() or ("0.0.0.0", self.settings.server.port)
        tag = self.settings.access.user_ad_tags.get(self.user.name) or general.ad_tag
        meta = Meta(framing.name, (self.ip, self.port), (core.pool.our_ip(ours), our_port), bytes.fromhex(tag) if tag else None)
        cipher = backend.ctr(preamble.to_client_key, preamble.to_client_iv)
        relay = MiddleRelay(core, self.ticket, self.peer, Inlet(core.arena, self.stream, self.records, preamble.from_client), framing,
                            Outlet(core.arena, self.stream, cipher, self.records is not None),
                            Seat(link, preamble.dc, core.pool.bindings.new_id(), meta))
        early = preamble.from_client.update(self.early.take_all())
        self.closed = True
        core.hand_over(self, relay)
        if log_session.enabled(Level.INFO):
            log_session.info("Routing via Middle-End", user=self.user.name, peer=self.peer, dc=preamble.dc, proto=framing.name,
                             mode="middle_proxy", pool_generation=core.pool.planner.generation, link=link.id)
        core.loop.call(relay.start, early, meta)

    def on_crash(self) -> None:
        """Our own error in a handler: it cost this connection."""
        self.close(InternalError("internal error"))

    def close(self, error: Exception | None) -> None:
        """Close and give everything back; may be called twice."""
        if self.closed:
            return
        self.closed = True
        if self.cycle is not None:
            self.cycle.abort()
        if self.waiting is not None and self.core.pool is not None:
            self.core.pool.bindings.leave(self.waiting)
        if self.ticket is not None:
            self.ticket.release()
        self.stream.close()
        report_end(error, self.stream, peer=self.peer)
        self.core.ended(self)


log_session: Final = Log("session")


# == 21. files ================================================================
# What lies on disk: the configuration with the files it includes, as it was at
# one moment, and the quotas that were used up.  A file may be written by
# somebody else while we read it: who reloads waits until two readings agree.
# Source: config.md 1, 2.11, 8.

# -- configuration files

_CONFIG_MAX: Final = 64 << 20            # bytes of one file: half a million users need less
_STABLE_S: Final = 0.05                  # two readings so far apart that are alike: the writer is done (config.md 8 item 3)
_STABLE_READS: Final = 40                # 2 s


def read_config_bytes(path: str) -> bytes:
    """Return what a configuration file holds.  Raises OSError or ConfigError.

    A pipe without a writer or a device without an end would be waited for until the end of days.
    """
    with open_to_read(path) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(f"{path}: not a regular file")
        data = file.read(min(facts.st_size + 4096, _CONFIG_MAX) + 1)           # the limit alone would be 64 MiB of memory
    if len(data) > _CONFIG_MAX:
        raise ConfigError(f"{path}: larger than {_CONFIG_MAX >> 20} MiB")
    return data


def read_config_file(including: str, wanted: str, given: Mapping[str, bytes] | None = None) -> tuple[str, str]:
    """Return (path, text) of a file named in `including` (empty: the main file).  Raises OSError or ConfigError.

    given: path -> bytes that count instead of what is on disk.
    """
    path = os.path.join(os.path.dirname(including), wanted) if including else wanted
    data = given[path] if given and path in given else read_config_bytes(path)
    try:
        return path, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8 at byte {error.start}") from None


class Reading(NamedTuple):
    """Main file and includes as they were at one moment."""

    files: dict[str, bytes]                  # path -> content, main file first
    marks: dict[str, tuple[int, ...]]        # path -> what stat said before it was read; () = nothing
    text: str                                # includes in place; empty after an error
    error: OSError | ConfigError | None

    def digest(self) -> bytes:
        """Tells two contents apart."""
        return digest_files(self.files)


def digest_files(files: Mapping[str, bytes]) -> bytes:
    """SHA-256 over names and contents."""
    total = hashlib.sha256()
    for path, data in files.items():
        total.update(f"{path}\0{len(data)}\0".encode(errors="surrogateescape"))
        total.update(data)
    return total.digest()


def stat_mark(path: str) -> tuple[int, ...]:
    """Device, inode, time of change and size of a file, behind symlinks; () if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def read_config(path: str) -> Reading:
    """Read a main file and its includes, each once."""
    files: dict[str, bytes] = {}
    marks: dict[str, tuple[int, ...]] = {}

    def read(including: str, wanted: str) -> tuple[str, str]:
        name = os.path.join(os.path.dirname(including), wanted) if including else wanted
        if name not in files:
            marks[name] = stat_mark(name)
            files[name] = read_config_bytes(name)
        return read_config_file(including, wanted, files)

    try:
        text, _included = expand_includes(read("", path)[1], path, read)
    except (OSError, ConfigError) as error:
        return Reading(files, marks, "", error)
    return Reading(files, marks, text, None)


def load_config(path: str) -> Loaded:
    """Return the configuration of a file with its includes.  Raises OSError or ConfigError."""
    return load_reading(read_config(path))


def load_reading(reading: Reading) -> Loaded:
    """Return what was read means.  Raises OSError or ConfigError."""
    if reading.error is not None:
        raise reading.error
    return parse_settings(parse_document(reading.text), _draws)


def read_stable(path: str, sleep: Callable[[float], None]) -> Reading:
    """Read until two readings 50 ms apart are alike: nobody is writing any more.  Gives up with an error after 2 s."""
    before = read_config(path)
    for _ in range(_STABLE_READS):
        sleep(_STABLE_S)
        now = read_config(path)
        if (now.files, str(now.error)) == (before.files, str(before.error)):
            return now
        before = now
    return Reading({}, dict.fromkeys(before.marks, ()), "", ConfigError("the file keeps changing"))       # no marks: look again


_draws: Final = Draws(lambda: 1024 + int(draw_fraction() * 3072))


# -- quota state (config.md 2.11)

_QUOTA_FLUSH_S: Final = 60.0             # what a crash may lose
_QUOTA_FILE_MAX: Final = 64 << 20        # bytes; a hundred per user
_QUOTA_CLOSE_S: Final = 1.5              # the last write waits so long for the one before it

Usage: TypeAlias = "tuple[str, int, int]"         # user, used octets, unix seconds of the last reset


def parse_quota_state(data: bytes) -> dict[str, tuple[int, int]]:
    """Return user -> (used octets, unix seconds of the last reset).  Raises ValueError for what is not of this form."""
    import json
    try:
        users = json.loads(data)["users"]
        found = {name: (entry.get("used_bytes", 0), entry.get("last_reset_epoch_secs", 0)) for name, entry in users.items()}
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no quota state: {error!r}") from None
    for pair in found.values():
        for number in pair:
            if type(number) is not int or not 0 <= number < 1 << 64:
                raise ValueError("a number is no count")
    return found


def render_quota_state(usage: Iterable[Usage]) -> bytes:
    """The file for these users; who used nothing and was never reset is left out."""
    import json
    users = {name: {"used_bytes": used, "last_reset_epoch_secs": reset} for name, used, reset in sorted(usage) if used or reset}
    last = max((entry["last_reset_epoch_secs"] for entry in users.values()), default=0)
    return (json.dumps({"last_reset_epoch_secs": last, "users": users}, indent=2, ensure_ascii=False) + "\n").encode(errors="replace")


def write_quota_file(path: str, data: bytes) -> None:
    """Put the state at `path` in one step, readable by its owner only; a symlink there is replaced.  Raises OSError."""
    refuse_nul(path)
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    draft = os.path.join(directory, f".{name}.tmp-{int.from_bytes(os.urandom(8), 'big')}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view):]
            os.fsync(fd)
        os.replace(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    with contextlib.suppress(OSError):                     # some file systems cannot
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)


class QuotaState:
    """Keeps used octets over a restart, where a file is configured.

    Nothing counts here: a relay that moves the first byte since the last write comes by (`User.mark`), and 60 s later the
    numbers are taken and written by a helper thread.  So at rest no timer runs, and no chunk pays for it.
    """

    def __init__(self, loop: Loop, users: UserTable, path: str | None) -> None:
        self.loop, self.users = loop, users
        self.path = os.path.abspath(path) if path else None
        self._timer: Timer | None = None
        self._writing = False
        self._warned = False
        self._taken = self._written = 0                    # numbers of snapshots: an older one never replaces a newer
        if path:
            import _thread
            self._lock = _thread.allocate_lock()

    def load(self) -> None:
        """Give the users what they had used; before the first of them comes in."""
        if self.path is None:
            return
        try:
            data = read_small_file(self.path, _QUOTA_FILE_MAX, os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        except OSError as error:
            log_files.warn("Failed to read quota state file", path=self.path, error=f"{error.strerror} (os error {error.errno})")
            return
        try:
            found = parse_quota_state(data)
        except ValueError as error:
            log_files.warn("Failed to parse quota state file", path=self.path, error=error)
            with contextlib.suppress(OSError):
                os.replace(self.path, f"{self.path}.bad")
            return
        known = [user for user in self.users if user.name in found]
        for user in known:
            user.used, user.reset_wall = found[user.name]
        log_files.info("Loaded per-user quota state", path=self.path, loaded_users=len(known))

    def touch(self) -> None:
        """Something is not written yet."""
        if self.path is not None and self._timer is None:
            self._timer = self.loop.call_later(_QUOTA_FLUSH_S, self._on_timer)

    def reset(self, user: User) -> Callable[[], None]:
        """Set the used octets of a user to 0; returns what writes that down, for another thread.  It raises OSError."""
        user.used, user.reset_wall = 0, int(time.time())
        if self.path is None:
            return lambda: None
        save = self._take()

        def write() -> None:
            try:
                save()
            except OSError:
                self.loop.call_from_thread(self.touch)     # the reset is in force: try again
                raise
        return write

    def write_down(self) -> Callable[[], None]:
        """Note the numbers of this moment; returns what writes them, if they are not written yet, for another thread.

        It raises OSError.
        """
        return self._take() if self.path is not None and (self._timer is not None or self._writing) else lambda: None

    def retire(self) -> None:
        """Write no more: the file is another's."""
        self.path = None
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        """Write what is not written yet; the loop has ended."""
        if self.path is not None and (self._timer is not None or self._writing):
            try:
                self._take()()
            except OSError as error:
                self._complain(error)

    def _on_timer(self) -> None:
        self._timer = None
        if self._writing:                                  # the disk is that slow
            self.touch()
            return
        self._writing = True
        self.loop.offload(self._take(), self._on_written)

    def _take(self) -> Callable[[], None]:
        """Note the numbers of this moment; returns what writes them, for any thread.  It raises OSError."""
        assert self.path is not None
        path, self._taken = self.path, self._taken + 1
        number, usage = self._taken, [(user.name, user.used, user.reset_wall) for user in self.users]
        for user in self.users:
            user.mark = 0                                  # the next byte is news

        def save() -> None:
            if not self._lock.acquire(timeout=_QUOTA_CLOSE_S):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            try:
                if number > self._written:
                    write_quota_file(path, render_quota_state(usage))
                    self._written = number
            finally:
                self._lock.release()
        return save

    def _on_written(self, result: Exception | None) -> None:
        self._writing = False
        if isinstance(result, OSError):
            self._complain(result)
            self.touch()
        elif result is not None:
            raise result
        else:
            self._warned = False

    def _complain(self, error: OSError) -> None:
        """Once until a write succeeds again; limits go on working in memory."""
        if not self._warned:
            log_files.warn("Failed to write quota state file", path=self.path, error=f"{error.strerror} (os error {error.errno})")
        self._warned = True


log_files: Final = Log("server")


# == 22. server ==============================================================
# Owner of everything that outlives a connection: listeners, places, the sweep
# over relays, and the orderly stop.

FDS_WANTED: Final = 4096
SLOTS_MAX: Final = 10_000                # connections at once, as in 3.2.1 (client-protocol.md D2)
_SWEEP_S: Final = 10.0                   # idle and expiry rules are enforced this precisely (upstream-and-relay.md D23)
_WARM_UP_S: Final = 10.0                 # a new program waits so long for its first link before it says that it is ready
_WARM_LOOK_S: Final = 0.1
_CROWD_MIN: Final = 64                   # connections whose memory is worth asking for
_HOUSEWORK_S: Final = 2.0                # the rest of the crowd may leave meanwhile
_STOP_FLUSH_S: Final = 1.0               # bytes queued for clients may still go out for so long (config.md 8 item 17)
_STOP_LIMIT_S: Final = 3.5               # whatever hangs, the process is gone 4 s after SIGTERM


def slot_cap(fd_limit: int) -> int:
    """Connections that `fd_limit` descriptors carry: two each, and 256 for the rest."""
    return max(64, min(SLOTS_MAX, (fd_limit - 256) // 2))


class Places:
    """Everybody who is connected, at most `cap`; at the cap the listeners rest (client-protocol.md D2)."""

    def __init__(self, cap: int, on_full: Callable[[bool], None] = lambda full: None) -> None:
        self.cap, self._on_full = cap, on_full
        self.owners: set[Connection] = set()
        self.listeners: list[Listener] = []
        self.closed = False                    # the process stops or drains: nobody comes in any more
        self.draining = False                  # another program accepts; who is here may stay
        self.resting = False                   # nobody is let in for a moment
        self.spare: SpareDescriptor | None = None
        self.unix_count = 0                    # connections that the unix listener accepted, ever
        self._unix_file: tuple[str, int] | None = None       # path and inode of our unix socket
        self.on_left: Callable[[], None] = lambda: None      # three quarters of a crowd have left
        self._peak = 0                         # most owners since then
        self._full = False
        self._warned = Throttle(60.0)

    def take(self, owner: Connection) -> None:
        """A new connection."""
        self.owners.add(owner)
        self._balance()

    def give(self, owner: Connection) -> None:
        """A connection ended."""
        self.owners.discard(owner)
        self._balance()

    def swap(self, old: Connection, new: Connection) -> None:
        """The same connection has another owner."""
        self.owners.discard(old)
        self.owners.add(new)

    def claim(self, path: str) -> None:
        """A unix socket of ours lies at `path` now; empty: it is not ours any more."""
        self._unix_file = (path, os.lstat(path).st_ino) if path else None

    def close_listeners(self) -> None:
        """Let nobody in any more; the file of our unix socket goes too, unless it is another's by now."""
        self.closed = True
        for listener in self.listeners:
            listener.close()
        self.listeners = []
        with contextlib.suppress(OSError):
            if self._unix_file is not None and os.lstat(self._unix_file[0]).st_ino == self._unix_file[1]:
                os.unlink(self._unix_file[0])

    def rest(self, on: bool) -> None:
        """Leave everybody who comes in the queues of the listening sockets, or go on."""
        self.resting = on
        for listener in self.listeners:
            (listener.pause if on or self._full else listener.resume)()

    def shrink(self) -> None:
        """Give back the room of those who left."""
        self.owners = set(self.owners)         # never empty in between: other threads look at its size

    def _balance(self) -> None:
        count = len(self.owners)
        if count > self._peak:
            self._peak = count
        elif count * 4 <= self._peak >= _CROWD_MIN:
            self._peak = count
            self.on_left()
        full = count >= self.cap
        if full == self._full:
            return
        self._full = full
        if full and self._warned.ready():
            log_server.warn("Connection limit reached", limit=self.cap)
        for listener in self.listeners:
            (listener.pause if full or self.resting else listener.resume)()
        self._on_full(full)


class Housework:
    """Gives memory back to the system once a crowd has left.

    Tables keep the size they had, and malloc keeps what lies between living objects: a page of 4 KB stays for the one address in it.
    So what outlives a crowd lies in few pieces (replay windows, key stocks) or is copied when the crowd has gone: malloc takes the
    smallest hole first, so the copies lie close together.  Once per crowd, a moment after it, so there is no wake-up at rest.
    """

    def __init__(self, loop: Loop, shrink_tables: Callable[[], None], compact: Callable[[], None] = lambda: None) -> None:
        self.loop, self._shrink_tables, self._compact = loop, shrink_tables, compact
        self._due = False
        # Now, if ctypes is there for another reason: what it makes for a function would lie all over what a crowd leaves.
        self._trim = find_trim() if "ctypes" in sys.modules or "_cffi_backend" in sys.modules else None

    def call(self) -> None:
        """A crowd has left: tidy up soon."""
        if not self._due:
            self._due = True
            self.loop.call_later(_HOUSEWORK_S, self.run)

    def run(self) -> None:
        """Tidy up now: a few milliseconds."""
        self._due = False
        self._shrink_tables()
        gc.collect()                           # lists of free tuples and floats too; what lives since the start is frozen
        trim = self._trim or find_trim()
        if trim is not None:
            trim(0)                            # joins free pieces to large ones, or the copies would take the small change all over
            self._compact()
            trim(0)


def find_trim() -> Callable[[int], object] | None:
    """What has malloc return its free pages to the system, where it can (glibc)."""
    if not _GLIBC:
        return None
    with contextlib.suppress(ImportError, AttributeError, OSError, MemoryError, TypeError):
        cffi: Any = sys.modules.get("_cffi_backend")
        if cffi is not None:                   # `cryptography` brings it; ctypes would be 1 MB more, all over what the crowd left
            kind = cffi.new_function_type((cffi.new_primitive_type("size_t"),), cffi.new_primitive_type("int"), False)
            trim: Callable[[int], object] = cffi.load_library(None).load_function(kind, "malloc_trim")
            return trim
        import ctypes
        return ctypes.CDLL(None).malloc_trim
    return None


class Sweep:
    """Ends sessions that were idle too long or whose user expired, at most 10 s late (upstream-and-relay.md D23).

    Armed for the earliest moment one can be idle too long, so a proxy at rest is not woken; only while a user that may expire
    is connected it looks every 10 s, because the wall clock can jump.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.relays: set[DirectRelay | MiddleRelay] = set()
        self._timer: Timer | None = None

    def add(self, relay: DirectRelay | MiddleRelay) -> None:
        """Watch over a relay from now on."""
        self.relays.add(relay)
        self._arm(self._due_at(relay))

    def look_again(self) -> None:
        """Users may expire that could not before."""
        if self.relays:
            self._arm(min(map(self._due_at, self.relays)))

    def _due_at(self, relay: DirectRelay | MiddleRelay) -> float:
        """Monotonic time at which the relay has to be looked at."""
        return relay.last_at + IDLE_LIMIT_S if relay.user.expires_wall == INF else self.loop.now

    def _arm(self, due_at: float) -> None:
        at = max(due_at, self.loop.now + _SWEEP_S)
        if self._timer is not None:
            if self._timer.at <= at:
                return
            self._timer.cancel()
        self._timer = self.loop.call_later(at - self.loop.now, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now, now_wall = self.loop.now, time.time()
        expired: dict[str, int] = {}
        for relay in list(self.relays):
            if now_wall > relay.user.expires_wall:
                expired[relay.user.name] = expired.get(relay.user.name, 0) + 1
                relay.close(None)
            elif now - relay.last_at >= IDLE_LIMIT_S:
                relay.expire_idle(now)
        for name, count in expired.items():
            log_server.info("User %s expired: closed %d connections", name, count)
        if self.relays:
            self._arm(min(map(self._due_at, self.relays)))


class TakeListening(Protocol):
    """Where the program before us may have left listening sockets (Heritage, room handover)."""

    def __call__(self, kind: str, host: str, port: int = -1) -> socket.socket | None: ...


class Server:
    """The running proxy.  Everything here happens on the loop thread."""

    def __init__(self, settings: Settings, loop: Loop, backend: Backend, fd_limit: int, paths: Container[str] = ()) -> None:
        self.settings, self.loop = settings, loop
        self.arena = Arena(backend, settings.general.crypto_pending_buffer, paths)
        self.counters = Counters()
        self.counters.gate(settings.general.telemetry.core_enabled, settings.general.telemetry.me_level)
        self.sources = Sources()
        self.count_users = settings.general.telemetry.user_enabled
        self.doorman = Doorman(backend)
        self.doorman.apply(settings.access)
        self.resolver = Resolver(loop)
        self.resolver.overrides = parse_dns_overrides(settings.network.dns_overrides)
        self.network = NetworkView(loop, settings, self.resolver, detect_addresses(settings))
        self.upstreams = Upstreams(loop, settings, self.counters, self.network.families, self.resolver,
                                   QUICK_CHECKS if "quick-checks" in paths else CHECKS)
        self.sources.upstreams, self.sources.path, self.sources.nat = self.upstreams.rows, self.upstreams.network_path, self.network.row
        self.half_closed: Lane[DirectRelay] = loop.lane(HALF_CLOSED_S, DirectRelay.on_half_closed_timeout)
        self.places = Places(slot_cap(fd_limit), lambda full: self.sources.event(
            "admission.state", f"accepting={str(not full).lower()} reason=connection_limit"))
        self.places.spare = SpareDescriptor(loop.mailbox.fd)
        self.places.on_left = Housework(loop, self._shrink, self._compact).call
        self.handshakes = Handshakes(loop, settings, self.places.cap)
        self.masks = Masks(loop, self.arena, self.resolver, Observer(loop, settings), self.places.cap, self.ended)
        self.fronts = FrontProfiles(settings, loop, functools.partial(backend.x25519_public, os.urandom), os.urandom,
                                    functools.partial(FrontDial, self.masks, self.upstreams))
        self.sources.beobachten = self.masks.observer.text
        self.sweep = Sweep(loop)
        self.quotas = QuotaState(loop, self.doorman.users, settings.general.quota_state_path)
        self.answers = AnswerBudget(memory_size())
        self.desyncs = DesyncLog(self.counters.me)
        self.handed: TakeListening = lambda kind, host, port=-1: None
        self._middle_started = False
        self.pool: Pool | None = None
        self.directory: Directory | None = None
        if settings.general.use_middle_proxy:
            self._build_middle(backend)

    def _build_middle(self, backend: Backend) -> None:
        """Links to the middle end; accept() starts them."""
        settings, loop = self.settings, self.loop
        origin = Origin(backend, os.urandom, os.getpid(), int(time.time()))
        planner = PoolPlanner(settings, draw_fraction, loop.now, self.counters.me)
        self.pool = Pool(loop, settings, self.counters, self.arena, self.upstreams, self.network, origin, planner)
        self.sources.pool = lambda: pool_snapshot(planner, loop.now)
        self.sources.route = lambda: route_snapshot(planner, loop.now, time.time(), self._count_direct())
        self.network.watchers.append(self.pool.on_families)
        families = [family for family, on in ((4, settings.network.ipv4), (6, settings.network.ipv6)) if on]
        self.directory = Directory(loop, settings, Downloads(loop, self.upstreams).fetch, families, self.pool)

    def _shrink(self) -> None:
        """Give back the room of connections that are gone: all tables that are as long as there are connections."""
        self.loop.shrink()
        self.places.shrink()
        shrink(self.sweep.relays)
        shrink(self.masks.ends)

    def _compact(self) -> None:
        """Move what is remembered of those who left out of their memory."""
        self.masks.observer.seen.compact()
        for part in (self.doorman.users, self.doorman.hellos, self.doorman.timeless_hellos, self.doorman.headers, self.counters):
            part.compact()

    def _count_direct(self) -> int:
        """Sessions on the direct way; where the middle end is wanted, they fell back to it."""
        return sum(isinstance(relay, DirectRelay) for relay in self.sweep.relays)

    @property
    def detected(self) -> tuple[str | None, str | None]:
        """IPv4 and IPv6 that clients can reach us at, as far as known."""
        return self.network.seen()

    def open_listeners(self) -> Iterator[tuple[ListenerEntry, int]]:
        """Bind every configured TCP listener, one a step; yield the ones that work, with their real port."""
        network, port = self.settings.network, self.settings.server.port
        for entry in self.settings.server.listeners:
            ip, family = str(entry.ip), entry.ip.version
            if not (network.ipv6 if family == 6 else network.ipv4):
                log_server.warn("Skipping IPv%d listener: IPv%d disabled by [network]", family, family, addr=ip)
                continue
            try:
                sock = self.handed("clients", ip, port) or bind_tcp(ip, port, entry.reuse_allow)
            except OSError as error:
                report_bind_failure(ip, port, entry.reuse_allow, error)
                continue
            if OPTIONS_INHERITED:
                tune_client(sock, self.settings.timeouts.client_keepalive, self.settings.timeouts.client_ack)
            listener = Listener(self.loop, sock, functools.partial(self._on_accept, entry), self.places.spare)
            self.places.listeners.append(listener)
            self.masks.listeners.append((ip, listener.address[1]))
            log_server.info("Listening on %s", format_address(ip, listener.address[1]))
            yield entry, listener.address[1]

    def warm_up(self, done: Callable[[], None]) -> None:
        """Call back when there is a link to the middle end, if one is wanted, at most ten seconds from now."""
        if self.pool is None:
            self.loop.defer(done)
            return
        self.start_middle()
        self._wait_for_link(self.pool, self.loop.now + _WARM_UP_S, done)

    def _wait_for_link(self, pool: Pool, until_at: float, done: Callable[[], None]) -> None:
        if pool.is_warm() or self.loop.now >= until_at:
            done()
        else:
            self.loop.call_later(_WARM_LOOK_S, functools.partial(self._wait_for_link, pool, until_at, done))

    def start_middle(self) -> None:
        """Begin to build links to the middle end, unless they are being built."""
        if self.pool is not None and self.directory is not None and not self._middle_started:
            self._middle_started = True
            self.pool.on_families()
            self.directory.start()

    def accept(self) -> None:
        """Let clients in, and begin what runs beside them."""
        self.fronts.start()
        self.start_middle()
        for listener in self.places.listeners:
            listener.resume()
        self.sources.stage = "ready"
        self.sources.admit(bool(self.places.listeners), "reason=start")

    @property
    def stopping(self) -> bool:
        """True from the first signal on."""
        return self.places.closed

    @property
    def port(self) -> int:
        """Port that clients connect to: the configured one, or what the system chose for 0."""
        chosen = self.places.listeners[0].address[1] if self.places.listeners else 0
        return self.settings.server.port or chosen

    def apply(self, settings: Settings) -> dict[str, int]:
        """Put the hot keys of a configuration in force; return user -> sessions that it ended (config.md 8 items 1, 4)."""
        before = {user: (user.secret, user.enabled) for user in self.doorman.users}
        self.settings = settings = merge_hot(self.settings, settings)
        self.doorman.apply(settings.access)
        self.resolver.overrides = parse_dns_overrides(settings.network.dns_overrides)
        self.masks.observer.apply(settings)
        self.fronts.apply(settings)
        self.upstreams.apply(settings)
        self.arena.apply(settings.general.crypto_pending_buffer)
        self.counters.gate(settings.general.telemetry.core_enabled, settings.general.telemetry.me_level)
        self.count_users = settings.general.telemetry.user_enabled
        self.handshakes.apply(settings)
        if self.pool is not None and self.directory is not None:
            self.pool.apply(settings)
            self.directory.apply(settings)
        if OPTIONS_INHERITED:
            for listener in self.places.listeners:
                if not isinstance(listener.address, str):      # a unix socket has no such options
                    tune_client(listener.sock, settings.timeouts.client_keepalive, settings.timeouts.client_ack)
        now = self.doorman.users.users
        gone = {user for user, (secret, enabled) in before.items()
                if now.get(user.name) is not user or user.secret != secret or enabled > user.enabled}
        self.sweep.look_again()
        closed = self._end_sessions(gone)
        if any(now.get(user.name) is not user and (user.used or user.reset_wall) for user in gone):
            self.quotas.touch()                # their entries go
        return closed

    def _end_sessions(self, users: set[User]) -> dict[str, int]:
        """Close what authenticated as one of `users`; return user name -> how many."""
        closed: dict[str, int] = {}
        for owner in list(self.places.owners) if users else ():
            ticket: Ticket | None = getattr(owner, "ticket", None)
            if ticket is not None and ticket.user in users:
                closed[ticket.user.name] = closed.get(ticket.user.name, 0) + 1
                owner.close(None)
        return closed

    def open_unix(self) -> None:
        """Bind the unix listener, where one is configured.  Raises OSError (client-protocol.md 2.2)."""
        path, mode = self.settings.server.listen_unix_sock, self.settings.server.listen_unix_sock_perm
        if not path:
            return
        sock = self.handed("clients", path) or bind_unix(path)
        note = set_unix_mode(path, mode) if mode is not None else ""
        sock.listen(1024)                      # nobody comes in before the mode is set
        self.places.listeners.append(Listener(self.loop, sock, self._on_unix_accept, self.places.spare))
        self.places.claim(path)
        self.masks.listen_path = path
        log_server.info("Listening on unix:%s%s", path, note)

    def _on_accept(self, entry: ListenerEntry, sock: socket.socket, peer: Any) -> None:
        ip, port, server = plain_ip(peer[0]), peer[1], self.settings.server
        if not OPTIONS_INHERITED:
            tune_client(sock, self.settings.timeouts.client_keepalive, self.settings.timeouts.client_ack)
        session = self._admit(ClientSession(self, Stream(self.loop, sock), ip, port))
        if server.proxy_protocol if entry.proxy_protocol is None else entry.proxy_protocol:
            trusted = server.proxy_protocol_trusted_cidrs
            ProxyGate(session).start(trusted is None or any(ipaddress.ip_address(ip) in network for network in trusted))
        else:
            session.start()

    def _on_unix_accept(self, sock: socket.socket, _peer: object) -> None:
        server = self.settings.server
        self.places.unix_count += 1
        port = self.places.unix_count % 65_535
        session = self._admit(ClientSession(self, Stream(self.loop, sock), "127.0.0.1", port, ("0.0.0.0", server.port)))
        if server.proxy_protocol:              # who may open the socket is trusted: its mode says so
            ProxyGate(session).start(True)
        else:
            session.start()

    def _admit(self, session: ClientSession) -> ClientSession:
        self.counters.accepted()
        self.places.take(session)
        return session

    def hand_over(self, old: Connection, new: Connection) -> None:
        """A connection goes on with another owner."""
        self.places.swap(old, new)
        if isinstance(new, (DirectRelay, MiddleRelay)):
            self.sweep.add(new)

    def quota_reached(self, user: User) -> bool:
        """`user.used` came to `user.mark`: True if its quota is used up."""
        user.mark = user.quota
        self.quotas.touch()
        return user.used >= user.quota

    def ended(self, owner: Connection) -> None:
        """A connection closed its streams."""
        self.places.give(owner)
        if isinstance(owner, (DirectRelay, MiddleRelay)):
            self.sweep.relays.discard(owner)
        if self.stopping and not self.places.owners:
            self.loop.stop()

    def retire(self) -> None:
        """Another program accepts at our sockets: carry whom we have to their end, and leave the loop with the last of them."""
        self.places.claim("")
        self.places.close_listeners()
        self.places.draining = True
        self.sources.admit(False, "reason=exchange")
        self.quotas.retire()
        self.masks.observer.retire()
        self.fronts.close()
        self.upstreams.health.retire()
        self.network.retire()
        if self.pool is not None and self.directory is not None:
            self.directory.retire()
            self.pool.retire()

    def stop(self) -> None:
        """Stop accepting, flush what waits for clients for at most a second, then leave the loop."""
        draining = self.places.draining
        if self.stopping and not draining:
            return
        self.places.draining = False
        log_server.info("Shutting down...")
        if not draining:                       # what is written here is another's otherwise
            self.places.close_listeners()
            self.masks.observer.flush()
            self.sources.admit(False, "reason=stop")
        for owner in list(self.places.owners):
            if isinstance(owner, (DirectRelay, MiddleRelay)):
                owner.drain()
            else:
                owner.close(None)
        if self.places.owners:
            self.loop.call_later(_STOP_FLUSH_S, self.loop.stop)
        else:
            self.loop.stop()


def set_unix_mode(path: str, text: str) -> str:
    """Give the unix socket the mode that `text` says in octal; return what the log says about it."""
    digits = text.lstrip("0").removeprefix("o")
    if not digits or not re.fullmatch("[0-7]{1,4}", digits):
        why = "invalid digit found in string" if digits else "cannot parse integer from empty string"
        log_server.warn("Invalid listen_unix_sock_perm '%s': %s. Ignoring.", text, why)
        return ""
    try:
        os.chmod(path, int(digits, 8))
    except OSError as error:
        log_server.error("Failed to set unix socket permissions to %s: IO error: %s (os error %s)", text, error.strerror, error.errno)
        return ""
    return f" (mode {text})"


def memory_size() -> int:
    """Physical memory in bytes, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0


def detect_addresses(settings: Settings) -> tuple[str | None, str | None]:
    """Local IPv4 and IPv6 that the system would reach the internet from; no packet is sent (upstream-and-relay.md 3.1)."""
    return local_address_towards("8.8.8.8"), local_address_towards("2001:4860:4860::8888") if settings.network.ipv6 else None


def report_bind_failure(ip: str, port: int, reuse_port: bool, error: OSError) -> None:
    """Log why a listener did not open, with the owner of the port where /proc tells it (client-protocol.md 2.1)."""
    where = format_address(ip, port)
    if error.errno != errno.EADDRINUSE:
        missing = ":" in ip and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
        (log_server.warn if missing else log_server.error)(
            "Failed to bind to %s: IO error: %s (os error %s)", where, error.strerror, error.errno)
        return
    owners = port_owners(port)
    for pid, process in owners:
        log_server.error("Failed to bind: address already in use", addr=where, pid=pid, process=process)
    if not owners:
        log_server.error("Failed to bind: address already in use (owner process unresolved)", addr=where)
    if not reuse_port:
        log_server.error("reuse_allow=false; set [[server.listeners]].reuse_allow=true to allow multi-instance listening")


def port_owners(port: int) -> list[tuple[int, str]]:
    """(pid, process name) of whoever listens on a TCP port, as far as /proc shows it to us."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as rows:
            for row in list(rows)[1:]:
                column = row.split()
                if column[3] == "0A" and int(column[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{column[9]}]")
    owners = []
    for entry in os.listdir("/proc") if inodes else ():
        if entry.isdigit() and _holds(entry, inodes):
            with contextlib.suppress(OSError), open(f"/proc/{entry}/comm", encoding="utf-8", errors="replace") as comm:
                owners.append((int(entry), comm.read().strip()))
    return sorted(owners)


def _holds(pid: str, inodes: set[str]) -> bool:
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for fd in fds:
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{fd}") in inodes:
                return True
    return False


log_server: Final = Log("server")


# == 23. control ==============================================================
# Steering a running proxy: the links it hands out, a changed configuration put
# in force, and the one door through which telemt_api.py sees the data plane.
# Source: config.md 4, 5.4, 8; api.md 10.

# -- links (config.md 5.4, api.md 10)

def public_ip(version: int, detected: tuple[str | None, str | None], settings: Settings) -> str | None:
    """The address of a family that clients can reach us at, as far as known.

    Behind NAT the configured public address wins over a private local one (config.md 8 item 14).
    """
    local, nat_ip = detected[version == 6], settings.general.middle_proxy_nat_ip
    if nat_ip is not None and nat_ip.version == version and (local is None or is_bogon(local)):
        return str(nat_ip)
    return local


def link_host(entry: ListenerEntry, detected: tuple[str | None, str | None], settings: Settings) -> str:
    """Host of the links of one listener: its announce, the public address of a wildcard's family, or its own address."""
    if entry.announce:
        return entry.announce
    if not entry.ip.is_unspecified:
        return str(entry.ip)
    return public_ip(entry.ip.version, detected, settings) or str(entry.ip)


def link_hosts(settings: Settings, detected: tuple[str | None, str | None]) -> list[str]:
    """Hosts of the links that the API hands out, best first; may be empty (api.md 10)."""
    host = (settings.general.links.public_host or "").strip()
    if host:
        return [host]
    found: list[str | None] = []
    for entry in settings.server.listeners:
        announce = (entry.announce or "").strip()
        if announce and not _is_unspecified(announce):
            found.append(announce)
        else:
            found.append(public_ip(entry.ip.version, detected, settings) if entry.ip.is_unspecified else str(entry.ip))
    if not any(found):
        found = [public_ip(4, detected, settings), public_ip(6, detected, settings)]
    if not any(found):
        found = [text.strip() for text in (settings.server.listen_addr_ipv4, settings.server.listen_addr_ipv6)]
        found = [text for text in found if text and not _is_unspecified(text)]
    return [host for host in dict.fromkeys(found) if host]


def _is_unspecified(text: str) -> bool:
    ip = parse_ip(text)
    return ip is not None and ip.is_unspecified


def _escape_host(host: str) -> str:
    """Percent-encode what has no place in the query of a link."""
    return re.sub("[^A-Za-z0-9_.~:-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode(errors="replace")), host)


class Link(NamedTuple):
    """One tg:// link of a user."""

    label: str       # in the log: Classic, DD, EE-TLS
    link: str
    kind: str        # in the API: classic, secure, tls
    host: str
    domain: str      # of a tls link, else empty


def user_links(settings: Settings, secret: str, host: str, port: int) -> list[Link]:
    """Links of one user and host, as configured modes admit: Classic, DD, then one EE-TLS per domain."""
    modes, cert = settings.general.modes, settings.censorship
    base = f"tg://proxy?server={host}&port={port}&secret="
    rows = []
    if modes.classic:
        rows.append(Link("Classic", base + secret, "classic", host, ""))
    if modes.secure:
        rows.append(Link("DD", f"{base}dd{secret}", "secure", host, ""))
    if modes.tls:
        rows += [Link("EE-TLS", f"{base}ee{secret}{domain.encode().hex()}", "tls", host, domain)
                 for domain in (cert.tls_domain, *cert.tls_domains)]
    return rows


def print_links(settings: Settings, host: str, port: int) -> None:
    """Print the start-up block for one host: every user that `general.links.show` names.

    The block is 3.2.1's to the byte (operators and panels read it); the same links for a browser follow behind it.
    """
    users, show = settings.access.users, settings.general.links.show
    names = sorted(users, key=str.encode) if show == "*" else list(show)
    if not names:
        return
    rows = []
    log_links.info("--- Proxy Links (%s) ---", host)
    for name in names:
        if name not in users:
            log_links.warn("User '%s' in show_link not found", name)
            continue
        log_links.info("User: %s", name)
        for row in user_links(settings, users[name], host, port):
            log_links.info("  %-9s%s", row.label + ":", row.link)
            rows.append((name, row.label, row.link.replace("tg://proxy", "https://t.me/proxy", 1)))
    log_links.info("------------------------")
    for web in rows:
        log_links.info("Web link of %s (%s): %s", *web)


def print_new_user(server: Server, name: str) -> None:
    """Print the links of a user that a reload brought, if `general.links.show` names it (config.md 4.2)."""
    settings = server.settings
    links = settings.general.links
    if links.show != "*" and name not in links.show:
        return
    host = next(iter(link_hosts(settings, server.detected)), "")
    if not host:
        log_links.warn("No address for links is known: set general.links.public_host")
    log_links.info("--- New user: %s ---", name)
    port = server.port if links.public_port is None else links.public_port
    for row in user_links(settings, settings.access.users[name], host or "UNKNOWN", port):
        log_links.info("  %-9s%s", row.label + ":", row.link)
    log_links.info("--------------------")


# -- systemd

def tell_manager(text: str, timed: bool = False) -> None:
    """Tell systemd how we are, if it wants to know (sd_notify(3)).  timed: with the time, as RELOADING wants it."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if timed:
        text += f"\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
    with contextlib.suppress(OSError), contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        sock.setblocking(False)
        sock.sendto(text.encode(), f"\0{path[1:]}" if path[0] == "@" else path)


# -- reload (config.md 4, 8 items 1-5)

_LOOK_S: Final = 1.0                     # period of stat(); the spec's, and the shortest that an idle process may have
_HASH_TURNS: Final = 3                   # every third look reads the content: for file systems whose time stamps do not tell
_HASH_MAX: Final = 1 << 20               # of at most so many bytes, 3 ms: a larger configuration is trusted to its time stamps


class Reloader:
    """Puts changed configurations in force: found by looking, asked for by SIGHUP, or handed over by the API."""

    def __init__(self, server: Server, loaded: Loaded, reading: Reading, shown: str,
                 level_of: Callable[[str], int | None]) -> None:
        """loaded, reading: what the server was started with.  shown: the path as it was given.

        level_of: threshold of a `general.log_level`, None when the level is pinned (config.md 6.3).
        """
        self.server, self.loaded = server, loaded
        self.path, self._shown, self._level_of = next(iter(reading.files)), shown, level_of
        self._marks, self._seen = reading.marks, reading.digest()
        self._applied = self._seen
        self._reported: tuple[bytes, str] | None = None    # digest and reason of the last failure that was logged
        self._looks = 0
        self._reading = False                              # a helper thread has the files
        self._again: list[bool] = []                       # asked for meanwhile; True = by SIGHUP
        self._retired = False

    def start(self) -> None:
        """Begin to look."""
        self.server.loop.call_later(_LOOK_S, self._look)

    def retire(self) -> None:
        """Look no more: the file is another's."""
        self._retired = True

    def hang_up(self) -> None:
        """SIGHUP."""
        tell_manager("RELOADING=1", timed=True)
        log_reload.info('SIGHUP received \u2014 reloading "%s"', self._shown)
        self._read(True)

    def apply(self, loaded: Loaded, files: Mapping[str, bytes]) -> None:
        """Put a configuration in force that was read from `files`; returns when it is."""
        self._again += [False] * self._reading             # what is being read now may be older
        self._marks, self._seen = {path: stat_mark(path) for path in files}, digest_files(files)
        self._put(loaded, self._seen)

    # -- looking

    def _look(self) -> None:
        if self._retired:
            return
        self.server.loop.call_later(_LOOK_S, self._look)
        self._looks += 1
        if self._reading:
            return
        marks = {path: stat_mark(path) for path in self._marks}
        if marks != self._marks or (self._looks % _HASH_TURNS == 0 and (not self._applied or self._differs())):
            self._marks = marks
            self._read(False)

    def _differs(self) -> bool:
        """True if the content is not what was read last, although nothing else tells."""
        if sum(mark[-1] for mark in self._marks.values() if mark) > _HASH_MAX:
            return False
        try:
            return digest_files({path: read_config_bytes(path) for path in self._marks}) != self._seen
        except (OSError, ConfigError):
            return False                                   # reported when it began

    def _read(self, loud: bool) -> None:
        if self._reading:
            self._again.append(loud)
            return
        self._reading = True
        # In a thread: it sleeps between readings, and parsing a thousand users takes longer than a session may wait.
        self.server.loop.offload(functools.partial(_read_and_load, self.path), functools.partial(self._on_read, loud))

    def _on_read(self, loud: bool, result: tuple[Reading, Loaded | OSError | ConfigError] | Exception) -> None:
        self._reading = False
        if self._retired:
            return
        if self._again:                                    # stale, or wanted again: what is there now counts
            loud = loud or any(self._again)
            self._again = []
            self._read(loud)
            return
        if isinstance(result, Exception):
            raise result
        reading, found = result
        self._marks, self._seen = reading.marks, reading.digest()
        if isinstance(found, Exception):
            invalid = isinstance(found, ConfigError) and found.invalid
            self._refuse(f"validation failed: {found}; keeping old config" if invalid
                         else f'failed to parse "{self._shown}": {_os_text(found)}', loud)
        elif self.loaded.users_explicit and not found.users_explicit:
            self._refuse("validation failed: [access.users] is missing; keeping old config", loud)
        elif loud or self._seen != self._applied or self._reported:
            self._put(found, self._seen)
        if loud:
            tell_manager("READY=1")

    def _refuse(self, reason: str, loud: bool) -> None:
        """Keep what is in force; say why, once per content."""
        if loud or self._reported != (self._seen, reason):
            log_reload.error("config reload: %s", reason)
        self._reported = self._seen, reason

    # -- applying

    def _put(self, loaded: Loaded, digest: bytes) -> None:
        """Apply, and say what changed.  An error of ours on the way leaves `_applied` empty: the next look tries again."""
        before, self._applied, self._reported = self.loaded, b"", None
        if loaded.settings != before.settings or loaded.warnings != before.warnings:
            self._put_changes(before, loaded)
        self.loaded, self._applied = loaded, digest
        self.server.sources.reloaded(time.time())

    def _put_changes(self, before: Loaded, loaded: Loaded) -> None:
        old, new = before.settings, loaded.settings
        hot = describe_hot(old, new)
        level = self._level_of(new.general.log_level) if old.general.log_level != new.general.log_level else LogBook.threshold
        LogBook.threshold, last = min(LogBook.threshold, LogBook.threshold if level is None else level), LogBook.threshold
        for text in describe_restart(old, new):
            log_reload.warn("config reload: %s", text)
        closed = self.server.apply(new)
        for text in (*hot, *(f"closed {count} connections of user {name}" for name, count in closed.items())):
            log_reload.info("config reload: %s", text)
        if level is None:
            log_reload.info("config reload: log_level ignored: RUST_LOG or the command line has set it")
        self._warn(before, loaded)
        for name in sorted(new.access.users.keys() - old.access.users.keys()):
            print_new_user(self.server, name)
        LogBook.threshold = last if level is None else level

    def _warn(self, before: Loaded, loaded: Loaded) -> None:
        """Advice of the loader that was not there before."""
        access = loaded.settings.access
        told = {*before.warnings, *zero_limit_warnings(access)}
        for text in (*(text for text in loaded.warnings if text not in told), *zero_limit_warnings(access, before.settings.access)):
            log_reload.warn("%s", text)
        for text in loaded.errors:
            if text not in before.errors:
                log_reload.error("%s", text)


def _read_and_load(path: str) -> tuple[Reading, Loaded | OSError | ConfigError]:
    """For a helper thread: the file once nobody writes it any more, and what it means or why it means nothing."""
    reading = read_stable(path, time.sleep)
    try:
        return reading, load_reading(reading)
    except (OSError, ConfigError) as error:
        return reading, error


def _os_text(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.strerror} (os error {error.errno})"
    return str(error)


# -- the seam to the control plane

class Control:
    """All that the control plane sees of the running proxy (ControlPort in telemt_api.py); usable from any thread.

    Settings, counters and users are published whole and only read: the loop thread replaces or adds, nobody locks.
    """

    def __init__(self, server: Server, reloader: Reloader) -> None:
        self._server = server
        self._reloader = reloader
        self.config_path = reloader.path
        self.started_at = server.loop.clock()
        self.started_wall = time.time()
        self.sources = server.sources
        self.version = VERSION
        self.log = Log("api")
        self.config_error: type[Exception] = ConfigError
        self.listening: list[int] = []         # descriptors of API and metrics; their threads add to it

    def inherited(self, host: str, port: int) -> int:
        """Descriptor of the listening socket of this address that the program before us handed over, ours from now on; -1: none."""
        sock = self._server.handed("control", host, port)
        return -1 if sock is None else sock.detach()

    def listens(self, fd: int) -> None:
        """This socket listens for API or metrics: an exchange of programs hands it on."""
        self.listening.append(fd)

    @property
    def settings(self) -> Settings:
        """What is in force now."""
        return self._server.settings

    @property
    def counters(self) -> Counters:
        """Process-wide totals."""
        return self._server.counters

    @property
    def users(self) -> Mapping[str, User]:
        """Configured users with what they use, in file order."""
        return self._server.doorman.users.users

    def ask(self, build: Callable[[], _T], timeout_s: float) -> _T:
        """Run `build` on the loop thread and return its value; what it raises is raised here.

        Raises TimeoutError when the loop does not come to it in time; it is not run later then.  Never from the loop thread itself.
        """
        import threading
        done = threading.Event()
        answer: list[_T | Exception] = []
        wanted = [True]

        def run() -> None:
            if not wanted:
                return
            try:
                answer.append(build())
            except Exception as error:
                answer.append(error)
            done.set()

        self._server.loop.call_from_thread(run)
        if not done.wait(timeout_s):
            wanted.clear()
            raise TimeoutError(f"the data plane did not answer within {timeout_s:g} s")
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    # -- configuration, without the loop

    def expand(self, text: str, given: Mapping[str, bytes] | None = None) -> tuple[str, tuple[str, ...]]:
        """Return a main file's text with its includes in place, and their paths.  Raises ConfigError.

        given: path -> bytes that count instead of what is on disk.
        """
        return expand_includes(text, self.config_path, lambda including, wanted: read_config_file(including, wanted, given))

    def parse(self, text: str) -> dict[str, Any]:
        """Return the tables of an expanded text.  Raises ConfigError."""
        return parse_document(text)

    def accept(self, document: dict[str, Any]) -> Loaded:
        """Return what the tables mean, validated as at a start.  Raises ConfigError."""
        return parse_settings(document, _draws)

    def load(self, text: str) -> Loaded:
        """Return what a main file's text means, as a start would read it.  Raises ConfigError."""
        return self.accept(self.parse(self.expand(text)[0]))

    def follow(self, including: str, line: str) -> str | None:
        """Return the path of the file that a line of the file `including` includes; None for any other line."""
        wanted = include_target(line)
        return None if wanted is None else os.path.join(os.path.dirname(including), wanted)

    def publish(self, loaded: Loaded, files: Mapping[str, bytes], timeout_s: float = 10.0) -> None:
        """Make a configuration live; returns when it is, sessions that have to go closed.  Raises TimeoutError.

        files: path -> content that it was read from, main file first: the watcher need not read them again.
        """
        self.ask(functools.partial(self._reloader.apply, loaded, files), timeout_s)

    def reset_quota(self, name: str, timeout_s: float = 10.0) -> int:
        """Set the used octets of a user to 0 and write that down; returns the time, unix seconds.

        Raises KeyError for an unknown user, OSError when the state file cannot be written (the reset is in force), TimeoutError.
        """
        def reset() -> tuple[int, Callable[[], None]]:
            user = self.users[name]
            save = self._server.quotas.reset(user)
            return user.reset_wall, save

        reset_wall, save = self.ask(reset, timeout_s)
        save()
        return reset_wall

    # -- links

    def links(self, name: str) -> list[Link]:
        """Links of a user in the order of api.md 10; empty for an unknown user or without any host."""
        settings = self._server.settings
        secret = settings.access.users.get(name)
        if secret is None:
            return []
        port = settings.general.links.public_port
        return [link for host in link_hosts(settings, self._server.detected)
                for link in user_links(settings, secret, _escape_host(host), self._server.port if port is None else port)]


log_reload: Final = Log("config")
log_links: Final = Log("links")


# == 24. handover =============================================================
# At SIGUSR2 a new program takes our place.  It is read from disk at that moment and gets our listening sockets.  They are never
# closed, both programs hold the same ones: while neither accepts, who connects waits in the kernel's queue.  The two talk over a
# pair of sockets, a word a line:
#
#   new  ready       the configuration is read, all sockets are there, the first link to the middle end stands
#   old  clients     nobody is accepted here any more, and what has to be kept is on disk
#   new  accepting   that file is read: from now on the old program only drains
#   old  control     API and metrics are closed here
#
# Up to `accepting` the old program can take everything back, and does so when the new one ends, says something else, or takes
# too long.  After it the old one writes no file, reads no configuration and asks nobody anything.
#
# Who watches over us knows one process.  systemd is told the new one (MAINPID).  For all others (a container, procd, a shell)
# the first program stays when it has drained, as a caretaker of a few lines: it passes signals on, and ends when the last
# program ends.  It learns of them through its lifeline, a pipe whose other end each program hands to the next.  A program that
# drains while the one that accepts dies ends at once: only then somebody starts the service again.

HANDED: Final = "TELEMT_HANDED"          # environment of a new program: `name=values` that Heritage reads
_EXCHANGE_S: Final = 60.0                # a router needs twenty seconds to compile us; then the new one is killed
DRAIN_S: Final = 600                     # what sessions get of the old program; TELEMT_DRAIN says otherwise
_SAID_MAX: Final = 20                    # lines of a failing program that are logged
_CARETAKER: Final = """\
import os, signal, sys
lifeline, heir, code = int(sys.argv[1]), int(sys.argv[2]), 1
def pass_on(signum, _frame):
    try:
        os.kill(heir, signum)
    except OSError:
        pass
for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
    signal.signal(signum, pass_on)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_SETMASK, [])
try:
    with open("/proc/self/comm", "w") as comm:
        comm.write("telemt")
except OSError:
    pass
for line in open(lifeline):
    word, number = line.split()
    if word == "heir":
        heir = int(number)
    else:
        code = int(number)
os._exit(code)
"""


class Heritage:
    """What we were handed at our start: listening sockets, and the way to talk to the program before us.  As a rule, nothing."""

    def __init__(self, environ: MutableMapping[str, str], pid: int) -> None:
        """Take it out of `environ`: our own note, and sockets of systemd for the process `pid` (sd_listen_fds(3))."""
        note = dict(word.split("=", 1) for word in environ.pop(HANDED, "").split("\t") if word)
        self.talk, self.life, self.stderr = (int(note.get(name) or "-1") for name in ("talk", "life", "stderr"))
        self.cwd = note.get("cwd", "")         # where the arguments count from, if not where we are
        self.users_explicit = note.get("users", "") == "explicit"
        self._left = {name: [socket.socket(fileno=int(fd)) for fd in note.get(name, "").split(",") if fd]
                      for name in ("clients", "control")}
        for fd in (self.talk, self.life, self.stderr, *(sock.fileno() for socks in self._left.values() for sock in socks)):
            if fd >= 0:
                os.set_inheritable(fd, False)
        if environ.get("LISTEN_PID") == str(pid):
            with contextlib.suppress(OSError, ValueError):
                self._left["clients"] = self._left["control"] = [self._listening(3 + n) for n in range(int(environ["LISTEN_FDS"]))]
            for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
                environ.pop(name, None)
        self._begin: Callable[[], None] | None = None
        self._open_control: Callable[[], None] = lambda: None
        self._loop: Loop | None = None

    @staticmethod
    def _listening(fd: int) -> socket.socket:
        os.set_inheritable(fd, False)
        return socket.socket(fileno=fd)

    @property
    def replaces(self) -> bool:
        """True if there is a program whose place we take."""
        return self.talk >= 0

    def take(self, kind: str, host: str, port: int = -1) -> socket.socket | None:
        """A listening socket of this address for `clients` or `control`, ours from now on; host: a path for a unix socket."""
        socks = self._left[kind]
        for sock in socks:
            name = sock.getsockname()
            same = name == host if isinstance(name, str) else port in (0, name[1]) and parse_ip(name[0]) == parse_ip(host)
            if same:
                socks.remove(sock)
                sock.setblocking(kind == "control")
                return sock
        return None

    def drop_rest(self, kind: str) -> None:
        """Close what the configuration does not want any more."""
        for sock in self._left[kind]:
            log_exchange.info("Not listening on %s any more", sock.getsockname())
            sock.close()
        self._left[kind].clear()

    # -- taking over

    def take_over(self, loop: Loop, begin: Callable[[], None], open_control: Callable[[], None]) -> None:
        """Say that we are ready; begin() is called when clients are ours, open_control() when API and metrics are."""
        self._loop, self._begin, self._open_control = loop, begin, open_control
        loop.watch(self.talk, READ, self._on_talk)
        os.write(self.talk, b"ready\n")

    def _on_talk(self, _mask: int) -> None:
        assert self._loop is not None
        words = os.read(self.talk, 4096).decode().split()
        if "clients" in words and self._begin is not None:
            self._begin()
            self._begin = None
            self.drop_rest("clients")
            os.write(self.talk, b"accepting\n")
            if self.stderr >= 0:               # ours; up to now the program before us read it
                os.dup2(self.stderr, 2)
                os.close(self.stderr)
                self.stderr = -1
        if words and "control" not in words:
            return
        self._loop.unwatch(self.talk, READ)
        os.close(self.talk)
        self.talk = -1
        if self._begin is None:                # should it have ended without the last word, all is ours as well
            self._open_control()
            self.drop_rest("control")
        else:
            log_exchange.error("The program before us has ended before we could take over")
            self._loop.stop()


class Heir:
    """A program that was started to take our place."""

    def __init__(self, loop: Loop, command: Sequence[str], handed: Mapping[str, Sequence[int]], facts: Sequence[str],
                 on_word: Callable[[Heir, str], None], on_end: Callable[[Heir, str], None]) -> None:
        """Start it with copies of the descriptors `handed`.  on_end(self, why) is called when it has ended.  Raises OSError."""
        self._loop, self._on_word, self._on_end = loop, on_word, on_end
        self._said: list[str] = []             # on its stderr
        self.code = 0                          # its exit code, once it has ended; negative: the signal
        self.talk, theirs = socket.socketpair()
        self._stderr, outlet = os.pipe()
        copies: list[int] = []
        note = [*facts]
        try:
            for name, fds in {**handed, "talk": [theirs.fileno()], "stderr": [2] if sys.stderr else []}.items():
                first = len(copies)
                copies += (fcntl.fcntl(fd, fcntl.F_DUPFD, 3) for fd in fds)        # not closed by exec
                note.append(f"{name}={','.join(map(str, copies[first:]))}")
            self.pid = os.posix_spawn(command[0], list(command[1:]), {**os.environ, HANDED: "\t".join(note)},
                                      file_actions=[(os.POSIX_SPAWN_DUP2, outlet, 2)])
        except OSError:
            self.talk.close()
            os.close(self._stderr)
            raise
        finally:
            theirs.close()
            for fd in (*copies, outlet):
                os.close(fd)
        loop.watch(self.talk.fileno(), READ, self._on_talk)
        loop.watch(self._stderr, READ, self._on_stderr)
        loop.offload(functools.partial(os.waitpid, self.pid, 0), self._on_exit)

    def tell(self, word: str) -> None:
        """Say a word to it; one that has ended is noticed elsewhere."""
        with contextlib.suppress(OSError):
            os.write(self.talk.fileno(), f"{word}\n".encode())

    def release(self) -> None:
        """All is said."""
        if self.talk.fileno() >= 0:
            self._loop.unwatch(self.talk.fileno(), READ)
            self.talk.close()
        if self._stderr >= 0:
            self._loop.unwatch(self._stderr, READ)
            os.close(self._stderr)
            self._stderr = -1

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    def _on_talk(self, _mask: int) -> None:
        words = os.read(self.talk.fileno(), 4096).decode().split()
        if not words:                          # it has ended, or ends: _on_exit tells why
            self._loop.unwatch(self.talk.fileno(), READ)
        for word in words:
            self._on_word(self, word)

    def _on_stderr(self, _mask: int) -> None:
        text = os.read(self._stderr, 65_536)
        if not text:
            self._loop.unwatch(self._stderr, READ)
            os.close(self._stderr)
            self._stderr = -1
        self._said += [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]
        del self._said[:-_SAID_MAX]

    def _on_exit(self, result: tuple[int, int] | Exception) -> None:
        while self._stderr >= 0:
            self._on_stderr(READ)
        self.code = code = os.waitstatus_to_exitcode(result[1]) if isinstance(result, tuple) else 0
        for line in self._said[:-1]:
            log_exchange.warn("New program: %s", line)
        why = f"it ended with exit code {code}" if code >= 0 else f"it was ended by signal {-code}"
        self.release()
        self._on_end(self, f"{why}: {self._said[-1]}" if self._said else why)


class Exchange:
    """Replaces this program by a new one on the same sockets, at SIGUSR2."""

    def __init__(self, server: Server, reloader: Reloader, control: Control, command: Sequence[str], cwd: str,
                 life: int) -> None:
        """command: what starts the program, interpreter first, then its argv.  cwd: where its arguments count from, if not here."""
        self.server, self.reloader, self.control, self.command, self._cwd = server, reloader, control, command, cwd
        self.stop_control: Callable[[bool], None] = lambda handed_on: None
        self.life = life                       # we tell our caretaker about our heir; -1: nobody takes care of us
        self._lifeline = -1                    # we are the caretaker to be: what our heirs tell us
        self.successor = 0                     # process that accepts now, 0 = we do
        self._heir: Heir | None = None
        self._limit: Timer | None = None

    def begin(self) -> None:
        """SIGUSR2: start the new program."""
        if self.successor:
            self._pass_on(signal.SIGUSR2)
        elif self._heir is not None or self.server.stopping:
            log_exchange.warn("SIGUSR2 ignored: %s", "the program stops" if self.server.stopping else "a new program is being started")
        else:
            log_exchange.info("SIGUSR2 received: starting the program anew")
            tell_manager("RELOADING=1", timed=True)
            try:
                self._start()
            except OSError as error:
                self._fail(f"it cannot be started: {error.strerror}")

    def stop(self, signum: int) -> None:
        """SIGTERM or SIGINT: everything ends that is ours."""
        if self._heir is not None:
            self._heir.kill()
        if self.successor:
            self._pass_on(signum)
        else:
            tell_manager("STOPPING=1")
        self.server.stop()

    def hang_up(self) -> None:
        """SIGHUP, for who serves."""
        if self.successor:
            self._pass_on(signal.SIGHUP)
        else:
            self.reloader.hang_up()

    def leave(self, code: int) -> int:
        """The loop has ended: return the exit code, or become the caretaker of who comes after us."""
        if self._lifeline >= 0 and self.successor:
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2))
            signal.setitimer(signal.ITIMER_REAL, 0)
            for order in self.server.loop.mailbox.take():      # a signal that came after the last turn; later ones wait for the caretaker
                self.server.loop.call(order)
            os.set_inheritable(self._lifeline, True)
            os.set_blocking(self._lifeline, True)              # libuv changes what it watches
            os.execv(sys.executable, [self.command[1], "-I", "-S", "-c", _CARETAKER, str(self._lifeline), str(self.successor)])
        if self.life >= 0 and not self.successor:
            with contextlib.suppress(OSError):           # our caretaker was killed
                os.write(self.life, f"code {code}\n".encode())
        return code

    # -- up to `accepting`

    def _start(self) -> None:
        loop = self.server.loop
        handed: dict[str, Sequence[int]] = {
            "clients": [listener.fd for listener in self.server.places.listeners],
            "control": self.control.listening}
        lifeline = os.pipe() if self.life < 0 and "NOTIFY_SOCKET" not in os.environ else (-1, self.life)
        facts = [f"users={'explicit' if self.reloader.loaded.users_explicit else 'none'}", *([f"cwd={self._cwd}"] * bool(self._cwd))]
        try:
            if lifeline[1] >= 0:
                handed["life"] = [lifeline[1]]
            self._heir = Heir(loop, self.command, handed, facts, self._on_word, self._on_end)
        finally:
            if lifeline[0] >= 0:
                os.close(lifeline[1])
                self._lifeline = lifeline[0]
        self._limit = loop.call_later(_EXCHANGE_S, self._on_limit)

    def _on_word(self, heir: Heir, word: str) -> None:
        if word == "ready":
            self.server.places.rest(True)
            self.server.loop.offload(self.server.quotas.write_down(), functools.partial(self._on_written, heir))
        elif word == "accepting":
            self._drain(heir)

    def _on_written(self, heir: Heir, result: Exception | None) -> None:
        if isinstance(result, Exception):
            log_exchange.warn("Failed to write quota state file", error=result)
        if heir is self._heir:
            heir.tell("clients")

    def _on_limit(self) -> None:
        if self._heir is not None:
            self._fail(f"it was not ready within {_EXCHANGE_S:g} s")

    def _on_end(self, heir: Heir, why: str) -> None:
        if heir is self._heir:
            self._fail(why)
        elif heir.pid == self.successor:
            log_exchange.debug("The program after us: %s", why)
            if heir.code:                      # else it was asked to stop, or has handed on and drained
                self._on_bereaved(why)

    def _fail(self, why: str) -> None:
        """Everything stays as it was."""
        log_exchange.error("The new program does not take over: %s; this one goes on", why)
        heir, self._heir = self._heir, None
        if heir is not None:
            heir.kill()
            heir.release()
        if self._limit is not None:
            self._limit.cancel()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self.server.places.rest(False)
        tell_manager("READY=1\nSTATUS=The last exchange of programs failed, see the log")

    # -- afterwards

    def _drain(self, heir: Heir) -> None:
        loop, self._heir, self.successor = self.server.loop, None, heir.pid
        if self._limit is not None:
            self._limit.cancel()
        tell_manager(f"MAINPID={heir.pid}\nREADY=1\nSTATUS=")
        if self.life >= 0:
            with contextlib.suppress(OSError):           # our caretaker was killed
                os.write(self.life, f"heir {heir.pid}\n".encode())
        if self._lifeline >= 0:
            loop.watch(self._lifeline, READ, self._on_lifeline)
        limit_s = drain_limit()
        log_exchange.info("Process %d accepts now; this one carries its %d sessions to their end, at most %d s", heir.pid,
                          len(self.server.places.owners), limit_s)
        self.reloader.retire()
        self.server.places.take(self)          # like a session: the loop turns until API and metrics are closed
        self.server.retire()
        loop.call_later(limit_s, self._on_drained)
        stop, self.stop_control = self.stop_control, lambda handed_on: None
        loop.offload(functools.partial(stop, True), functools.partial(self._on_control_stopped, heir))

    def _on_control_stopped(self, heir: Heir, _result: Exception | None) -> None:
        heir.tell("control")
        heir.release()
        self.server.ended(self)

    def close(self, error: Exception | None) -> None:
        """Nothing: as a Connection we end by ourselves."""

    def _on_drained(self) -> None:
        log_exchange.info("Drain limit reached: closing %d sessions", len(self.server.places.owners))
        self.server.stop()

    def _on_lifeline(self, _mask: int) -> None:
        words = os.read(self._lifeline, 4096).decode().split()
        for word, number in itertools.pairwise(words):
            if word == "heir":
                self.successor = int(number)
        if not words:
            self.server.loop.unwatch(self._lifeline, READ)
            self._on_bereaved("nobody is left")

    def _on_bereaved(self, why: str) -> None:
        """Nobody accepts any more: stop draining, so that who watches over us starts the program again now, not when we have drained."""
        if self.server.places.draining:
            log_exchange.error("The program that took over does not serve any more: %s; this one stops too", why)
            self.server.stop()

    def _pass_on(self, signum: int) -> None:
        """To who serves, if the signal was meant for all of us."""
        if self._lifeline >= 0:
            with contextlib.suppress(OSError):
                os.kill(self.successor, signum)
        else:
            log_exchange.info("Signal %d: process %d serves, this one drains", signum, self.successor)


def drain_limit() -> int:
    """Seconds that sessions of a replaced program get."""
    text = os.environ.get("TELEMT_DRAIN", "")
    return int(text) if text.isascii() and text.isdigit() else DRAIN_S


log_exchange: Final = Log("exchange")


# == 25. ping ================================================================
# A client of our own: through any MTProto proxy link to a data centre and back,
# with the time of every step.  It is what `ping` and `healthcheck` run.
#
#   connect | hello, flight (ee links only) | header, req_pq -> resPQ
#
# It speaks as Telegram's apps do, so it also works against other proxies.  When
# something fails, the step and what came back tell the likely reason.  One
# thing a hello cannot tell is why it was taken for a stranger's: wrong secret,
# or clocks apart.  A second hello with a clock of "seconds since boot", which
# proxies accept at any time (client-protocol.md 6.2), decides that.
# Source: client-protocol.md 5-8; core.telegram.org/mtproto/auth_key.

_STEP_LIMIT_S: Final = 8.0               # per step; a data centre on the other side of the world answers in 0.5 s
_REPLY_MAX: Final = 65_536
_REQ_PQ_MULTI: Final = 0xBE7E8EF1
_RES_PQ: Final = 0x05162463
_SINCE_BOOT: Final = 4242                # seconds; any number far from a date
_LINK_START: Final = re.compile(r"(?:tg://proxy|tg:proxy|https?://(?:www\.)?(?:t\.me|telegram\.me|telegram\.dog)/proxy)/?\?(.*)", re.DOTALL)


class ProxyLink(NamedTuple):
    """What a tg://proxy link says."""

    host: str
    port: int
    secret: bytes            # 16 bytes
    mode: str                # classic, dd or ee
    domain: str = ""         # ee: the name in the ClientHello
    preface: bytes = b""     # sent first: a PROXY header, where the listener insists on one
    path: str = ""           # a unix socket in place of host and port

    @property
    def where(self) -> str:
        """The address, as a person would write it."""
        return self.path or format_address(self.host, self.port)


def parse_proxy_link(text: str) -> ProxyLink:
    """Return what a `tg://proxy?` or `https://t.me/proxy?` link says.  Raises ConfigError with what is wrong and never with the secret."""
    match = _LINK_START.fullmatch(text.strip())
    if match is None:
        raise ConfigError("not a proxy link: it begins with tg://proxy? or https://t.me/proxy?", prefix=False)
    fields: dict[str, str] = {}
    for part in match[1].partition("#")[0].replace("&amp;", "&").split("&"):
        name, _, value = part.partition("=")
        fields[name] = percent_decode(value)
    for name in ("server", "port", "secret"):
        if not fields.get(name):
            raise ConfigError(f"the link has no {name}=", prefix=False)
    port = parse_port(fields["port"])
    if not port:
        raise ConfigError(f"port={fields['port'][:20]} in the link is not a port", prefix=False)
    host = fields["server"].strip("[]").rstrip(".")
    return ProxyLink(host, port, *parse_link_secret(fields["secret"]))


def percent_decode(text: str) -> str:
    """`text` with %XX replaced; `+` stays, because it is a character of base64."""
    raw = re.sub(rb"%([0-9A-Fa-f]{2})", lambda hit: bytes((int(hit[1], 16),)), text.encode())
    return raw.decode("utf-8", "replace")


def parse_link_secret(text: str) -> tuple[bytes, str, str]:
    """Return (secret, mode, domain) of a secret in hex, base64 or base64url.  Raises ConfigError."""
    if re.fullmatch(r"(?:[0-9A-Fa-f]{2}){16,}", text):
        raw = bytes.fromhex(text)
    else:
        try:
            plain = text.replace("-", "+").replace("_", "/").rstrip("=")
            raw = binascii.a2b_base64(plain + "=" * (-len(plain) % 4))
        except (binascii.Error, ValueError):
            raw = b""
        if not re.fullmatch(r"[A-Za-z0-9+/_-]+=*", text):
            raw = b""
    if len(raw) == 16:
        return raw, "classic", ""
    if len(raw) == 17 and raw[0] == 0xDD:
        return raw[1:], "dd", ""
    if len(raw) > 17 and raw[0] == 0xEE:
        domain = raw[17:].decode("utf-8", "replace")
        if domain.isascii() and domain.isprintable() and len(domain) <= 253:
            return raw[1:17], "ee", domain
        raise ConfigError("the name behind the secret of this ee link is not a host name", prefix=False)
    raise ConfigError("secret= in the link is not 32 hex characters, dd and 32, ee with 32 and a host name, or the same in base64",
                      prefix=False)


class Pong(NamedTuple):
    """Result of one attempt; times in seconds, None = the step was not reached or there is none."""

    dc: int
    step: str                     # "" = answered; else the step that failed: resolve, connect, handshake, answer
    reason: str = ""              # what happened, and what it usually means
    connect_s: float | None = None
    handshake_s: float | None = None
    answer_s: float | None = None

    @property
    def total_s(self) -> float:
        """Seconds of all steps together."""
        return sum(part for part in (self.connect_s, self.handshake_s, self.answer_s) if part is not None)


class PingDesk(NamedTuple):
    """What all attempts share."""

    loop: Loop
    backend: Backend
    dials: Lane[Dial]
    steps: Lane[Attempt]

    @classmethod
    def open(cls, loop: Loop, backend: Backend) -> PingDesk:
        """A desk on a loop."""
        return cls(loop, backend, loop.lane(_STEP_LIMIT_S, Dial.on_timeout), loop.lane(_STEP_LIMIT_S, Attempt.on_timeout))


class Attempt:
    """One client: connect, handshake, one question to data centre `dc`.  done(Pong) is called once."""

    __slots__ = ("desk", "link", "dc", "done", "clock_s", "stream", "step", "began", "times", "inbox", "records", "decrypt", "nonce",
                 "hello", "answer")

    def __init__(self, desk: PingDesk, link: ProxyLink, ip: str, dc: int, done: Callable[[Pong], None],
                 clock_s: float | None = None) -> None:
        self.desk, self.link, self.dc, self.done = desk, link, dc, done
        self.clock_s = clock_s                 # None: now.  Another clock asks only whether the hello is taken
        self.stream: Stream | None = None
        self.step, self.began = "connect", time.monotonic()
        self.times: dict[str, float] = {}
        self.inbox, self.answer = Inbox(_REPLY_MAX), Inbox(_REPLY_MAX)
        self.records: RecordReader | None = None
        self.nonce, self.hello = os.urandom(16), b""
        if link.path:
            desk.loop.defer(self._connect_unix)
        else:
            Dial(desk.loop, ip, link.port, desk.dials, self._on_connected)

    # -- steps

    def _next(self, step: str) -> None:
        """The step at hand is done; its time is taken and the next begins."""
        now = time.monotonic()
        self.times[self.step], self.step, self.began = now - self.began, step, now
        self.desk.steps.arm(self)

    def _connect_unix(self) -> None:
        try:
            self._on_connected(connect_unix(self.desk.loop, self.link.path))
        except OSError as error:
            self._fail(str(error.strerror))

    def _on_connected(self, result: Stream | RouteError) -> None:
        if isinstance(result, RouteError):
            self._fail(explain_connect(result))
            return
        self.stream = result
        result.watch(READ, self.on_readable)
        if self.link.mode == "ee":
            self._next("handshake")
            when = time.time() if self.clock_s is None else self.clock_s
            self.hello = self._sign_hello(int(when))
            self._send(self.link.preface + self.hello)
        else:
            self._next("answer")
            self._ask(self.link.preface)

    def _sign_hello(self, clock_s: int) -> bytes:
        make_key = functools.partial(self.desk.backend.x25519_public, os.urandom)
        hello = without_random(build_probe_hello(self.link.domain, make_key, os.urandom, hybrid=False))
        mac = KeyedHmac(self.link.secret).digest(hello)
        stamp = int.from_bytes(mac[28:], "little") ^ clock_s
        return hello[:_RANDOM.start] + mac[:28] + stamp.to_bytes(4, "little") + hello[_RANDOM.stop:]

    def _ask(self, preface: bytes) -> None:
        transport = Transport.INTERMEDIATE if self.link.mode == "classic" else Transport.PADDED
        header = make_client_preamble(transport, self.dc, self.link.secret, self.desk.backend, os.urandom)
        self.decrypt = header.from_dc
        body = req_pq(self.nonce, time.time())
        if transport is Transport.PADDED:
            body += os.urandom(int(draw_fraction() * 4))
        data = header.block + header.to_dc.update(len(body).to_bytes(4, "little") + body)
        if self.link.mode == "ee":
            data = _CCS + RECORD_HEAD + len(data).to_bytes(2, "big") + data
        self._send(preface + data)

    def _send(self, data: bytes) -> None:
        assert self.stream is not None
        try:
            if self.stream.write(data) < len(data):
                self._fail("the system did not take 1 KB to send")
        except OSError as error:
            self._fail(f"connection lost: {error.strerror}")

    # -- bytes in

    def on_readable(self, _mask: int) -> None:
        """Called by the loop."""
        assert self.stream is not None
        try:
            data = self.stream.read(min(self.inbox.room, self.answer.room))
        except OSError as error:
            self._fail(self._explain_end("reset by the other side" if error.errno == errno.ECONNRESET else str(error.strerror)))
            return
        if data is None:
            return
        if data == b"":
            self._fail(self._explain_end("closed by the other side"))
            return
        if self.step == "handshake":
            self.inbox.append(data)
            self._take_flight()
        else:
            self._take_answer(data)

    def _take_flight(self) -> None:
        head = self.inbox.peek(self.inbox.limit)
        size = flight_size(head)
        if size < 0:
            self._fail(explain_stranger(head))
        elif size and len(head) >= size:
            if not is_flight_signed(head[:size], self.hello, self.link.secret):
                self._fail(explain_stranger(head))
            elif self.clock_s is not None:
                self._end(Pong(self.dc, "", connect_s=self.times["connect"], handshake_s=time.monotonic() - self.began))
            else:
                self.inbox.take(size)
                self.records = RecordReader()
                self._next("answer")
                self._ask(b"")
                self._take_answer(self.inbox.take_all())

    def _take_answer(self, data: bytes) -> None:
        if self.records is not None:
            data = self.records.payload(data)
            if self.records.failed or self.records.closed:
                self._fail("handshake fine, but what follows is no stream of a proxy")
                return
        elif not len(self.answer) and data[:5] in (b"HTTP/", b"SSH-2", b"\x15\x03\x01\0\2", b"\x15\x03\x03\0\2"):
            self._fail(explain_stranger(data))
            return
        self.answer.append(self.decrypt.update(data))
        head = self.answer.peek(4)
        size = int.from_bytes(head, "little") & 0x7FFFFFFF
        if len(head) == 4 and not 4 <= size <= 1024:
            self._fail(f"the handshake was fine, so the secret is right, but what answers is not data centre {self.dc}: "
                       "something on the server's way to Telegram answers in its place" if self.link.mode == "ee" else
                       "the answer makes no sense: probably a server that is no proxy, or the secret is wrong")
        elif len(head) == 4 and len(self.answer) >= 4 + size:
            self._judge(self.answer.peek(4 + size)[4:])

    def _judge(self, frame: bytes) -> None:
        if len(frame) >= 40 and frame[20:24] == _RES_PQ.to_bytes(4, "little") and frame[24:40] == self.nonce:
            self._next("")
            self._end(Pong(self.dc, "", "", self.times["connect"], self.times.get("handshake"), self.times["answer"]))
        elif len(frame) < 20:                  # a transport error: one negative number, then padding
            code = int.from_bytes(frame[:4], "little", signed=True)
            self._fail(f"data centre {self.dc} refused with error {code}")
        else:
            self._fail("the answer belongs to no question of ours")

    # -- the ways to end

    def on_timeout(self) -> None:
        """Called by the lane of steps."""
        self._fail(self._explain_end(f"no answer in {_STEP_LIMIT_S:.0f} s"))

    def on_crash(self) -> None:
        """Our own error."""
        self._fail("internal error")

    def _explain_end(self, what: str) -> str:
        if self.step == "handshake":
            return f"{what} behind the ClientHello: a proxy would have answered; wrong port, wrong secret, or blocked on the way"
        if self.link.mode == "ee":
            return f"{what}; the handshake was fine, so the proxy does not reach data centre {self.dc}, or the user is at a limit"
        return (f"{what}: wrong secret or mode (a web server with TLS also closes so), or the proxy does not reach "
                f"data centre {self.dc}")

    def _fail(self, reason: str) -> None:
        self._end(Pong(self.dc, self.step, reason, self.times.get("connect"), self.times.get("handshake")))

    def _end(self, pong: Pong) -> None:
        self.desk.steps.cancel(self)
        if self.stream is not None:
            self.stream.close()
        done, self.done = self.done, _ignore
        done(pong)


def _ignore(_pong: Pong) -> None:
    """After the end."""


class PingRun:
    """Attempts through one link, one after the other; report(Pong) for each, then done()."""

    def __init__(self, desk: PingDesk, link: ProxyLink, dcs: Sequence[int], report: Callable[[Pong], None],
                 done: Callable[[], None]) -> None:
        self.desk, self.link, self.report, self.done = desk, link, report, done
        self.waiting = list(dcs)
        self.ips: list[str] = []

    def start(self) -> None:
        """Look the host up, then ask each data centre."""
        if self.link.path or parse_ip(self.link.host) is not None:
            self._on_resolved([self.link.host])
        else:
            resolve(self.desk.loop, self.link.host, self.link.port, self._on_resolved)

    def _on_resolved(self, result: list[str] | Exception) -> None:
        if isinstance(result, Exception) or not result:
            why = getattr(result, "strerror", "") or str(result) or "no address"
            self._leave(Pong(self.waiting[0], "resolve", f"{self.link.host}: {why}"))
            return
        self.ips = result
        self._ask_next()

    def _ask_next(self) -> None:
        if not self.waiting:
            self.done()
            return
        Attempt(self.desk, self.link, self.ips[0], self.waiting[0], self._on_pong)

    def _on_pong(self, pong: Pong) -> None:
        if pong.step == "connect" and len(self.ips) > 1:
            del self.ips[0]                    # a name may have an address of a family that leads nowhere
            self._ask_next()
        elif pong.step == "handshake":
            Attempt(self.desk, self.link, self.ips[0], pong.dc, functools.partial(self._on_verdict, pong), _SINCE_BOOT)
        elif pong.step == "connect":
            self._leave(pong)
        else:
            del self.waiting[0]
            self.report(pong)
            self._ask_next()

    def _on_verdict(self, first: Pong, second: Pong) -> None:
        """A hello with another clock was tried: accepted means that the secret is right."""
        if not second.step:
            first = first._replace(reason=f"the secret is right, but the clocks differ by more than 10 minutes: it is "
                                          f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC here")
        self._leave(first)

    def _leave(self, pong: Pong) -> None:
        """What failed would fail for every data centre."""
        self.report(pong)
        self.waiting.clear()
        self.done()


def explain_connect(error: RouteError) -> str:
    """Why a connection was not made, and what it usually means."""
    if error.code == errno.ECONNREFUSED:
        return "port closed: nothing listens there, or a firewall refuses"
    if error.code in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return f"no way there: {os.strerror(error.code)}"
    if not error.code:
        return "no answer: wrong address, a firewall, or blocked on the way"
    return str(error)


def explain_stranger(head: bytes) -> str:
    """Who answered in place of a proxy, as far as its first bytes say."""
    if head[:5] == b"SSH-2":
        return "answered by an SSH server: wrong port"
    if head[:5] == b"HTTP/" or head[:1] in (b"\x15", b"\x16"):
        return "answered by a web server: the secret is wrong, the clocks differ, or it is no proxy"
    return "the answer is not of a proxy: wrong port or secret"


def flight_size(head: bytes) -> int:
    """Bytes of the three records that answer a ClientHello; 0 = not all headers are here, -1 = something else."""
    at = 0
    for kind in (0x16, 0x14, 0x17):
        if len(head) <= at:
            return 0
        if head[at] != kind:
            return -1
        if len(head) < at + RECORD_HEADER:
            return 0
        at += RECORD_HEADER + int.from_bytes(head[at + 3:at + 5], "big")
    return at


def is_flight_signed(flight: bytes, hello: bytes, secret: bytes) -> bool:
    """True if `flight` answers `hello` and was signed with `secret` (client-protocol.md 6.4)."""
    if len(flight) < 43:
        return False
    mac = KeyedHmac(secret).digest(hello[_RANDOM], without_random(flight))
    return hmac.compare_digest(mac, flight[_RANDOM])


def req_pq(nonce: bytes, now_wall: float) -> bytes:
    """Return the unencrypted message that opens a key exchange, 40 bytes; nonce: 16 bytes."""
    message_id = int(now_wall * 2**32) & ~3
    return struct.pack("<QQII16s", 0, message_id, 20, _REQ_PQ_MULTI, nonce)


PING_HEAD: Final = "  DC   connect handshake    answer     total"


def draw_pong(pong: Pong) -> str:
    """One row under PING_HEAD, and behind it, if it failed, a line that says where and why."""
    def cell(seconds: float | None) -> str:
        return f"{'-' if seconds is None else f'{seconds * 1000:.0f} ms':>10}"

    row = f"{pong.dc:>4}{cell(pong.connect_s)}{cell(pong.handshake_s)}{cell(pong.answer_s)}"
    return f"{row}{'failed':>10}\n      at {pong.step}: {pong.reason}" if pong.step else row + cell(pong.total_s)


# == 26. check ===============================================================
# What an operator would like to know before people complain: findings, each
# with what is wrong, why it matters, and the line or command that cures it.
# First what the configuration says by itself, then what this machine says, then
# (not with --offline) what the network says; the last with 3 s each, side by
# side.  Nothing is served, written or kept open.
# Source: config.md 6.5.

_PROBE_LIMIT_S: Final = 3.0
_CLOCK_LIMIT_S: Final = 30.0             # the middle end refuses more (middle-proxy-wire.md 2.1); FakeTLS clients bear 10 minutes
_CLOCK_HOST: Final = "core.telegram.org"
_WORLD: Final = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))
_ALL_ZERO: Final = "0" * 32


class Finding(NamedTuple):
    """One answer of `check`."""

    key: str                 # what it is about: a configuration key, or `process`, `network`
    what: str
    why: str = ""
    cure: str = ""
    note: bool = False       # good to know, nothing to mend


def look_at_config(loaded: Loaded) -> Iterator[Finding]:
    """What the configuration says by itself."""
    settings = loaded.settings
    yield from _look_at_keys(loaded)
    yield from _look_at_users(settings.access, loaded.users_explicit)
    yield from _look_at_route(settings)
    yield from _look_at_exposure(settings.server)


def _look_at_keys(loaded: Loaded) -> Iterator[Finding]:
    for path, names in loaded.unknown.items():
        for name in names:
            near = suggest_key(path, name)
            where = f"{path}.{name}" if path else name
            yield Finding(where, "unknown key, ignored", "what it should change stays as it is",
                          f"write {near} instead" if near else f"remove {name}")
    said = {*unknown_key_warnings(loaded.unknown), *zero_limit_warnings(loaded.settings.access)}
    for text in (*loaded.errors, *loaded.warnings):
        if text not in said and "all-zero secret" not in text:         # said with its cure among the users
            yield Finding("config", text, cure="see the key in docs/configuration.md")
    if loaded.without_effect:
        yield Finding("config", f"without effect in this program: {', '.join(loaded.without_effect)}", note=True)


def _look_at_users(access: Access, explicit: bool) -> Iterator[Finding]:
    now = time.time()
    if not explicit:
        yield Finding("access.users", "no user is configured: there is only `default` with the secret of all zeros", "everybody knows it",
                      'write [access.users] and under it NAME = "32 hex characters"; openssl rand -hex 16 makes them')
    owners: dict[str, list[str]] = {}
    for name, secret in access.users.items():
        owners.setdefault(secret.lower(), []).append(name)
    for secret, names in owners.items():
        if secret == _ALL_ZERO and explicit:
            yield Finding("access.users", f"all-zero secret of {_some(names)}", "everybody knows it, scanners try it first",
                          "openssl rand -hex 16 makes a secret")
        elif len(names) > 1:
            yield Finding("access.users", f"one secret for {_some(names)}", "all of them count as the first one: limits, quota, statistics",
                          "give each a secret of its own; openssl rand -hex 16 makes one")
    limits = {"user_max_tcp_conns": access.user_max_tcp_conns, "user_data_quota": access.user_data_quota,
              "user_max_unique_ips": access.user_max_unique_ips}
    blocked: dict[str, list[str]] = {
        "user_enabled": [name for name in access.users if not access.user_enabled.get(name, True)],
        "user_expirations": [name for name, until in access.user_expirations.items() if until.timestamp() < now and name in access.users],
        **{key: [name for name, limit in table.items() if limit == 0 and name in access.users] for key, table in limits.items()}}
    words = {"user_enabled": ("switched off", "remove the entry or write true"), "user_expirations": ("expired", "write a later date")}
    for key, names in blocked.items():
        if names:
            what, cure = words.get(key, ("blocked by a limit of 0", "no limit = remove the entry"))
            yield Finding(f"access.{key}", f"{what}: {_some(names)}", "their links do not work", cure)
    if access.users and len({name for names in blocked.values() for name in names}) == len(access.users):
        yield Finding("access.users", "no user is usable", "nobody can connect", "see the findings about users")
    for key, table in (*limits.items(), ("user_expirations", access.user_expirations), ("user_ad_tags", access.user_ad_tags)):
        strangers = [name for name in table if name not in access.users]
        if strangers:
            yield Finding(f"access.{key}", f"entry for no user: {_some(strangers)}", "probably a name was changed in one place only",
                          "write the name as in [access.users]", note=True)


def _some(names: Sequence[str]) -> str:
    """The first ten names."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _look_at_route(settings: Settings) -> Iterator[Finding]:
    general = settings.general
    if not general.use_middle_proxy:
        if general.ad_tag or settings.access.user_ad_tags:
            yield Finding("general.ad_tag",
                          "ad tag without effect: it is sent only through the middle end (general.use_middle_proxy = true)",
                          "the sponsored channel is not shown", "general.use_middle_proxy = true, or remove the tag")
        else:
            yield Finding("general.use_middle_proxy",
                          "direct mode: no ad tag; media of other DCs and of the CDN may not load for some accounts; "
                          "the middle end is the remedy", note=True)
    elif general.auto_degradation_enabled:
        yield Finding("general.auto_degradation_enabled",
                      "while the middle end is not usable new sessions go direct: no ad tag, media of other DCs may not load "
                      "(general.auto_degradation_enabled = false: they wait and close instead)", note=True)
    if not any(entry.enabled for entry in settings.upstreams):
        yield Finding("upstreams", "no enabled upstream", "every connection to Telegram will fail",
                      'add [[upstreams]] with type = "direct"')


def _look_at_exposure(server: ServerSettings) -> Iterator[Finding]:
    api = server.api
    place = parse_ip_port(api.listen)
    if api.enabled and place is not None:
        ip, port = place
        open_to_all = not api.whitelist or any(net in _WORLD for net in api.whitelist)
        if port and not ip.is_loopback and open_to_all and not api.auth_header:
            yield Finding("server.api.whitelist", f"the API at {api.listen} is open to the world",
                          "who finds it reads all secrets and adds users",
                          'whitelist = ["127.0.0.1/32"], and auth_header = "a long random text"')
        elif port and not ip.is_loopback and not api.auth_header:
            yield Finding("server.api.auth_header", f"the API at {api.listen} asks for no Authorization header",
                          "every program on a machine of the whitelist reads all secrets", 'auth_header = "a long random text"', note=True)
    wide = server.metrics_port or server.metrics_listen
    if wide and (not server.metrics_whitelist or any(net in _WORLD for net in server.metrics_whitelist)):
        yield Finding("server.metrics_whitelist", "the metrics are open to the world", "user names and traffic are shown to everybody",
                      'metrics_whitelist = ["127.0.0.1/32"] or the address of your Prometheus')


# -- this machine

def look_at_machine(settings: Settings, path: str) -> Iterator[Finding]:
    """What this machine says: ports, descriptors, cryptography, directories."""
    yield from _look_at_ports(settings)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < FDS_WANTED:
        yield Finding("process", f"at most {hard} open files: {slot_cap(hard)} connections", "a Telegram app opens up to 12",
                      "LimitNOFILE=65536 in the unit, or ulimit -n 65536")
    yield from _look_at_crypto()
    yield from _look_at_paths(settings, path)


def _look_at_ports(settings: Settings) -> Iterator[Finding]:
    server = settings.server
    wanted = [("server.port", str(entry.ip), server.port, entry.reuse_allow) for entry in server.listeners
              if (settings.network.ipv6 if entry.ip.version == 6 else settings.network.ipv4)]
    place = parse_ip_port(server.api.listen)
    if server.api.enabled and place is not None:
        wanted.append(("server.api.listen", str(place[0]), place[1], False))
    for key, ip, port, shared in wanted:
        try:
            bind_tcp(ip, port, shared).close()
        except OSError as error:
            yield _explain_bind(key, ip, port, error)


def _explain_bind(key: str, ip: str, port: int, error: OSError) -> Finding:
    where = format_address(ip, port)
    if error.errno == errno.EADDRINUSE:
        owners = port_owners(port)
        names = ", ".join(f"{name} (pid {pid})" for pid, name in owners) or "a process that this user may not see"
        if owners and all(name == "telemt" for _, name in owners):
            return Finding(key, f"{where} is held by {names}: the proxy is running", note=True)
        return Finding(key, f"{where} is in use by {names}", "the proxy cannot listen there", "stop that program, or take another port")
    if error.errno == errno.EACCES:
        return Finding(key, f"{where}: no permission", f"ports below 1024 need root or CAP_NET_BIND_SERVICE (this is user {os.geteuid()})",
                       "AmbientCapabilities=CAP_NET_BIND_SERVICE in the unit, or a port above 1023")
    if ":" in ip and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
        return Finding(key, f"{where}: this machine has no IPv6", cure="network.ipv6 = false", note=True)
    return Finding(key, f"{where}: {error.strerror}", "the proxy cannot listen there", "see `ip address` for what this machine has")


def _look_at_crypto() -> Iterator[Finding]:
    try:
        backend = pick_backend(os.environ.get("TELEMT_CRYPTO", ""))
    except ConfigError as error:
        yield Finding("TELEMT_CRYPTO", str(error), "the proxy does not start", "unset TELEMT_CRYPTO")
        return
    if backend.name == "python":
        yield Finding("process", "no AES library: pure Python does 1 MB/s", "enough for chat, not for media",
                      "pip install cryptography, or apt install python3-cryptography, or opkg install python3-ctypes libopenssl")
    else:
        yield Finding("process", f"crypto backend {backend.name}", note=True)


def _look_at_paths(settings: Settings, path: str) -> Iterator[Finding]:
    folder = os.path.dirname(os.path.abspath(path))
    if settings.server.api.enabled and not settings.server.api.read_only and not os.access(folder, os.W_OK):
        yield Finding("server.api", f"{folder} is not writable for this user", "the API answers every change with 500",
                      f"ReadWritePaths={folder} in the unit, or server.api.read_only = true")
    mode = os.stat(path).st_mode
    if mode & 0o004:
        yield Finding("config", f"{path} is readable by every user of this machine", "it holds all secrets", f"chmod 600 {path}", note=True)
    sock = settings.censorship.mask_unix_sock
    if settings.censorship.mask and sock and not os.path.exists(sock):
        yield Finding("censorship.mask_unix_sock", f"{sock} does not exist", "strangers get no answer, which is how a proxy looks",
                      "start the web server, or correct the path")


# -- the network

def network_probes(settings: Settings) -> dict[str, Callable[[], Sequence[Finding]]]:
    """Name for the progress line -> call that blocks for a few seconds, for every probe that this configuration asks for."""
    probes: dict[str, Callable[[], Sequence[Finding]]] = {_CLOCK_HOST: functools.partial(probe_clock, _CLOCK_HOST)}
    cert = settings.censorship
    if cert.mask and not cert.mask_unix_sock:
        probes["mask host"] = functools.partial(probe_mask, settings)
        probes["clock of the mask host"] = functools.partial(probe_mask_clock, settings)
    if settings.general.use_middle_proxy and any(entry.enabled and entry.type == "direct" for entry in settings.upstreams):
        probes["middle end"] = functools.partial(probe_middle, settings)       # what a SOCKS server would reach cannot be said here
    return probes


def run_probes(probes: Mapping[str, Callable[[], Sequence[Finding]]], tell: Callable[[str], None]) -> list[Finding]:
    """Findings of all probes, side by side, in their order; one that takes too long is a finding itself.

    tell: gets the names of those that are not back yet, and "" at the end.
    """
    import queue
    import threading
    answers: queue.SimpleQueue[tuple[str, Sequence[Finding]]] = queue.SimpleQueue()

    def work(name: str, probe: Callable[[], Sequence[Finding]]) -> None:
        try:
            found = probe()
        except (ImportError, LookupError, OSError, ValueError) as error:       # a smaller Python, or an odd network
            found = [Finding("network", f"{name} could not be asked: {error}", note=True)]
        answers.put((name, found))

    for name, probe in probes.items():
        threading.Thread(target=work, args=(name, probe), daemon=True).start()
    results: dict[str, Sequence[Finding]] = {}
    until = time.monotonic() + _PROBE_LIMIT_S + 1.0     # what has no limit of its own is name resolution
    with contextlib.suppress(queue.Empty):
        while len(results) < len(probes):
            tell(", ".join(name for name in probes if name not in results))
            name, found = answers.get(timeout=max(0.001, until - time.monotonic()))
            results[name] = found
    tell("")
    return [finding for name in probes for finding in results.get(name, [
        Finding("network", f"{name}: no answer in {_PROBE_LIMIT_S:.0f} s", "slow name resolution, or a firewall that drops")])]


def probe_clock(name: str) -> Sequence[Finding]:
    """Compare our clock with the one that a web server puts into its answers.  Blocks; raises OSError."""
    import http.client
    with contextlib.closing(http.client.HTTPSConnection(name, timeout=_PROBE_LIMIT_S)) as connection:
        return compare_clocks(name, _date_of(connection), time.time())


def probe_mask_clock(settings: Settings) -> Sequence[Finding]:
    """The same with the mask host, whose certificate does not matter here; a host that does not answer is found by probe_mask."""
    import http.client
    import ssl
    cert = settings.censorship
    host, port = cert.mask_host or cert.tls_domain, cert.mask_port
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError, http.client.HTTPException):
        ip = _look_up(host, port, settings.network.dns_overrides)[0]
        if port == settings.server.port and is_local_ip(ip):
            return []                          # it is ourselves
        sock = connect_blocking(ip, port, _PROBE_LIMIT_S)
        with contextlib.closing(sock), context.wrap_socket(sock, server_hostname=cert.tls_domain) as tls:
            connection = http.client.HTTPConnection(cert.tls_domain, port)
            connection.sock = tls
            return compare_clocks(host, _date_of(connection), time.time())
    return []


def _date_of(connection: http.client.HTTPConnection) -> str:
    connection.request("HEAD", "/", headers={"User-Agent": "curl/8"})
    return connection.getresponse().getheader("Date") or ""


def compare_clocks(name: str, date: str, now_wall: float) -> Sequence[Finding]:
    """The finding of a clock that is too far from the `Date` of a web server; none without a readable one."""
    theirs = parse_http_date(date)
    if theirs is None or abs(ahead := now_wall - theirs) <= _CLOCK_LIMIT_S:
        return []
    return [Finding("process", f"the clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {name}",
                    "the middle end refuses more than 30 s and stays unusable, FakeTLS clients are refused from 10 minutes on",
                    "timedatectl set-ntp true, or ntpd -q -p pool.ntp.org")]


def probe_middle(settings: Settings) -> Sequence[Finding]:
    """What will keep the middle end unusable (config.md 6.5).  Blocks."""
    found, general, network = [], settings.general, settings.network
    addresses = [ip for enabled, ip in zip((network.ipv4, network.ipv6), DC_TABLE[_DEFAULT_DC], strict=True) if enabled]
    if not any(map(local_address_towards, addresses)):
        found.append(Finding("network.ipv4", "no usable address family: this machine has no route to Telegram", _NO_MIDDLE,
                             "network.ipv4 = true (or ipv6), and a default route: ip route"))
    why = secret_trouble(general)
    if why:
        found.append(Finding("general.proxy_secret_path", f"no proxy-secret at {general.proxy_secret_path} and none to be had: {why}",
                             _NO_MIDDLE, f"let this machine reach {general.proxy_secret_url or SECRET_URL}, or put the file there"))
    return found


_NO_MIDDLE: Final = "it is what will keep the middle end unusable: no ad tag, media of other DCs may not load"


def secret_trouble(general: General) -> str:
    """Why there will be no proxy-secret, "" where there is one.  Blocks."""
    limit = general.proxy_secret_len_max
    with contextlib.suppress(OSError, WireError):
        check_secret_size(len(read_small_file(general.proxy_secret_path, SECRET_BODY_MAX)), limit)
        return ""
    try:
        answer = fetch_url(general.proxy_secret_url or SECRET_URL, SECRET_BODY_MAX, _PROBE_LIMIT_S)
        check_secret_answer(answer.status, answer.body, limit)
    except (OSError, ValueError, ImportError, TelemtError) as error:
        return describe(error)
    return ""


def probe_mask(settings: Settings) -> Sequence[Finding]:
    """Is the mask host there, somebody else than us, and does its certificate fit every domain of the links?"""
    cert = settings.censorship
    host, port = cert.mask_host or cert.tls_domain, cert.mask_port
    try:
        addresses = _look_up(host, port, settings.network.dns_overrides)
    except OSError as error:
        return [Finding("censorship.mask_host", f"{host} does not resolve: {error.strerror}", _NO_MASK, _MASK_CURE)]
    if port == settings.server.port and any(map(is_local_ip, addresses)):
        return [Finding("censorship.mask_host", f"{format_address(host, port)} is this proxy itself",
                        "strangers would go round in a circle; they are closed instead", "let mask_host and mask_port name a web server")]
    found = []
    for domain in (cert.tls_domain, *cert.tls_domains):
        try:
            trouble = _certificate_trouble(domain, addresses[0], port)
        except OSError as error:
            return [Finding("censorship.mask_host", f"{format_address(host, port)} is unreachable: {error.strerror or error}", _NO_MASK,
                            _MASK_CURE)]
        if trouble:
            found.append(Finding("censorship.tls_domain", f"{format_address(host, port)} for {domain}: {trouble}",
                                 "a prober sees that this server is not that site", f"choose a tls_domain that {host} serves with TLS 1.3"))
    return found


_NO_MASK: Final = "strangers get no answer, which is how a proxy looks"
_MASK_CURE: Final = "correct mask_host and mask_port (default: tls_domain, 443), or the firewall"


def _look_up(host: str, port: int, overrides: Iterable[str]) -> list[str]:
    """Addresses of a host, overrides first.  Blocks; raises OSError."""
    override = parse_dns_overrides(overrides).get((host.lower(), port))
    if override is not None:
        return [str(override)]
    return list(dict.fromkeys(str(row[4][0]) for row in socket.getaddrinfo(host.encode(), port, type=socket.SOCK_STREAM)))


def _certificate_trouble(domain: str, ip: str, port: int) -> str:
    """What is wrong with the TLS that a server offers for `domain`; empty if nothing is.  Blocks; raises OSError without a connection."""
    import ssl
    context = ssl.create_default_context()
    with contextlib.closing(connect_blocking(ip, port, _PROBE_LIMIT_S)) as sock:
        try:
            with context.wrap_socket(sock, server_hostname=domain) as tls:
                return "" if tls.version() == "TLSv1.3" else f"speaks {tls.version()} only"
        except ssl.SSLCertVerificationError as error:
            return f"certificate not valid: {error.verify_message}"
        except (ssl.SSLError, ConnectionError, TimeoutError) as error:
            return f"no TLS: {getattr(error, 'reason', None) or error}"


def draw_finding(finding: Finding) -> list[str]:
    """Lines of one finding; the first says whether something has to be done."""
    lines = [f"{'note' if finding.note else 'PROBLEM':<8}{finding.key}: {finding.what}"]
    return lines + [f"        {word}: {text}" for word, text in (("why", finding.why), ("do", finding.cure)) if text]


# == 27. cli =================================================================
# Arguments, files, the log on stdout, process set-up, exit codes.
# Source: config.md 5, 6 and 8 items 13-20; platform.md 4.

USAGE: Final = """\
usage: telemt.py [CONFIG] [options]

  CONFIG                configuration file (default: config.toml); written with a random secret when it does not exist
  -s, --silent          log warnings, errors and links only
  --log-level LEVEL     debug, verbose, normal or silent
  --init [...]          write a config and a systemd unit; options: --port N --domain D --secret HEX --user NAME
                        --config-dir DIR --no-start --force
  -V, --version         print the version
  -h, --help            print this text

       telemt.py check [CONFIG] [--json] [--offline]     what is wrong or missing, without serving
       telemt.py links [CONFIG] [--user NAME] [--qr] [--json]
       telemt.py ping LINK... [--dc N] [--count N] [--json]    a real client through any proxy link
       telemt.py healthcheck [CONFIG]                    for containers: ping the own listener
       telemt.py top [CONFIG] [--once] [--interval S]    who is online, how much they pull

environment: RUST_LOG=LEVEL wins over --log-level; TELEMT_CRYPTO=cryptography|libcrypto|pycryptodome|python forces a backend;
             TELEMT_DRAIN=SECONDS for the sessions of a program that SIGUSR2 replaced (600)
signals:     SIGHUP reads the configuration again; SIGUSR2 starts the program anew on the same sockets, and nobody is lost
"""
_SUBCOMMANDS: Final = ("check", "ping", "links", "healthcheck", "top")
_LEVELS: Final = {"debug": Level.TRACE, "verbose": Level.DEBUG, "normal": Level.INFO, "silent": Level.WARN}
_LEVEL_WORDS: Final = {"trace": "debug", "debug": "debug", "verbose": "verbose", "normal": "normal", "info": "normal",
                       "silent": "silent", "quiet": "silent", "error": "silent", "warn": "silent"}
_RUST_LEVELS: Final = {"off": Level.ERROR + 1, "error": Level.ERROR, "warn": Level.WARN, "info": Level.INFO,
                       "debug": Level.DEBUG, "trace": Level.TRACE}
_COLORS: Final = {Level.TRACE: "\x1b[35m", Level.DEBUG: "\x1b[34m", Level.INFO: "\x1b[32m", Level.WARN: "\x1b[33m",
                  Level.ERROR: "\x1b[31m"}
_TEXT_SPACE: Final = "\t"                       # the DC table of upstream-and-relay.md 12 has tabs
_FEW_USERS: Final = 16                            # up to here a stranger's hello costs at most 0.1 ms of SHA-256
_DEFAULT_CONFIG: Final = """\
# Written by telemt.py on its first start.  More keys: the sample config.toml of the project.
[general]
use_middle_proxy = false      # true: through Telegram's middle end (ad tag); false: straight to the data centres

[general.modes]
classic = false
secure = false                # dd links: no TLS around
tls = true                    # ee links: looks like HTTPS to tls_domain

[server]
port = {port}

[censorship]
tls_domain = "{domain}"   # a real site with TLS 1.3; best one in the same data centre or country

[access.users]
default = "{secret}"          # 32 hex characters; keep it secret, it is part of the link
"""


class Arguments(NamedTuple):
    """The command line, understood."""

    config: str = "config.toml"   # with action `usage`: what is wrong
    level: str = ""               # "" = not given
    action: str = "run"           # run, help, version, init, usage, or a subcommand


def parse_arguments(words: Sequence[str]) -> Arguments:
    """Read the command line as 3.2.1 does (config.md 6.1): unknown options are reported and ignored."""
    if "--init" in words:
        return Arguments(action="init")
    if words and words[0] in _SUBCOMMANDS:
        return Arguments(action=words[0])
    config, level, silent = "config.toml", "", False
    rest = iter(words)
    for word in rest:
        if word in ("-h", "--help"):
            return Arguments(action="help")
        if word in ("-V", "--version"):
            return Arguments(action="version")
        if word in ("-s", "--silent"):
            silent = True
        elif word == "--log-level":
            given = next(rest, None)
            if given is None:
                return Arguments(action="usage", config="--log-level needs a value: debug, verbose, normal or silent")
            level = _LEVEL_WORDS.get(given.lower(), "normal")
        elif word.startswith("--log-level="):
            level = _LEVEL_WORDS.get(word.partition("=")[2].lower(), "normal")
        elif word in _INIT_OPTIONS or word in _INIT_FLAGS:
            return Arguments(action="usage", config=f"{word} works only together with --init")
        elif word.startswith("-"):
            complain(f"Unknown option: {word}")
        else:
            config = word
    return Arguments(config, "silent" if silent else level)


def complain(text: str) -> None:
    """One line on stderr; where that cannot be written, nobody is left to tell."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    """The result of a subcommand, on stdout.  Ends the program with exit code 1 where it cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):             # `| head` has seen enough
            complain(f"telemt.py: cannot write to stdout: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)           # Python would try again while it ends, and exit with 120
        sys.exit(1)


# -- configuration file

def write_default_config(path: str) -> None:
    """Write a short commented configuration with a random secret, readable by its owner only.  Raises OSError."""
    port = 443 if hasattr(os, "geteuid") and os.geteuid() == 0 else 8443       # below 1024 needs root
    write_whole(path, _DEFAULT_CONFIG.format(port=port, domain="petrovich.ru", secret=os.urandom(16).hex()), replace=False)


# -- log

class LogSink:
    """Writes records to stdout, one line each: `2026-03-04T10:00:00.123456Z  INFO telemt::links: text`.

    It never waits for whoever reads them, or one full pipe would hold up everybody's bytes.  What the reader does not take is
    kept, up to 256 KiB; what comes then is lost, counted, and reported when it takes lines again.  A write that fails (disk
    full, reader gone) is tried again with the first record after five seconds.
    """

    def __init__(self, fd: int, colors: bool, encoding: str = "utf-8", loop: Loop | None = None) -> None:
        self._colors, self._encoding, self._loop = colors, encoding, loop
        self._fd, self._asks = open_log(fd)
        self._kept = bytearray()               # the end of the log that is not written yet
        self._lost = 0                         # records behind it
        self._watched = False                  # the loop tells when there is room
        self._busy = False                     # flush() runs: a record of a signal handler joins the queue
        self._retry_at = 0.0                   # monotonic; an error is not asked about at every record
        self.patience_s = _LOG_PATIENCE_S      # what may still be waited for the reader: before the loop turns, and at the end
        self._second, self._prefix = -1, ""

    def __call__(self, level: Level, target: str, text: str) -> None:
        line = self._line(level, target, text)
        if self._lost or len(self._kept) > _LOG_KEPT_MAX:
            self._lost += 1
        else:
            self._kept += line
        if not self._watched and not self._busy and (not self._retry_at or time.monotonic() >= self._retry_at):
            self.flush()

    def _line(self, level: Level, target: str, text: str) -> bytes:
        now = time.time()
        second = int(now)
        if second != self._second:             # strftime once a second, not once a record
            self._second, self._prefix = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        name = f"{level.name:>5}"
        if self._colors:
            name = f"{_COLORS[level]}{name}\x1b[0m"
        if not text.isprintable():             # a user name may hold anything: it must not forge a record or steer a terminal
            text = "".join(char if char.isprintable() or char in _TEXT_SPACE else ascii(char)[1:-1] for char in text)
        line = f"{self._prefix}.{int((now - second) * 1e6):06d}Z {name} {target}: {text}\n"
        return line.encode(self._encoding, "backslashreplace")

    def flush(self) -> None:
        """Write what the reader takes now; before the loop turns it is given some time."""
        self._retry_at, self._busy, blocked = 0.0, True, False
        try:
            while self._kept and not blocked:
                blocked = not self._write_some() and not self._wait()
        except OSError:                        # that must not end the proxy
            self._retry_at = time.monotonic() + _LOG_RETRY_S
        self._busy = False
        self._watch(blocked)

    def _write_some(self) -> bool:
        """Write a piece; False if there is no room for it."""
        if self._asks and not self._has_room(0.0):
            return False
        try:
            del self._kept[:os.write(self._fd, self._kept[:select.PIPE_BUF])]
        except BlockingIOError:
            return False
        if self._lost and not self._kept:
            self._kept += self._line(Level.WARN, "telemt::cli", f"{self._lost} log lines lost: they could not be written")
            self._lost = 0
        return True

    def close(self) -> None:
        """The process ends: what is kept may go out for another moment."""
        self._watch(False)
        self._loop, self.patience_s = None, _LOG_PATIENCE_S / 2
        self.flush()

    def _has_room(self, timeout_s: float) -> bool:
        """Whether PIPE_BUF bytes can be written without waiting: what POLLOUT of a pipe or socket means."""
        poller = select.poll()
        poller.register(self._fd, select.POLLOUT)
        return bool(poller.poll(timeout_s * 1e3))

    def _wait(self) -> bool:
        """True if there is room again, after waiting for it where nobody else waits for us."""
        if self.patience_s <= 0 or (self._loop is not None and self._loop.turns):
            return False
        begin = time.monotonic()
        found = self._has_room(self.patience_s)
        self.patience_s -= time.monotonic() - begin
        return found

    def _watch(self, wanted: bool) -> None:
        if wanted is self._watched or self._loop is None:
            return
        self._watched = wanted
        if wanted:
            self._loop.watch(self._fd, WRITE, lambda _mask: self.flush())
        else:
            self._loop.unwatch(self._fd, WRITE)


_LOG_KEPT_MAX: Final = 262_144
_LOG_RETRY_S: Final = 5.0
_LOG_PATIENCE_S: Final = 1.0


def open_log(fd: int) -> tuple[int, bool]:
    """Return (descriptor to log to, whether it must be asked for room before each write).

    O_NONBLOCK would be set for everybody who shares this open file, the shell of our terminal for one.  So pipes and
    terminals are opened once more, for us alone; where that is refused, and for sockets, poll() is asked.  Files never block.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):     # no /proc, another user's terminal, no reader
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), False
    return fd, not stat.S_ISREG(mode)


def chosen_level(argument: str, configured: str) -> Level | int:
    """Threshold by precedence: RUST_LOG, command line, configuration (config.md 6.3, 8 item 19)."""
    rust = os.environ.get("RUST_LOG")
    if rust is not None:
        level = parse_rust_log(rust)
        if level is not None:
            return level
    return _LEVELS[argument or configured]


def hot_level(argument: str, configured: str) -> Level | None:
    """Threshold of a `general.log_level` that a reload brings; None when RUST_LOG or the command line has the say."""
    rust = os.environ.get("RUST_LOG")
    pinned = argument or (rust is not None and parse_rust_log(rust) is not None)
    return None if pinned else _LEVELS[configured]


def parse_rust_log(text: str) -> int | None:
    """Threshold of a RUST_LOG value: its bare level, else the one for `telemt`; empty = errors; None = not understood."""
    if not text.strip():
        return Level.ERROR
    bare = named = None
    for part in text.split(","):
        target, equals, word = part.strip().rpartition("=")
        level = _RUST_LEVELS.get(word.strip().lower())
        if not equals:
            bare = bare if level is None else level
        elif target.strip() == "telemt":
            named = level
    return bare if bare is not None else named


# -- process set-up

def raise_fd_limit() -> int:
    """Raise the soft limit of open files to the hard one and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > 1_048_576:
        hard = 1_048_576
    if soft < hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft < FDS_WANTED:
        log_cli.warn("open file limit is %d: at most %d connections (raise it with ulimit -n or LimitNOFILE=)", soft, slot_cap(soft))
    return soft


def name_process() -> None:
    """Be `telemt` for pidof and /proc/PID/comm, where packages look for it (platform.md 6)."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write("telemt")


def hash_with_openssl() -> None:
    """Load OpenSSL's SHA-256, three times as fast on a ClientHello: pays for its memory where a hello is tried with many users."""
    if sys.modules.get("_hashlib", 0) is None:
        del sys.modules["_hashlib"]
        importlib.reload(hashlib)


class Orders(NamedTuple):
    """What signals ask for; called on the loop thread."""

    stop: Callable[[int], None]                # SIGINT, SIGTERM
    hang_up: Callable[[], None]                # SIGHUP
    exchange: Callable[[], None]               # SIGUSR2


def arm_signals(loop: Loop, orders: Orders, twice_s: float = 0.0) -> None:
    """First SIGINT or SIGTERM: stop in order; a second one kills.  Others as soon as the loop turns.

    twice_s: so soon after the first the second is the same one, from our caretaker and from who signals all of us.
    """
    def leave(*_: object) -> None:
        os._exit(0)

    def on_second(first_at: float, signum: int, _frame: object) -> None:
        if time.monotonic() >= first_at + twice_s:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def on_stop(signum: int, _frame: object) -> None:      # in the handler itself: the loop may be stuck, in a write to our log for one
        second = functools.partial(on_second, time.monotonic()) if twice_s else signal.SIG_DFL
        for other in (signal.SIGINT, signal.SIGTERM):
            signal.signal(other, second)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, _STOP_LIMIT_S)
        loop.call_from_thread(functools.partial(orders.stop, signum))

    signal.signal(signal.SIGALRM, leave)
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.on_signal(signum, on_stop)
    loop.on_signal(signal.SIGHUP, lambda *_: loop.call_from_thread(orders.hang_up))
    loop.on_signal(signal.SIGUSR2, lambda *_: loop.call_from_thread(orders.exchange))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)


def own_command(cwd: str) -> list[str]:
    """What starts this program again, as it was started: the interpreter, then its argv; `cwd` is where that was, if not here."""
    with contextlib.suppress(OSError):
        cwd = cwd or os.getcwd()
    argv = list(sys.orig_argv)
    at = len(argv) - len(sys.argv)
    if "telemt" in sys._xoptions:              # the image of _start_afresh: back to the file that it was made from
        argv[at] = str(sys._xoptions["telemt"])
        del argv[at - 3:at]                    # -S -X telemt=
        at -= 3
    if argv[at] == sys.argv[0] or "telemt" in sys._xoptions:
        argv[at] = os.path.join(cwd, argv[at])
    return [sys.executable, *argv]


# -- start

def print_banner(loaded: Loaded, threshold: int, backend: Backend, poller: AnyPoller, colors_off: bool) -> None:
    """The first log lines: who we are and what we were told (config.md 5.1 step 5)."""
    settings = loaded.settings
    modes, cert = settings.general.modes, settings.censorship
    python = ".".join(map(str, sys.version_info[:3]))
    log_cli.info("telemt.py %s (%s) crypto=%s poller=%s python=%s", VERSION, REFERENCE, backend.name, poller.name, python)
    log_cli.info("Log level: %s", next((word for table in (_LEVELS, _RUST_LEVELS) for word, level in table.items() if level == threshold)))
    if colors_off:
        log_cli.info("Colors: disabled")
    log_cli.info("Modes: classic=%s secure=%s tls=%s", *(str(on).lower() for on in (modes.classic, modes.secure, modes.tls)))
    if modes.classic:
        log_cli.warn("Classic mode is enabled: it is easy to recognise and block")
    log_cli.info("TLS domain: %s", cert.tls_domain)
    target = f"unix:{cert.mask_unix_sock}" if cert.mask_unix_sock else f"{cert.mask_host}:{cert.mask_port}"
    log_cli.info("Mask: %s -> %s", str(cert.mask).lower(), target)
    if cert.mask_unix_sock and not os.path.exists(cert.mask_unix_sock):
        log_cli.warn("Unix socket '%s' does not exist yet. Masking will fail until it appears.", cert.mask_unix_sock)
    if cert.tls_domain == "www.google.com":
        log_cli.warn("Using default tls_domain. Consider setting a custom domain.")
    if backend.name == "python":
        log_cli.warn(PURE_PYTHON_WARNING)
    for text in loaded.warnings:
        log_cli.warn("%s", text)
    for text in loaded.errors:
        log_cli.error("%s", text)
    if loaded.without_effect:
        log_cli.info("Settings without effect: %s", ", ".join(loaded.without_effect))


def print_facts(server: Server) -> None:
    """What the start found out (config.md 5.1 steps 7-10)."""
    settings = server.settings
    server.network.report()
    if settings.access.user_max_unique_ips:
        log_cli.info("IP limits configured for %d users", len(settings.access.user_max_unique_ips))
    if settings.network.dns_overrides:
        log_cli.info("Runtime DNS overrides configured: %d entries", len(settings.network.dns_overrides))
    if settings.access.replay_check_len == 0:
        log_cli.warn("access.replay_check_len = 0: replayed handshakes are not recognised")
    log_cli.info("Transport: %s", "Middle-End Proxy - all DC-over-RPC" if settings.general.use_middle_proxy
                 else "Direct DC - TCP - standard DC-over-TCP")


def missing_parts(settings: Settings, poller: AnyPoller) -> list[str]:
    """Warnings about configured features that cannot be had here: never fail silently."""
    found = []
    wanted = settings.general.event_loop
    if wanted not in ("auto", poller.name):
        why = "the uvloop package is not installed" if wanted == "uvloop" else "this system does not have it"
        found.append(f'general.event_loop = "{wanted}": {why}, using {poller.name}')
    return found


def import_apart(name: str) -> Any:
    """Import a module of ours whose code a child process compiles, so that the compiler's memory goes with the child.

    That memory is 7 MB for telemt_api.py, at every start where Python may not write its cache, as a service in /usr/local/bin
    may not.  Where anything is unusual, or fails, it is imported as any other.
    """
    import _thread
    finder: Any = sys.modules["_frozen_importlib_external"].PathFinder
    spec = finder.find_spec(name) if name not in sys.modules else None
    if spec is None or not hasattr(os, "fork") or _thread._count():        # others than this one
        return importlib.import_module(name)
    code = code_from_child(functools.partial(getattr(spec.loader, "get_code", lambda _: None), name))
    if code is None:
        return importlib.import_module(name)
    module = sys.modules[name] = type(sys)(name)
    module.__spec__, module.__file__, module.__loader__ = spec, spec.origin, spec.loader
    whole = False
    try:
        exec(code, vars(module))
        whole = True
    finally:
        if not whole:
            del sys.modules[name]
    return module


def code_from_child(make: Callable[[], Any]) -> Any:
    """Return the code object that `make` makes in a child process, None if that cannot be."""
    import marshal
    try:
        inlet, outlet = os.pipe()
    except OSError:
        return None
    try:
        child = os.fork()
    except OSError:                            # too many processes, or none allowed
        os.close(inlet)
        os.close(outlet)
        return None
    if child == 0:
        status = 1
        try:
            with open(outlet, "wb") as file:
                file.write(marshal.dumps(make()))
            status = 0
        finally:
            os._exit(status)
    os.close(outlet)
    with open(inlet, "rb") as file:
        data = file.read()
    return marshal.loads(data) if os.waitpid(child, 0)[1] == 0 else None


def start_control_plane(exchange: Exchange) -> None:
    """Start API and metrics where the configuration wants them; without telemt_api.py the proxy runs on (platform.md 2).

    exchange.stop_control stops them; it takes at most a second.
    """
    wanted = exchange.server.settings.server
    if not (wanted.api.enabled or wanted.metrics_port or wanted.metrics_listen):
        return
    try:
        exchange.stop_control = import_apart("telemt_api").start(exchange.control)
    except ImportError as error:
        missing = error.name or "telemt_api"
        log_cli.warn("control plane not started: %s is missing%s", missing,
                     "" if missing == "telemt_api" else " (OpenWrt: python3-email python3-urllib)")


def show_links(server: Server, entry: ListenerEntry, port: int) -> None:
    """Print the links of one listener, with what is known of our addresses now."""
    settings = server.settings
    public_port = settings.general.links.public_port
    print_links(settings, link_host(entry, server.detected, settings), port if public_port is None else public_port)


def open_with_links(server: Server) -> bool:
    """Open the listeners, each with its link block, or one block for `links.public_host` (config.md 5.4).

    False, after an ERROR, if the proxy must not start: nothing to listen on, or the unix socket does not open.
    """
    settings = server.settings
    links, unix = settings.general.links, settings.server.listen_unix_sock
    ports = []
    for entry, port in server.open_listeners():
        ports.append(port)
        if links.public_host is not None:
            continue
        show = functools.partial(show_links, server, entry, port)
        if entry.announce or not entry.ip.is_unspecified:
            show()
        else:                                  # the one case that what the world sees of us decides
            server.network.when_known(entry.ip.version, show)
    if (ports and links.public_host is not None) or (unix and not ports):
        host = links.public_host or server.detected[0] or server.detected[1]
        if host is None:
            log_cli.warn("Failed to detect a public address for the links; set general.links.public_host")
        port = settings.server.port if not ports else ports[0]
        print_links(settings, host or "UNKNOWN", port if links.public_port is None else links.public_port)
    try:
        server.open_unix()
    except OSError as error:
        log_cli.error("Failed to bind to unix:%s: IO error: %s (os error %s)", unix, error.strerror or error, error.errno)
        return False
    if not server.places.listeners:
        log_cli.error("No listeners. Exiting.")
    return bool(server.places.listeners)


def run(arguments: Arguments) -> int:
    """Serve until a signal; return the exit code."""
    heritage = Heritage(os.environ, os.getpid())
    if heritage.cwd:
        os.chdir(heritage.cwd)
    path = arguments.config
    if not os.path.lexists(path) and not heritage.replaces:
        try:
            write_default_config(path)
        except OSError as error:
            complain(f"[telemt] Error: cannot create default config at {path}: {error.strerror}")
            return 1
        complain(f"[telemt] Created default config at {path}")
    try:
        reading = read_stable(os.path.abspath(path), time.sleep) if heritage.replaces else read_config(os.path.abspath(path))
        loaded = load_reading(reading)
        if heritage.users_explicit and not loaded.users_explicit:
            raise ConfigError("[access.users] is missing")     # as a reload refuses it
    except OSError as error:
        complain(f"[telemt] Error: {path}: {error.strerror} (os error {error.errno})")
        return 1
    except ConfigError as error:
        complain(f"[telemt] {'Invalid config' if error.invalid else 'Error'}: {error}")
        return 1
    cwd = ""
    with contextlib.suppress(OSError):         # our directory may be gone
        if os.getcwd() == "/":                 # a service manager's default: relative state files belong beside the config
            cwd = "/"
            os.chdir(os.path.dirname(os.path.abspath(path)))
    try:
        return serve(loaded, reading, arguments, heritage, cwd)
    finally:
        if isinstance(LogBook.sink, LogSink):
            LogBook.sink.close()


def settle_stdout() -> None:
    """Make stdout one that takes every text."""
    if sys.stdout is None:                     # started with it closed
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as we do
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")      # a name that the terminal cannot show must end nothing


def open_log_sink(loop: Loop, disable_colors: bool) -> LogSink:
    """The log on stdout from now on, everything from INFO up."""
    colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ and not disable_colors
    sink = LogSink(sys.stdout.fileno(), colors, sys.stdout.encoding, loop)
    LogBook.sink, LogBook.now, LogBook.threshold = sink, time.monotonic, Level.INFO
    return sink


def serve(loaded: Loaded, reading: Reading, arguments: Arguments, heritage: Heritage, cwd: str) -> int:
    """Open everything in the order of config.md 8 item 13 and turn the loop.  cwd: where the arguments count from, if not here."""
    settings = loaded.settings
    threshold = chosen_level(arguments.level, settings.general.log_level)
    loop = Loop(pick_poller(settings.general.event_loop), time.monotonic)
    sink = open_log_sink(loop, settings.general.disable_colors)
    exchange: Exchange | None = None
    arm_signals(loop, Orders(lambda signum: exchange.stop(signum) if exchange is not None else loop.stop(),
                             lambda: exchange.hang_up() if exchange is not None else None,
                             lambda: exchange.begin() if exchange is not None else None), _TWICE_S if heritage.life >= 0 else 0.0)
    try:
        backend = pick_backend(os.environ.get("TELEMT_CRYPTO", ""), log_cli.debug)
    except ConfigError as error:
        complain(f"[telemt] Error: {error}")
        return 1
    print_banner(loaded, threshold, backend, loop.poller, settings.general.disable_colors)
    if len(settings.access.users) > _FEW_USERS:
        hash_with_openssl()
    name_process()
    server = Server(settings, loop, backend, raise_fd_limit(), os.environ.get("TELEMT_PATHS", "").split(","))
    server.handed = heritage.take
    print_facts(server)
    for text in missing_parts(settings, loop.poller):
        log_cli.warn("%s", text)
    reloader = Reloader(server, loaded, reading, arguments.config, functools.partial(hot_level, arguments.level))
    exchange = Exchange(server, reloader, Control(server, reloader), own_command(cwd), cwd, heritage.life)
    if not heritage.replaces:
        server.quotas.load()
        start_control_plane(exchange)
    elif settings.server.api.enabled or settings.server.metrics_port or settings.server.metrics_listen:
        with contextlib.suppress(ImportError):             # compiled now, started when the program before us has stopped its own
            import_apart("telemt_api")
    loop.catch_up()
    server.network.start()
    if not open_with_links(server):
        return 1
    LogBook.threshold = threshold
    if heritage.replaces:
        server.warm_up(functools.partial(heritage.take_over, loop, functools.partial(begin, exchange, True),
                                         functools.partial(go_on, exchange)))
    else:
        begin(exchange, False)
        for kind in ("clients", "control"):
            heritage.drop_rest(kind)
        tell_manager("READY=1")
    gc.collect()
    gc.freeze()                                # what lives as long as the process need not be walked again
    loop.run()
    server.quotas.close()
    exchange.stop_control(False)
    sink.close()
    return exchange.leave(0)


def begin(exchange: Exchange, late: bool) -> None:
    """Let clients in.  late: the program before us has just written what is to be read."""
    server = exchange.server
    if late:
        server.quotas.load()
    server.loop.catch_up()
    server.masks.observer.flush()
    server.accept()
    server.upstreams.start()
    exchange.reloader.start()


def go_on(exchange: Exchange) -> None:
    """API and metrics are ours as well: the exchange is complete."""
    start_control_plane(exchange)
    tell_manager("READY=1")
    log_cli.info("Took over from the program before")


_TWICE_S: Final = 0.5


def main(words: Sequence[str]) -> int:
    """Run the command line; return the exit code (config.md 6.4)."""
    settle_stdout()
    arguments = parse_arguments(words)
    if arguments.action == "run":
        return run(arguments)
    if signal.getsignal(signal.SIGINT) is _leave_early:        # a subcommand is interrupted like any other program
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if arguments.action == "init":
        return init(words)
    if arguments.action == "help":
        complain(USAGE.rstrip())
        return 0
    if arguments.action == "usage":
        complain(f"telemt.py: {arguments.config}\n{USAGE.rstrip()}")
        return 2
    if arguments.action == "version":
        say(f"telemt.py {VERSION} ({REFERENCE})")
        return 0
    return interruptible(SUBCOMMANDS[arguments.action], words[1:])


# -- subcommands (config.md 6.5)

def interruptible(subcommand: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """Run a subcommand; ^C ends it with exit code 130 and nothing more on the screen."""
    try:
        return subcommand(words)
    except KeyboardInterrupt:
        return 130


def make_parser(name: str, text: str) -> argparse.ArgumentParser:
    """An empty parser; what it does not understand is a usage error, exit code 2."""
    import argparse  # only a subcommand pays for it
    return argparse.ArgumentParser(prog=f"telemt.py {name}", description=text, allow_abbrev=False)


def ping(words: Sequence[str]) -> int:
    """`ping LINK...`: 0 when every attempt was answered, else 1."""
    parser = make_parser("ping", "A client through a proxy link to Telegram's data centres and back, with the time of each step.")
    parser.add_argument("link", nargs="+", metavar="LINK", help="tg://proxy?... or https://t.me/proxy?...; quote it for the shell")
    parser.add_argument("--dc", type=int, action="append", metavar="N", help="only this data centre; negative: media (default: 1 to 5)")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="so often each (default: 1)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(words)
    dcs = options.dc or [1, 2, 3, 4, 5]
    if not all(0 < abs(dc) < 32_768 for dc in dcs):
        parser.error("--dc is a number of a data centre: 1 to 5, negative for media, 203 for the CDN")
    if not 1 <= options.count <= 1000:
        parser.error("--count is a number from 1 to 1000")
    try:
        links = [parse_proxy_link(text) for text in options.link]
    except ConfigError as error:
        parser.error(str(error))
    results = [ping_one(link, dcs * options.count, not options.json) for link in links]
    if options.json:
        say(dump_pongs(links, results))
    return int(any(pong.step for pongs in results for pong in pongs))


def ping_one(link: ProxyLink, dcs: Sequence[int], aloud: bool) -> list[Pong]:
    """Ping through one link; aloud: rows of a table as the answers come."""
    loop = Loop(pick_poller("auto"), time.monotonic)
    pongs: list[Pong] = []
    if aloud:
        say(f"{link.where} {link.mode} {link.domain}".rstrip())
        say(PING_HEAD)

    def report(pong: Pong) -> None:
        pongs.append(pong)
        if aloud:
            say(draw_pong(pong))

    desk = PingDesk.open(loop, pick_backend(os.environ.get("TELEMT_CRYPTO", "")))
    run = PingRun(desk, link, dcs, report, loop.stop)
    loop.defer(run.start)
    loop.run()
    return pongs


def dump_pongs(links: Sequence[ProxyLink], results: Sequence[Sequence[Pong]]) -> str:
    """JSON of all attempts; the secrets stay out of it."""
    import json

    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1000, 3)

    return json.dumps([{
        "server": link.host, "port": link.port, "mode": link.mode, "domain": link.domain or None,
        "ok": not any(pong.step for pong in pongs),
        "attempts": [{"dc": pong.dc, "ok": not pong.step, "connect_ms": milliseconds(pong.connect_s),
                      "handshake_ms": milliseconds(pong.handshake_s), "answer_ms": milliseconds(pong.answer_s),
                      "failed_step": pong.step or None, "reason": pong.reason or None} for pong in pongs],
    } for link, pongs in zip(links, results, strict=True)], indent=2)


def check(words: Sequence[str]) -> int:
    """`check [CONFIG]`: 0 nothing found, 1 something, 2 the configuration does not load."""
    parser = make_parser("check", "Validate a configuration as a start would, then look around without serving.")
    parser.add_argument("config", nargs="?", default="config.toml", metavar="CONFIG", help="configuration file (default: config.toml)")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--offline", action="store_true", help="ask nothing over the network")
    options = parser.parse_args(words)
    try:
        loaded = load_for(options.config)
    except ConfigError as error:
        if options.json:
            say(dump_findings(options.config, str(error), []))
        else:
            complain(f"telemt.py check: {error}")
        return 2
    findings = [*look_at_config(loaded), *look_at_machine(loaded.settings, options.config)]
    if not options.offline:
        findings += run_probes(network_probes(loaded.settings), progress_line())
    problems = sum(not finding.note for finding in findings)
    if options.json:
        say(dump_findings(options.config, "", findings))
    else:
        for finding in sorted(findings, key=lambda finding: finding.note):
            say("\n".join(draw_finding(finding)))
        say(f"{options.config}: {problems or 'no'} problem{'' if problems == 1 else 's'}")
    return int(problems > 0)


def load_for(path: str) -> Loaded:
    """The configuration for a subcommand.  Raises ConfigError that names the file, whatever is wrong with it."""
    try:
        return load_config(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", prefix=False) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", prefix=False) from None


def progress_line() -> Callable[[str], None]:
    """A call that shows what is waited for on a terminal, and nothing elsewhere."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return lambda waiting: None
    return lambda waiting: complain_part(f"\r\x1b[Kasking {waiting} ..." if waiting else "\r\x1b[K")


def complain_part(text: str) -> None:
    """Text on stderr without an end of line."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def dump_findings(path: str, error: str, findings: Sequence[Finding]) -> str:
    """JSON of a check."""
    import json
    rows = [{"key": row.key, "what": row.what, "why": row.why or None, "cure": row.cure or None, "problem": not row.note}
            for row in findings]
    return json.dumps({"config": path, "loads": not error, "error": error or None, "ok": not error and all(row.note for row in findings),
                       "findings": rows}, indent=2)


def links(words: Sequence[str]) -> int:
    """`links [CONFIG]`: the links of all users or of one; 1 if the configuration does not load or there is no such user."""
    parser = make_parser("links", "The links of the users, as the running proxy would print them.")
    parser.add_argument("config", nargs="?", default="config.toml", metavar="CONFIG", help="configuration file (default: config.toml)")
    parser.add_argument("--user", metavar="NAME", help="only this user")
    parser.add_argument("--qr", action="store_true", help="each with a QR code to photograph (needs telemt_api.py)")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(words)
    try:
        settings = load_for(options.config).settings
    except ConfigError as error:
        complain(f"telemt.py links: {error}")
        return 1
    users = settings.access.users
    if options.user is not None and options.user not in users:
        complain(f"telemt.py links: {options.config}: no user {options.user!r} in [access.users]")
        return 1
    names = [options.user] if options.user is not None else sorted(users, key=str.encode)
    hosts = link_hosts(settings, detect_addresses(settings))
    if not hosts:
        complain("telemt.py links: no public address known: set general.links.public_host")
        return 1
    port = settings.server.port if settings.general.links.public_port is None else settings.general.links.public_port
    rows = [(name, link) for name in names for host in hosts for link in user_links(settings, users[name], host, port)]
    if options.json:
        say(dump_links(rows, port))
        return 0
    draw = qr_painter() if options.qr else lambda link: []
    if isinstance(draw, str):
        complain(f"telemt.py links: {draw}")
        return 1
    for name, link in rows:
        say("\n".join([f"{printable(name)}  {link.label}: {link.link}", *draw(link.link)]))
    return 0


def printable(text: str) -> str:
    """A name from a configuration, harmless for a terminal."""
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def qr_painter() -> Callable[[str], list[str]] | str:
    """Call that draws a link in half blocks, or what is missing for it."""
    try:
        api = importlib.import_module("telemt_api")
        "\u2588\u2580\u2584".encode(sys.stdout.encoding)
    except ImportError:
        return "--qr needs telemt_api.py beside telemt.py"
    except UnicodeEncodeError:
        return f"--qr needs block characters, which {sys.stdout.encoding} has not: set LC_ALL=C.UTF-8 if the terminal shows UTF-8"
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return lambda link: api.draw_qr(api.make_qr(link), plain)


def dump_links(rows: Sequence[tuple[str, Link]], port: int) -> str:
    """JSON of links."""
    import json
    return json.dumps([{
        "user": name, "kind": row.kind, "host": row.host, "port": port, "domain": row.domain or None, "link": row.link,
        "web_link": row.link.replace("tg://proxy", "https://t.me/proxy", 1)} for name, row in rows], indent=2)


def top(words: Sequence[str]) -> int:
    """`top [CONFIG]`: 0 shown, 1 the API is unreachable or refuses."""
    parser = make_parser("top", "Who is online and how much they pull, over the API of the running proxy.  Keys: q p t c n.")
    parser.add_argument("config", nargs="?", default="config.toml", metavar="CONFIG", help="configuration file (default: config.toml)")
    parser.add_argument("--once", action="store_true", help="two samples, then plain text for scripts; so without a terminal")
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two looks (default: 1)")
    options = parser.parse_args(words)
    if not 0.1 <= options.interval <= 3600:
        parser.error("--interval is a number of seconds from 0.1 to 3600")
    try:
        settings = load_for(options.config).settings
        host, port = own_api(settings.server.api)
    except ConfigError as error:
        complain(f"telemt.py top: {error}")
        return 1
    try:
        api = importlib.import_module("telemt_api")
    except ImportError as error:
        complain("telemt.py top: needs telemt_api.py beside telemt.py" if error.name == "telemt_api" else
                 f"telemt.py top: {error.name} is missing (OpenWrt: python3-email python3-urllib)")
        return 1
    once = options.once or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb"
    try:
        return int(api.run_top(host, port, settings.server.api.auth_header, options.interval, once, say))
    except api.TopError as error:
        complain(f"telemt.py top: {error}")
        return 1


def own_api(api: Api) -> tuple[str, int]:
    """Where our own API answers.  Raises ConfigError if the configuration has none."""
    place = parse_ip_port(api.listen)
    if not api.enabled or place is None or not place[1]:
        raise ConfigError("the API is off: write [server.api] enabled = true and restart the proxy", prefix=False)
    ip, port = place
    return str(ip) if not ip.is_unspecified else "::1" if ip.version == 6 else "127.0.0.1", port


def healthcheck(words: Sequence[str]) -> int:
    """`healthcheck [CONFIG]`: 0 if a client of ours gets an answer from a data centre and the API, where it is on, says ok."""
    parser = make_parser("healthcheck", "Ping the own listener with the first usable user, and ask the API where it is on.")
    parser.add_argument("config", nargs="?", default="config.toml", metavar="CONFIG", help="configuration file (default: config.toml)")
    options = parser.parse_args(words)
    try:
        settings = load_for(options.config).settings
        link = own_link(settings)
    except ConfigError as error:
        complain(f"telemt.py healthcheck: {error}")
        return 1
    pong = ping_one(link, [2], aloud=False)[0]
    trouble = f"{link.where}: failed at {pong.step}: {pong.reason}" if pong.step else ask_api(settings.server.api)
    if trouble:
        complain(f"telemt.py healthcheck: {trouble}")
        return 1
    say(f"{link.where}: healthy, {pong.total_s * 1000:.0f} ms to data centre 2")
    return 0


def own_link(settings: Settings) -> ProxyLink:
    """A link to ourselves for the first usable user.  Raises ConfigError if there is none."""
    access, modes, server = settings.access, settings.general.modes, settings.server
    now = time.time()
    limits = (access.user_max_tcp_conns, access.user_data_quota, access.user_max_unique_ips)
    usable = [name for name in access.users if access.user_enabled.get(name, True) and all(table.get(name) != 0 for table in limits)
              and (name not in access.user_expirations or access.user_expirations[name].timestamp() > now)]
    if not usable:
        raise ConfigError("no user is usable (disabled, expired or blocked by 0)", prefix=False)
    mode = "ee" if modes.tls else "dd" if modes.secure else "classic"
    secret, domain = bytes.fromhex(access.users[usable[0]]), settings.censorship.tls_domain if mode == "ee" else ""
    for entry in server.listeners:
        if settings.network.ipv6 if entry.ip.version == 6 else settings.network.ipv4:
            host = str(entry.ip) if not entry.ip.is_unspecified else "::1" if entry.ip.version == 6 else "127.0.0.1"
            announced = server.proxy_protocol if entry.proxy_protocol is None else entry.proxy_protocol
            return ProxyLink(host, server.port, secret, mode, domain, b"PROXY UNKNOWN\r\n" if announced else b"")
    if server.listen_unix_sock:
        return ProxyLink("", 0, secret, mode, domain, b"PROXY UNKNOWN\r\n" if server.proxy_protocol else b"", server.listen_unix_sock)
    raise ConfigError("no listener is configured", prefix=False)


def ask_api(api: Api) -> str:
    """What is wrong with our own API; empty if it is off or says ok."""
    try:
        host, port = own_api(api)
    except ConfigError:
        return ""
    import http.client
    connection = http.client.HTTPConnection(host, port, timeout=3)
    try:
        connection.request("GET", "/v1/health", headers={"Authorization": api.auth_header} if api.auth_header else {})
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return f"API at {format_address(host, port)}: {error}"
    finally:
        connection.close()
    return "" if status == 200 else f"API at {format_address(host, port)}: HTTP status {status}"


SUBCOMMANDS: Final[dict[str, Callable[[Sequence[str]], int]]] = {"check": check, "healthcheck": healthcheck, "links": links, "ping": ping,
                                                              "top": top}


# -- --init (config.md 6.2, 8 item 20)

_UNIT_PATH: Final = "/etc/systemd/system/telemt.service"
_USER_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_INIT_OPTIONS: Final = {"--port": "443", "--domain": "www.google.com", "--secret": "", "--user": "user", "--config-dir": "/etc/telemt"}
_INIT_FLAGS: Final = ("--init", "--no-start", "--force")
_INIT_CONFIG: Final = """\
show_link = ["{user}"]

[general]
prefer_ipv6 = false
fast_mode = true
use_middle_proxy = false
log_level = "normal"
desync_all_full = false
update_every = 43200
hardswap = false
me_pool_drain_ttl_secs = 90
me_pool_min_fresh_ratio = 0.8
me_reinit_drain_timeout_secs = 120

[general.modes]
classic = false
secure = false
tls = true

[network]
ipv4 = true
ipv6 = true
prefer = 4
multipath = false

[server]
port = {port}
listen_addr_ipv4 = "0.0.0.0"
listen_addr_ipv6 = "::"

[[server.listeners]]
ip = "0.0.0.0"

[[server.listeners]]
ip = "::"

[timeouts]
client_handshake = 15
tg_connect = 10
client_keepalive = 60
client_ack = 300

[censorship]
tls_domain = "{domain}"
mask = true
mask_port = 443
fake_cert_len = 2048
tls_full_cert_ttl_secs = 90

[access]
replay_check_len = 65536
replay_window_secs = 1800
ignore_time_skew = false

[access.users]
"{user}" = "{secret}"

[[upstreams]]
type = "direct"
enabled = true
weight = 10
"""
_UNIT: Final = """\
[Unit]
Description=telemt.py MTProto proxy{title}
Wants=network-online.target
After=network-online.target
# people wait for it: it is started again for as long as it takes
StartLimitIntervalSec=0

[Service]
# it says when it is ready, and which process it is after SIGUSR2: systemctl kill --kill-whom=main -s USR2 telemt
Type=notify
# -B: byte code could not be written beside the program
ExecStart={python} -B {script} {config}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=2
# SIGTERM, and wait until it is gone, which takes 4 s at most.  systemd left to itself kills at once a program that came by an
# exchange, because it was not its own child when it took over.
ExecStop=/bin/sh -c 'kill -TERM $MAINPID; exec tail -s 0.1 --pid=$MAINPID -f /dev/null'
TimeoutStopSec=10
# two per session
LimitNOFILE=65536

# A user of its own; systemd invents one where the system has no user `telemt`.  The API changes the configuration by writing a
# new file beside it and renaming, so the directory has to belong to that user, whoever wrote the file before.
DynamicUser=true
User=telemt
{directory}ExecStartPre=+/bin/chown -hR --reference=/var/lib/{state}/. {owned}
ReadWritePaths={owned}
UMask=0077

# caches and used quotas: relative paths of the configuration begin here
StateDirectory={state}
StateDirectoryMode=0700
WorkingDirectory=/var/lib/{state}

# ports below 1024, and nothing else that a user may not do
AmbientCapabilities=CAP_NET_BIND_SERVICE
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
NoNewPrivileges=true

ProtectSystem=strict
ProtectHome={home}
PrivateTmp=true
{bound}PrivateDevices=true
ProtectClock=true
ProtectControlGroups=true
ProtectHostname=true
ProtectKernelLogs=true
ProtectKernelModules=true
ProtectKernelTunables=true
ProtectProc=invisible
RestrictNamespaces=true
RestrictRealtime=true
RestrictSUIDSGID=true
RemoveIPC=true
LockPersonality=true
MemoryDenyWriteExecute=true
# without AF_NETLINK: an upstream that names an interface asks by ioctl and /proc for its addresses
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
_HIDDEN: Final = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")     # what a unit does not see of the file system


class InitRequest(NamedTuple):
    """What `--init` was asked for."""

    port: int
    domain: str
    secret: str
    user: str
    config_dir: str
    start: bool
    force: bool


def parse_init(words: Sequence[str]) -> InitRequest:
    """Read the sub-options of --init.  Raises ConfigError with the text after `[error] `."""
    values = dict(_INIT_OPTIONS)
    rest = iter(words)
    for word in rest:
        if word in values:
            value = next(rest, None)
            if value is None or value.startswith("-"):         # `--user --no-start` forgot the name
                raise ConfigError(f"{word} needs a value", prefix=False, invalid=True)
            values[word] = value
    secret = values["--secret"] or os.urandom(16).hex()
    if not re.fullmatch(r"[0-9A-Fa-f]{32}", secret):
        raise ConfigError("Secret must be exactly 32 hex characters", prefix=False)
    if not _USER_NAME.fullmatch(values["--user"]):
        raise ConfigError("User name must be 1..64 characters of A-Z a-z 0-9 _ . -", prefix=False)
    if not values["--domain"] or not values["--domain"].isprintable() or re.search(r"[\s/\"'\\\x00-\x1f\x7f]", values["--domain"]):
        raise ConfigError("Domain must not contain whitespace, '/' or quotes", prefix=False)
    port = parse_port(values["--port"])
    return InitRequest(443 if port is None else port, values["--domain"], secret, values["--user"], os.path.abspath(values["--config-dir"]),
                       "--no-start" not in words, "--force" in words)


def init(words: Sequence[str]) -> int:
    """Write a configuration and a systemd unit, and start it; return the exit code."""
    try:
        request = parse_init(words)
    except ConfigError as error:
        complain(f"[error] {error}")
        return 2 if error.invalid else 1
    path = os.path.join(request.config_dir, "config.toml")
    complain(f"[+] Secret: {request.secret}\n[+] User: {request.user}\n[+] Port: {request.port}\n[+] Domain: {request.domain}")
    if os.path.lexists(path) and not request.force:
        complain(f"[error] {path} exists; use --force to overwrite")
        return 1
    try:
        os.makedirs(request.config_dir, exist_ok=True)
        text = _INIT_CONFIG.format(user=request.user, port=request.port, domain=request.domain, secret=request.secret)
        write_whole(path, text, replace=request.force)
    except OSError as error:
        complain(f"[telemt] Init failed: {error.strerror}: {path}")
        return 1
    complain(f"[+] Config written to {path}")
    install_unit(request, path)
    link = f"tg://proxy?server=YOUR_SERVER_IP&port={request.port}&secret=ee{request.secret}{request.domain.encode().hex()}"
    say(f"--- Proxy Links (YOUR_SERVER_IP) ---\nUser: {request.user}\n  EE-TLS:  {link}\n------------------------\n"
        "Put the address of this server in place of YOUR_SERVER_IP.")
    return 0


def build_unit(python: str, script: str, config: str, owned: str = "/etc/telemt", state: str = "telemt", title: str = "",
               reads: Sequence[str] = ()) -> str:
    """Text of a systemd unit; deploy/systemd/ holds what this returns for the places where `make install` puts things.

    owned: what is handed to the user of the service.  reads: files and directories that it needs beside the program.
    """
    keep = [f"-{at}" for at in dict.fromkeys([script, *reads]) if at.startswith(_HIDDEN)]
    write = [owned] if f"{owned}/".startswith(_HIDDEN) else []
    home = any(at.lstrip("-").startswith(_HIDDEN[:3]) for at in (*keep, *write))
    bound = "".join([f"BindReadOnlyPaths={unit_word(at)}\n" for at in keep] + [f"BindPaths={unit_word(at)}\n" for at in write])
    return _UNIT.format(
        python=unit_word(python), script=unit_word(script), config=unit_word(config), owned=unit_word(owned), state=state, title=title,
        directory="ConfigurationDirectory=telemt\nConfigurationDirectoryMode=0750\n" if owned == "/etc/telemt" else "",
        home="tmpfs" if home else "true", bound="# the only things that are not hidden there\n" + bound if bound else "")


def install_unit(request: InitRequest, path: str) -> None:
    """Write the systemd unit and start it; what fails is printed, and nothing of it is fatal."""
    script = os.path.realpath(main.__code__.co_filename)
    if os.path.basename(script) == "__main__.py":              # inside telemt.pyz
        script = os.path.dirname(script)
    reads = [*([os.path.join(os.path.dirname(script), "telemt_api.py")] if script.endswith(".py") else []),
             *(way for at in (sys.prefix, sys.base_prefix) for way in (at, os.path.realpath(at)))]
    ours = request.config_dir == "/etc/telemt" or all(name.endswith(".toml") for name in os.listdir(request.config_dir))
    if not ours:                               # somebody's home, perhaps: never handed over as a whole
        complain(f"[!] {request.config_dir} holds other things too: the service gets only {path}, and its API cannot add users")
    for at in (script, *reads):
        if not readable_for_all(at):
            complain(f"[!] {at} must be readable for every user, because the service has one of its own: chmod -R a+rX {at}")
    unit = build_unit(sys.executable, script, path, request.config_dir if ours else path, reads=reads)
    try:
        write_whole(_UNIT_PATH, unit, replace=True, mode=0o644)
    except OSError as error:
        complain(f"[!] {_UNIT_PATH}: {error.strerror}; install this unit yourself:\n{unit}")
        return
    complain(f"[+] Unit written to {_UNIT_PATH}")
    for step in [["daemon-reload"], ["enable", "telemt.service"]] + [["start", "telemt.service"]] * request.start:
        run_systemctl(step)
    if request.start:
        time.sleep(1)
        run_systemctl(["is-active", "telemt.service"])


def readable_for_all(path: str) -> bool:
    """Whether the user of the service can read this; what its unit hides and shows to it again needs no way there."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True                            # not there: not needed
    wanted = 0o005 if stat.S_ISDIR(mode) else 0o004
    above = [] if path.startswith(_HIDDEN) else list(itertools.accumulate(os.path.dirname(path).split("/"), "{}/{}".format))
    return mode & wanted == wanted and all(os.stat(at or "/").st_mode & 0o001 for at in above)


def unit_word(text: str) -> str:
    """A path as one word of a systemd unit (systemd.syntax(7)): specifiers doubled, quoted where it must be."""
    text = text.replace("%", "%%")
    return text if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def run_systemctl(words: list[str]) -> None:
    """Run one systemctl step and say how it went."""
    import subprocess  # half a megabyte for a subcommand
    try:
        result = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        complain(f"[!] systemctl {' '.join(words)}: {error}")
        return
    mark = "[+]" if result.returncode == 0 else "[!]"
    complain(f"{mark} systemctl {' '.join(words)}: {(result.stdout + result.stderr).strip() or 'ok'}")


log_cli: Final = Log("cli")


def run_and_exit() -> NoReturn:
    """Run the program and leave.

    A helper thread that is still in a call would wake up in an interpreter that is being taken apart: in one of many thousand stops
    that was a SIGSEGV instead of the exit code.  All is written and closed by then, so nothing is taken apart.
    """
    import _thread
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:                  # a subcommand; the proxy itself stops in order
        code = 130
    if not _thread._count():
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):     # closed, or none
            stream.flush()
    os._exit(code)


if __name__ == "__main__" and not _AFRESH:     # else _LOADER calls it
    run_and_exit()
