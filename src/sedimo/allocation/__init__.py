"""The best recipe under a budget."""
