"""Other formats: PEFT's adapters."""
