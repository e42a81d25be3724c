#!/usr/bin/env python3
"""fuzz - throw mutated input at every parser of telemt.py and telemt_api.py (tools/fuzz_targets.py lists them).

usage: fuzz.py [--runs N | --minutes M] [--seed S] [--target NAME]... [--out DIR] [--engine own|atheris|both]
       fuzz.py --replay FILE --target NAME
       fuzz.py --list | --planted

A parser may raise its one kind of error (WireError for bytes of a peer, ConfigError for text of the operator) and
nothing else, must come back within two seconds of processor time, must not ask for a gigabyte, must not keep what it
was given, and must keep the promises that its target asserts.  A finding is cut down to a small input, written to
DIR/NAME-HASH.bin (default build/fuzz) with the command that repeats it, and ends the program with exit 1.

The own mutator starts from valid inputs; an input joins the corpus when it made the parser say something new, or (from
CPython 3.12 on, by sys.monitoring) run a line that had not run before.  Where atheris is installed, its coverage-guided
engine gets half of the time of --minutes.  --planted fuzzes parsers with a known fault of each kind: all must be found,
and it exits 1.  Runs of the own mutator can be repeated with the seed that is printed first.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from fuzz_targets import ROOT, Target, all_targets

HANG_S = 2.0                # of processor time: a machine that is busy with other things changes nothing
STUCK_S = 60.0              # of the wall: waiting for what never comes
MEMORY_MAX = 1 << 30        # bytes of address space that one input may ask for
GROWTH_MAX = 48 << 20       # bytes that all inputs together may leave behind
GROWTH_EVERY = 2_000        # inputs between two looks at that
CORPUS_MAX = 400
INPUT_MAX = 70_000
MINIMISE_TRIES = 3_000
FOUND = 77                  # exit code of the guided engine
EDGE_BYTES = (0, 1, 2, 3, 0x0A, 0x14, 0x15, 0x16, 0x17, 0x20, 0x22, 0x7F, 0x80, 0xEF, 0xFE, 0xFF)
EDGE_WORDS = (0, 1, 4, 32, 255, 256, 512, 0x303, 0x4000, 0x4100, 0x4101, 0x7FFF, 0x8000, 0xFFFF)
EDGE_NUMBERS = (b"0", b"-1", b"1", b"255", b"256", b"65535", b"65536", b"9223372036854775807", b"9223372036854775808", b"1e400", b"nan")


class Hang(BaseException):
    """The parser did not come back in time; not an Exception, so that no parser takes it for its own."""


class Leak(Exception):
    """Memory grew with every input."""


class Finding(NamedTuple):
    """An input that a target could not take, as small as we got it."""

    target: str
    data: bytes
    error: str

    @property
    def file_name(self) -> str:
        """Name of the reproducer."""
        return f"{self.target}-{hashlib.sha256(self.data).hexdigest()[:12]}.bin"


# -- mutations: each takes and returns a bytearray ---------------------------------------------------------------------------------

class Mutator:
    """Changes inputs by the rules of one seeded generator."""

    def __init__(self, rng: random.Random, words: Sequence[bytes]) -> None:
        self.rng, self.words = rng, words
        self.ways = (self.flip_bit, self.set_byte, self.set_any_byte, self.step_byte, self.set_word, self.insert, self.delete,
                     self.repeat, self.cut, self.cross, self.change_number, *((self.insert_word,) * 3 if words else ()))

    def make(self, corpus: Sequence[bytes]) -> bytes:
        """Return a new input made from one or two of `corpus`, rarely from nothing."""
        if self.rng.random() < 0.03:
            return self.rng.randbytes(self.rng.randrange(200))
        data = bytearray(self.rng.choice(corpus[-3:] if self.rng.random() < 0.2 else corpus))        # the newest got furthest
        for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
            self.rng.choice(self.ways)(data, corpus)
        return bytes(data[:INPUT_MAX])

    def place(self, data: bytearray) -> int:
        """Some index into `data`, more often near the front, where the headers are."""
        return self.rng.randrange(min(len(data), 64) if self.rng.random() < 0.4 else len(data)) if data else 0

    def size(self) -> int:
        """A length: mostly short."""
        return self.rng.choice((1, 1, 2, 3, 4, 8, 16, 64, 300))

    def flip_bit(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Flip one bit."""
        if data:
            data[self.place(data)] ^= 1 << self.rng.randrange(8)

    def set_byte(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Set one byte to a value that often matters."""
        if data:
            data[self.place(data)] = self.rng.choice(EDGE_BYTES)

    def set_any_byte(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Set one byte to any value."""
        if data:
            data[self.place(data)] = self.rng.randrange(256)

    def step_byte(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Make one byte larger or smaller by one: limits are missed by one."""
        if data:
            at = self.place(data)
            data[at] = (data[at] + self.rng.choice((-1, 1))) % 256

    def set_word(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Set two bytes as a big-endian length would be."""
        at = self.place(data)
        value = self.rng.choice(EDGE_WORDS) if self.rng.random() < 0.5 else max(0, min(len(data) - at + self.rng.randrange(-6, 7), 0xFFFF))
        data[at:at + 2] = value.to_bytes(2, "big")

    def insert(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Insert random bytes."""
        at = self.place(data)
        data[at:at] = self.rng.randbytes(self.size())

    def insert_word(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Insert something the format is made of, or put it in place of as many bytes."""
        at, word = self.place(data), self.rng.choice(self.words)
        data[at:at + (len(word) if self.rng.random() < 0.5 else 0)] = word

    def delete(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Take a piece out."""
        at = self.place(data)
        del data[at:at + self.size()]

    def repeat(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Copy a piece to another place."""
        start, size = self.place(data), self.size()
        at = self.place(data)
        data[at:at] = data[start:start + size]

    def cut(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """End early."""
        del data[self.place(data):]

    def cross(self, data: bytearray, corpus: Sequence[bytes]) -> None:
        """Go on with the rest of another input."""
        other = self.rng.choice(corpus)
        data[self.place(data):] = other[self.rng.randrange(len(other) + 1):]

    def change_number(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Replace a run of digits."""
        at = self.place(data)
        start = next((i for i in range(at, min(len(data), at + 200)) if 48 <= data[i] <= 57), None)
        if start is not None:
            end = next((i for i in range(start, len(data)) if not 48 <= data[i] <= 57), len(data))
            data[start:end] = self.rng.choice(EDGE_NUMBERS)


# -- one target --------------------------------------------------------------------------------------------------------------------

class Coverage:
    """Tells whether a line of the two books ran for the first time; costs nothing once all have.  Always False before 3.12."""

    def __init__(self) -> None:
        self.fresh = False
        self.monitoring: Any = getattr(sys, "monitoring", None)

    def __enter__(self) -> Coverage:
        if self.monitoring is not None and self.monitoring.get_tool(self.monitoring.COVERAGE_ID) is not None:
            self.monitoring = None               # somebody measures already
        if self.monitoring is not None:
            self.monitoring.use_tool_id(self.monitoring.COVERAGE_ID, "fuzz")
            self.monitoring.register_callback(self.monitoring.COVERAGE_ID, self.monitoring.events.LINE, self._on_line)
            self.monitoring.set_events(self.monitoring.COVERAGE_ID, self.monitoring.events.LINE)
            self.monitoring.restart_events()
        return self

    def __exit__(self, *_: object) -> None:
        if self.monitoring is not None:
            self.monitoring.set_events(self.monitoring.COVERAGE_ID, 0)
            self.monitoring.free_tool_id(self.monitoring.COVERAGE_ID)

    def _on_line(self, code: CodeType, _line: int) -> object:
        if "telemt" in code.co_filename or code.co_name.startswith("planted"):
            self.fresh = True
        return self.monitoring.DISABLE

    def take(self) -> bool:
        """Whether a new line ran since the last call."""
        fresh, self.fresh = self.fresh, False
        return fresh


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Clocks and memory of inputs, in the main thread; elsewhere nothing is limited."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_alarm) for number in (signal.SIGALRM, signal.SIGPROF)}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_MAX, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number, handler in before.items():
            signal.signal(number, handler)


def on_alarm(signum: int, _frame: object) -> None:
    """A clock of try_input ran out."""
    raise Hang(f"no answer within {HANG_S:g} s of work" if signum == signal.SIGPROF else f"no answer within {STUCK_S:g} s")


def set_clocks(work_s: float, wall_s: float) -> None:
    """0 = off."""
    signal.setitimer(signal.ITIMER_PROF, work_s)
    signal.setitimer(signal.ITIMER_REAL, wall_s)


def try_input(target: Target, data: bytes) -> tuple[str, BaseException | None]:
    """Return what the target answered, in a word that tells answers apart, and the exception if it was not an allowed one."""
    watch = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGPROF) is on_alarm
    if watch:
        set_clocks(HANG_S, STUCK_S)
    try:
        answer = target.call(data)
    except target.allowed as error:
        return f"{type(error).__name__}: {getattr(error, 'reason', str(error)[:24])}", None
    except (Exception, Hang) as error:
        return where(error), error
    finally:
        if watch:
            set_clocks(0, 0)
    return f"ok: {answer if isinstance(answer, int | str) else type(answer).__name__}", None


def where(error: BaseException) -> str:
    """Type of an exception and the line that raised it: two findings with the same word are one fault."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else type(error).__name__


def minimise(target: Target, data: bytes, fault: str) -> bytes:
    """Return a smaller input with the same fault: drop pieces, halves first."""
    tries, size = 0, max(1, len(data) // 2)
    while size and tries < MINIMISE_TRIES:
        at = 0
        while at < len(data) and tries < MINIMISE_TRIES:
            shorter = data[:at] + data[at + size:]
            tries += 1
            word, error = try_input(target, shorter)
            if error is not None and word == fault:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def found(target: Target, data: bytes, word: str, error: BaseException) -> Finding:
    """The finding behind a fault, cut down; what takes long is not tried again."""
    small = data if isinstance(error, Hang | Leak | MemoryError) else minimise(target, data, word)
    return Finding(target.name, small, "".join(traceback.format_exception(error)))


def fuzz(target: Target, runs: int, seed: int, seconds: float = 0.0) -> Finding | None:
    """Give `target` its seeds and then `runs` mutated inputs, or as many as fit into `seconds`; the first fault, or None."""
    rng = random.Random(f"{seed}/{target.name}")
    mutator, corpus, heard = Mutator(rng, target.words), list(target.seeds), set[str]()
    run, until, base = -len(target.seeds), time.monotonic() + seconds, 0
    runs = -(-runs // target.cost)
    with limits(), Coverage() as coverage:
        while (time.monotonic() < until) if seconds and run >= 0 else run < runs:
            data = target.seeds[run] if run < 0 else mutator.make(corpus)
            word, error = try_input(target, data)
            if error is not None:
                return found(target, data, word, error)
            if (coverage.take() or word not in heard) and len(corpus) < CORPUS_MAX and run >= 0:
                corpus.append(data)
            heard.add(word)
            run += 1
            if run % GROWTH_EVERY == 0:
                base = base or rss()             # the first look is behind the warm-up
                if rss() - base > GROWTH_MAX:
                    return found(target, data, "Leak", Leak(f"{(rss() - base) >> 20} MiB more after {run} inputs"))
    return None


# -- faults on purpose -------------------------------------------------------------------------------------------------------------

def planted_targets() -> list[Target]:
    """One parser per kind of fault, each behind something that valid input nearly has."""
    kept: list[bytes] = []

    def planted_crash(data: bytes) -> int:
        if data[:2] != b"\x16\x03" or len(data) < 6:
            raise ValueError("not a record")
        return data[data[5] + 6] if data[5] > 0xF0 else len(data)          # trusts the length

    def planted_wrong_error(data: bytes) -> int:
        if not data.startswith(b"port="):
            raise ValueError("not a port")
        return {b"80": 1, b"443": 2}[data[5:]] if data[5:].isdigit() else 0    # KeyError is not what it may raise

    def planted_hang(data: bytes) -> int:
        at = 0
        while at < len(data):
            at += data[at]                       # a length of 0 stays where it is
        return at

    def planted_stall(data: bytes) -> None:
        if data[:1] == b"\xff":
            time.sleep(3600)                     # waits for what never comes

    def planted_slow(data: bytes) -> int:
        return sum(data[at:].count(b"(") for at in range(len(data)) for _ in range(len(data))) if len(data) > 400 else 0

    def planted_memory(data: bytes) -> int:
        return len(bytes(int.from_bytes(data[:4], "big"))) if len(data) >= 4 else 0        # a buffer before a limit

    def planted_leak(data: bytes) -> int:
        kept.append(data * 2000)                 # keeps what it was given
        return len(kept) % 2

    def planted_promise(data: bytes) -> int:
        whole, cut = data.split(b","), data[:3].split(b",") + data[3:].split(b",")
        assert len(whole) + (len(data) > 2) >= len(cut) - data.count(b";;"), "a cut reads otherwise"
        return len(whole)

    record = b"\x16\x03\x01\x00\x20\x01" + bytes(30)
    return [Target("crash", planted_crash, [record], (ValueError,)),
            Target("wrong_error", planted_wrong_error, [b"port=443"], (ValueError,)),
            Target("hang", planted_hang, [b"\x01\x02\x03\x04"], ()), Target("stall", planted_stall, [b"\x01abc"], ()),
            Target("slow", planted_slow, [b"(" * 300], ()), Target("memory", planted_memory, [b"\0\0\1\0abc"], (ValueError,)),
            Target("leak", planted_leak, [b"0123456789" * 3], ()), Target("promise", planted_promise, [b"ab,cd,ef;gh"], (), [b";", b","])]


def planted_maze(data: bytes) -> int:
    """Six bytes in the right order, each a branch: nobody finds them who does not see how far he came."""
    if len(data) >= 6:
        if data[0] == 0x13:
            if data[1] == 0x57:
                if data[2] == 0x9B:
                    if data[3] == 0xDF:
                        if data[4] == 0x24:
                            if data[5] == 0x68:
                                raise KeyError("the middle of the maze")
    return 0


MAZE = Target("maze", planted_maze, [bytes(6)], ())


# -- command line ------------------------------------------------------------------------------------------------------------------

def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="fuzz.py", description="Throw mutated input at every pure parser of telemt.py.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--runs", type=int, default=100_000, help="inputs per target (default 100000)")
    length.add_argument("--minutes", type=float, default=0.0, help="instead: time for all targets together")
    parser.add_argument("--engine", choices=("own", "atheris", "both"), default="both", help="atheris takes part in --minutes only")
    parser.add_argument("--seed", type=int, help="repeat an earlier run")
    parser.add_argument("--target", action="append", default=[], metavar="NAME", help="only this one; may be given several times")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz", metavar="DIR", help="where reproducers go")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="give one file to the target")
    parser.add_argument("--list", action="store_true", help="print the targets")
    parser.add_argument("--planted", action="store_true", help="fuzz parsers with known faults")
    return parser.parse_args(words)


def report(finding: Finding, out: Path) -> None:
    """Write the reproducer and say how to use it."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / finding.file_name
    path.write_bytes(finding.data)
    print(f"\n{finding.error}\n{finding.target}: {len(finding.data)} bytes in {path}")
    print(f"repeat: python3 tools/fuzz.py --replay {path} --target {finding.target}", flush=True)


def replay(targets: Sequence[Target], path: Path) -> int:
    """Give one file to the targets; 1 if it is a fault."""
    with limits():
        for target in targets:
            word, error = try_input(target, path.read_bytes())
            print(f"{target.name}: {word}")
            if error is not None:
                traceback.print_exception(error)
                return 1
    return 0


def guided(target: Target, seconds: float, seed: int, out: Path) -> bool:
    """Let atheris look for so long, in a process of its own, because it never comes back; whether it found something."""
    tool = Path(__file__).resolve().parent / "fuzz_atheris.py"
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-B", str(tool), target.name, f"{max(1, round(seconds))}", str(seed % (1 << 31)), str(out), folder]
        run = subprocess.run(words, check=False, capture_output=True, text=True, errors="replace")
    print(run.stdout, end="", flush=True)
    if run.returncode not in (0, FOUND):         # of this tool
        print(run.stderr[-4000:], file=sys.stderr)
    return run.returncode != 0


def main(words: Sequence[str]) -> int:
    """0 nothing found, 1 a fault, 2 wrong use."""
    options = arguments(words)
    known = {target.name: target for target in (planted_targets() if options.planted else [*all_targets(), MAZE])}
    if options.list:
        print("\n".join(name for name in known if name != MAZE.name))
        return 0
    if unknown := [name for name in options.target if name not in known]:
        print(f"no such target: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.target or known if options.target or name != MAZE.name]
    if options.replay:
        return replay(chosen, options.replay)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    engines = ["own", *(["atheris"] if options.minutes and importlib.util.find_spec("atheris") else [])]
    engines = [name for name in engines if options.engine in (name, "both")]
    share = options.minutes * 60 / len(chosen) / max(1, len(engines))
    length = f"{share:.0f} s" if share else f"{options.runs} inputs"
    print(f"seed {seed}, {length} for each of {len(chosen)} targets, engines: {', '.join(engines) or 'none'}", flush=True)
    faults = [target.name for target in chosen if not try_target(target, engines, options, share, seed)]
    missed = [target.name for target in chosen if target.name not in faults] if options.planted else []
    if missed:
        print(f"NOT FOUND: {', '.join(missed)}")
        return 2
    return int(bool(faults) or not engines)


def try_target(target: Target, engines: Sequence[str], options: argparse.Namespace, share: float, seed: int) -> bool:
    """One target with all engines; whether it is sound."""
    sound = True
    if "own" in engines:
        finding = fuzz(target, options.runs, seed, share)
        sound = finding is None
        if finding is not None:
            report(finding, options.out)
    if "atheris" in engines and sound:
        sound = not guided(target, share, seed, options.out)
    print(f"{target.name:<16} {'ok' if sound else 'FAULT'}", flush=True)
    return sound


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
