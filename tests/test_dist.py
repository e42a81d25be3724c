"""tools/make_dist.py: the same sources give the same bytes, whoever builds them where and when; the sums are those of the files."""
from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import make_dist

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"telemt.py": 'VERSION: Final = "1.2.3"\n', "telemt_api.py": "VALUE = 7\n", "docs/a.md": "a\n", "tool.sh": "#!/bin/sh\n"}


def make_tree(root: Path, names: list[str], mode: int, mtime: int) -> Path:
    """A small project, its files written in this order with these permissions and dates."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SMALL[name])
        path.chmod(mode | (0o111 if name.endswith(".sh") else 0))
        os.utime(path, (mtime, mtime))
    git = ["git", "-C", str(root), "-c", "init.defaultBranch=main"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    return root


def everything(root: Path) -> dict[str, tuple[int, bytes]]:
    return {name: (mode, data) for name, mode, data in make_dist.files(root)}


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    """Other dates, permissions, order of writing, umask, folder."""
    first = everything(make_tree(tmp_path / "a", list(SMALL), 0o644, 1_000_000_000))
    old = os.umask(0o077)
    try:
        second = everything(make_tree(tmp_path / "deep" / "b", list(SMALL)[::-1], 0o600, 1_700_000_000))
    finally:
        os.umask(old)
    assert first == second and list(first) == ["telemt.py", "telemt_api.py", "telemt.pyz", "telemt-py-1.2.3.tar"]


def test_a_changed_byte_changes_the_sum(tmp_path: Path) -> None:
    root = make_tree(tmp_path, list(SMALL), 0o644, 1_000_000_000)
    before = everything(root)
    (root / "telemt_api.py").write_text("VALUE = 8\n")
    after = everything(root)
    assert {name for name in before if before[name] != after[name]} == {"telemt_api.py", "telemt.pyz", "telemt-py-1.2.3.tar"}


def test_the_real_dist_twice(tmp_path: Path) -> None:
    """`make dist`: the files that the sums name, no others, by another interpreter process in another time zone too."""
    lines = make_dist.write_dist(tmp_path / "one")
    tool = [sys.executable, str(ROOT / "tools" / "make_dist.py"), str(tmp_path / "two")]
    subprocess.run(tool, check=True, capture_output=True, env={**os.environ, "TZ": "Asia/Tehran", "LC_ALL": "C"}, timeout=60)
    sums = (tmp_path / "two" / "SHA256SUMS").read_text()
    assert sums == "".join(lines)
    found = dict(line.split("  ")[::-1] for line in sums.splitlines())
    assert set(os.listdir(tmp_path / "two")) == {*found, "SHA256SUMS"} == set(os.listdir(tmp_path / "one"))
    for name, digest in found.items():
        assert hashlib.sha256((tmp_path / "one" / name).read_bytes()).hexdigest() == digest, name


def test_the_archive_holds_the_books_as_they_are() -> None:
    data = make_dist.build_pyz(ROOT)
    assert data.startswith(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == ["__main__.py", "telemt_api.py"] and archive.testzip() is None
        assert archive.read("__main__.py") == (ROOT / "telemt.py").read_bytes()
        assert archive.read("telemt_api.py") == (ROOT / "telemt_api.py").read_bytes()
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_the_sources_are_what_git_tracks(tmp_path: Path) -> None:
    root = make_tree(tmp_path, list(SMALL), 0o600, 1_000_000_000)
    (root / "secret.toml").write_text("not tracked")
    (root / "docs" / "a.md").unlink()           # tracked, and gone
    with tarfile.open(fileobj=io.BytesIO(everything(root)["telemt-py-1.2.3.tar"][1])) as archive:
        assert [(info.name, oct(info.mode), info.mtime, info.uid, info.uname) for info in archive] == [
            (f"telemt-py-1.2.3/{name}", mode, make_dist.EPOCH_S, 0, "")
            for name, mode in (("telemt.py", "0o644"), ("telemt_api.py", "0o644"), ("tool.sh", "0o755"))]


def test_without_git_there_are_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in make_dist.BOOKS.values():
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert list(everything(tmp_path)) == ["telemt.py", "telemt_api.py", "telemt.pyz"]


def test_a_running_file_is_replaced_and_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "telemt.pyz"
    path.write_bytes(b"old")
    with path.open("rb") as running:
        make_dist.put(path, 0o755, b"new")
        assert running.read() == b"old"
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o755
