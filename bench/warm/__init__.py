"""What warm-ups gain, on real engines and in virtual time."""
