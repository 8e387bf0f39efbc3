"""The tests; packages, so that rank processes can import a test module by its name."""
