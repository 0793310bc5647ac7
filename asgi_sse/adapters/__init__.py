"""Response classes that web frameworks accept as their own, one module per framework.

Each module imports its own framework and no other.
"""
