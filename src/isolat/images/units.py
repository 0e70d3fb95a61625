"""What makes an image's systemd that of a machine of ours: the agent's service, terminals, and what is not needed.

Without hardware virtualization every process that a boot starts costs 50 to 150 ms, so what a machine without
hardware of its own, updates or users has no use for is masked: linked to /dev/null in /etc/systemd/system
(systemctl(1), mask). All of it can be had back inside with ``systemctl unmask``.
"""

from __future__ import annotations

AGENT_UNIT = "isolat-agent.service"
_SYSTEM = "etc/systemd/system"

# An ordinary service: what an exec finds is a system whose basic.target was reached. No SIGTERM at the end: what was
# started through the agent was asked to end before the machine was, and the agent itself is deaf to it.
_AGENT = """\
[Unit]
Description=Isolat agent

[Service]
ExecStart=/usr/libexec/isolat/isolat-agent --service
Restart=always
RestartSec=1
Delegate=yes
KillMode=mixed
KillSignal=SIGKILL
OOMScoreAdjust=-900
LimitNOFILE=65536
"""

# Only what something waits for: disks, network cards, the first terminals, the power button, and the buses that their
# drivers are found by. All of a PC's devices are three hundred, most of them memory blocks, terminals and processors.
_COLDPLUG = """\
[Service]
ExecStart=
ExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block --subsystem-match=net \\
    --subsystem-match=virtio --subsystem-match=virtio-ports --subsystem-match=acpi --subsystem-match=input
ExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=tty --sysname-match=ttyS0 \\
    --sysname-match=tty1 --sysname-match=console
"""

# By itself a login prompt waits until all else is done or 5 s have passed, so as not to be written over.
_GETTY = """\
[Service]
Type=simple
"""

# The last lines of a machine's life are on its console, and nothing is written to a disk that is thrown away.
_JOURNAL = """\
[Journal]
Storage=volatile
RuntimeMaxUse=16M
"""

# A stop is bounded: what does not end by itself is killed.
_MANAGER = """\
[Manager]
DefaultTimeoutStopSec=10s
ShowStatus=auto
"""

_HOSTS = """\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
"""

MASKED = (
    # the distribution's own upkeep
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "man-db.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "logrotate.timer", "systemd-tmpfiles-clean.timer"),
    # a root that the initrd has mounted as it stays, and that is thrown away
    *("systemd-remount-fs.service", "systemd-fsck-root.service", "systemd-repart.service"),
    *("systemd-random-seed.service", "systemd-journal-flush.service"),
    # hardware
    *("systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-pstore.service"),
    *("systemd-hwdb-update.service", "systemd-backlight@.service", "systemd-rfkill.socket"),
    # a network
    *("systemd-networkd-wait-online.service", "remote-fs.target", "ifupdown-wait-online.service"),
    # questions that nobody is there to answer, and records of who was there
    *("systemd-firstboot.service", "systemd-ask-password-console.path", "systemd-ask-password-wall.path"),
    *("systemd-update-utmp.service", "systemd-update-utmp-runlevel.service"),
    # file systems for looking into the kernel, each mounted by a process, and modules that are loaded when used
    *("sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount", "dev-hugepages.mount"),
    *("sys-fs-fuse-connections.mount", "proc-sys-fs-binfmt_misc.automount", "systemd-binfmt.service"),
    "modprobe@.service",
)

# What makes units of what this disk does not have: GPT, encrypted disks, suspension, offline updates. The terminals
# that the getty generator would find are told of below.
GENERATORS_MASKED = tuple(
    f"systemd-{name}-generator"
    for name in (
        *("bless-boot", "cryptsetup", "debug", "getty", "gpt-auto", "hibernate-resume", "integritysetup", "rc-local"),
        *("run", "system-update", "veritysetup"),
    )
)


def files(device: str) -> dict[str, str]:
    """Path to content. ``device``: the root's."""
    return {
        f"{_SYSTEM}/{AGENT_UNIT}": _AGENT,
        f"{_SYSTEM}/systemd-udev-trigger.service.d/isolat.conf": _COLDPLUG,
        f"{_SYSTEM}/getty@.service.d/isolat.conf": _GETTY,
        f"{_SYSTEM}/serial-getty@.service.d/isolat.conf": _GETTY,
        "etc/systemd/journald.conf.d/isolat.conf": _JOURNAL,
        "etc/systemd/system.conf.d/isolat.conf": _MANAGER,
        "etc/fstab": f"{device} / ext4 rw,noatime 0 0\n",
        "etc/hostname": "isolat\n",
        "etc/hosts": _HOSTS,
        "etc/.updated": "",  # this is no first boot after an upgrade of /usr (systemd-update-done.service(8))
        "var/.updated": "",
    }


def links() -> dict[str, str]:
    """Path to what the symbolic link there says."""
    wants = {
        f"{_SYSTEM}/multi-user.target.wants/{AGENT_UNIT}": f"/{_SYSTEM}/{AGENT_UNIT}",
        f"{_SYSTEM}/getty.target.wants/getty@tty1.service": "/lib/systemd/system/getty@.service",
        f"{_SYSTEM}/getty.target.wants/serial-getty@ttyS0.service": "/lib/systemd/system/serial-getty@.service",
        f"{_SYSTEM}/default.target": "/lib/systemd/system/multi-user.target",
    }
    masked = {f"{_SYSTEM}/{name}": "/dev/null" for name in MASKED}
    return wants | masked | {f"etc/systemd/system-generators/{name}": "/dev/null" for name in GENERATORS_MASKED}
