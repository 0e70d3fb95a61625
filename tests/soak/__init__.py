"""The large sizes: run by ``make soak``, a small version of each by ``make test``."""
