#!/bin/sh
# Install the program on this machine, or take it away again: what `make install` and `make uninstall` call.
#
# usage: install.sh install|uninstall
#   PREFIX      default /usr/local: the books go to PREFIX/lib/telemt, the command to PREFIX/bin/telemt
#   DESTDIR     put before every path, for packages; then systemd is not told
#   SYSCONFDIR  default /etc: the sample goes to SYSCONFDIR/telemt/config.toml, with a random secret, unless there is a file
#   UNITDIR     default /etc/systemd/system
#   PYTHON      interpreter that the command and the units name; default /usr/bin/python3
#
# The configuration is left alone by both.
set -eu

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
SYSCONFDIR=${SYSCONFDIR:-/etc}
UNITDIR=${UNITDIR:-/etc/systemd/system}
PYTHON=${PYTHON:-/usr/bin/python3}
LIB=$PREFIX/lib/telemt
BIN=$PREFIX/bin
CONFIG=$SYSCONFDIR/telemt/config.toml
UNITS="telemt.service telemt@.service"
BOOKS="telemt.py telemt_api.py"

cd "$(dirname "$0")/.."

for path in "$PREFIX" "$SYSCONFDIR" "$UNITDIR" "$PYTHON"; do
	case "$path" in
	/*[!A-Za-z0-9_./+-]* | [!/]*) echo "install: '$path' is no absolute path of plain characters" >&2; exit 2 ;;
	esac
done

# A file as a whole, by rename: whoever runs the old one keeps it.
put() { # SOURCE TARGET MODE
	install -m "$3" "$1" "$2.new"
	mv -f "$2.new" "$2"
}

systemd() { # WORDS...: only where this is the running system
	if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then systemctl "$@" || echo "install: systemctl $* failed" >&2; fi
}

# The command finds the books from where it lies itself, so that a tree in DESTDIR works too.
command_text() {
	cat <<-END
	#!/bin/sh
	exec $PYTHON -B "\$(dirname "\$(readlink -f "\$0")")/../lib/telemt/telemt.py" "\$@"
	END
}

install_all() {
	if [ -z "$DESTDIR" ] && ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
		echo "install: $PYTHON is not Python 3.11 or newer: make install PYTHON=/path/to/python3.12" >&2
		exit 1
	fi
	install -d "$DESTDIR$LIB" "$DESTDIR$BIN" "$DESTDIR$UNITDIR"
	for name in $BOOKS; do put "$name" "$DESTDIR$LIB/$name" 644; done
	scratch=$(mktemp)
	trap 'rm -f "$scratch"' EXIT
	command_text > "$scratch"
	put "$scratch" "$DESTDIR$BIN/telemt" 755
	for name in $UNITS; do
		sed -e "s|/usr/bin/python3|$PYTHON|g; s|/usr/local/lib/telemt|$LIB|g; s|/etc/telemt|$SYSCONFDIR/telemt|g" "deploy/systemd/$name" > "$scratch"
		put "$scratch" "$DESTDIR$UNITDIR/$name" 644
	done
	if [ -e "$DESTDIR$CONFIG" ] || [ -h "$DESTDIR$CONFIG" ]; then
		echo "install: $DESTDIR$CONFIG is there and stays as it is"
	else
		install -d -m 750 "$DESTDIR$SYSCONFDIR/telemt"
		secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
		sed -e "s/\"0\{32\}\"/\"$secret\"/; s/^# name = \"32 hex characters\".*/# name = \"32 hex characters\"; this secret is random and belongs to this installation./; /^# and every start warns about it\./d" \
			config.toml > "$scratch"
		put "$scratch" "$DESTDIR$CONFIG" 600
		echo "install: $DESTDIR$CONFIG is the sample, with a random secret: look at port and tls_domain"
	fi
	systemd daemon-reload
	echo "install: $DESTDIR$BIN/telemt; start it with: systemctl enable --now telemt"
}

uninstall_all() {
	systemd disable --now telemt.service
	systemd stop 'telemt@*'
	for name in $UNITS; do rm -f "$DESTDIR$UNITDIR/$name"; done
	rm -f "$DESTDIR$BIN/telemt"
	for name in $BOOKS; do rm -f "$DESTDIR$LIB/$name"; done
	if [ -d "$DESTDIR$LIB" ]; then
		rm -rf "$DESTDIR$LIB/previous" "$DESTDIR$LIB/__pycache__"
		rmdir "$DESTDIR$LIB" 2>/dev/null || echo "uninstall: $DESTDIR$LIB holds other files and stays" >&2
	fi
	systemd daemon-reload
	echo "uninstall: $DESTDIR$SYSCONFDIR/telemt stays, and so does /var/lib/telemt"
}

case "${1:-}" in
install) install_all ;;
uninstall) uninstall_all ;;
*) sed -n '2,12p' "$0" >&2; exit 2 ;;
esac
