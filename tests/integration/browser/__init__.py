"""Tests with a real browser. A package, so that one of them serves all modules and is gone before other tests."""
