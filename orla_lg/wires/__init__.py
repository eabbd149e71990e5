"""What the bytes of each API mean that models are called by: one module for each, ``wire`` says what they share."""
