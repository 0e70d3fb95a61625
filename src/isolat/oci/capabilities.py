"""The Linux capabilities that a container's processes may have, each with its reason.

A subset of what Docker gives by default. They count only inside the environment's user namespace
(user_namespaces(7)): over its own files, processes and network, never over the host's. A process that is not root
inside has none of them in effect, because a change of user from 0 clears them (capabilities(7), "Effect of user ID
changes"), and ``no_new_privs`` keeps set-user-ID programs and file capabilities from bringing them back.
"""

from __future__ import annotations

GIVEN: tuple[tuple[str, str], ...] = (
    ("CAP_CHOWN", "package managers set owners"),
    ("CAP_DAC_OVERRIDE", "root inside reads what other users inside own"),
    ("CAP_FOWNER", "package managers set modes and times of others' files"),
    ("CAP_FSETID", "keeps the set-group-ID bit when such a file is written"),
    ("CAP_KILL", "the init ends every process inside, whoever runs it"),
    ("CAP_NET_BIND_SERVICE", "servers listen on ports below 1024"),
    ("CAP_SETFCAP", "packages set file capabilities, which count only in this user namespace"),
    ("CAP_SETGID", "the init changes to the group asked for"),
    ("CAP_SETPCAP", "servers give up capabilities for good"),
    ("CAP_SETUID", "the init changes to the user asked for"),
    ("CAP_SYS_CHROOT", "sshd and mail servers lock themselves in an empty directory"),
)

# What Docker gives besides.
LEFT_OUT: tuple[tuple[str, str], ...] = (
    ("CAP_AUDIT_WRITE", "the kernel takes audit messages from its first user namespace only"),
    ("CAP_MKNOD", "a user namespace can't make devices; FIFOs and sockets need no capability"),
    ("CAP_NET_RAW", "forged packets on a shared bridge; ping works without, by net.ipv4.ping_group_range"),
)


def oci_capabilities() -> dict[str, list[str]]:
    """``process.capabilities`` (OCI config, "Linux Process"). Nothing is inherited across a change of user."""
    names = [name for name, _ in GIVEN]
    return {
        "bounding": names,
        "effective": names,
        "permitted": names,
        "inheritable": [],
        "ambient": [],
    }
