"""Files: the path of every file, file systems (folders and buckets), and local copies of objects in a bucket."""
