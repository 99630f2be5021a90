"""Images from their sources to cached features and pixels. The passes over them run in Ray Data."""
