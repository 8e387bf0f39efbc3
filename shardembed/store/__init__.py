"""What an owner holds: rows, optimizer state, waiting gradients."""
