"""Whether a plan computes what one process computes: forward, backward and steps, tensor by tensor."""
