"""The paper's simulation in two dimensions."""
