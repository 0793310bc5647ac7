"""Channels: publish once, encode once, and every subscriber reads with a cursor of its own."""

from .broker import Broker, Channel
from .subscription import Subscription

__all__ = ["Broker", "Channel", "Subscription"]
