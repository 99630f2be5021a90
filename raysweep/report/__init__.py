"""What people look at: the report of a sweep, made from its folder alone."""
