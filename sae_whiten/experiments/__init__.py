"""What makes data, trains and evaluates: SAEs on a model, and experiments with a known answer."""
