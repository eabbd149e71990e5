#!/usr/bin/env bash
# A browser for the tests of the live page: Debian's Chromium, driven by Playwright, which downloads none of its own.
#
#   eval "$(.ci/chromium.sh start)"    # finds or installs it; exports ORLA_TEST_CHROMIUM, the path of its program
#   pytest tests/serve/page
#
# `start` prints only the export line on stdout and everything else on stderr; called again, it prints the same line.
# There is nothing to stop: the tests start the browser, and end it. Without ORLA_TEST_CHROMIUM they skip, and say so.
#
# `eval "$(…)"` hides a failed start from `set -e`; where the browser must be there, write
#   exports="$(.ci/chromium.sh start)"; eval "$exports"
#
# ORLA_TEST_CHROMIUM names the program if it is set already; else it is looked for on PATH as chromium, chromium-browser
# and google-chrome. Where it is missing, it is installed with apt-get if this runs as root on a Debian-like system.

set -euo pipefail

say() { printf 'chromium.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

find_browser() {
    local name found
    for name in "${ORLA_TEST_CHROMIUM:-}" chromium chromium-browser google-chrome; do
        if [[ -n "$name" ]] && found="$(command -v "$name")"; then
            printf '%s\n' "$found"
            return 0
        fi
    done
    return 1
}

install_browser() {
    command -v apt-get >/dev/null ||
        die "no Chromium was found and there is no apt-get here; install it, and name it in ORLA_TEST_CHROMIUM"
    [[ "$(id -u)" == 0 ]] || die "no Chromium was found and only root can install it: sudo apt-get install chromium"
    say "no Chromium was found; installing it with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update >&2 </dev/null || die "apt-get update failed; is a package mirror reachable?"
    apt-get install -y --no-install-recommends chromium fonts-dejavu-core >&2 </dev/null ||
        die "apt-get could not install the package chromium"
}

start() {
    local browser
    browser="$(find_browser)" || { install_browser && browser="$(find_browser)"; } ||
        die "Chromium was installed, but is not on PATH"
    "$browser" --version >&2 </dev/null || die "$browser does not run"
    printf 'export ORLA_TEST_CHROMIUM=%q\n' "$browser"
}

case "${1:-}" in
    start) start ;;
    *) die "usage: eval \"\$(.ci/chromium.sh start)\"" ;;
esac
