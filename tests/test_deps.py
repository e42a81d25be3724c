"""tools/deps_test.sh: whatever is missing, `make deps-test` ends well and says what that means; nothing is installed here."""
import subprocess
from pathlib import Path

TOOL = Path(__file__).resolve().parent.parent / "tools" / "deps_test.sh"


def deps_test(folder, **fakes):
    """Output of a run that sees only the programs given here (and what /usr/sbin has)."""
    for name, code in fakes.items():
        (folder / name).write_text(f"#!/bin/sh\n{code}\n")
        (folder / name).chmod(0o755)
    run = subprocess.run(["/bin/sh", str(TOOL)], check=False, capture_output=True, text=True, timeout=20, env={"PATH": str(folder)})
    assert run.returncode == 0 and run.stderr == ""
    return run.stdout


def test_without_root_it_says_so(tmp_path):
    said = deps_test(tmp_path, **{"apt-get": "echo apt was called >&2", "id": "echo 1000"})
    assert "not root; tests that need one of these are skipped:" in said and " curl" in said


def test_without_apt_it_says_so(tmp_path):
    assert "no apt here" in deps_test(tmp_path, id="echo 0")


def test_installed_programs_need_no_apt(tmp_path):
    wanted = {pair.split(":")[0] for pair in TOOL.read_text().partition('WANTED="')[2].partition('"')[0].split()}
    assert {"nginx", "haproxy", "curl"} <= wanted
    said = deps_test(tmp_path, **dict.fromkeys(wanted, "exit 0"), **{"apt-get": "echo apt was called >&2"})
    assert said == "deps-test: everything is installed\n"
