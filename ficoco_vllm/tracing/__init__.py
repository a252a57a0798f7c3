"""Traces of reductions: recorded in the worker, fetched by the server, and chained over the layers."""
