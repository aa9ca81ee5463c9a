"""What is trained on features of a few labelled items, or with the backbone; the folder of a saved model."""
