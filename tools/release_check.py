"""Say what is missing for a release; exit code 1 if anything is.

usage: release_check.py [FOLDER]      default: the project that this file belongs to

Each finding names the cure.  Looked at: the version is the same wherever it stands, CHANGELOG has a heading for it, it is not
tagged yet, the generated documents are current, nothing is uncommitted, and dist/ made from a fresh clone elsewhere has the
same bytes.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import make_dist

ROOT: Final = Path(__file__).resolve().parent.parent
SHOWN: Final = re.compile(r"\btelemt[.-]py(?:[ :-]|(?: |-)v)(\d+\.\d+\.\d+)\b")       # telemt.py 0.1.0, telemt-py:0.1.0
PLACES: Final = ("*.md", "docs/*.md", "deploy/**/*", "Makefile", "pyproject.toml", ".ci/*")


class Finding(NamedTuple):
    """What is wrong, and what mends it; a note does not stop the release."""

    what: str
    cure: str
    note: bool = False


def git(root: Path, *words: str) -> str | None:
    """Output of git in a folder, None where it fails."""
    try:
        return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def look_at_version(root: Path) -> Iterator[Finding]:
    """telemt.py says it, everybody else repeats it."""
    version = make_dist.version(root)
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        yield Finding(f"telemt.py: VERSION is {version!r}", 'write VERSION: Final = "MAJOR.MINOR.PATCH"')
    packaged = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if packaged != version:
        yield Finding(f"pyproject.toml: version {packaged}, but telemt.py says {version}", f'write version = "{version}"')
    seen = {path for pattern in PLACES for path in root.glob(pattern) if path.is_file()} - {root / "CHANGELOG.md"}
    for path in sorted(seen):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            for shown in SHOWN.findall(line):
                if shown != version:
                    where = f"{path.relative_to(root)}:{number}"
                    yield Finding(f"{where}: shows version {shown}, but telemt.py says {version}", f"write {version}")


def look_at_changelog(root: Path) -> Iterator[Finding]:
    """The first heading is that of the version, with its date."""
    version = make_dist.version(root)
    headings = re.findall(r"^## \[([^\]]+)\](.*)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    if version not in [name for name, _ in headings]:
        yield Finding(f"CHANGELOG.md: no heading for {version}", f"write ## [{version}] - YYYY-MM-DD above what has changed")
    elif headings[0][0] != version:
        yield Finding(f"CHANGELOG.md: {headings[0][0]} stands above {version}", "raise VERSION in telemt.py, or move the heading")
    elif not re.fullmatch(r" - \d{4}-\d\d-\d\d", headings[0][1]):
        yield Finding(f"CHANGELOG.md: the heading of {version} has no date", f"on the day: ## [{version}] - YYYY-MM-DD", note=True)


def look_at_tag(root: Path) -> Iterator[Finding]:
    """A version is given once."""
    tag = f"v{make_dist.version(root)}"
    tagged, here = git(root, "rev-parse", "-q", "--verify", f"{tag}^{{commit}}"), git(root, "rev-parse", "HEAD")
    if tagged is not None and tagged != here:
        yield Finding(f"git: {tag} is the tag of another commit", "raise VERSION in telemt.py")


def look_at_documents(root: Path) -> Iterator[Finding]:
    """make_docs.py of that project, with its own tables."""
    done = subprocess.run([sys.executable, "-B", "tools/make_docs.py", "--check"], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
                          check=False, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        yield Finding(f"{line.partition(':')[0]}: not current", "make docs, and commit what it wrote")
    if done.returncode and not done.stdout:
        yield Finding(f"tools/make_docs.py fails: {done.stderr.strip().rpartition(chr(10))[2]}", "mend it")


def look_at_tree(root: Path) -> Iterator[Finding]:
    """What is released is what is committed."""
    status = git(root, "status", "--porcelain")
    if status is None:
        yield Finding("this is no git checkout", "make the release from a clone")
        return
    for line in status.splitlines():
        yield Finding(f"git: {line[3:]} is {'not tracked' if line.startswith('??') else 'not committed'}", "commit it, or take it away")


def look_at_dist(root: Path) -> Iterator[Finding]:
    """A clone in another folder, with another umask, time zone and hash seed, gives the same sums."""
    if git(root, "status", "--porcelain") != "":
        return                                 # said already; a clone would differ for that reason
    with tempfile.TemporaryDirectory() as scratch:
        clone, out = Path(scratch, "clone"), Path(scratch, "out")
        ours = "".join(make_dist.write_dist(Path(scratch, "ours"), root))
        if git(root, "clone", "-q", "--no-hardlinks", str(root), str(clone)) is None:
            yield Finding("git clone fails", "see what it says: git clone . /tmp/clone")
            return
        env = {**os.environ, "TZ": "Pacific/Chatham", "PYTHONHASHSEED": "1", "LC_ALL": "C"}
        done = subprocess.run(["sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, "-B", "tools/make_dist.py", str(out)],
                              cwd=clone, env=env, check=False, capture_output=True, text=True)
        theirs = (out / "SHA256SUMS").read_text(encoding="ascii") if done.returncode == 0 else f"{done.stderr}\n"
        for line in sorted(set(theirs.splitlines()) ^ set(ours.splitlines())):
            yield Finding(f"dist is not reproducible: {line}", "see tools/make_dist.py: nothing of a machine may get in")


CHECKS: Final[tuple[Callable[[Path], Iterator[Finding]], ...]] = (
    look_at_version, look_at_changelog, look_at_tag, look_at_documents, look_at_tree, look_at_dist)


def main(words: list[str]) -> int:
    """Print every finding; return the exit code."""
    if len(words) > 1 or words[:1] in (["-h"], ["--help"]):
        sys.stderr.write(f"{__doc__}\n")
        return 2
    root = Path(words[0]) if words else ROOT
    findings = [finding for check in CHECKS for finding in check(root)]
    for what, cure, note in findings:
        sys.stdout.write(f"{'note' if note else 'FAIL'}  {what}\n      -> {cure}\n")
    failed = sum(not finding.note for finding in findings)
    sys.stdout.write(f"{make_dist.version(root)}: {f'{failed} to mend' if failed else 'ready for release'}\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
