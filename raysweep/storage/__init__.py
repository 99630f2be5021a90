"""Where files are kept: every path, folders and buckets, and this node's copies of objects."""
