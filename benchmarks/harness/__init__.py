"""Shared parts of the benchmarks: engines, servers, model folders, an HTTP client, results with their bars, plots."""
