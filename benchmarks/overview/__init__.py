"""Generated tables and pictures of the README and docs/, from the committed results."""
