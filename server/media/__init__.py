"""Loading the images of requests within the operator's limits."""
