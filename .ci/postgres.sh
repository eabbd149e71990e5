#!/usr/bin/env bash
# A throwaway PostgreSQL for the tests, on a free port of 127.0.0.1.
#
#   eval "$(.ci/postgres.sh start)"    # starts it; exports ORLA_TEST_POSTGRES_URL and ORLA_TEST_POSTGRES_DIR
#   pytest …
#   .ci/postgres.sh stop               # stops it and removes its folder
#
# `start` prints only the two export lines on stdout and everything else on stderr; called again while
# its server answers, it prints the same lines again. `stop` acts on ORLA_TEST_POSTGRES_DIR, or on the folder
# named as its second argument; called again, or with nothing started, it does nothing and succeeds.
#
# `eval "$(…)"` hides a failed start from `set -e`; where the server must be there, write
#   exports="$(.ci/postgres.sh start)"; eval "$exports"; trap '.ci/postgres.sh stop' EXIT
#
# PostgreSQL is looked for with pg_config, in /usr/lib/postgresql and on PATH. Where it is missing,
# it is installed with apt-get if this runs as root on a Debian-like system. PostgreSQL refuses to run as root, so
# root starts it as the user `postgres` (made if missing). Nothing is durable: fsync is off.

set -euo pipefail

say() { printf 'postgres.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# ── find or install ──────────────────────────────────────────────────────────────────────────────────

has_server() { [[ -n "$1" && -x "$1/initdb" && -x "$1/pg_ctl" && -x "$1/postgres" ]]; }

# Prints the folder of the server's programs; the newest of several. pg_config may belong to the client
# library alone, whose folder holds no server: then the search goes on.
find_server() {
    local folder
    while IFS= read -r folder; do
        if has_server "$folder"; then
            printf '%s\n' "$folder"
            return 0
        fi
    done < <(candidates)
    return 1
}

candidates() {
    local program
    if command -v pg_config >/dev/null; then pg_config --bindir || true; fi
    printf '%s\n' /usr/lib/postgresql/*/bin | sort -rV
    # A program on PATH may be a link or a wrapper: its real folder is the one that holds its siblings.
    program="$(command -v postgres || command -v initdb || true)"
    if [[ -n "$program" ]]; then dirname "$(readlink -f "$program")"; fi
}

install_server() {
    command -v apt-get >/dev/null ||
        die "PostgreSQL was not found and there is no apt-get here; install its server (initdb, pg_ctl, postgres)"
    [[ "$(id -u)" == 0 ]] ||
        die "PostgreSQL was not found and only root can install it: sudo apt-get install postgresql"
    say "PostgreSQL was not found; installing it with apt-get"
    export DEBIAN_FRONTEND=noninteractive
    # A cluster of the package's own would only occupy a port: ours is made below.
    mkdir -p /etc/postgresql-common/createcluster.d
    printf 'create_main_cluster = false\n' >/etc/postgresql-common/createcluster.d/orla-test.conf
    apt-get update >&2 </dev/null || die "apt-get update failed; is a package mirror reachable?"
    apt-get install -y --no-install-recommends postgresql >&2 </dev/null ||
        die "apt-get could not install the package postgresql"
}

# ── run as somebody who is not root ──────────────────────────────────────────────────────────────────

server_user() {
    if [[ "$(id -u)" != 0 ]]; then
        id -un
        return
    fi
    if ! id postgres >/dev/null 2>&1; then
        useradd --system --no-create-home --shell /usr/sbin/nologin postgres >&2 ||
            die "could not make the user postgres, and PostgreSQL refuses to run as root"
    fi
    printf 'postgres\n'
}

# From its own folder, since the current one may be closed to that user; with stdin and, for the
# server, stdout elsewhere, so that the $(…) around `start` ends although the server goes on.
as_user() {
    local user="$1" folder="$2"
    shift 2
    if [[ "$(id -u)" == 0 ]]; then
        (cd "$folder" && runuser -u "$user" -- "$@" </dev/null)
    else
        (cd "$folder" && "$@" </dev/null)
    fi
}

# ── start ────────────────────────────────────────────────────────────────────────────────────────────

start() {
    if [[ -n "${ORLA_TEST_POSTGRES_DIR:-}" ]] && is_running "$ORLA_TEST_POSTGRES_DIR" &&
        [[ -s "$ORLA_TEST_POSTGRES_DIR/port" ]]; then
        print_exports "$ORLA_TEST_POSTGRES_DIR"
        return
    fi
    local bin user root
    bin="$(find_server)" || { install_server && bin="$(find_server)"; } ||
        die "PostgreSQL was installed, but initdb, pg_ctl and postgres are in none of the usual folders"
    user="$(server_user)"
    # A short path: the name of a unix socket may have about 100 characters.
    root="$(mktemp -d /tmp/orla-pg.XXXXXX)"
    [[ "$(id -u)" != 0 ]] || chown "$user" "$root"
    if ! { make_cluster "$bin" "$user" "$root" && serve "$bin" "$user" "$root"; }; then
        rm -rf -- "$root"
        die "PostgreSQL in $bin could not be started as $user"
    fi
    say "PostgreSQL from $bin, as $user, on port $(<"$root/port")"
    print_exports "$root"
}

make_cluster() {
    local bin="$1" user="$2" root="$3"
    as_user "$user" "$root" "$bin/initdb" -D "$root/data" -U orla -A trust -E UTF8 --locale=C --no-sync \
        >"$root/initdb.log" 2>&1 || { cat "$root/initdb.log" >&2; return 1; }
    cat >>"$root/data/postgresql.conf" <<CONF
listen_addresses = '127.0.0.1'
unix_socket_directories = '$root'
fsync = off
synchronous_commit = off
full_page_writes = off
max_connections = 50
CONF
}

# A free port may be taken by another between our look and the server's bind: hence several tries.
serve() {
    local bin="$1" user="$2" root="$3" port try
    for try in 1 2 3 4 5; do
        port="$(free_port)"
        if as_user "$user" "$root" "$bin/pg_ctl" -D "$root/data" -l "$root/data/server.log" \
            -o "-p $port" -w -t 60 start >"$root/pg_ctl.log" 2>&1; then
            printf '%s\n' "$port" >"$root/port"
            return 0
        fi
        say "port $port did not work (try $try)"
    done
    cat "$root/data/server.log" "$root/pg_ctl.log" >&2 || true
    return 1
}

# A port below the range that the system hands out for outgoing connections, refused by whoever asks there.
free_port() {
    local port
    while :; do
        port=$((20000 + RANDOM % 12000))
        if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
            printf '%s\n' "$port"
            return
        fi
    done
}

print_exports() {
    printf 'export ORLA_TEST_POSTGRES_DIR=%q\n' "$1"
    printf 'export ORLA_TEST_POSTGRES_URL=%q\n' "postgresql://orla@127.0.0.1:$(<"$1/port")/postgres"
}

# ── stop ─────────────────────────────────────────────────────────────────────────────────────────────

server_pid() { head -n 1 "$1/data/postmaster.pid" 2>/dev/null || true; }

is_running() {
    local pid
    pid="$(server_pid "$1")"
    [[ -n "$pid" ]] && kill -0 "$pid" 2>/dev/null
}

stop() {
    local root="${1:-${ORLA_TEST_POSTGRES_DIR:-}}" pid
    if [[ -z "$root" || ! -d "$root" ]]; then return 0; fi
    # What is removed below must be ours, whatever the variable says.
    [[ "$root" == /tmp/orla-pg.* ]] || die "$root was not made by this script: nothing is stopped or removed"
    pid="$(server_pid "$root")"
    if [[ -n "$pid" ]]; then
        kill -INT "$pid" 2>/dev/null || true # "fast shutdown": sessions are ended, the server leaves in order
        wait_for_end "$root" || { kill -QUIT "$pid" 2>/dev/null || true; wait_for_end "$root"; } ||
            die "the server with pid $pid does not end; its folder $root stays"
    fi
    rm -rf -- "$root"
}

# A server that left in order removes its pid file. Its pid may stay: a container whose first process
# collects no orphans keeps it as a zombie, which answers to `kill -0`.
wait_for_end() {
    local try
    for try in $(seq 100); do
        is_running "$1" || return 0
        sleep 0.1
    done
    say "the server did not end in $((try / 10)) s"
    return 1
}

case "${1:-}" in
    start) start ;;
    stop) stop "${2:-}" ;;
    *) die "usage: eval \"\$(.ci/postgres.sh start)\"  |  .ci/postgres.sh stop [folder]" ;;
esac
