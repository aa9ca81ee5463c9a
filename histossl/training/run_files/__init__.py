"""What a run leaves on disk: checkpoints, the exported backbone, and whose directory it is."""
