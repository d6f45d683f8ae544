"""The loss, the loop, and what a run writes."""
