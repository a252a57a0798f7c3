"""What the benchmarks share: engines, servers, model folders, an HTTP client, results with their bars, plots."""
