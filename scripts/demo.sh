#!/usr/bin/env bash
# A few real environments, each with a word on what is to be seen. `make demo` sets everything up first.
# It uses the default state root, names everything demo-*, and removes what it made, also when it is interrupted.
set -euo pipefail
cd "$(dirname "$0")/.."
isolat=$PWD/.venv/bin/isolat
name=demo-$$

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; else bold='' dim='' plain=''; fi

tell() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

# A command as one would type it.
show() {
    local word line='$ isolat' simple='^[A-Za-z0-9_./:=@%+-]+$'
    for word; do
        [[ $word =~ $simple ]] && line+=" $word" || line+=" '$word'"
    done
    printf '%s%s%s\n' "$dim" "$line" "$plain"
}

# Shows a command and runs it. What it says must be true: with any other exit code than the expected one, the demo fails.
try() { expect 0 "$@"; }

expect() {
    local wanted=$1 code=0
    shift
    show "$@"
    "$isolat" "$@" || code=$?
    [ $code -eq 0 ] || printf '%s(exit code %s)%s\n' "$dim" "$code" "$plain"
    if [ $code -ne "$wanted" ]; then
        printf 'demo: exit code %s was expected here\n' "$wanted" >&2
        exit 1
    fi
}

cleanup() { "$isolat" rm -f "$name" >/dev/null 2>&1 || true; }
trap cleanup EXIT

tell "1. A command in a container of its own, from an image made of Debian's packages on this machine"
try run --rm debian python3 -c 'print(6*7)'

tell "2. It is a part of a pipe like any other command"
printf '%s$ echo hello | isolat run --rm -i debian tr a-z A-Z%s\n' "$dim" "$plain"
echo hello | "$isolat" run --rm -i debian tr a-z A-Z

tell "3. Exit codes are the command's own; 127 and 126 mean that it never ran"
expect 7 run --rm debian sh -c 'exit 7'
expect 127 run --rm debian no-such-command

tell "4. What it sees: its own ids, processes and host name, and no network"
try run --rm --hostname inside debian sh -c 'id -u; hostname; ls /proc | grep -c "^[0-9]"; ls /sys/class/net'

tell "5. Limits hold: more memory than it may have (64 MiB), and more processes than it may have (16)"
expect 137 run --rm -m 64m debian python3 -c 'b = bytearray(512 << 20)'
expect 2 run --rm --pids-limit 16 debian sh -c 'for i in $(seq 40); do sleep 1 & done; echo not reached'

tell "6. Left running in the background, entered, watched, and removed"
try run -d --name "$name" debian sh -c 'i=0; while :; do echo "tick $i"; i=$((i+1)); sleep 0.2; done'
sleep 1
try exec "$name" sh -c 'echo "inside: $(cat /proc/1/comm) is process 1"'
try ps
try logs -n 3 "$name"
try rm -f "$name"

tell "7. Everything that a run would do, before it does it (the first lines)"
show run --plan --rm debian true
plan=$("$isolat" run --plan --rm debian true)
printf '%s\n' "$plan" | sed -n 1,15p | cut -c 1-118

tell "Next: isolat run -it debian      a shell inside;  isolat doctor      what this machine can do"
