"""Experiments with a known answer: synthetic activations, and the paper's 2-D landscape."""
