"""Samples as packed batches, in an order that lets a run stop and resume exactly."""
