"""What became of the rows: samples in flat arrays, kept in the cache, with a report."""
