"""What an SAE and a whitening are worth: metrics as functions of tensors, and figures."""
