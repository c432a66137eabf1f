"""What the latents of SAEs stand for: measured on a model, and shown on one HTML page."""
