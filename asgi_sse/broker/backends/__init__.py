"""Where a broker's events are kept: in memory, on Redis or on NATS."""
