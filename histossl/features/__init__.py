"""Starts: what gives a bag of features per slide, and extraction.

A start is random, ImageNet or adapted weights, a weights file, or colour statistics.

Out: one HDF5 file per slide with features (N, D) and coords (N, 2).
"""
