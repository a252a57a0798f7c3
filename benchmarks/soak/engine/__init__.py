"""Mixed requests to one engine that reduces in the decoder: every block comes back, memory does not grow."""
