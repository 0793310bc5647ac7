"""Backends, which store the events of a broker: in memory, on Redis or on NATS."""
