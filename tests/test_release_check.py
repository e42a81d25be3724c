"""tools/release_check.py: a project without fault passes; each planted fault is named with its cure."""
from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import make_dist
import release_check

ROOT = Path(__file__).resolve().parent.parent
VERSION = make_dist.version(ROOT)


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@example.com", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a release is made of, as the only commit of a repository; its documents are current and its CHANGELOG is dated."""
    root = tmp_path_factory.mktemp("release")
    for name in ("telemt.py", "telemt_api.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    for name in ("docs", "deploy", "tools"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "images", "performance.md"))
    (root / "CHANGELOG.md").write_text(f"# Changelog\n\n## [{VERSION}] - 2026-01-31\n\n- All.\n\n## [0.0.9] - 2025-01-31\n")
    git(root, "-c", "init.defaultBranch=main", "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "all")
    return root


@pytest.fixture
def project(shelf: Path) -> Iterator[Path]:
    yield shelf
    git(shelf, "checkout", "-q", "main")
    git(shelf, "reset", "-q", "--hard", "main")
    git(shelf, "clean", "-qfd")


def replace(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text(encoding="utf-8")
    assert old in text
    (root / name).write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_project_without_fault_is_ready(project: Path) -> None:
    run = subprocess.run([sys.executable, "-B", str(ROOT / "tools/release_check.py"), str(project)], check=False, capture_output=True,
                         text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, f"{VERSION}: ready for release\n"), run.stdout + run.stderr


PLANTED: dict[str, tuple[str, Callable[[Path], object], str, str]] = {       # check, fault, finding, cure
    "package": ("version", lambda root: replace(root, "pyproject.toml", f'version = "{VERSION}"', 'version = "7.7.7"'),
                "pyproject.toml: version 7.7.7", f'version = "{VERSION}"'),
    "book": ("version", lambda root: replace(root, "telemt.py", f'VERSION: Final = "{VERSION}"', 'VERSION: Final = "1.0"'),
             "VERSION is '1.0'", "MAJOR.MINOR.PATCH"),
    "readme": ("version", lambda root: replace(root, "README.md", "\n", "\nThis is telemt.py 7.7.7.\n"),
               "README.md:2: shows version 7.7.7", f"write {VERSION}"),
    "image": ("version", lambda root: (root / "deploy" / "x.yml").write_text("image: telemt-py:7.7.7\n"),
              "deploy/x.yml:1: shows version 7.7.7", f"write {VERSION}"),
    "no heading": ("changelog", lambda root: replace(root, "CHANGELOG.md", f"## [{VERSION}]", "## [7.7.7]"),
                   f"no heading for {VERSION}", f"## [{VERSION}] - YYYY-MM-DD"),
    "later heading": ("changelog", lambda root: replace(root, "CHANGELOG.md", "## [", "## [7.7.7] - 2026-02-01\n\n## ["),
                      f"7.7.7 stands above {VERSION}", "raise VERSION"),
    "tagged": ("tag", lambda root: (git(root, "tag", "-f", f"v{VERSION}"), git(root, "checkout", "-q", "--detach"),
                                    git(root, "commit", "-q", "--allow-empty", "-m", "later")),
               "is the tag of another commit", "raise VERSION"),
    "key": ("documents", lambda root: replace(root, "docs/configuration.md", "| key |", "| k3y |"),
            "docs/configuration.md: not current", "make docs"),
    "unit": ("documents", lambda root: replace(root, "deploy/systemd/telemt.service", "NoNewPrivileges=true\n", ""),
             "deploy/systemd/telemt.service: not current", "make docs"),
    "broken generator": ("documents", lambda root: replace(root, "tools/make_docs.py", "import json", "import jsom"),
                         "make_docs.py fails: ModuleNotFoundError", "mend it"),
    "edited": ("tree", lambda root: replace(root, "telemt_api.py", "\n", "\n\n"), "telemt_api.py is not committed", "commit it"),
    "stray": ("tree", lambda root: (root / "notes.txt").write_text("x") and None, "notes.txt is not tracked", "take it away"),
    "clock": ("dist", lambda root: (replace(root, "tools/make_dist.py", "info = zipfile.ZipInfo(name, EPOCH)",
                                            "info = zipfile.ZipInfo(name, (2000 + os.getpid() % 99, 1, 1, 0, 0, 0))"),
                                    git(root, "commit", "-q", "-a", "-m", "clock")),
              "telemt.pyz", "nothing of a machine"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(project: Path, fault: str) -> None:
    check, plant, what, cure = PLANTED[fault]
    head = subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    try:
        plant(project)
        found = list(getattr(release_check, f"look_at_{check}")(project))
        assert [finding for finding in found if what in finding.what and cure in finding.cure and not finding.note], found
    finally:
        git(project, "checkout", "-qf", "main")
        git(project, "reset", "-q", "--hard", head)
        subprocess.run(["git", "-C", str(project), "tag", "-d", f"v{VERSION}"], check=False, capture_output=True)


def test_every_check_has_a_planted_fault() -> None:
    assert {f"look_at_{check}" for check, *_ in PLANTED.values()} == {check.__name__ for check in release_check.CHECKS}


def test_all_faults_are_named_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("package", "stray"):
        PLANTED[name][1](project)
    assert release_check.main([str(project)]) == 1
    said = capsys.readouterr().out
    assert said.count("FAIL") == 3 and "-> " in said and said.endswith(": 3 to mend\n")       # pyproject.toml is edited, too


def test_a_heading_without_date_is_a_note(project: Path) -> None:
    replace(project, "CHANGELOG.md", " - 2026-01-31", " - unreleased")
    assert [finding.note for finding in release_check.look_at_changelog(project)] == [True]


def test_a_folder_without_git_is_none_to_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert [finding.what for finding in release_check.look_at_tree(tmp_path)] == ["this is no git checkout"]
