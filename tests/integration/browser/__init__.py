"""Tests in a real browser. A package, so that one browser serves all modules and is closed before other tests run."""
