"""What GPU code does on this machine's GPUs: `make gpu`, or python -m benchmarks.on_gpu."""
