"""Layers: modules with a hand-written backward, tensor and sequence parallel where that means something."""
