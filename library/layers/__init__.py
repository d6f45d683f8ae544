"""How layers of a frozen model hold their weights and compute with them."""
