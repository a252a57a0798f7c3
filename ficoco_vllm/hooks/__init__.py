"""Changes to objects of vLLM and other libraries: each is listed in `table.py` and made by `wrapping.py`."""
