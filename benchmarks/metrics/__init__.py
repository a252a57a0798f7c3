"""What counting costs: throughput with our metrics and without; and a picture of the dashboard from a real run."""
