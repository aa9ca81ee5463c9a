"""Parts that several methods share: projection heads, queue, EMA, BatchNorm over processes, masked ViTs."""
