#!/usr/bin/env bash
# A few real environments, each with a word on what is to be seen. `make demo` sets everything up first.
# It uses the default state root, names everything demo-*, and removes what it made, also when it is interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
isolat=$PWD/.venv/bin/isolat
name=demo-$$

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; else bold='' dim='' plain=''; fi

tell() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

# Prints a command as one would type it, then runs it; says its exit code when that is not 0.
try() {
    local code=0
    printf '%s$ isolat' "$dim"
    printf ' %q' "$@"
    printf '%s\n' "$plain"
    "$isolat" "$@" || code=$?
    [ $code -eq 0 ] || printf '%s(exit code %s)%s\n' "$dim" "$code" "$plain"
    return 0
}

cleanup() { "$isolat" rm -f "$name" >/dev/null 2>&1 || true; }
trap cleanup EXIT

tell "1. A command in a container of its own, from an image made of Debian's packages on this machine"
try run --rm debian python3 -c 'print(6*7)'

tell "2. It is a part of a pipe like any other command"
printf '%s$ echo hello | isolat run --rm -i debian tr a-z A-Z%s\n' "$dim" "$plain"
echo hello | "$isolat" run --rm -i debian tr a-z A-Z

tell "3. Exit codes are the command's own; 127 and 126 mean that it never ran"
try run --rm debian sh -c 'exit 7'
try run --rm debian no-such-command

tell "4. What it sees: its own ids, processes and host name, and no network"
try run --rm --hostname inside debian sh -c 'id -u; hostname; ls /proc | grep -c "^[0-9]"; ls /sys/class/net'

tell "5. Limits hold: more memory than it may have (64 MiB), and more processes than it may have (16)"
try run --rm -m 64m debian python3 -c 'b = bytearray(512 << 20)'
try run --rm --pids-limit 16 debian sh -c 'for i in $(seq 40); do sleep 1 & done 2>/dev/null; echo not reached'

tell "6. Left running in the background, entered, watched, and removed"
try run -d --name "$name" debian sh -c 'i=0; while :; do echo "tick $i"; i=$((i+1)); sleep 0.2; done'
sleep 1
try exec "$name" sh -c 'echo "inside: $(cat /proc/1/comm) is process 1"'
try ps
try logs -n 3 "$name"
try rm -f "$name"

tell "7. Everything that a run would do, before it does it (the first lines)"
printf '%s$ isolat run --plan --rm debian true%s\n' "$dim" "$plain"
plan=$("$isolat" run --plan --rm debian true)
printf '%s\n' "$plan" | sed -n 1,15p

tell "Next: isolat run -it debian      a shell inside;  isolat doctor      what this machine can do"
