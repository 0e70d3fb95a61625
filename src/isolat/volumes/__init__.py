"""Volumes of environments that share no file system with this machine: copied in, and what has changed copied back.

``archive`` is the format, ``incoming`` and ``outgoing`` the two ways, both by open directories and never by path;
``worker`` does either as the caller, in a process of its own; ``transfer`` is what the engine calls.
"""
