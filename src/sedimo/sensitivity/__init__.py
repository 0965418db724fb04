"""What each choice costs, by several methods."""
