"""Mixed requests to a real server: none lost, none answered twice, nothing left behind."""
