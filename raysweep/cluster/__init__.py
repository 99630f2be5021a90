"""Starting Ray, its nodes and their resources, and the package that is sent to a cluster with a job."""
