"""What stops a run that would continue for nothing."""
