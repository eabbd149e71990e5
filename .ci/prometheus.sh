#!/usr/bin/env bash
# A Prometheus for the tests: found, or installed with apt-get if this runs as root on a Debian-like system.
#
#   eval "$(.ci/prometheus.sh start)"  # exports ORLA_TEST_PROMETHEUS and ORLA_TEST_PROMTOOL, the paths of its programs
#   pytest …
#
# `start` prints only the export lines on stdout and everything else on stderr. Nothing runs afterwards: a test starts
# a server of its own in a folder of its own, and ends it.
#
# `eval "$(…)"` hides a failed start from `set -e`; where Prometheus must be there, write
#   exports="$(.ci/prometheus.sh start)"; eval "$exports"

set -euo pipefail

say() { printf 'prometheus.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

is_there() { command -v prometheus >/dev/null && command -v promtool >/dev/null; }

install_it() {
    command -v apt-get >/dev/null ||
        die "Prometheus was not found and there is no apt-get here; install it (prometheus, promtool)"
    [[ "$(id -u)" == 0 ]] ||
        die "Prometheus was not found and only root can install it: sudo apt-get install prometheus"
    say "Prometheus was not found; installing it with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    # The package's own server would only occupy a port: its unit is masked while it is installed.
    local unit=/etc/systemd/system/prometheus.service
    if [[ ! -e "$unit" && ! -L "$unit" ]]; then
        mkdir -p "${unit%/*}"
        ln -s /dev/null "$unit"
        trap 'rm -f -- /etc/systemd/system/prometheus.service' EXIT
    fi
    apt-get update >&2 </dev/null || die "apt-get update failed; is a package mirror reachable?"
    apt-get install -y --no-install-recommends prometheus >&2 </dev/null ||
        die "apt-get could not install the package prometheus"
}

start() {
    is_there || install_it
    is_there || die "Prometheus was installed, but prometheus and promtool are not on PATH"
    say "$(prometheus --version 2>&1 | head -n 1), at $(command -v prometheus)"
    printf 'export ORLA_TEST_PROMETHEUS=%q\n' "$(command -v prometheus)"
    printf 'export ORLA_TEST_PROMTOOL=%q\n' "$(command -v promtool)"
}

case "${1:-}" in
    start) start ;;
    *) die "usage: eval \"\$(.ci/prometheus.sh start)\"" ;;
esac
