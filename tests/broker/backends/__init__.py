"""Tests of the backends; a package, since it has a ``conftest.py``."""
