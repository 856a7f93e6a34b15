"""Loss functions: pure functions of tensors, the equation beside the lines."""
