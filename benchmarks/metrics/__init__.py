"""The cost of counting, and a picture of the dashboard from a real run."""
