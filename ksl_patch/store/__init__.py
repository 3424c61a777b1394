"""Where patches are kept."""
