"""Runs: sources that outlive their clients."""
