"""Losses as functions of their arguments: contrastive, prototypes, spreading."""
