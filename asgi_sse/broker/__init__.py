"""Channels with replay: publish an event once, and each subscriber reads it from a log at its own speed."""

from .backends.base import BrokerStatistics
from .broker import Broker
from .channel import Channel
from .endpoint import Access
from .publishing import publish
from .runs.run import Run
from .subscription import Subscription

__all__ = ["Access", "Broker", "BrokerStatistics", "Channel", "Run", "Subscription", "publish"]
