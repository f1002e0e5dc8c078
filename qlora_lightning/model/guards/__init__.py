"""What stops a run that would go on for nothing."""
