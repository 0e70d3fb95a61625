from __future__ import annotations

from tests.support.fixtures import fresh_root

__all__ = ["fresh_root"]
