"""Images from their sources to cached features and pixels: the only importer of ray.data."""
