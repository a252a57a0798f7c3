"""Many mixed requests against one engine that reduces in the decoder: every block comes back, memory stays."""
