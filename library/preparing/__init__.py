"""Pictures before they are a dataset: resized, cropped, enlarged, unpacked, sorted out."""
