"""What a trained model says about batches, here or on other hosts: validation and predictions."""
