"""Backbones: a timm model from ImageNet weights, a file, or random.

In: a timm name or a weights file. Out: the model, and a BackboneInfo with its size, normalisation and provenance.
"""
