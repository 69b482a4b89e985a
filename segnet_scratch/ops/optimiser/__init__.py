"""The update of the parameters, and the norm of their gradients."""
