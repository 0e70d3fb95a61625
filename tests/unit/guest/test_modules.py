"""The modules that are loaded, and their order."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from isolat.errors import Unsupported
from isolat.guest import modules
from isolat.guest.kernel import Kernel
from tests.unit.guest.elves import module, module_tree


def names(paths: list[Path]) -> list[str]:
    return [modules.file_name(path) for path in paths]


def kernel(at: Path) -> Kernel:
    return Kernel("6.1", at / "vmlinux", at)


def test_a_module_comes_after_what_it_needs(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"virtio_mmio": "virtio,virtio_ring", "virtio_ring": "", "virtio": "virtio_ring"})
    found = modules.closure(kernel(tree), ["virtio_mmio"], [])
    assert names(found) == ["virtio_ring.ko", "virtio.ko", "virtio_mmio.ko"]


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"virtio-rng": ""})
    assert names(modules.closure(kernel(tree), ["virtio_rng"], [])) == ["virtio_rng.ko"]


def test_what_is_built_in_needs_no_file(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"erofs": "libcrc32c"}, builtin=("fs/ext4/ext4", "lib/libcrc32c"))
    assert names(modules.closure(kernel(tree), ["erofs", "ext4"], ["virtio_pci"])) == ["erofs.ko"]


def test_a_kernel_that_lacks_something_is_refused_with_its_name(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"erofs": ""}, builtin=("ext4",))
    with pytest.raises(Unsupported, match="no overlay, which"):
        modules.closure(kernel(tree), ["erofs", "overlay", "ext4"], [])


def test_the_algorithm_that_a_module_asks_for_at_run_time_comes_first(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"erofs": "libcrc32c", "crc32c_generic": ""})
    (tree / "kernel" / "libcrc32c.ko").write_bytes(module("softdep=pre: crc32c post: other", "depends="))
    assert names(modules.closure(kernel(tree), ["erofs"], [])) == ["crc32c_generic.ko", "libcrc32c.ko", "erofs.ko"]


def test_a_cycle_ends(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"a": "b", "b": "a"})
    assert names(modules.closure(kernel(tree), ["a"], [])) == ["b.ko", "a.ko"]


def test_compressed_modules_are_read(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"virtio": ""})
    (tree / "kernel" / "overlay.ko.xz").write_bytes(lzma.compress(module("depends=virtio")))
    assert names(modules.closure(kernel(tree), ["overlay"], [])) == ["virtio.ko", "overlay.ko"]


def test_a_kernel_without_modules_has_everything_built_in() -> None:
    assert modules.closure(Kernel("6.1", Path("vmlinux"), None)) == []


def test_a_pruned_directory_has_the_same_closure(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"a": "b", "b": "", "c": "", "net/d": ""})
    before = modules.closure(kernel(tree), ["a"], [])
    modules.prune(tree, before)
    assert modules.closure(kernel(tree), ["a"], []) == before
    assert sorted(path.name for path in tree.rglob("*")) == ["a.ko", "b.ko", "kept", "kernel", "modules.builtin"]


@pytest.mark.parametrize("data", [b"", b"\x7fELF", bytes(200), b"\x7fELF" + b"\xff" * 200])
def test_what_is_no_module_is_told_apart(data: bytes) -> None:
    with pytest.raises(ValueError, match="module"):
        modules.module_info(data)


def _whole(at: Path, more: dict[str, str], builtin: tuple[str, ...] = ()) -> Kernel:
    return kernel(module_tree(at, {"erofs": "", **more}, (*(set(modules.REQUIRED) - {"erofs"}), *builtin)))


def test_what_live_volumes_need_comes_beside_what_is_always_loaded(tmp_path: Path) -> None:
    found = modules.live(_whole(tmp_path, {"virtiofs": "fuse,erofs", "fuse": ""}))
    assert found is not None and names(found) == ["fuse.ko", "virtiofs.ko"]


def test_built_in_it_needs_no_file_and_a_kernel_without_it_is_told_apart(tmp_path: Path) -> None:
    assert modules.live(_whole(tmp_path / "in", {}, ("virtiofs",))) == []
    assert modules.live(_whole(tmp_path / "out", {"fuse": ""})) is None
    assert modules.live(Kernel("6.1", Path("vmlinux"), None)) == []


def test_a_directory_that_was_pruned_for_less_is_told_apart(tmp_path: Path) -> None:
    tree = module_tree(tmp_path, {"a": ""})
    assert not modules.is_pruned_for_this(tree)
    modules.prune(tree, [])
    assert modules.is_pruned_for_this(tree)
    (tree / "kept").write_text("erofs\n")
    assert not modules.is_pruned_for_this(tree)
