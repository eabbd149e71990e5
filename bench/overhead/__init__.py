"""What a call costs more through orla_lg."""
