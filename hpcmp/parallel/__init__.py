"""Parallelism over the model: pipeline schedules and their runner, data-parallel gradient buckets."""
