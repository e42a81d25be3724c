"""The short form of `make fuzz`, and the proof that the fuzzer finds what it looks for."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fuzz

ROOT = Path(__file__).resolve().parent.parent
TARGETS = fuzz.all_targets()
RUNS = 2_000
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


def test_a_planted_fault_is_found_cut_down_and_repeatable(tmp_path: Path) -> None:
    run = tool("--planted", "--runs", "2000", "--seed", "7", "--out", str(tmp_path))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "seed 7" in run.stdout
    [reproducer] = tmp_path.iterdir()
    assert len(reproducer.read_bytes()) == 6
    assert "IndexError" in tool("--planted", "--replay", str(reproducer)).stdout


def test_a_parser_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(data: bytes) -> None:
        while data[:1] != b"\0":
            pass

    monkeypatch.setattr(fuzz, "HANG_S", 0.05)
    finding = fuzz.fuzz(fuzz.Target("hang", parse, [b"\0"], (ValueError,)), 100, 1)
    assert finding is not None
    assert "Hang" in finding.error


def test_a_run_can_be_repeated() -> None:
    def record(heard: list[bytes]) -> list[bytes]:
        assert fuzz.fuzz(fuzz.Target("echo", heard.append, [b"0123456789", b"abc"], ()), 50, 3) is None
        return heard

    assert record([]) == record([])


def test_an_unknown_target_is_wrong_use() -> None:
    assert tool("--target", "nobody").returncode == 2
