"""Vision towers that reduce their tokens between layers."""
