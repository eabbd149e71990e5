"""What a streamed chunk costs more."""
