"""Prometheus metrics of what the reduction saves and costs."""
