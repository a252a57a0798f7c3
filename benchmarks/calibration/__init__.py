"""How small a budget may be on one's own images, found without labels."""
