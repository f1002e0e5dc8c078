"""Samples as flat batches, in an order from which a run can stop and go on exactly."""
