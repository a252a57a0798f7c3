"""Which composition of stages loses least on the embedded benchmark: a search, and a test on questions it never saw."""
