"""Checks that take minutes or a network: `check_*.py` are not collected, the targets of the Makefile name them."""
