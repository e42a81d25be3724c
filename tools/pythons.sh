#!/bin/sh
# pythons.sh - find interpreters that can run this project (CPython 3.11 or newer).
#
# usage: pythons.sh pick [PYTHON]    print the absolute path of one; exit 1 with a message if there is none
#        pythons.sh all              print "VERSION PATH", one line per minor version that is installed
#
# Needs sh and nothing else.  A name on PATH proves nothing (it can be a shim
# whose version is not installed), so every candidate is run before it counts.
set -u

WANTED="3.11 3.12 3.13 3.14"

# "MINOR PATH" of an interpreter that runs and is new enough, else nothing.
describe() {
    "$1" -c 'import sys
if sys.version_info >= (3, 11) and sys.implementation.name == "cpython":
    print("%d.%d" % sys.version_info[:2], sys.executable)' 2>/dev/null < /dev/null
}

# Where a minor version may hide: PATH, pyenv's folder, what uv manages.
candidates() {
    echo "python$1"
    echo python3
    root=${PYENV_ROOT:-$(pyenv root 2>/dev/null)}
    [ -n "$root" ] && for python in "$root"/versions/"$1"*/bin/python3; do echo "$python"; done
    uv python find "$1" 2>/dev/null
}

# "MINOR PATH" of the first candidate for a minor version that is one.
find_minor() {
    candidates "$1" | while read -r python; do
        found=$(describe "$python") || continue
        [ "${found%% *}" = "$1" ] && { echo "$found"; break; }
    done
}

pick() {
    if [ -n "${1:-}" ]; then
        set -- "$1"
        case "$1" in python3.*)                  # a shim of that name may not work while the version is there
            found=$(find_minor "${1#python}")
            [ -n "$found" ] && { echo "${found#* }"; return 0; } ;;
        esac
    else
        set -- python3 python3.13 python3.12 python3.11 python3.14
    fi
    for candidate in "$@"; do
        found=$(describe "$candidate") && [ -n "$found" ] && { echo "${found#* }"; return 0; }
    done
    echo "no usable interpreter: telemt.py needs CPython 3.11 or newer (tried: $*)" >&2
    for candidate in "$@"; do
        version=$("$candidate" --version 2>&1) && echo "  $candidate is $version" >&2
    done
    echo "  name one: make test PYTHON=/path/to/python3.12" >&2
    return 1
}

all() {
    for minor in $WANTED; do
        find_minor "$minor"
    done
}

case "${1:-}" in
    pick) pick "${2:-}" ;;
    all) all ;;
    *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
