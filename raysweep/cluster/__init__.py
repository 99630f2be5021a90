"""Ray itself, the nodes and what fits on them, and what travels to a cluster with a job."""
