"""What a checkpoint holds beside tensors, and how a run goes on exactly where it stopped."""
