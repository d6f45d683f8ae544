"""Scripts around training; each is run by its path."""
