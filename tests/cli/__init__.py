"""Tests of the commands. A package, so that one running hub serves all modules of a worker."""
