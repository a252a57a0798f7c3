"""Overload: a fixed budget queues without end, one that follows the load does not."""
