#!/usr/bin/env python3
"""The coverage-guided half of tools/fuzz.py: one target for so many seconds with atheris, which never returns.

usage: fuzz_atheris.py TARGET SECONDS SEED OUT FOLDER      (FOLDER: empty, for the corpus)

Both books are instrumented while they are imported.  A fault is cut down and reported as tools/fuzz.py does it, exit fuzz.FOUND.
"""
from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(TOOLS.parent)]
atheris: Any = importlib.import_module("atheris")
with atheris.instrument_imports(include=["telemt", "telemt_api"], enable_loader_override=False):
    import telemt  # noqa: F401 - before fuzz_targets, which would import it as it is
    import telemt_api  # noqa: F401
import fuzz  # noqa: E402 - behind the instrumented books
from fuzz_targets import all_targets  # noqa: E402


def main(name: str, seconds: int, seed: int, out: Path, folder: Path) -> None:
    """Run until the time is over or something is found."""
    if name == fuzz.MAZE.name:
        target = fuzz.MAZE._replace(call=atheris.instrument_func(fuzz.planted_maze))
    else:
        target = next(one for one in all_targets() if one.name == name)

    def one_input(data: bytes) -> None:
        word, error = fuzz.try_input(target, data)
        if error is not None:
            fuzz.report(fuzz.found(target, data, word, error), out)
            sys.stdout.flush()
            os._exit(fuzz.FOUND)

    corpus, words = folder / "corpus", folder / "words"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / f"seed{number}").write_bytes(data)
    usable = [word for word in target.words if 0 < len(word) <= 64]
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in usable))
    with fuzz.limits():
        atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=8192", "-timeout=0", "-rss_limit_mb=0",
                       *([f"-dict={words}"] if usable else []), f"-artifact_prefix={folder}/", "-verbosity=0", str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
