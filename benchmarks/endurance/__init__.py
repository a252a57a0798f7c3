"""Thousands of mixed requests against a real server: none lost, none answered twice, nothing left behind."""
