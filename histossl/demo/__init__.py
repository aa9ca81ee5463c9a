"""An archive that is painted, and taken through every stage: what a new install can show without a download."""
