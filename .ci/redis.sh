#!/usr/bin/env bash
# A Redis for the tests: found, or installed with apt-get if this runs as root on a Debian-like system.
#
#   eval "$(.ci/redis.sh start)"  # exports ORLA_TEST_REDIS, the path of its program
#   pytest …
#
# `start` prints only the export lines on stdout and everything else on stderr. Nothing runs afterwards: a test starts
# a server of its own in a folder of its own, and ends it.
#
# `eval "$(…)"` hides a failed start from `set -e`; where Redis must be there, write
#   exports="$(.ci/redis.sh start)"; eval "$exports"

set -euo pipefail

say() { printf 'redis.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

is_there() { command -v redis-server >/dev/null; }

install_it() {
    command -v apt-get >/dev/null ||
        die "Redis was not found and there is no apt-get here; install it (redis-server)"
    [[ "$(id -u)" == 0 ]] ||
        die "Redis was not found and only root can install it: sudo apt-get install redis-server"
    say "Redis was not found; installing it with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    # The package's own server would only occupy a port: its unit is masked while it is installed.
    local unit=/etc/systemd/system/redis-server.service
    if [[ ! -e "$unit" && ! -L "$unit" ]]; then
        mkdir -p "${unit%/*}"
        ln -s /dev/null "$unit"
        trap 'rm -f -- /etc/systemd/system/redis-server.service' EXIT
    fi
    apt-get update >&2 </dev/null || die "apt-get update failed; is a package mirror reachable?"
    apt-get install -y --no-install-recommends redis-server >&2 </dev/null ||
        die "apt-get could not install the package redis-server"
}

start() {
    is_there || install_it
    is_there || die "Redis was installed, but redis-server is not on PATH"
    say "$(redis-server --version | head -n 1), at $(command -v redis-server)"
    printf 'export ORLA_TEST_REDIS=%q\n' "$(command -v redis-server)"
}

case "${1:-}" in
    start) start ;;
    *) die "usage: eval \"\$(.ci/redis.sh start)\"" ;;
esac
