"""What the reduction saves and costs, counted and published for Prometheus."""
