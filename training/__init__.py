"""What train_reference.py needs around its loop: data, model, losses, checkpoints, reports."""
