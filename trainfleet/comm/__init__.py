"""Peers in step that exchange arrays: over torch.distributed, or over threads of one process."""
