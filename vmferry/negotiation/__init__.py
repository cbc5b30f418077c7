"""What stands between a machine and a destination, decided from facts alone. Pure."""
