"""Measuring: what a step costs, beside the peers that are installed."""
