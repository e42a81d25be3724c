"""Write the generated documents: docs/configuration.md from the settings tables, docs/api.md through api_docs.py, the systemd
units in deploy/ from what --init writes.

usage: make_docs.py [--check]      --check writes nothing and exits with 1 where a committed file is not current

A test compares these files with what this program makes.
"""
from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import api_docs
import bench_report

import telemt
from telemt import Key, Reload

ROOT: Final = Path(__file__).resolve().parent.parent

HEAD = """\
# Every configuration key

<!-- written by tools/make_docs.py from the tables in telemt.py, room settings: `make docs` -->

The file is TOML, by default `config.toml` in the working directory. No key is required: a missing one has its default. The names, types
and defaults are those of telemt 3.2.1; the keys that people change stand in the sample [config.toml](../config.toml).

Look at a file without starting it:

```console
$ python3 telemt.py check --offline config.toml    # exit 1: something was found
```

An unknown key is one warning, with the name that was probably meant; a value of the wrong type or range stops the start. While the proxy
runs the same mistakes leave the old configuration in force ([changes.md](changes.md)).

## How to read the tables

- **default**: what holds when the key is absent; *unset* is neither 0 nor empty.
- **reload**: *at once* = a changed file takes effect while the proxy runs; *restart* = with the next start, one warning until then;
  *nothing* = read and checked, so that a file of telemt loads, but without effect here.
- A limit of 0 blocks. It does not mean "no limit": for that, leave the key out.

| type | what to write |
|---|---|
| `bool` | `true` or `false` |
| `u8` `u16` `u32` `u64` `usize` `int` | a whole number: up to 255, 65,535, 4,294,967,295, and 2^63-1 for the other three |
| `f32` | a number, `0.8` |
| `str`, `[str]` | `"text"`, `["text", "text"]` |
| `ip`, `cidr`, `[cidr]` | `"192.0.2.1"`; `"10.0.0.0/8"`, one address is a network too; a list of them |
| `time` | date, time and offset: `"2030-01-31T00:00:00Z"` |
| words | one of them, in quotes |
| `{name: T}` | a table of its own, one line for each name: `[access.users]`, then `alice = "..."` |

## Included files

`include = "users.toml"` on a line of its own is replaced by that file, as if its text stood there. Names are relative to the file that
includes, at most 10 deep. Included files are watched as well, and changes through the API go into the file where the entry stands.
"""

WORDS: Final[Mapping[Reload, str]] = {
    Reload.HOT: "at once", Reload.HOT_OURS: "at once", Reload.RESTART: "restart", Reload.RESTART_OURS: "restart",
    Reload.NO_EFFECT: "nothing"}
UNITS: Final = {"": "", "s": "seconds", "ms": "milliseconds", "B": "bytes", "min": "minutes", "%": "per cent"}


def sections() -> Iterator[tuple[str, str, list[tuple[str, Key]]]]:
    """Yield (heading, what it is about, its keys) in the order of the tables; the keys above any table come first."""
    keys: dict[str, list[tuple[str, Key]]] = {"": []}
    about = {"": "Keys above the first `[table]` of the file."}
    for path, spec in telemt.KEYS.items():
        parent, _, name = path.rpartition(".")
        if spec.table is not None:
            keys[path + "[]" * spec.many] = []
            about[path + "[]" * spec.many] = spec.help or first_sentence(spec.table)
        else:
            keys[parent].append((name, spec))
    for path, rows in keys.items():
        yield heading(path), about[path], rows


def first_sentence(table: type[Any]) -> str:
    """What the docstring of a table says behind its name."""
    text = (table.__doc__ or "").partition(":")[2].strip().partition("\n")[0]
    return text[:1].upper() + text[1:]


def heading(path: str) -> str:
    """The header that stands in the file."""
    return (f"[[{path[:-2]}]]" if path.endswith("[]") else f"[{path}]") if path else "top level"


def default_text(spec: Key) -> str:
    """The default as it would be written."""
    if spec.required:
        return "**required**"
    value = telemt.as_json(spec.default)
    if value is None:
        return "*unset*"
    if isinstance(value, dict):
        return "none" if not value else ", ".join(f"`{name} = {toml(item)}`" for name, item in value.items())
    return f"`{toml(value)}`" if not isinstance(value, list) or len(value) <= 3 else f"{len(value)} entries"


def toml(value: Any) -> str:
    """A value of JSON types as TOML writes it on one line."""
    return json.dumps(value, ensure_ascii=False)


def meaning(spec: Key) -> str:
    """The sentence about a key, with unit, rule and the entries that have it."""
    parts = [spec.help]
    if spec.unit:
        parts.append(f"In {UNITS[spec.unit]}.")
    if spec.rule is not None:
        parts.append(spec.rule.text[0].upper() + spec.rule.text[1:] + ".")
    if spec.only:
        parts.append(f"Only with `type` {' or '.join(spec.only.split())}.")
    return " ".join(parts).replace("|", "\\|")


def configuration() -> str:
    """The whole of docs/configuration.md."""
    parts = [HEAD]
    for title, about, rows in sections():
        parts.append(f"## {title}\n")
        if about:
            parts.append(about + "\n")
        lines = ["| key | type | default | reload | |", "|---|---|---|---|---|"]
        lines += [f"| `{name}` | `{spec.kind.name}` | {default_text(spec)} | {WORDS[spec.reload]} | {meaning(spec)} |"
                  for name, spec in rows]
        long = [(name, telemt.as_json(spec.default)) for name, spec in rows if default_text(spec).endswith(" entries")]
        parts.append("\n".join(lines) + "\n")
        parts += [f"Default of `{name}`: {', '.join(f'`{item}`' for item in items)}.\n" for name, items in long]
    return "\n".join(parts)


UNIT_HEADS: Final = {"telemt.service": """\
# telemt.py under systemd.  Installed by `make install`, or by hand:
#   telemt.py and telemt_api.py to /usr/local/lib/telemt/, the configuration to /etc/telemt/config.toml,
#   this file to /etc/systemd/system/, then `systemctl daemon-reload` and `systemctl enable --now telemt`.
# Log: `journalctl -u telemt`.  Read the configuration again: `systemctl reload telemt`.
# The text is that of `telemt.py --init`, from there by `make docs`.

""", "telemt@.service": """\
# telemt.py under systemd, several instances: telemt@1 reads /etc/telemt/1.toml, telemt@2 reads /etc/telemt/2.toml ...  They may share
# one port: each file then says `[[server.listeners]]` with `reuse_allow = true`, and the API and metrics ports differ.  What they do
# not share is in docs/operations.md.  Installed as telemt.service is; then `systemctl enable --now telemt@1 telemt@2`.
# Log: `journalctl -u "telemt@*"`.  Read the configuration again: `systemctl reload "telemt@*"`.
# The text is that of `telemt.py --init`, from there by `make docs`.

"""}


def unit(name: str) -> str:
    """A file of deploy/systemd/, for the places where `make install` puts things."""
    python, script = "/usr/bin/python3", "/usr/local/lib/telemt/telemt.py"
    if "@" in name:
        text = telemt.build_unit(python, script, "/etc/telemt/INSTANCE.toml", state="telemt-INSTANCE", title=", instance INSTANCE")
        return UNIT_HEADS[name] + text.replace("INSTANCE", "%i")
    return UNIT_HEADS[name] + telemt.build_unit(python, script, "/etc/telemt/config.toml")


def operations() -> str:
    """docs/operations.md with its table computed from the last measurements."""
    found = json.loads((ROOT / "docs/performance.json").read_text(encoding="utf-8"))
    return bench_report.between((ROOT / "docs/operations.md").read_text(encoding="utf-8"), "capacity", bench_report.capacity_table(found))


DOCUMENTS: Final[Mapping[str, Callable[[], str]]] = {
    "docs/configuration.md": configuration, "docs/api.md": api_docs.render, "docs/operations.md": operations,
    **{f"deploy/systemd/{name}": functools.partial(unit, name) for name in UNIT_HEADS}}


def stale() -> list[str]:
    """Documents whose committed text is not what their generator writes."""
    return [name for name, render in DOCUMENTS.items()
            if not (ROOT / name).is_file() or (ROOT / name).read_text(encoding="utf-8") != render()]


def main(words: list[str]) -> int:
    """Write what is stale, or only name it."""
    if words not in ([], ["--check"]):
        sys.stderr.write((__doc__ or "") + "\n")
        return 2
    found = stale()
    for name in found:
        sys.stdout.write(f"{name}: {'not current, run make docs' if words else 'written'}\n")
        if not words:
            (ROOT / name).write_text(DOCUMENTS[name](), encoding="utf-8")
    return 1 if words and found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
