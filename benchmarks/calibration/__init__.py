"""The smallest budget that is safe for a user's own images, without labels."""
