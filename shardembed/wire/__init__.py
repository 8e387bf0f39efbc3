"""How messages are laid out in bytes."""
