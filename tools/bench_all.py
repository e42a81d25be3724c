"""`make bench`: all benches one after the other, as one run that may be interrupted and goes on where it was.

usage: bench_all.py [--quick] [--fresh] [WORD ...]       WORD ...: arguments for bench.py, which then runs alone

What is done is remembered in build/bench until all is, unless the program or a bench has changed since: each bench, and each row of
bench.py.  --fresh forgets it.  A missed target does not end the run.  At the end it says how long each took.
"""
from __future__ import annotations

import subprocess
import sys
import time

from bench import ROOT, TOOLS
from bench_report import MISSED, Kept

STEPS = {"bench.py": ["--quick"], "bench_middle.py": ["--quick"], "bench_api.py": ["--rounds", "1", "--seconds", "0.5"],
         "bench_strangers.py": ["--quick"]}                                     # with the arguments of the quick form
LONG_ONLY = ("bench_pollers.py",)              # compares what nobody changes from day to day


def run(name: str, words: list[str]) -> list[float]:
    """One bench: its exit code and how many seconds it took; SystemExit if it broke."""
    print(f"== {name} {' '.join(words)}", flush=True)
    begin = time.monotonic()
    code = subprocess.run([sys.executable, str(TOOLS / name), *words], check=False, cwd=ROOT).returncode
    if code not in (0, MISSED):
        raise SystemExit(f"{name} broke: mend it, then the same command goes on there")
    return [code, time.monotonic() - begin]


def main(words: list[str]) -> int:
    """Run them all."""
    quick = "--quick" in words
    others = [word for word in words if word not in ("--quick", "--fresh")]
    if others:
        run("bench.py", [*others, *(["--quick"] if quick else [])])
        return 0
    if "--fresh" in words:
        Kept.forget()
    kept = Kept("all", use=not quick)
    took = {name: kept.part(name, lambda name=name: run(name, STEPS[name] if quick else ["--write"]))  # type: ignore[misc]
            for name in (*STEPS, *(() if quick else LONG_ONLY))}
    if not quick:
        Kept.forget()
    print("\n".join(f"{name:20} {seconds:5.0f} s{'  a target is missed' if code else ''}" for name, (code, seconds) in took.items()))
    print(f"{'together':20} {sum(seconds for _, seconds in took.values()):5.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
