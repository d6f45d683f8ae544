"""What each training script does, from checked options to files: recipes over library.training."""
