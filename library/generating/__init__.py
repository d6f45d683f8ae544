"""Pictures from prompts with networks applied: single ones, grids, and what a run shows of itself."""
