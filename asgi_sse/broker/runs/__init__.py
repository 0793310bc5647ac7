"""Runs: sources that go on when their clients leave."""
