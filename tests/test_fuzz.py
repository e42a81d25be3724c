"""The short form of `make fuzz`, and the proof that the fuzzer finds what it looks for."""
from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz

ROOT = Path(__file__).resolve().parent.parent
TARGETS = fuzz.all_targets()
RUNS = 1_000
SEED = 1                     # the short form repeats; `make fuzz` draws a new seed each time


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    """Run tools/fuzz.py."""
    return subprocess.run([sys.executable, str(ROOT / "tools" / "fuzz.py"), *words], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_only_its_own_error_leaves_a_parser(target: fuzz.Target) -> None:
    finding = fuzz.fuzz(target, RUNS, SEED)
    assert finding is None, f"seed {SEED}: {finding.data!r}\n{finding.error}"


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_seeds_are_worth_mutating(target: fuzz.Target) -> None:
    answers = [fuzz.try_input(target, seed)[0] for seed in target.seeds]
    assert any(answer.startswith("ok") for answer in answers), answers


PLANTED = {"crash": "IndexError", "wrong_error": "KeyError", "hang": "s of work", "stall": "no answer within", "slow": "s of work",
           "memory": "MemoryError", "leak": "MiB more after", "promise": "a cut reads otherwise"}


@pytest.mark.parametrize("target", fuzz.planted_targets(), ids=lambda target: target.name)
def test_a_planted_fault_of_each_kind_is_found(target: fuzz.Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANG_S", 0.05)
    monkeypatch.setattr(fuzz, "STUCK_S", 0.2 if target.name == "stall" else 60)
    monkeypatch.setattr(fuzz, "GROWTH_EVERY", 200)
    finding = fuzz.fuzz(target, 5_000, SEED)
    assert finding is not None and PLANTED[target.name] in finding.error, finding


def test_every_kind_of_fault_is_planted() -> None:
    assert {target.name for target in fuzz.planted_targets()} == PLANTED.keys()


def test_a_fault_is_cut_down_saved_and_repeatable(tmp_path: Path) -> None:
    run = tool("--planted", "--target", "crash", "--runs", "2000", "--seed", "7", "--out", str(tmp_path))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "seed 7" in run.stdout
    [reproducer] = tmp_path.iterdir()
    assert len(reproducer.read_bytes()) == 6
    [command] = re.findall("repeat: python3 tools/fuzz.py (.*)", run.stdout)
    again = tool("--planted", *command.split())
    assert again.returncode == 1 and "crash: IndexError" in again.stdout
    assert tool("--planted", "--target", "crash", "--runs", "0").returncode == 2, "planted and not found is no success"


def test_no_parser_swallows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(data: bytes) -> None:
        try:
            while data[:1] != b"\0":
                pass
        except Exception:
            pass

    monkeypatch.setattr(fuzz, "HANG_S", 0.05)
    finding = fuzz.fuzz(fuzz.Target("hang", parse, [b"\0"], (ValueError,)), 100, 1)
    assert finding is not None and "Hang" in finding.error


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is of CPython 3.12")
def test_lines_that_run_for_the_first_time_lead_into_the_maze() -> None:
    finding = fuzz.fuzz(fuzz.MAZE, 1_000_000, SEED)
    assert finding is not None and "the middle of the maze" in finding.error


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="no atheris for this Python")
def test_atheris_finds_its_way_through_the_maze(tmp_path: Path) -> None:
    run = tool("--target", "maze", "--engine", "atheris", "--minutes", "1", "--out", str(tmp_path), "--seed", "1")
    assert run.returncode == 1 and "the middle of the maze" in run.stdout, run.stdout + run.stderr
    [reproducer] = tmp_path.iterdir()
    assert "maze: KeyError" in tool("--replay", str(reproducer), "--target", "maze").stdout


def test_a_run_can_be_repeated() -> None:
    def record(heard: list[bytes]) -> list[bytes]:
        assert fuzz.fuzz(fuzz.Target("echo", heard.append, [b"0123456789", b"abc"], ()), 50, 3) is None
        return heard

    assert record([]) == record([])


def test_wrong_use_of_the_fuzzer() -> None:
    assert tool("--target", "nobody").returncode == 2
    assert tool("--runs", "1", "--minutes", "1").returncode == 2
