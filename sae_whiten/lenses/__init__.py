"""Further views of SAEs: norms of codes, maps of latents, known features, two dimensions."""
