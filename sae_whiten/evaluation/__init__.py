"""Numbers about finished SAEs: reconstruction, the model's loss, probing."""
