"""Captions and tags of pictures: made by models, cleaned by rules, gathered in metadata files."""
