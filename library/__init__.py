"""What the scripts share: options, datasets, model families, training."""
