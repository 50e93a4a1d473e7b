"""What the hooks and the optimizers share."""
