#!/bin/sh
# Bring this version to a server, or the one before back: what `make deploy HOST=` and `make rollback HOST=` call.
#
# usage: deploy.sh deploy HOST | deploy.sh rollback HOST       HOST as ssh takes it, with root at its end (or SUDO=sudo)
#   FILES    default "telemt.py telemt_api.py"; "telemt.py" for a proxy without API
#   PREFIX   default /usr/local: the files go to PREFIX/lib/telemt, as `make install` puts them
#   CONFIG   default /etc/telemt/config.toml, on the server: it has to be there
#   UNIT     default telemt, written from deploy/systemd/ to UNITDIR (default /etc/systemd/system); UNIT= leaves units alone
#   RESTART  command on the server that makes the new files run; default "systemctl restart UNIT", else "/etc/init.d/telemt restart"
#   EXCHANGE 1: no restart; the new program takes over the sockets of the old one, whose sessions go on (SIGUSR2, systemd only)
#   PYTHON   on the server; default /usr/bin/python3
#   WAIT     seconds for the health check after the restart; default 30
#   SSH SCP  default ssh and scp: SSH="ssh -p 2222" SCP="scp -P 2222"
#
# What happens there: `check` of the new files against the configuration of the server; the old files are kept in
# PREFIX/lib/telemt/previous; the new ones take their place by rename; restart; `healthcheck` until it succeeds.  Where
# it does not, the old files come back in the same way.  `rollback` exchanges the files with those in previous.
#
# The half that works on the server is this same file.  It ignores a lost connection: what was begun is ended, in order.
set -eu

# -- on the server: deploy.sh there deploy|rollback FOLDER, with all settings in the environment

say() { echo "$THERE: $*" || :; }               # the connection may be gone: that must not end us

give_up() { say "$*"; exit 1; }

# The configuration passes with the program in a folder.  Findings are shown; only what keeps it from starting counts.
check_in() { # FOLDER
	said=$("$PYTHON" -B "$1/telemt.py" check --offline "$CONFIG" 2>&1) && return 0
	last=$(printf '%s\n' "$said" | tail -n 1)
	case "$last" in
	"$CONFIG: "*" problem"*) printf '%s\n' "$said" | sed 's/^/    /' || :; return 0 ;;     # an exception exits with 1 too
	esac
	printf '%s\n' "$said" | tail -n 15 | sed 's/^/    /' || :
	return 1
}

# The files of a version, copied to where a rename is enough to put them in force.
stage() { # FROM UNIT-FROM INTO
	mkdir "$3"
	for name in telemt.py telemt_api.py; do
		[ ! -f "$1/$name" ] || { cp "$1/$name" "$3/" && chmod 644 "$3/$name"; } || return 1
	done
	[ -z "$UNIT" ] || [ ! -f "$2/$UNIT.service" ] || { cp "$2/$UNIT.service" "$3/" && chmod 644 "$3/$UNIT.service"; }
}

# Every file of a staged version takes its place; a book that it has not goes, because it is of another version.
switch_to() { # FOLDER
	[ -f "$1/telemt_api.py" ] || rm -f "$LIB/telemt_api.py"
	for name in telemt_api.py telemt.py; do
		[ ! -f "$1/$name" ] || { cp "$1/$name" "$LIB/.busy/$name" && mv -f "$LIB/.busy/$name" "$LIB/$name"; } || return 1
	done
	[ -n "$UNIT" ] && [ -f "$1/$UNIT.service" ] || return 0
	! cmp -s "$1/$UNIT.service" "$UNITDIR/$UNIT.service" || return 0
	mkdir -p "$UNITDIR" && cp "$1/$UNIT.service" "$UNITDIR/.$UNIT.new" && mv -f "$UNITDIR/.$UNIT.new" "$UNITDIR/$UNIT.service" || return 1
	say "unit $UNITDIR/$UNIT.service written"
	EXCHANGE=                               # the process that runs is not of this unit
	systemctl daemon-reload
}

# The new program takes over from the one that runs, or this fails and the old one goes on (docs/operations.md).
exchange() {
	before=$(systemctl show -p MainPID --value "$UNIT")
	[ "${before:-0}" -gt 0 ] || { say "$UNIT does not run: no exchange"; return 1; }
	kill -USR2 "$before" || return 1
	turns=0
	while [ "$(systemctl show -p MainPID --value "$UNIT")" = "$before" ]; do
		turns=$((turns + 1))
		[ "$turns" -le 75 ] || { say "the new program did not take over, see journalctl -u $UNIT"; return 1; }
		sleep 1
	done
}

# Make the files in place run.
begin() { # exchange|restart|nothing
	case "$1" in
	exchange) exchange || { begun=; return 1; } ;;
	restart) sh -c "$RESTART" </dev/null || { say "failed: $RESTART"; return 1; } ;;
	esac
}

how() { if [ -n "$EXCHANGE" ]; then echo exchange; else echo restart; fi; }

# Begin, and wait for a client of our own to get an answer from a data centre through the proxy.
runs() { # SECONDS HOW
	begin "$2" || return 1
	end=$(($(date +%s) + $1))
	while :; do
		said=$("$PYTHON" -B "$LIB/telemt.py" healthcheck "$CONFIG" 2>&1) && { say "$said"; return 0; }
		[ "$(date +%s)" -lt "$end" ] || break
		sleep 1
	done
	say "no health within $1 s: $(printf '%s\n' "$said" | tail -n 1)"
	return 1
}

version_in() { # FOLDER
	found=$(sed -n 's/^VERSION: Final = "\(.*\)"$/\1/p' "$1/telemt.py" | head -n 1)
	echo "version ${found:-unknown}"
}

there() { # deploy|rollback FOLDER
	trap '' HUP PIPE
	folder=$2
	trap 'rm -rf "$folder"' EXIT
	trap 'exit 1' INT TERM
	command -v systemctl >/dev/null 2>&1 || UNIT=
	mkdir -p "$LIB"
	mkdir "$LIB/.busy" 2>/dev/null || give_up "another deployment is going on, or was killed; in that case: rmdir $LIB/.busy"
	trap 'rm -rf "$folder" "$LIB/.busy"' EXIT
	[ -f "$CONFIG" ] || give_up "no $CONFIG: write one first (telemt.py --init --no-start)"
	"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || give_up "$PYTHON is not Python 3.11 or newer: PYTHON=/path/to/it"
	new=$LIB/.busy/new old=$LIB/.busy/old
	if [ "$1" = rollback ]; then
		[ -f "$LIB/previous/telemt.py" ] || give_up "there is no version before this one"
		stage "$LIB/previous" "$LIB/previous" "$new"
	else
		(cd "$folder" && sha256sum -c SHA256SUMS >/dev/null) || give_up "the files did not arrive as they were sent"
		stage "$folder" "$folder" "$new"
	fi
	check_in "$new" || give_up "$(version_in "$new") does not start with $CONFIG: nothing was changed"
	stage "$LIB" "$UNITDIR" "$old"
	begun=1
	[ -z "$EXCHANGE" ] || [ "$(systemctl show -p Type --value "$UNIT" 2>/dev/null)" = notify ] || EXCHANGE=
	if ! { switch_to "$new" && runs "$WAIT" "$(how)"; }; then
		[ -f "$old/telemt.py" ] || give_up "this was the first version here: there is none to go back to"
		say "going back to $(version_in "$old")"
		{ switch_to "$old" && runs 30 "${begun:+restart}"; } || say "THE OLD ONE DOES NOT ANSWER EITHER"
		exit 1
	fi
	if [ -f "$old/telemt.py" ]; then
		rm -rf "$LIB/previous"
		mv "$old" "$LIB/previous"
	fi
	say "$1: now $(version_in "$LIB")"
	[ -z "$UNIT" ] || systemctl is-enabled "$UNIT" >/dev/null 2>&1 || say "it does not start at boot yet: systemctl enable $UNIT"
}

# -- here

settings() { # as words for the shell of the server
	for name in LIB CONFIG UNIT UNITDIR RESTART EXCHANGE PYTHON WAIT THERE; do
		eval "value=\$$name"
		# shellcheck disable=SC2154  # value: by eval
		printf "%s='%s' " "$name" "$(printf '%s' "$value" | sed "s/'/'\\\\''/g")"
	done
}

here() { # deploy|rollback HOST
	cd "$(dirname "$0")/.."
	SSH=${SSH:-ssh} SCP=${SCP:-scp} SUDO=${SUDO:-} FILES=${FILES:-telemt.py telemt_api.py} PREFIX=${PREFIX:-/usr/local}
	UNITDIR=${UNITDIR:-/etc/systemd/system} CONFIG=${CONFIG:-/etc/telemt/config.toml} PYTHON=${PYTHON:-/usr/bin/python3} WAIT=${WAIT:-30}
	UNIT=${UNIT-telemt} EXCHANGE=${EXCHANGE:-} LIB=$PREFIX/lib/telemt THERE=${2##*@}
	RESTART=${RESTART:-if command -v systemctl >/dev/null 2>&1; then systemctl restart ${UNIT:-telemt}; else /etc/init.d/telemt restart; fi}
	bundle=$(mktemp -d)
	trap 'rm -rf "$bundle"' EXIT
	trap 'exit 1' INT TERM HUP
	cp tools/deploy.sh "$bundle/deploy.sh"
	if [ "$1" = deploy ]; then
		# shellcheck disable=SC2086  # a list
		cp $FILES "$bundle/"
		[ -f "$bundle/telemt.py" ] || { echo "deploy: FILES names no telemt.py" >&2; exit 2; }
		if [ -n "$UNIT" ]; then
			home=$(dirname "$CONFIG")             # handed over to the user of the service as a whole
			[ "$(basename "$home")" = telemt ] || { echo "deploy: $CONFIG lies in no directory named telemt: add UNIT=" >&2; exit 2; }
			sed -e "s|/usr/bin/python3|$PYTHON|g; s|/usr/local/lib/telemt|$LIB|g; s|/etc/telemt/config.toml|@CONFIG@|g" \
				-e "s|/etc/telemt|$home|g; s|@CONFIG@|$CONFIG|g" deploy/systemd/telemt.service > "$bundle/$UNIT.service"
		fi
	fi
	sums=$(cd "$bundle" && sha256sum -- *)
	printf '%s\n' "$sums" > "$bundle/SHA256SUMS"
	# SSH, SCP and SUDO may hold options
	# shellcheck disable=SC2086
	folder=$($SSH "$2" 'umask 077; mktemp -d') || { echo "deploy: cannot reach $2" >&2; exit 1; }
	case "$folder" in /*[!A-Za-z0-9_./-]* | [!/]* | "") echo "deploy: $2 answered '$folder'" >&2; exit 1 ;; esac
	# shellcheck disable=SC2086
	if ! $SCP -q "$bundle"/* "$2:$folder/"; then
		$SSH "$2" "rm -rf '$folder'" || :
		exit 1
	fi
	# shellcheck disable=SC2086,SC2029  # the words are meant to be put together here
	$SSH "$2" "$SUDO env $(settings) sh '$folder/deploy.sh' there $1 '$folder'"
}

case "${1:-} ${2:-}" in
"there "?*) there "$2" "$3" ;;
"deploy "?* | "rollback "?*) here "$1" "$2" ;;
*) sed -n '2,15p' "$0" >&2; exit 2 ;;
esac
