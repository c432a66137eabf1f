"""Where the latents of SAEs lie, and how often they fire."""
