"""The command line and the HTTP endpoint."""
