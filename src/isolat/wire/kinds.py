"""The numbers of the wire protocol (docs/protocol.md). Plain integers: the hot path must not import enum."""

from __future__ import annotations

from typing import Final

VERSION: Final = 1
HEADER_BYTES: Final = 12
MAX_BODY_BYTES: Final = 1 << 20
MAX_DATA_BYTES: Final = 64 << 10
MAX_DESCRIPTORS: Final = 4

# kinds
HELLO: Final = 1
STEP: Final = 2
SPAWN: Final = 3
SIGNAL: Final = 4
RESIZE: Final = 5
ADOPT: Final = 6
PROCS: Final = 7
FORGET: Final = 8
READ: Final = 9
WRITE: Final = 10
QUIT: Final = 11
HOLD: Final = 12
FETCH: Final = 13
DROP: Final = 14
RESUME: Final = 15
SETTLE: Final = 16
IDLE: Final = 17
HUSH: Final = 18
OK: Final = 32
ERROR: Final = 33
DATA: Final = 48
EOF: Final = 49
CREDIT: Final = 50
EXITED: Final = 51
LOST: Final = 52

KIND_NAMES: Final[dict[int, str]] = {
    HELLO: "HELLO", STEP: "STEP", SPAWN: "SPAWN", SIGNAL: "SIGNAL", RESIZE: "RESIZE", ADOPT: "ADOPT",
    PROCS: "PROCS", FORGET: "FORGET", READ: "READ", WRITE: "WRITE", QUIT: "QUIT", HOLD: "HOLD",
    FETCH: "FETCH", DROP: "DROP", RESUME: "RESUME", SETTLE: "SETTLE", IDLE: "IDLE", HUSH: "HUSH",
    OK: "OK", ERROR: "ERROR", DATA: "DATA", EOF: "EOF", CREDIT: "CREDIT", EXITED: "EXITED", LOST: "LOST",
}  # fmt: skip
RAW_KINDS: Final = frozenset({DATA, EOF, CREDIT})

# tags; the comment says how the value is read
T_KEY: Final = 1  # text
T_TO: Final = 2  # text
T_ARGV: Final = 3  # bytes, repeats
T_ENV: Final = 4  # bytes, repeats: NAME=value
T_CWD: Final = 5  # bytes
T_USER: Final = 6  # text: name[:group] or uid[:gid]
T_FLAGS: Final = 7  # int
T_ROWS: Final = 8  # int
T_COLS: Final = 9  # int
T_SIGNAL: Final = 10  # int
T_SCOPE: Final = 11  # int
T_PREFIX: Final = 12  # text
T_COUNT: Final = 13  # int
T_CODE: Final = 14  # int
T_ERRNO: Final = 15  # int
T_STAGE: Final = 16  # text
T_MESSAGE: Final = 17  # text
T_TAIL: Final = 18  # bytes
T_PATH: Final = 19  # bytes
T_MODE: Final = 20  # int
T_OFFSET: Final = 21  # int
T_SIZE: Final = 22  # int
T_DATA: Final = 23  # bytes
T_STEP: Final = 24  # nested
T_OP: Final = 25  # int
T_SOURCE: Final = 26  # bytes
T_TARGET: Final = 27  # bytes
T_FSTYPE: Final = 28  # text
T_OPTIONS: Final = 29  # bytes
T_UID: Final = 30  # int; in a LINE: first the id on the file system, then the id it becomes
T_GID: Final = 31  # int
T_WRITE: Final = 32  # nested: PATH, DATA
T_LINE: Final = 33  # nested: UID, UID, COUNT
T_INVERSE: Final = 34  # bytes, repeats
T_PID: Final = 35  # int
T_STATE: Final = 36  # int: 0 alive, 1 ended, 2 parked
T_TIME: Final = 37  # int, ns since the epoch: first start, then end
T_VERSION: Final = 38  # int
T_ROLE: Final = 39  # text
T_PIDFILE: Final = 40  # bytes
T_ROOT: Final = 41  # bytes
T_CGROUP: Final = 42  # bytes, repeats: files to write "0" to before the exec
T_PROC: Final = 43  # nested
T_STREAM: Final = 44  # int: the number of a process on a serial channel
T_HELD: Final = 45  # text, repeats: held descriptors that become the child's 4, 5, …
T_SPACES: Final = 46  # int: CLONE_NEW* of the namespaces that the child starts in
T_PARK: Final = 47  # int, ms
T_GRACE: Final = 48  # int, ms
T_HOST: Final = 49  # text
T_HOME: Final = 50  # bytes

# flags of SPAWN
F_TTY: Final = 1
F_STDIN: Final = 2
F_CONTROL: Final = 4
F_LAUNCHER: Final = 8
F_LOG: Final = 16
F_MAIN: Final = 32
F_FDS: Final = 64
F_SERIAL: Final = 128
F_APART: Final = 256
F_BESIDE: Final = 512
F_CONFINED: Final = 1024
FIRST_FLAGS: Final = 255  # of SPAWN: what those know who don't say in their HELLO which they do
# flags of WRITE
F_TRUNCATE: Final = 1

STDIN: Final = 0
STDOUT: Final = 1
STDERR: Final = 2

SCOPE_PROCESS: Final = 0
SCOPE_GROUP: Final = 1
SCOPE_ALL: Final = 2
