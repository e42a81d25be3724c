#!/bin/sh
# Install the programs that some journeys run against: real web servers, load balancers, SOCKS servers, observers.
# Nothing is started (policy-rc.d says no while packages are set up), what is there is left alone, and whatever goes wrong
# the answer is a sentence and exit 0: the journeys that miss a program are reported as skipped, with the reason.
# An installed list costs two look-ups in PATH, not a call of apt.
set -u

# command : package
WANTED="nginx:nginx-light haproxy:haproxy microsocks:microsocks danted:dante-server sshd:openssh-server ssh:openssh-client
        tshark:tshark promtool:prometheus ip:iproute2 curl:curl openssl:openssl shellcheck:shellcheck systemd-analyze:systemd
        nft:nftables unshare:util-linux
        chromium:chromium"

PATH="$PATH:/usr/sbin:/sbin"
missing=
for pair in $WANTED; do
	command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair##*:}"
done
[ -n "$missing" ] || { echo "deps-test: everything is installed"; exit 0; }

give_up() {
	echo "deps-test: $1; tests that need one of these are skipped:$missing"
	exit 0
}

command -v apt-get >/dev/null 2>&1 || give_up "no apt here"
[ "$(id -u)" = 0 ] || give_up "not root"

policy=/usr/sbin/policy-rc.d
made=
if [ ! -e "$policy" ]; then
	printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod 755 "$policy" && made=1
fi
trap '[ -z "$made" ] || rm -f "$policy"' EXIT
trap 'exit 0' INT TERM

export DEBIAN_FRONTEND=noninteractive
APT="timeout 300 apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=15 -o Acquire::https::Timeout=15 -o DPkg::Lock::Timeout=60"
$APT update >/dev/null 2>&1 || give_up "no network, or apt is busy"
# One by one: a package that this release does not have must not keep the others away.
for package in $missing; do
	echo "deps-test: installing $package"
	$APT install --no-install-recommends -y "$package" >/dev/null 2>&1 || echo "deps-test: $package could not be installed"
done
exit 0
