"""What makes an image's systemd that of a machine of ours: the agent's service, terminals, and what is not needed.

Without hardware virtualization every process that a boot starts costs 50 to 150 ms, so what a machine without
hardware of its own, updates or users has no use for is masked: linked to /dev/null in /etc/systemd/system
(systemctl(1), mask). All of it can be had back inside with ``systemctl unmask``.
"""

from __future__ import annotations

AGENT_UNIT = "isolat-agent.service"
_SYSTEM = "etc/systemd/system"

# Early: an exec is answered while the rest of the system still comes up. No SIGTERM at the end: what was started
# through the agent was asked to end before the machine was, and the agent itself is deaf to it.
_AGENT = """\
[Unit]
Description=Isolat agent
DefaultDependencies=no
After=systemd-tmpfiles-setup.service
Conflicts=shutdown.target
Before=shutdown.target

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
    # of the distribution's own upkeep
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "man-db.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "logrotate.timer", "systemd-tmpfiles-clean.timer"),
    # of a root that the initrd has mounted as it stays
    *("systemd-remount-fs.service", "systemd-fsck-root.service", "systemd-repart.service"),
    # of hardware
    *("systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-pstore.service"),
    *("systemd-hwdb-update.service", "systemd-backlight@.service", "systemd-rfkill.socket"),
    # of a network
    *("systemd-networkd-wait-online.service", "remote-fs.target", "ifupdown-wait-online.service"),
    # of questions that nobody is there to answer
    *("systemd-firstboot.service", "systemd-ask-password-console.path", "systemd-ask-password-wall.path"),
)


def files(device: str) -> dict[str, str]:
    """Path to content. ``device``: the root's."""
    return {
        f"{_SYSTEM}/{AGENT_UNIT}": _AGENT,
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
        f"{_SYSTEM}/sysinit.target.wants/{AGENT_UNIT}": f"/{_SYSTEM}/{AGENT_UNIT}",
        f"{_SYSTEM}/getty.target.wants/getty@tty1.service": "/lib/systemd/system/getty@.service",
        f"{_SYSTEM}/getty.target.wants/serial-getty@ttyS0.service": "/lib/systemd/system/serial-getty@.service",
        f"{_SYSTEM}/default.target": "/lib/systemd/system/multi-user.target",
    }
    return wants | {f"{_SYSTEM}/{name}": "/dev/null" for name in MASKED}
