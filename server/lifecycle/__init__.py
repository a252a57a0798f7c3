"""Starting, draining, stopping and cleaning up server processes."""
