"""Soak tests: thousands of mixed requests to a server, or to one engine, that must leave nothing behind."""
