"""Traces of reductions: recorded in the worker, fetched by the server, chained over the layers."""
