"""What a checkpoint holds beside tensors, and how a run resumes exactly where it stopped."""
