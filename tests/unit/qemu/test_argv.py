"""QEMU's command lines, kept in tests/golden/qemu with one option a line.

``ISOLAT_UPDATE_GOLDEN=1 pytest tests/unit/qemu/test_argv.py`` writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from isolat.qemu import pc
from isolat.qemu.argv import (
    KVM_CPU,
    TCG_CPU,
    Descriptors,
    HeldDisk,
    Machine,
    kernel_arguments,
    memory_overhead_bytes,
    microvm_argv,
    placeholder,
    template_key,
    with_disks,
)

GOLDEN = Path(__file__).parents[2] / "golden/qemu"
UPDATE = bool(os.environ.get("ISOLAT_UPDATE_GOLDEN"))

BOOT = Machine(
    binary="/usr/bin/qemu-system-x86_64",
    accel="tcg",
    cpu=TCG_CPU,
    memory_mib=256,
    tsc_khz=2_500_000,
    vmlinux="/guest/kernel/vmlinux",
    initramfs="/guest/initramfs.cpio",
)
TEMPLATE = replace(BOOT, share=True)
CLONE = replace(BOOT, incoming=True)
KVM = replace(BOOT, accel="kvm", cpu=KVM_CPU, tsc_khz=0)
DISKS = {"vda": HeldDisk("image", 7), "vdb": HeldDisk("disk", 8)}
PC = pc.Pc("/usr/bin/qemu-system-x86_64", "tcg", TCG_CPU, 1024, cpus=2)

CASES: dict[str, tuple[str, ...]] = {
    "microvm-boot": microvm_argv(BOOT),
    "microvm-template": microvm_argv(TEMPLATE),
    "microvm-clone": microvm_argv(CLONE),
    "microvm-live": microvm_argv(replace(BOOT, share=True, live=2)),
    "microvm-clone-with-disks": with_disks(microvm_argv(CLONE), DISKS),
    "microvm-four-processors": microvm_argv(replace(BOOT, cpus=4)),
    "microvm-kvm": microvm_argv(KVM),
    "microvm-without-kernel": microvm_argv(replace(BOOT, vmlinux="", initramfs="")),
    "pc": pc.pc_argv(PC),
    "pc-kvm-two-disks": pc.pc_argv(replace(PC, accel="kvm", cpu=KVM_CPU, disks=(pc.Disk(), pc.Disk(read_only=True)))),
}


def _readable(words: tuple[str, ...]) -> str:
    lines: list[str] = []
    for word in words:
        if word.startswith("-") or not lines or " " in lines[-1] or not lines[-1].startswith("-"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_is_the_golden_one(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    text = _readable(CASES[name])
    if UPDATE:
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path.name} differs; ISOLAT_UPDATE_GOLDEN=1 writes it anew"


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(CASES)


def test_template_and_clone_have_the_same_devices() -> None:
    """A state is loaded by the places of its devices."""

    def devices(words: tuple[str, ...]) -> list[str]:
        return [word for word in words if word.startswith("virt")]

    assert devices(microvm_argv(TEMPLATE)) == devices(microvm_argv(CLONE)) == devices(microvm_argv(BOOT))


def test_a_clone_loads_no_kernel() -> None:
    assert not {"-kernel", "-initrd", "-append", "-S"} & set(microvm_argv(CLONE))


@pytest.mark.parametrize("words", CASES.values(), ids=CASES.keys())
def test_every_machine_is_confined_and_bare(words: tuple[str, ...]) -> None:
    for word in ("-sandbox", "-nodefaults", "-no-user-config", "-no-reboot"):
        assert word in words
    assert "spawn=deny" in words[words.index("-sandbox") + 1]
    assert not any("balloon" in word or "usb=on" in word for word in words)


def test_without_a_filter_of_its_own_none_is_asked_for() -> None:
    assert "-sandbox" not in microvm_argv(replace(BOOT, sandbox=False))


def test_the_clock_is_told_only_under_emulation() -> None:
    assert "tsc_early_khz=2500000" in kernel_arguments(BOOT)
    assert "mitigations=off" in kernel_arguments(BOOT)
    assert "tsc_early_khz" not in kernel_arguments(KVM)
    assert "mitigations=off" not in kernel_arguments(KVM)


def test_disks_take_the_place_of_placeholders_and_of_nothing_else() -> None:
    waits, has = microvm_argv(CLONE), with_disks(microvm_argv(CLONE), DISKS)
    devices = [[word.partition(",drive=")[0] for word in words if word.startswith("virt")] for words in (waits, has)]
    assert devices[0] == devices[1]
    assert sum("null-co" in word for word in waits) - sum("null-co" in word for word in has) == len(DISKS)
    assert {"read-only=on" in word for word in has if "node-name=image" in word} == {True}
    assert {"read-only=on" in word for word in has if "node-name=disk" in word} == {False}
    with pytest.raises(ValueError, match="no part of this command line"):
        with_disks(has, DISKS)


def test_a_placeholder_is_named_after_its_device() -> None:
    assert any(f"node-name={placeholder('vdb')}," in word for word in microvm_argv(CLONE))


KEY = template_key(BOOT, "guest", "qemu")

SAME: dict[str, Machine] = {
    "a clone's": CLONE,
    "the template's": TEMPLATE,
    "other paths": replace(BOOT, vmlinux="/x", initramfs="/y"),
    "other descriptors": replace(BOOT, descriptors=Descriptors(7, 8, 9)),
}
OTHER: dict[str, Machine] = {
    "memory": replace(BOOT, memory_mib=512),
    "processors": replace(BOOT, cpus=2),
    "clock": replace(BOOT, tsc_khz=2_500_001),
    "accelerator": KVM,
    "model": replace(BOOT, cpu="max"),
    "program": replace(BOOT, binary="/opt/qemu"),
    "kernel arguments": replace(BOOT, kernel_arguments=("debug",)),
}


@pytest.mark.parametrize("name", SAME)
def test_the_key_is_the_same(name: str) -> None:
    assert template_key(SAME[name], "guest", "qemu") == KEY


@pytest.mark.parametrize("name", OTHER)
def test_the_key_is_another(name: str) -> None:
    assert template_key(OTHER[name], "guest", "qemu") != KEY


@pytest.mark.parametrize(("guest", "qemu"), [("other", "qemu"), ("guest", "other"), ("qemu", "guest")])
def test_guest_and_program_are_in_the_key(guest: str, qemu: str) -> None:
    assert template_key(BOOT, guest, qemu) != KEY


def test_the_overhead_grows_with_what_it_is_for() -> None:
    mib = 1 << 20
    assert memory_overhead_bytes(BOOT) >= (BOOT.tb_size_mib + 24) * mib
    assert memory_overhead_bytes(KVM) < memory_overhead_bytes(BOOT)
    assert memory_overhead_bytes(replace(BOOT, cpus=2)) > memory_overhead_bytes(BOOT)
    assert memory_overhead_bytes(replace(BOOT, tb_size_mib=64)) - memory_overhead_bytes(BOOT) == 32 * mib
    assert pc.memory_overhead_bytes(PC) > memory_overhead_bytes(BOOT)


def _option(words: tuple[str, ...], name: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == name]


def test_the_descriptors_are_where_they_are_said_to_be() -> None:
    words = microvm_argv(replace(CLONE, descriptors=Descriptors(agent=31, ram=32, qmp=33)))
    assert "socket,id=agent,fd=31" in _option(words, "-chardev")
    assert "socket,id=qmp,fd=33" in _option(words, "-chardev")
    assert any("mem-path=/proc/self/fd/32," in word for word in _option(words, "-object"))


_Words = Callable[[], tuple[str, ...]]


@pytest.mark.parametrize("make", [lambda: microvm_argv(BOOT), lambda: pc.pc_argv(PC)])
def test_the_functions_are_pure(make: _Words) -> None:
    assert make() == make()
