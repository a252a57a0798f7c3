"""Benchmark of numeric precision: what half precision changes in a reduction."""
