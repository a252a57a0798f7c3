"""A budget that follows the load: requests that name none get fewer visual tokens while the KV cache is short."""
