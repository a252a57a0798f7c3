"""Explanations of a reduction, the kept patches and the destinations of the others: route, page and picture."""
