"""A batch of tiles becomes augmented views, on the device the model is on."""
