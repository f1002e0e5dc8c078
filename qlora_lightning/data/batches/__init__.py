"""Samples as flat batches, in an order from which a run can stop and resume exactly."""
