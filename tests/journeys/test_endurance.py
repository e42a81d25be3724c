"""`make soak` in three seconds: all instances, everybody at once, and the same judge."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from doubles import ROOT


def test_a_short_soak_is_sound(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    run = subprocess.run([sys.executable, str(ROOT / "tools" / "soak.py"), "--seconds", "3", "--out", str(out)], check=False,
                         capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(out.read_text())
    assert found["findings"] == []
    for name in ("direct", "middle", "exchanged"):
        row = found["results"][name]
        assert row["sessions"] > 5 and row["strangers"] > 1 and row["changes"] > 0 and row["hangups"] > 0, row
