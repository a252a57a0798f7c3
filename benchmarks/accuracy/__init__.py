"""Accuracy through the HTTP endpoint: methods by budgets, ablations, sensitivity."""
