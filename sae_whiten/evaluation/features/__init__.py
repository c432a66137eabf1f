"""What the latents of SAEs respond to: measured on a model, and shown on one HTML page."""
