"""Write dist/: telemt.pyz (both books in one file), the two books, the source, and SHA256SUMS.

usage: make_dist.py [FOLDER]      default: dist

The same sources give the same bytes on every machine: order, dates and permissions are fixed, and nothing is compressed, because
another zlib compresses differently.  The archive of the sources holds what git tracks and is left out where there is no git.
"""
from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
BOOKS: Final = {"__main__.py": "telemt.py", "telemt_api.py": "telemt_api.py"}     # name in the archive -> file
SHEBANG: Final = b"#!/usr/bin/env python3\n"
EPOCH: Final = (1980, 1, 1, 0, 0, 0)            # the first date that a zip archive can say
EPOCH_S: Final = 315_532_800                    # the same, as unix time


def build_pyz(root: Path) -> bytes:
    """The program as one file that Python runs, its modules stored as they are."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, source in BOOKS.items():
            info = zipfile.ZipInfo(name, EPOCH)
            info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, (root / source).read_bytes())
    return SHEBANG + out.getvalue()             # Python finds an archive from its end


def version(root: Path) -> str:
    """VERSION as telemt.py says it."""
    return next(line for line in (root / "telemt.py").read_text(encoding="utf-8").splitlines()
                if line.startswith("VERSION")).partition('"')[2].partition('"')[0]


def tracked(root: Path) -> list[str]:
    """What git tracks and is there, sorted by bytes; empty without git."""
    try:
        found = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], check=True, capture_output=True).stdout.split(b"\0")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [os.fsdecode(name) for name in sorted(found) if name and os.path.lexists(root / os.fsdecode(name))]


def build_source(root: Path, names: list[str], folder: str) -> bytes:
    """These files below `folder/`, as a tar archive without a trace of who made it where and when."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.mtime = EPOCH_S
            path = root / name
            if path.is_symlink():
                info.type, info.linkname, info.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
                archive.addfile(info)
                continue
            data = path.read_bytes()
            info.size, info.mode = len(data), 0o755 if path.stat().st_mode & 0o100 else 0o644
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def files(root: Path) -> Iterator[tuple[str, int, bytes]]:
    """(name, permissions, content) of everything in dist/ but the sums."""
    for name in BOOKS.values():
        yield name, 0o644, (root / name).read_bytes()
    yield "telemt.pyz", 0o755, build_pyz(root)
    names = tracked(root)
    if names:
        folder = f"telemt-py-{version(root)}"
        yield f"{folder}.tar", 0o644, build_source(root, names, folder)


def write_dist(folder: Path, root: Path = ROOT) -> list[str]:
    """Write everything and the sums, each file as a whole; return the lines of SHA256SUMS."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, mode, data in files(root):
        put(folder / name, mode, data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
    put(folder / "SHA256SUMS", 0o644, "".join(lines).encode())
    return lines


def put(path: Path, mode: int, data: bytes) -> None:
    """Replace a file by rename: whoever runs the old one keeps it."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    fresh.chmod(mode)
    fresh.replace(path)


def main(words: list[str]) -> int:
    """Write and list; return the exit code."""
    if len(words) > 1 or words[:1] in (["-h"], ["--help"]):
        sys.stderr.write(f"{__doc__}\n")
        return 2
    folder = Path(words[0]) if words else ROOT / "dist"
    sys.stdout.writelines(write_dist(folder))
    if not tracked(ROOT):
        sys.stdout.write("no git here: the archive of the sources is left out\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
