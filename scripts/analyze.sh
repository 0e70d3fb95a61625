#!/usr/bin/env bash
# gcc's static analyzer over each C file: double closes and frees, use after free, descriptors that leak. What it finds
# fails. Off are three checks that cannot see what these programs do on purpose: memory is not freed before an exec or
# an exit, CMSG_FIRSTHDR is not null where room for the header was just given, and Linux overcommits small allocations.
set -euo pipefail
status=0
for source in "$@"; do
    gcc -std=c11 -D_GNU_SOURCE -D_FILE_OFFSET_BITS=64 -O1 -fanalyzer -Werror -Wno-format-truncation \
        -Wno-analyzer-malloc-leak -Wno-analyzer-null-dereference \
        -Wno-analyzer-possible-null-argument -Wno-analyzer-possible-null-dereference \
        -c -o /dev/null "$source" || status=1
done
exit $status
