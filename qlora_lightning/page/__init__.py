"""What every HTML page of ours shares: its style, and that whatever comes from outside stays text. A leaf."""
