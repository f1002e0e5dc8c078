"""Base and adapter a tensor at a time: read, merged, measured, and compared without the whole model in memory."""
