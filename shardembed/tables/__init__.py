"""What is decided before anything moves: tables, their start, their cuts, the plan."""
