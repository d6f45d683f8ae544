"""From folders of pictures to batches. Needs no torch up to dataset.py."""
