"""The command line and what belongs to the HTTP endpoint."""
