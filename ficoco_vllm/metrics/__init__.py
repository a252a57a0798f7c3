"""Prometheus metrics of the reduction's savings and costs."""
