"""Adapter algorithms, one file each, and scripts that work on their files."""
