"""Which whitening recovers known features best, on synthetic activations."""
