"""What was kept of an image, and where the rest went: the route, the page and the picture."""
