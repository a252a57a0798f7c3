"""Training and measuring the bundled demo model."""
