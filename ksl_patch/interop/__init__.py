"""Other formats: PEFT's adapters, and patches written into a checkpoint of their own."""
