"""Benchmarks: each is one command, ends with its bars, and writes its JSON."""
