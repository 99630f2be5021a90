"""Code that runs in Ray's processes: one Population in one Train run, and the test of chosen classifiers."""
