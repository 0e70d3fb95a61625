from __future__ import annotations

from tests.support.fixtures import fresh_root, root, session_root

__all__ = ["fresh_root", "root", "session_root"]
