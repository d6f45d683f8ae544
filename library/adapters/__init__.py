"""Adapter files of every kind as layers with a change of weight each, and what is made of them."""
