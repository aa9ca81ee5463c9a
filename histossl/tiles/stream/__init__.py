"""From the store to batches in memory: which tile is drawn when, read and decoded ahead of the loop."""
