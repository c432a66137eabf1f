"""Mean and covariance of activations, from a stream, a model, a cache, one process or several."""
