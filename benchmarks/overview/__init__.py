"""The README's results: one table and two pictures out of the committed JSON."""
