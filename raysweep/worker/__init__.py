"""Inside Ray's processes: one Population in one Train run, and the test of what was chosen."""
