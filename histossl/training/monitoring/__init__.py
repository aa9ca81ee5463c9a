"""What is noticed while a run goes on: health of the features, the probe, log.jsonl."""
