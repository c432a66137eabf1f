"""Which way of whitening recovers features that are known."""
